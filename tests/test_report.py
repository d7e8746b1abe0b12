"""Runs to look at, one or several, in whatever state they are and whatever their models wrote."""

import csv
import dataclasses
import functools
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toy_runs import evaluate, printed, refused, results, run

import eval as evaluation
import train
from teamtr_min.bench import report
from teamtr_min.config import Config
from teamtr_min.files import read_json, read_jsonl, write_json
from teamtr_min.run import figures

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
    assert "{:.3f} [{:.3f}, {:.3f}]".format(summary["accuracy_final"], *summary["accuracy_final_ci"]) in text
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
    own = dataclasses.replace(Config(lora_rank=16, agents=5, occupancy="fresh"), batch_rows=7)
    own.save(mine / "config.json")
    assert page_of(mine).knobs == {"occupancy", "min_ess"}, "a preset of its kind has ten times the rate"


def test_hostile_text_stays_text(mine):
    before = page_of(mine)
    record = before.data["transcripts"][0] | {"messages": [{"agent": 0, "text": HOSTILE}]}
    with (mine / "transcripts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record | {"text": HOSTILE, "answer": HOSTILE}, ensure_ascii=False) + "\n")
    changes = {"fields": f"{HOSTILE},", "task": f"{HOSTILE}.py", "model": "relay"}
    dataclasses.replace(Config.load(mine / "config.json"), **changes).save(mine / "config.json")
    page = page_of(mine.rename(mine.with_name("<img src=x>")))
    assert page.tags == before.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.source.count("</script>") == 3 and page.source.count("<script") == 3
    assert page.data["transcripts"][-1]["messages"][0]["text"] == HOSTILE


def test_a_run_that_was_stopped_has_a_report(copy):
    result = report.run([str(copy)])
    assert result["state"] == "2 of 3 stages; not finished: interrupted"


def test_what_is_no_run_is_a_sentence_and_without_a_name_the_newest_is_taken(mine, capsys, monkeypatch):
    monkeypatch.chdir(mine.parent)
    told = functools.partial(refused, capsys, evaluation.main, "report")
    assert "no run under runs/" in told()
    assert "config.json" in told("--team", str(mine.parent))
    for name in ("newer", "older"):
        shutil.copytree(mine, f"runs/{name}")
    os.utime("runs/older/metrics.jsonl", (0, 0))
    assert report.run([])["team"] == "runs/newer"
    for inside in ("", "/deeper/page"):
        assert "mine/config.json" in told("--out", f"mine/config.json{inside}")
    (mine / "metrics.jsonl").write_text("")
    assert "no update in its metrics.jsonl yet" in told("--team", str(mine))


def drawn(path: Path) -> str:
    chromium = shutil.which("chromium") or pytest.skip("needs Chromium to run the script of a page")
    command = [chromium, "--headless=new", "--no-sandbox", "--virtual-time-budget=2000", "--dump-dom"]
    return subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120).stdout


