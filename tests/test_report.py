"""`python eval.py report`: a run to look at, in whatever state it is and whatever its models wrote."""

import dataclasses
import functools
import html.parser
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from commands import printed, refusal
from toy_runs import results

import eval as evaluation
from teamtr_min.bench import report
from teamtr_min.config import Config
from teamtr_min.files import read_jsonl

pytest.importorskip("matplotlib", reason="the figures of a report need matplotlib")
from matplotlib.figure import Figure  # noqa: E402

HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>\u2028&amp;{{data}}\\ \"'"


@pytest.fixture
def mine(finished, tmp_path):
    ignored = shutil.ignore_patterns("checkpoints", "agents", "report*")
    return Path(shutil.copytree(finished, tmp_path / "mine", ignore=ignored))


class Page(html.parser.HTMLParser):
    """The elements of a page, what it would load, the data inside, and the knobs in its table."""

    def __init__(self, path: Path):
        super().__init__()
        self.source, self.tags, self.attributes = path.read_text(encoding="utf-8"), [], []
        self.feed(self.source)
        inside = re.search(r'<script type="application/json" id="data">(.*?)</script>', self.source, re.S)
        self.data = json.loads(inside[1])
        self.knobs = {knob[0] for knob in self.data["knobs"]}

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes


def page_of(run: Path) -> Page:
    report.run([str(run)])
    return Page(run / "report.html")


def test_what_is_drawn_and_printed_is_what_was_logged(mine, capsys):
    text, (summary, updates, stages) = printed(capsys, "report", "--team", str(mine)), results(mine)
    low, high = summary["accuracy_final_ci"]
    assert f"3 of 3 stages; held-out accuracy {summary['accuracy_start']:.3f} -> " in text
    assert f"{summary['accuracy_final']:.3f} [{low:.3f}, {high:.3f}]" in text
    record, (left, right) = report.read(mine), (Figure(), Figure())
    report.learning(left, record)
    (axes,) = left.axes
    for line, key in zip(axes.lines, ("return_mean", "accuracy")):
        assert list(line.get_ydata()) == [stage[key] for stage in stages]
    drawn = {}
    for dot, _, (bar,) in axes.containers:
        ((at, bottom), (_, top)) = bar.get_segments()[0]
        drawn[at] = dot.get_ydata()[0], [bottom, top]
    shown = (summary, "return_start"), (stages[1], "return_held_out"), (summary, "return_final")
    for at, (source, key) in zip((0, 2, 3), shown):
        assert drawn[at][0] == source[key] and drawn[at][1] == pytest.approx(source[f"{key}_ci"])
    report.trust_region(right, record)
    for j, pair in enumerate(zip(right.axes[0].lines[:6:2], right.axes[0].lines[1:6:2])):
        for line, key in zip(pair, ("kl_before", "kl_after")):
            assert list(line.get_ydata()) == [u[key] for u in updates if u["agent"] == j]
    assert set(right.axes[0].lines[6].get_ydata()) == {0.5}, "the radius"


def test_the_page_stands_alone_holds_every_transcript_and_shows_what_was_asked_for(mine):
    page = page_of(mine)
    loads = [value for name, value in page.attributes if name in ("src", "srcset", "href")]
    assert len(loads) == 2 and all(v.startswith("data:image/png;base64,iVBOR") for v in loads)
    assert "link" not in page.tags and "iframe" not in page.tags
    assert not re.search(r"https?:|url\(|@import|\{\{", page.source)
    assert "default-src 'none'; img-src data:" in page.source
    transcripts = [line for _, line in read_jsonl(mine / "transcripts.jsonl")]
    assert page.data["transcripts"] == transcripts and len(transcripts) > 8
    assert [role["name"] for role in page.data["roles"]] == ["A", "B", "C"]
    toy = set("stages problems group inner_steps eval_problems eval_every lr delta device out".split())
    assert page.knobs == toy
    dataclasses.replace(Config(lora_rank=16, agents=5, min_ess=0.7), batch_rows=7).save(mine / "config.json")
    assert page_of(mine).knobs == {"occupancy", "min_ess"}, "a preset of its kind has ten times the rate"


def test_hostile_text_stays_text(mine):
    before = page_of(mine)
    record = before.data["transcripts"][0] | {"messages": [{"agent": 0, "text": HOSTILE}]}
    with (mine / "transcripts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record | {"text": HOSTILE, "answer": HOSTILE}, ensure_ascii=False) + "\n")
    changes = {"fields": HOSTILE, "task": f"{HOSTILE}.py", "model": "relay"}
    dataclasses.replace(Config.load(mine / "config.json"), **changes).save(mine / "config.json")
    page = page_of(mine.rename(mine.with_name("<img src=x>")))
    assert page.tags == before.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.source.count("</script>") == 2 and page.source.count("<script") == 2
    assert page.data["transcripts"][-1]["messages"][0]["text"] == HOSTILE


def test_a_run_that_was_stopped_or_killed_has_a_report(stopped, mine):
    result = report.run([str(shutil.copytree(stopped, mine.with_name("stopped")))])
    assert result["state"] == "2 of 3 stages; not finished: interrupted"
    *whole, last, _ = (mine / "metrics.jsonl").read_text().splitlines(keepends=True)[:7]
    (mine / "metrics.jsonl").write_text("".join(whole) + last[:50])
    (mine / "summary.json").unlink()
    state = report.run([str(mine)])["state"]
    assert state == "1 of 3 stages; not finished: the run goes on, or was killed"


def test_what_is_no_run_is_a_sentence_and_without_a_name_the_newest_is_taken(mine, capsys, monkeypatch):
    monkeypatch.chdir(mine.parent)
    refused = functools.partial(refusal, capsys, evaluation.main, "report")
    assert "no run under runs/" in refused()
    assert "config.json" in refused("--team", str(mine.parent))
    for name in ("newer", "older"):
        shutil.copytree(mine, f"runs/{name}")
    os.utime("runs/older/metrics.jsonl", (0, 0))
    assert report.run([])["team"] == "runs/newer"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "figures need matplotlib: pip install matplotlib" in refused("--team", str(mine))
    assert not (mine / "report.html").exists()
    (mine / "metrics.jsonl").write_text("")
    assert "no update in its metrics.jsonl yet" in refused("--team", str(mine))
