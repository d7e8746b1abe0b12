"""Links, flags and sizes of the documentation."""

import dataclasses
import importlib
import re
import runpy
from pathlib import Path

import pytest
from tiny import random_model, write_checkpoint, write_tokenizer
from toy_runs import lines

from teamtr_min.config import Config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
EVAL = "team mode k seeds problems limit shots data json csv samples short web port jobs out help".split()
REPLACE = "resume agent model stages out align".split()
TORCHRUN = ["nproc-per-node"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_commands_name_flags_that_exist(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link
    known = {f.name.replace("_", "-") for f in dataclasses.fields(Config)} | {*EVAL, *REPLACE, *TORCHRUN}
    for line in re.findall(r"^.*(?:train|eval|replace)(?:\.py)? .*$", page.read_text(), re.MULTILINE):
        if line.lstrip().startswith(("python", "torchrun")):
            flags = re.findall(r"(?<![\w-])--([a-z][a-z-]*)", line)
            assert set(flags) <= known, line


def test_the_commands_of_your_own_data_run_one_after_the_other(half_right, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    write_tokenizer(write_checkpoint(tmp_path / "tiny", random_model("qwen2", vocab_size=262)))
    small = {"train": "--stages 1 --warm-start 1 --problems 2 --max-new-tokens 3", "eval": "--k 1"}
    page = (ROOT / "docs" / "your-data.md").read_text()
    for program, flags in re.findall(r"^python (train|eval)\.py (.*)$", page, re.MULTILINE):
        flags = f"{flags} {small[program]}".replace("HuggingFaceTB/SmolLM2-135M-Instruct", "tiny").split()
        assert importlib.import_module(program).main(flags) == 0, flags
    said = capsys.readouterr().out
    assert said.count("prompt  agent ") == 2 and "demonstrations.jsonl: " in said and "10 problems" in said


def test_the_documentation_can_be_read_in_an_evening():
    assert sum(len(page.read_text().split()) for page in ROOT.glob("docs/*.md")) <= 13300


def test_three_lines_of_pandas_draw_a_curve(finished, tmp_path):
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs/metrics.md").read_text(), re.DOTALL)[1]
    (tmp_path / "curve.py").write_text(code.replace("runs/NAME", str(finished)))
    drawn = list(runpy.run_path(str(tmp_path / "curve.py"))["curve"].lines[0].get_ydata())
    assert drawn == pytest.approx([stage["return_mean"] for stage in lines(finished, "stage")])
