"""`python eval.py report`: a run to look at, whatever state it is in and whatever its models wrote."""

import dataclasses
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
from teamtr_min.run.metrics import violation_rate

import eval as evaluation
import train
from teamtr_min.bench import plots, report
from teamtr_min.config import Config

pytest.importorskip("matplotlib", reason="the figures of a report need matplotlib")
from matplotlib.image import imread  # noqa: E402

TOY = ["--stages", "2", "--problems", "4", "--group", "4", "--inner-steps", "2", "--eval-problems", "32",
       "--device", "cpu"]  # fmt: skip
FIGURES = ("accuracy", "kl", "returns", "seconds")
HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>\u2028&amp;{{data}}\\ \"'"


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "toy"
    assert train.main([*TOY, "--agents", "2", "--eval-every", "1", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def toy_page(toy_run):
    report.run(str(toy_run))
    return Page(toy_run / "report.html")


@pytest.fixture
def copy(toy_run, tmp_path):
    ignored = shutil.ignore_patterns("checkpoints", "agents", "report*")
    return Path(shutil.copytree(toy_run, tmp_path / "copy", ignore=ignored))


def complaint(run: Path, capsys) -> str:
    """What `eval.py report` says of a run that it cannot report on."""
    capsys.readouterr()
    assert evaluation.main(["report", "--team", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


class Page(html.parser.HTMLParser):
    """The elements of a page, what it would load, and the data inside."""

    def __init__(self, path: Path):
        super().__init__()
        self.source, self.tags, self.attributes = path.read_text(encoding="utf-8"), [], []
        self.feed(self.source)
        inside = re.search(r'<script type="application/json" id="data">(.*?)</script>', self.source, re.S)
        self.data = json.loads(inside[1])

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]


def test_figures_and_page_are_written_and_the_headline_is_the_runs(toy_run, capsys):
    assert evaluation.main(["report", "--team", str(toy_run), "--json"]) == 0
    result, summary = json.loads(capsys.readouterr().out), json.loads((toy_run / "summary.json").read_text())
    assert result["benchmark"] == "report" and result["report"] == str(toy_run / "report.html")
    assert result["figures"] == [str(toy_run / "report" / f"{name}.png") for name in FIGURES]
    for name in ("accuracy_start", "accuracy_final", "seconds", "stages", "rollouts", "tokens_sampled",
                 "tokens_trained", "violation_rate_before", "violation_rate_after", "stopped"):  # fmt: skip
        assert result[name] == summary[name], name
    for path in result["figures"]:
        image = imread(path)  # (height, width, RGBA)
        assert image.shape[1] == 1280 and 500 < image.shape[0] < 1000
        assert 0.01 < (image[:, :, :3].min(axis=2) < 0.9).mean() < 0.6  # neither blank nor black
    text = report.table(result)
    assert f"{summary['accuracy_start']:.3f} → {summary['accuracy_final']:.3f}" in text
    assert all(path in text for path in [result["report"], *result["figures"]])


def test_without_a_name_the_newest_run_is_reported(copy, capsys, monkeypatch):
    monkeypatch.chdir(copy.parent)
    assert evaluation.main(["report"]) == 2
    assert "no run under runs/" in capsys.readouterr().err
    for name in ("newer", "older"):
        shutil.copytree(copy, f"runs/{name}")
    os.utime("runs/older/metrics.jsonl", (0, 0))
    assert report.find_run(None) == Path("runs/newer")


@pytest.mark.parametrize("heights", [[0.98, 0.99], [0.0, 0.01], [0.5, 0.51, 0.52, 0.9], [1] * 5, [0.2, 0.7]])
def test_labels_neither_overlap_nor_leave_the_axes_nor_move_without_need(heights):
    found = plots.spread(heights, apart=0.2)
    assert min(b - a for a, b in pairwise(found)) > 0.199 and 0 <= found[0] < found[-1] <= 1
    assert heights != [0.2, 0.7] or found == heights


def test_the_page_stands_alone(toy_page):
    loads = [value for name, value in toy_page.attributes if name in ("src", "srcset", "href")]
    assert len(loads) == 2 * len(FIGURES)  # on light and on dark paper
    assert all(value.startswith("data:image/png;base64,iVBOR") for value in loads)
    assert "link" not in toy_page.tags and "iframe" not in toy_page.tags
    assert not re.search(r"https?:|url\(|@import|\{\{", toy_page.source)
    assert "default-src 'none'; img-src data:" in toy_page.source


def test_every_transcript_is_in_the_page_as_it_was_logged(toy_run, toy_page):
    logged = lines(toy_run / "transcripts.jsonl")
    assert toy_page.data["transcripts"] == logged and len(logged) > 8
    assert toy_page.data["names"] == ["A", "B"]


def make_hostile(copy: Path) -> Page:
    """The page of a run whose every text tries to break out; the transcript is the only one of stage 7."""
    record = lines(copy / "transcripts.jsonl")[0] | {"stage": 7, "return": 0.0, "split": "train"}
    record |= {"text": HOSTILE, "answer": HOSTILE, "messages": [{"agent": 0, "text": HOSTILE}]}
    with (copy / "transcripts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
    config = Config.load(copy / "config.json")
    changes = {"answer_field": HOSTILE, "model": "relay,relay"}  # one model per agent
    dataclasses.replace(config, **changes).save(copy / "config.json")
    copy = copy.rename(copy.with_name("<img src=x>"))
    report.run(str(copy))
    return Page(copy / "report.html")


def test_hostile_text_stays_text(toy_page, copy):
    page = make_hostile(copy)
    count = {tag: page.tags.count(tag) for tag in {*page.tags, *toy_page.tags} - {"b", "span"}}
    assert count == {tag: toy_page.tags.count(tag) for tag in count}  # b and span: changed knobs are bold
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.source.count("</script>") == 2 and page.source.count("<script") == 2
    assert page.data["transcripts"][-1]["messages"][0]["text"] == HOSTILE


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here to run the page's script")
def test_the_address_chooses_the_transcript_in_a_browser(copy, tmp_path):
    make_hostile(copy)
    path = tmp_path / "<img src=x>" / "report.html"

    def shown(address: str) -> str:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                   "--virtual-time-budget=2000", f"--user-data-dir={tmp_path / 'browser'}"]  # fmt: skip
        url = path.as_uri() + address
        done = subprocess.run([*command, url], capture_output=True, text=True, timeout=60)
        return done.stdout[done.stdout.index('<form id="filter">') : done.stdout.index("<h2>Configuration")]

    dom = shown("#stage=7&only=wrong")
    assert "1 of 1" in dom and "training problem, after 7 stages" in dom and "<b>A</b>" in dom
    assert "&lt;/script&gt;&lt;img src=x" in dom and "<img" not in dom
    press = '<script>dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }))</script>'
    path.write_text(path.read_text() + press)
    assert "No transcript is like that" in shown("#stage=7&only=right")
    assert "2 of 4" in (dom := shown("#split=train&stage=1")) and "after 1 stage<" in dom


def test_a_run_that_was_interrupted_has_a_report(tmp_path, monkeypatch):
    calls, update = [], train.update

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(train, "update", interrupted)
    out = tmp_path / "run"
    assert train.main([*TOY, "--agents", "2", "--out", str(out)]) == 130
    result = report.run(str(out))
    assert result["stages"] == 1 and result["stopped"] == "interrupted" and result["accuracy_final"] is None
    assert result["rollouts"] == 3 * 16 and result["seconds"] > 0
    page = Page(out / "report.html").source
    assert "1 of 2 stages; not finished: interrupted" in page and "at the start" in page


def test_a_run_that_was_killed_in_mid_write_has_a_report(copy):
    """The cut-off last line is left out, and a summary from before the kill is not believed."""
    metrics, transcripts = (copy / "metrics.jsonl").read_text(), (copy / "transcripts.jsonl").read_text()
    whole = metrics.splitlines(keepends=True)
    (copy / "transcripts.jsonl").write_text(transcripts[:-20])
    (copy / "metrics.jsonl").write_text("".join(whole[:4]) + whole[4][:50])
    result = report.run(str(copy))
    assert result["damaged"] == ["metrics.jsonl", "transcripts.jsonl"]
    assert result["transcripts"] == transcripts.count("\n") - 1
    assert result["accuracy_start"] is not None and result["accuracy_final"] is None
    assert "killed" in result["stopped"] and result["stages"] == 1
    updates = [u for u in map(json.loads, whole[:4]) if u["kind"] == "update"]
    assert result["violation_rate_before"] == violation_rate(updates, "kl_before")
    assert "the last line of metrics.jsonl was cut off" in Page(copy / "report.html").source


def test_agents_that_took_no_turn_no_radius_and_a_single_stage_are_drawn(tmp_path):
    router = tmp_path / "router.py"
    router.write_text("def router(turn, messages, agents, uniform):\n    return 2 * (turn % 2)\n")
    out = tmp_path / "run"
    flags = [*TOY, "--agents", "5", "--router", str(router), "--delta", "inf", "--stages", "1"]
    assert train.main([*flags, "--out", str(out)]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of a layout that does not fit
        result = report.run(str(out))
    assert result["delta"] is None and "radius" not in " ".join(report.tiles(result))
    assert imread(result["figures"][1]).shape[0] > imread(result["figures"][0]).shape[0]  # two rows of panels


def test_what_is_no_run_is_a_sentence(copy, tmp_path, capsys, monkeypatch):
    assert f"is {tmp_path} the directory of a run?" in complaint(tmp_path, capsys)
    metrics = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(metrics.replace("{", "", 1))
    assert "metrics.jsonl, line 1: not a line that a run writes" in complaint(copy, capsys)
    (copy / "metrics.jsonl").write_text(metrics.replace('"halvings"', '"halves"', 1))
    assert "metrics.jsonl, line 1: no halvings" in complaint(copy, capsys)
    (copy / "metrics.jsonl").write_text("")
    assert "no update in its metrics.jsonl yet" in complaint(copy, capsys)
    (copy / "metrics.jsonl").unlink()
    assert "metrics.jsonl: No such file" in complaint(copy, capsys)
    (copy / "metrics.jsonl").write_text(metrics)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "figures need matplotlib: pip install matplotlib" in complaint(copy, capsys)
    assert not (copy / "report").exists() and not (copy / "report.html").exists()


def test_transcripts_are_coloured_on_a_terminal_alone(capsys, monkeypatch):
    def printed() -> str:
        assert evaluation.main(["--agents", "2", "--problems", "8", "--device", "cpu", "--again"]) == 0
        return capsys.readouterr().out

    plain = printed()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = printed()
    assert "\033" not in plain and "\033[36mA\033[0m: " in coloured
    assert "\033[31mwrong" in coloured or "\033[32mright" in coloured
    bare = re.sub("\033\\[[0-9]+m", "", coloured)
    assert bare.partition("\n\n")[2] == plain.partition("\n\n")[2]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in printed()
