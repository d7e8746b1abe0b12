"""Links, flags, sizes and programs of the documentation."""

import dataclasses
import importlib
import re
import runpy
from pathlib import Path

import pytest
import torch
from ready import Prepared
from tiny import random_model, write_checkpoint, write_tokenizer
from toy_runs import lines

from teamtr_min.config import Config
from teamtr_min.engine import rng

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


@pytest.mark.parametrize("delta", [0.02, 1.2e-6])
def test_the_first_update_of_minimal_py_is_that_of_train_py(delta, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    minimal = importlib.import_module("minimal")
    ready = Prepared(agents=2, rounds=2, problems=6, group=4, lr=5e-6, delta=delta, temperature=0.8)
    team = minimal.Minimal(ready.config)
    problems = [p for p in ready.rollouts.problems[:: ready.config.group]]
    rollouts, returns = team.collect(problems, rng.RngPath(0, "train", 0, 0))
    for own, row in zip(rollouts, ready.rollouts.messages, strict=True):
        assert [(m.tokens, m.text, m.stopped) for m in own] == [(m.tokens, m.text, m.stopped) for m in row]
    assert torch.equal(returns, ready.rollouts.returns)
    advantages = minimal.group_advantages(returns.view(-1, ready.config.group)).flatten()
    assert torch.allclose(advantages, ready.advantages, atol=1e-6)
    before = [p.clone() for p in team.models[0].parameters()]
    outcome, update = team.update(0, problems, rollouts, advantages), ready.update()
    assert (outcome["steps"], outcome["halvings"]) == (update.steps, update.halvings)
    assert (update.halvings > 0) == (delta < 1e-5)
    assert outcome["kl"] == pytest.approx(update.kept["kl"], rel=1e-2)
    ours, theirs = (torch.cat([p.flatten() for p in m.parameters()]) for m in (team.models[0], ready.model))
    moved = (theirs - torch.cat([p.flatten() for p in before])).norm()
    assert (ours - theirs).abs().max() < 1e-5 and (ours - theirs).norm() < 5e-3 * moved
    assert team.betas[0] == ready.learner.beta
    assert len((ROOT / "docs/minimal.py").read_text().splitlines()) <= 200


def test_the_program_for_python_trains_a_team_that_answers(capsys, monkeypatch, tmp_path):
    program = re.search(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    small = program[1].replace("stages=20", "stages=1, problems=4, eval_problems=16, device='cpu'")
    Path("program.py").write_text(small)
    runpy.run_path("program.py")
    assert (out := capsys.readouterr().out).count("answer: ") == 3 and "\n5*3-4" in out
