"""A run that was stopped goes on to the same bits, or says in a sentence why it cannot."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from campaign import campaign, cut, flip_a_bit
from commands import interrupt_at, refusal
from conftest import SHARED
from toy_runs import TOY, bits, run

import train
from teamtr_min.config import Config
from teamtr_min.learner import Diverged, Learner
from teamtr_min.run import checkpoint
from teamtr_min.run.loading import build_team
from teamtr_min.tasks import Relay


def content(directory: Path) -> dict:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_killed_and_damaged_at_random_moments_a_run_resumes_to_the_same_bits():
    assert campaign(seed=0, least=4) >= 4


def test_ctrl_c_leaves_agents_a_summary_and_a_run_that_resumes_to_the_same_bits(finished, copy, capsys):
    summary = json.loads((copy / "summary.json").read_text())
    assert summary["reason"] == summary["stopped"] == "interrupted" and summary["stages"] == 2
    assert summary["accuracy_start"] is not None and summary["accuracy_final"] is None
    assert (copy / "agents" / "2" / "model.safetensors").is_file()
    assert train.main(["--resume", str(copy)]) == 0
    assert "resumed after 2 of 3 stages" in capsys.readouterr().out
    assert bits(copy) == bits(finished)


@pytest.mark.parametrize("moment", [(2, train, "group_advantages"), (1, checkpoint, "save_file")])
def test_stopped_before_its_first_checkpoint_a_run_starts_again(finished, tmp_path, monkeypatch, moment):
    call, module, name = moment
    with monkeypatch.context() as patch:
        interrupt_at(call, patch, module, name)
        assert train.main([*TOY, *SHARED, "--out", str(tmp_path / "run")]) == 130
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert bits(tmp_path / "run") == bits(finished)


@pytest.mark.parametrize("file", ["learner-0.safetensors", "state.json", "SHA256.json"])
@pytest.mark.parametrize("damage", [cut, flip_a_bit, Path.unlink])
def test_a_damaged_checkpoint_is_passed_over_with_a_line(finished, copy, capsys, file, damage):
    damage(copy / "checkpoints" / "000002" / file)
    assert train.main(["--resume", str(copy)]) == 0
    text = capsys.readouterr().out
    assert "000002 is damaged; trying the one before" in text and "resumed after 1 of 3 stages" in text
    assert bits(copy) == bits(finished)


def test_the_newest_two_checkpoints_stay_whole_and_nothing_else_does(finished, stopped):
    for out, names in ((finished, ["000002", "000003"]), (stopped, ["000001", "000002"])):
        checkpoints = sorted((out / "checkpoints").iterdir())
        assert [path.name for path in checkpoints] == names and all(map(checkpoint._undamaged, checkpoints))
        assert {p.suffix for p in out.rglob("*") if p.is_file()} == {".json", ".jsonl", ".safetensors"}


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda out: [cut(s) for s in out.glob("checkpoints/*/state.json")], "every checkpoint under"),
        (lambda out: shutil.rmtree(out / "checkpoints"), "has finished 2 stages but has no checkpoints"),
        (lambda out: cut(out / "metrics.jsonl"), "metrics.jsonl was cut short"),
        (lambda out: cut(out / "transcripts.jsonl"), "transcripts.jsonl was cut short"),
        (lambda out: cut(out / "config.json"), "is not the configuration of a run"),
    ],
)
def test_where_nothing_can_be_resumed_nothing_is_touched(copy, capsys, spoil, sentence):
    spoil(copy)
    before = content(copy)
    assert sentence in refusal(capsys, train.main, "--resume", str(copy))
    assert content(copy) == before


def test_a_resume_with_other_flags_names_what_differs(stopped, capsys):
    flags = ["--resume", str(stopped), "--lr", "0.1", "--agents", "3", "--order", "random"]
    sentence = refusal(capsys, train.main, *flags)
    assert "--lr 0.1 (the run has 0.003), --order random (the run has fixed)" in sentence
    assert "--agents" not in sentence


def test_a_resume_of_nothing_says_so(tmp_path, capsys):
    assert "nowhere" in refusal(capsys, train.main, "--resume", str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


# What a run rests on

TASK = """
from teamtr_min.tasks import Relay
class Mine(Relay):
    def grade(self, problem, messages):
        return 0.5 * super().grade(problem, messages)
def task(config):
    return Mine(config)
