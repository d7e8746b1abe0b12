"""A run that was stopped goes on to the same bits, or says in a sentence why it cannot."""

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
from campaign import campaign, cut, flip_a_bit
from conftest import SHARED
from safetensors import SafetensorError
from toy_runs import TOY, bits, contents, interrupt_at, refused, results, run

import train
from teamtr_min.config import Config
from teamtr_min.files import UserError
from teamtr_min.hf import weights as weights_module
from teamtr_min.run import checkpoint


def resume(out: Path, finished: Path) -> None:
    assert train.main(["--resume", str(out)]) == 0
    assert bits(out) == bits(finished)


def test_killed_and_damaged_at_random_moments_a_run_resumes_to_the_same_bits(tmp_path):
    campaign(tmp_path / "run", seed=0, kills=4)


def test_ctrl_c_leaves_agents_a_summary_and_a_run_that_resumes_to_the_same_bits(finished, copy, capsys):
    summary = results(copy)[0]
    assert summary["reason"] == summary["stopped"] == "interrupted" and summary["stages"] == 2
    assert summary["accuracy_start"] is not None and summary["accuracy_final"] is None
    assert (copy / "agents" / "2" / "model.safetensors").is_file()
    resume(copy, finished)
    assert "resumed after 2 of 3 stages" in capsys.readouterr().out


@pytest.mark.parametrize("place", [(2, train, "group_advantages"), (1, checkpoint, "save_tensors")])
def test_stopped_before_its_first_checkpoint_a_run_starts_again(finished, tmp_path, monkeypatch, place):
    with monkeypatch.context() as patch:
        interrupt_at(place[0], patch, *place[1:])
        assert train.main([*TOY, *SHARED, "--out", str(tmp_path / "run")]) == 130
    resume(tmp_path / "run", finished)


@pytest.mark.parametrize("file, damage", [
    ("learner-0.safetensors", flip_a_bit), ("learner-1.safetensors", Path.unlink), ("SHA256.json", cut)
])  # fmt: skip
def test_a_damaged_checkpoint_is_passed_over_with_a_line(finished, copy, capsys, file, damage):
    damage(copy / "checkpoints" / "000002" / file)
    resume(copy, finished)
    text = capsys.readouterr().out
    assert "000002 is damaged; trying the one before" in text and "resumed after 1 of 3 stages" in text


def test_a_checkpoint_that_was_passed_over_does_not_come_back(finished, copy, monkeypatch):
    """Its logs are cut by then."""
    file = copy / "checkpoints" / "000002" / "learner-0.safetensors"
    flip_a_bit(file)
    with monkeypatch.context() as patch:
        interrupt_at(1, patch, train, "update")
        assert train.main(["--resume", str(copy)]) == 130
    if file.exists():
        flip_a_bit(file)
    resume(copy, finished)


def test_the_newest_two_checkpoints_stay_whole_and_nothing_else_does(finished, stopped):
    for out, names in ((finished, ["000002", "000003"]), (stopped, ["000001", "000002"])):
        checkpoints = sorted((out / "checkpoints").iterdir())
        assert [path.name for path in checkpoints] == names and all(map(checkpoint._undamaged, checkpoints))
        assert {p.suffix for p in out.rglob("*")} <= {"", ".json", ".jsonl", ".safetensors", ".png"}


CUT = {  # files -> what is said when they are cut short; "checkpoints" itself is gone
    "checkpoints/*/state.json": "every checkpoint under", "config.json": "config.json cannot be read",
    "metrics.jsonl": "metrics.jsonl was cut short", "transcripts.jsonl": "transcripts.jsonl was cut short",
    "checkpoints": "has finished 2 stages but has no checkpoints",
}  # fmt: skip


@pytest.mark.parametrize("files, sentence", [*CUT.items()])
def test_where_nothing_can_be_resumed_nothing_is_touched(copy, capsys, files, sentence):
    for path in copy.glob(files):
        shutil.rmtree(path) if path.is_dir() else cut(path)
    before = contents(copy)
    assert sentence in refused(capsys, train.main, "--resume", str(copy))
    assert contents(copy) == before


def test_a_resume_of_nothing_or_with_other_flags_names_what_is_wrong(stopped, tmp_path, capsys):
    flags = "--lr 0.1 --agents 3 --order random".split()
    sentence = refused(capsys, train.main, "--resume", str(stopped), *flags)
    assert "--lr 0.1 (the run has 0.003), --order random (the run has fixed)" in sentence
    assert "--agents" not in sentence
    with pytest.raises(UserError, match=r"--lr 0.1 \(the run has 0.003\)"):
        train.train(Config(resume=str(stopped), lr=0.1))
    assert "nowhere" in refused(capsys, train.main, "--resume", str(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_a_run_resumes_from_python_with_the_settings_that_it_has(finished, copy):
    train.train(Config(resume=str(copy)))
    assert bits(copy) == bits(finished)


TASK = """
from teamtr_min.tasks import Relay
class task(Relay):
    def grade(self, *given): return 0.5 * super().grade(*given)
"""


def test_a_resume_names_what_has_changed_and_goes_on_only_if_told_to(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    roles = [{"name": name, "system": ""} for name in "ABC"]
    Path("mine.py").write_text(TASK)
    Path("roles.json").write_text(json.dumps(roles))
    run(Path("run"), "--task", "mine.py", "--roles", "roles.json", "--stages", "1")
    assert train.main(["--resume", "run"]) == 0
    Path("mine.py").write_text(TASK.replace("0.5", "0.9"))
    before = contents(Path("run"))
    sentence = refused(capsys, train.main, "--resume", "run")
    assert "now than when it began: task file; put them back" in sentence
    assert "--accept-changes" in sentence and contents(Path("run")) == before
    assert train.main(["--resume", "run", "--accept-changes"]) == 0
    assert train.main(["--resume", "run"]) == 0, "what was accepted is what the run rests on from then on"
    Path("roles.json").write_text(json.dumps([*roles[:2], {"name": "D", "system": ""}]))
    sentence = refused(capsys, train.main, "--resume", "run")
    prompts = [f"prompts of agent {j} (tokenizer, template, roles, date)" for j in range(2)]
    assert f"began: {', '.join(prompts)}, roles file; put" in sentence  # C does not read its own name


@pytest.mark.parametrize("new", [True, False])
def test_a_run_has_one_writer(finished, copy, tmp_path, capsys, new):
    """The first has only taken its lock, the moment before it writes config.json."""
    out, flags = (tmp_path / "new", [*TOY, *SHARED, "--out"]) if new else (copy, ["--resume"])
    out.mkdir(exist_ok=True)
    with (out / "metrics.jsonl").open("a") as other:
        before = contents(out)
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "is being written by another process" in refused(capsys, train.main, *flags, str(out))
        assert contents(out) == before
    assert train.main([*flags, str(out)]) == 0
    assert bits(out) == bits(finished)


@pytest.mark.parametrize("files", ["model", ""])
def test_a_disk_that_refuses_is_a_sentence_and_the_run_resumes(finished, copy, capsys, monkeypatch, files):
    save = weights_module.save_file

    def refuse(tensors, path, **metadata):
        if files not in str(path):
            return save(tensors, path, **metadata)
        Path(path).write_bytes(b"half a file")
        raise SafetensorError(os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(weights_module, "save_file", refuse)
        assert "No space left on device" in refused(capsys, train.main, "--resume", str(copy))
    assert sorted(p.name for p in (copy / "checkpoints").iterdir())[0] in ("000001", "000002")
    assert not list(copy.rglob("*.part"))
    resume(copy, finished)
