"""A run that was killed goes on to the same bits."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import train
from teamtr_min import load_model
from teamtr_min.run import checkpoint

TOY = ["--agents", "2", "--stages", "3", "--problems", "4", "--group", "4", "--inner-steps", "2",
       "--eval-problems", "16", "--eval-every", "1", "--device", "cpu"]  # fmt: skip


def results(out: Path, agents: int = 2) -> tuple:
    """All that two equal runs have in common: metrics and summary but for time, transcripts, weights."""

    def timeless(text: str) -> dict:
        return {k: v for k, v in json.loads(text).items() if not k.startswith("seconds")}

    weights = [[p.detach() for p in load_model(out / "agents" / str(j)).parameters()] for j in range(agents)]
    return (
        [timeless(line) for line in (out / "metrics.jsonl").read_text().splitlines()],
        timeless((out / "summary.json").read_text()),
        (out / "transcripts.jsonl").read_text(),
        [p.tolist() for agent in weights for p in agent],
    )


def start_or_resume(out: Path, flags: list[str]) -> None:
    torch.set_num_threads(1)  # a toy gains nothing from two, and suffers on a busy machine
    train.main(["--resume", str(out)] if (out / "config.json").exists() else [*flags, "--out", str(out)])


@pytest.mark.parametrize(
    "flags", [TOY, [*TOY, "--occupancy", "stale", "--order", "random", "--router", "random"]]
)
def test_killed_at_any_moment_a_run_resumes_to_the_same_bits(tmp_path, flags):
    """SIGKILL at ten random moments (twenty over both cases), against one run that nobody disturbed."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train"])
    moments, kills = random.Random(0), 0

    def spawn(out: Path) -> multiprocessing.Process:
        child = processes.Process(target=start_or_resume, args=(out, flags))
        child.start()
        return child

    undisturbed = spawn(tmp_path / "undisturbed")
    begin = time.perf_counter()
    undisturbed.join()
    whole = time.perf_counter() - begin
    out = tmp_path / "killed"
    while kills < 10:
        child = spawn(out)
        child.join(timeout=moments.uniform(0, 0.6 * whole))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
        else:  # it came through: once more from the start
            assert results(out) == results(tmp_path / "undisturbed")
            shutil.rmtree(out)
        if out.is_dir() and not (out / "config.json").exists():
            shutil.rmtree(out)  # killed before it had begun
    spawn(out).join()
    assert results(out) == results(tmp_path / "undisturbed")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train.main([*TOY, "--out", str(out)]) == 0
    return out


def stopped_copy(finished: Path, tmp_path: Path, number: int = 5) -> Path:
    """The finished run as it stood after `number` updates, the log being ahead of the checkpoint."""
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    for later in sorted((out / "checkpoints").iterdir()):
        if int(later.name) > number:
            shutil.rmtree(later)
    shutil.rmtree(out / "agents")
    return out


def test_only_the_last_checkpoints_stay_and_unchanged_agents_are_links(finished):
    kept = sorted(p.name for p in (finished / "checkpoints").iterdir())
    assert kept == ["000005", "000006"]
    same = [
        os.path.samefile(*(finished / "checkpoints" / k / f"agent-{j}.safetensors" for k in kept))
        for j in (0, 1)
    ]
    assert same == [True, False]
    assert {p.suffix for p in finished.rglob("*") if p.is_file()} == {".json", ".jsonl", ".safetensors"}


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(finished, tmp_path, capsys):
    for number, damage in enumerate((b"", b"x" * 100)):
        out = tmp_path / str(number)
        shutil.copytree(finished, out)
        newest = out / "checkpoints" / "000006" / "agent-1.safetensors"
        newest.unlink()
        newest.write_bytes(damage)
        assert train.main(["--resume", str(out)]) == 0
        assert "000006 is damaged; trying the one before" in capsys.readouterr().out
        assert results(out) == results(finished)


def test_when_all_checkpoints_are_damaged_nothing_is_touched(finished, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    for state in out.glob("checkpoints/*/state.json"):
        state.write_text("{")
    assert train.main(["--resume", str(out)]) == 2
    assert "is damaged; nothing to resume from" in capsys.readouterr().err
    assert results(out) == results(finished)


def test_a_finished_run_without_checkpoints_is_not_written_over(finished, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoints")
    assert train.main(["--resume", str(out)]) == 2
    assert "holds a trained team but no checkpoints" in capsys.readouterr().err
    assert results(out) == results(finished)


def test_a_resume_with_another_configuration_names_what_differs(finished, capsys):
    assert train.main(["--resume", str(finished), "--lr", "0.1", "--agents", "2", "--order", "random"]) == 2
    error = capsys.readouterr().err
    assert "--lr 0.1 (the run has 0.0005)" in error and "--order random (the run has fixed)" in error
    assert "--agents" not in error


def test_a_resume_of_nothing_says_so(tmp_path, capsys):
    assert train.main(["--resume", str(tmp_path / "nowhere")]) == 2
    assert "No such file or directory; is" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_leaves_the_old_checkpoint_whole(finished, tmp_path, capsys, monkeypatch, fault):
    out = stopped_copy(finished, tmp_path, number=5)
    original = checkpoint.save_file

    def refuse(tensors, path, *rest):
        Path(path).write_bytes(b"half a file")
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    assert train.main(["--resume", str(out)]) == 2
    error = capsys.readouterr().err
    assert os.strerror(fault) in error and f"continue with --resume {out}" in error and error.count("\n") == 1
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["000005"]
    monkeypatch.setattr(checkpoint, "save_file", original)
    assert train.main(["--resume", str(out)]) == 0
    assert results(out) == results(finished)


def test_adam_and_beta_come_back_to_the_bit(tmp_path):
    torch.manual_seed(0)
    from teamtr_min.learner import Learner

    learners = [
        Learner([load_model("relay", dtype=dtype)], 0.01) for dtype in (torch.float32, torch.bfloat16)
    ]
    for learner in learners:
        for p in learner.masters:
            p.grad = torch.randn_like(p)
        learner.step(1e-3)
        learner.beta = 0.3
    checkpoint.save(tmp_path, checkpoint.Progress(0, 1), learners, {0, 1}, {}, keep=1)
    fresh = [Learner([load_model("relay", dtype=dtype)], 0.01) for dtype in (torch.float32, torch.bfloat16)]
    checkpoint.load(tmp_path, fresh, None, None)
    for a, b in zip(learners, fresh):
        assert a.beta == b.beta
        assert all(torch.equal(p, q) for p, q in zip(a.models[0].parameters(), b.models[0].parameters()))
        one, two = a.point(), b.point()
        assert all(torch.equal(p, q) for p, q in zip(one.masters, two.masters))
        assert all(
            s.keys() == t.keys() and all(torch.equal(s[k], t[k]) for k in s)
            for s, t in zip(one.state, two.state)
        )