def test_the_same_held_out_problems_are_kept_at_every_evaluation_and_shown_side_by_side(mine):
    path = mine / "transcripts.jsonl"
    lines = [line for _, line in read_jsonl(path) if line["split"] == "held-out"]
    kept = [[line["text"] for line in lines if line["stage"] == stage] for stage in range(4)]
    assert [*map(len, kept)] == [32, 4, 4, 32] and kept[0] == kept[3] and kept[1] == kept[2] == kept[0][::8]
    # problem -> return at the end less at the start
    gains = {0: 0.5, 3: 1.0, 4: 0.9, 6: 1.0, 9: -0.2, 11: -0.7}
    for line in lines:
        gain = gains.get(kept[0].index(line["text"]), 0)
        line |= {"return": max(gain if line["stage"] else -gain, 0), "id": line["text"]}
        line["messages"] = [{"agent": 0, "text": f"{HOSTILE} at {line['stage']}"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page_of(mine)
    shown = drawn(mine / "report.html")
    pairs = re.findall(r'<section class="pair">(.*?)</section>', shown, re.S)
    assert [re.search(r'"problem">(.*?)<', pair)[1] for pair in pairs] == [kept[0][i] for i in (3, 6, 4, 11)]
    assert all(" at 0<" in pair and " at 3<" in pair for pair in pairs) and "<img src=x" not in shown
    assert "32 held-out" in shown and "4 ended with a higher return, 2 with a lower one" in shown


def test_runs_side_by_side_are_grouped_by_all_but_their_seed(mine, capsys):
    """A run of two seeds, one of them killed in its third stage, and one with another radius."""
    killed, wide = (shutil.copytree(mine, mine.with_name(name)) for name in ("killed", "wide"))
    for directory, changes in ((killed, {"seed": 1}), (wide, {"delta": 0.1})):
        write_json(directory / "config.json", read_json(mine / "config.json") | {"out": "x"} | changes)
    log = (mine / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(log[:9]) + log[9][:40])
    (killed / "summary.json").unlink()
    (mine / "report.html").touch()
    result = evaluate(capsys, "report", "--team", f"{mine},{killed},{wide}", "--csv")
    assert [group["name"] for group in result["groups"]] == ["delta 0.5", "delta 0.1"]
    first, second = result["groups"][0]["runs"]
    summary, _, stages = results(mine)
    assert first["accuracy_final_ci"] == summary["accuracy_final_ci"]
    assert second["state"].startswith("2 of 3 stages; not finished") and "accuracy_final" not in second
    y = [summary["return_start"], *(s["return_held_out"] for s in stages[:2]), summary["return_final"]]
    seconds = [0, *(stage["seconds"] - stage["seconds_evaluation"] for stage in stages)]
    rollouts = [0, *(stage["rollouts_so_far"] for stage in stages)]
    assert [*first["curve"].values()] == [*map(list, zip(rollouts, seconds, y))]
    second["curve"]["1"][2] += 0.2  # else both are alike
    figure = Figure()
    report.curves(figure, (result["groups"], 0))
    mean = figure.axes[0].lines[2]
    assert list(mean.get_ydata()) == pytest.approx([y[0], y[1] + 0.1, y[2]]), "as far as both have come"
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert max(band[band[:, 0] == rollouts[1], 1]) == pytest.approx(y[1] + 0.2), "the standard error is 0.1"
    table = list(csv.DictReader((mine.parent / "stages.csv").open(newline="")))
    assert len(table) == 8 and float(table[0]["return_held_out_ci_1"]) == stages[0]["return_held_out_ci"][1]
    page = drawn(mine.parent / "compare.html")
    assert f'<a href="{mine.name}/report.html">' in page and page.count("<a ") == 1


def test_a_run_ends_with_a_picture_unless_there_is_none(tmp_path, capsys, monkeypatch, save_summary):
    monkeypatch.setattr(figures, "save_summary", save_summary)
    run(tmp_path / "one", "--stages", "1")
    assert (tmp_path / "one/summary.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run(tmp_path / "none", "--stages", "1")
    assert "no summary.png: figures need matplotlib" in capsys.readouterr().out
    assert not list((tmp_path / "none").glob("*png*"))


def test_tensorboard_has_each_number_of_metrics_once_in_a_resumed_run_too(copy):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write_json(copy / "config.json", read_json(copy / "config.json") | {"tensorboard": True})
    for _ in range(2):  # the second goes on from the end
        assert train.main(["--resume", str(copy)]) == 0
    read = events.EventAccumulator(str(copy / "tensorboard")).Reload()
    points = [(tag, e.step, e.value) for tag in read.Tags()["scalars"] for e in read.Scalars(tag)]
    found = {(tag, step): value for tag, step, value in points}
    assert len(points) == len(found) and ("evaluation/return_final", 3) in found
    for u in results(copy)[1]:
        assert found[f"kl_after/{u['agent']} {'ABC'[u['agent']]}", u["stage"]] == pytest.approx(u["kl_after"])