"""


@pytest.mark.parametrize("changed", ["task", "roles"])
def test_a_resume_names_what_has_changed_and_goes_on_only_if_told_to(tmp_path, capsys, monkeypatch, changed):
    monkeypatch.chdir(tmp_path)
    roles = [{"name": name, "system": ""} for name in "ABC"]
    Path("mine.py").write_text(TASK)
    Path("roles.json").write_text(json.dumps(roles))
    run(Path("run"), "--task", "mine.py", "--roles", "roles.json", "--stages", "1")
    assert train.main(["--resume", "run"]) == 0
    if changed == "task":
        Path("mine.py").write_text(TASK.replace("0.5", "0.9"))
    else:
        Path("roles.json").write_text(json.dumps([*roles[:2], {"name": "D", "system": ""}]))
    before = content(Path("run"))
    sentence = refusal(capsys, train.main, "--resume", "run")
    assert f"{changed} file" in sentence
    assert ("prompts of agent 0" in sentence) == (changed == "roles")
    assert "--accept-changes" in sentence and content(Path("run")) == before
    assert train.main(["--resume", "run", "--accept-changes"]) == 0
    assert train.main(["--resume", "run"]) == 0, "what was accepted is what the run rests on from then on"
    Path("mine.py").write_text(TASK.replace("0.5", "0.7"))
    assert "task file" in refusal(capsys, train.main, "--resume", "run"), "and nothing else"


def test_a_chat_template_that_has_changed_is_named(copy, capsys):
    config = json.loads((copy / "config.json").read_text())
    config["fingerprint"]["prompts of agent 1 (template, roles, date)"] = "another"
    (copy / "config.json").write_text(json.dumps(config))
    sentence = refusal(capsys, train.main, "--resume", str(copy))
    assert "than when it began: prompts of agent 1 (template, roles, date); put them back" in sentence


# One writer, and disks that refuse


def test_a_run_has_one_writer(finished, copy, capsys):
    before = content(copy)
    with (copy / "metrics.jsonl").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "is being written by another process" in refusal(capsys, train.main, "--resume", str(copy))
        assert content(copy) == before
    assert train.main(["--resume", str(copy)]) == 0
    assert bits(copy) == bits(finished)


def test_of_two_runs_that_begin_in_one_directory_the_second_changes_nothing(tmp_path, capsys):
    """The first has only taken its lock by then, the moment before it writes config.json."""
    out = tmp_path / "run"
    out.mkdir()
    with (out / "metrics.jsonl").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "is being written by another" in refusal(capsys, train.main, *TOY, "--out", str(out))
        assert content(out) == {out / "metrics.jsonl": b""}
    run(out, "--stages", "1")  # its lock went with it


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("modules", [["hf.weights"], ["hf.weights", "run.checkpoint"]])
def test_a_disk_that_refuses_is_a_sentence_and_the_run_resumes(
    finished, copy, capsys, monkeypatch, modules, fault
):
    """At the end of the run, or at the end of a stage, when the agents cannot be saved either."""

    def refuse(tensors, path, **metadata):
        Path(path).write_bytes(b"half a file")
        raise OSError(fault, os.strerror(fault))

    with monkeypatch.context() as patch:
        for module in modules:
            patch.setattr(f"teamtr_min.{module}.save_file", refuse)
        assert os.strerror(fault) in refusal(capsys, train.main, "--resume", str(copy))
    assert sorted(p.name for p in (copy / "checkpoints").iterdir())[0] in ("000001", "000002")
    assert not list(copy.rglob("*.part"))
    assert train.main(["--resume", str(copy)]) == 0
    assert bits(copy) == bits(finished)


# Tensors


def test_adam_and_beta_come_back_to_the_bit(tmp_path):
    torch.manual_seed(0)

    def learners() -> list[Learner]:
        configs = [Config(agents=1, device="cpu", dtype=dtype) for dtype in ("fp32", "bf16")]
        return [Learner(build_team(config, Relay(config)), [0], 0.01) for config in configs]

    saved, loaded = learners(), learners()
    for learner in saved:
        for p in learner.masters:
            p.grad = torch.randn_like(p)
        learner.step(1e-3)
        learner.beta = 0.3
    checkpoint.save(tmp_path, 1, saved, {"seconds": 7})
    assert checkpoint.load(tmp_path, loaded) == {"seconds": 7}
    for a, b in zip(saved, loaded):
        assert a.beta == b.beta and all(map(torch.equal, a.parameters, b.parameters))
        one, two = a.snapshot(), b.snapshot()
        assert all(map(torch.equal, one.masters, two.masters))
        for s, t in zip(one.state, two.state):
            assert s and s.keys() == t.keys() and all(torch.equal(s[name], t[name]) for name in s)
    with torch.no_grad():
        saved[1].masters[0].view(-1)[0] = torch.nan
    with pytest.raises(Diverged):
        checkpoint.save(tmp_path, 2, saved, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000001"]
