"""A run that was stopped goes on to the same bits, or says in a sentence why it cannot."""

import errno
import fcntl
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from commands import interrupt_at, refusal
from safetensors.torch import load_file
from toy_runs import TOY, results, run, timeless

import train
from teamtr_min.config import Config
from teamtr_min.learner import Learner
from teamtr_min.run import checkpoint
from teamtr_min.tasks import Relay
from teamtr_min.team import load_team

FLAGS = ["--agents", "2", "--stages", "3", "--eval-every", "1", "--keep", "3"]


def bits(out: Path) -> tuple:
    """All that two equal runs have in common: logs and summary but for time, agents, the last checkpoint."""
    summary, updates, stages = results(out)
    logs = [(out / name).read_bytes() for name in ("metrics.jsonl", "transcripts.jsonl")]
    assert not any(b"\0" in log for log in logs)
    files = [*out.glob("agents/*/*"), *out.glob("checkpoints/000003/*.safetensors")]
    weights = {str(file.relative_to(out)): file.read_bytes() for file in files}
    return timeless([summary, *updates, *stages]), logs[1], weights


def start_or_resume(out: Path, flags: list[str]) -> None:
    torch.set_num_threads(1)  # a toy gains nothing from two, and suffers on a busy machine
    train.main(["--resume", str(out)] if (out / "config.json").exists() else [*flags, "--out", str(out)])


STALE = ["--occupancy", "stale", "--order", "random", "--router", "random", "--checkpoint-every", "2"]


@pytest.mark.parametrize("more", [[], STALE])
def test_killed_at_any_moment_a_run_resumes_to_the_same_bits(tmp_path, more):
    """SIGKILL at six random moments (twelve over both cases), against one run that nobody disturbed."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train", "torch._dynamo"])  # else most kills hit a child that imports
    moments, kills = random.Random(0), 0

    def spawn(out: Path) -> multiprocessing.Process:
        child = processes.Process(target=start_or_resume, args=(out, [*TOY, *FLAGS, *more]))
        child.start()
        return child

    for name in ("warm-up", "undisturbed"):
        begin = time.perf_counter()
        spawn(tmp_path / name).join()
    whole, expected = time.perf_counter() - begin, bits(tmp_path / "undisturbed")
    out = tmp_path / "killed"
    while kills < 6:
        child = spawn(out)
        child.join(timeout=moments.uniform(0.2, 1) * whole)
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
        else:  # it came through: once more from the start
            assert bits(out) == expected
            shutil.rmtree(out)
        if out.is_dir() and not (out / "config.json").exists():
            shutil.rmtree(out)  # killed before it had begun
    spawn(out).join()
    assert bits(out) == expected


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three stages with all its checkpoints."""
    out = tmp_path_factory.mktemp("runs") / "run"
    run(out, *FLAGS)
    return out, bits(out)


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished[0], tmp_path / "copy"))


def stop_after(stages: int, out: Path) -> None:
    """Take a finished run back to this stage's checkpoint, as a kill leaves it: the logs are ahead."""
    for later in range(stages + 1, 4):
        shutil.rmtree(out / "checkpoints" / f"{later:06d}")
    shutil.rmtree(out / "agents")
    (out / "summary.json").unlink()


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    os.truncate(file, 50)


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("moment", [(2, train, "group_advantages"), (1, checkpoint, "save_file")])
def test_stopped_before_its_first_checkpoint_a_run_starts_again(
    finished, tmp_path, monkeypatch, killed, moment
):
    call, module, name = moment
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(call, patch, module, name)
        assert train.main([*TOY, *FLAGS, "--out", str(out)]) == 130
    if killed:  # then there is no last word
        shutil.rmtree(out / "agents")
        (out / "summary.json").unlink()
    assert train.main(["--resume", str(out)]) == 0
    assert bits(out) == finished[1]


FILES = "learner-0.safetensors", "state.json"


@pytest.mark.parametrize(
    "stage, file, damage",
    [*itertools.product((1, 2), FILES, (cut, Path.unlink)), (2, "learner-1.safetensors", flip_a_bit)],
)
def test_a_damaged_checkpoint_is_passed_over_and_gets_into_no_later_one(
    finished, copy, capsys, stage, file, damage
):
    stop_after(2, copy)
    damage(copy / "checkpoints" / f"{stage:06d}" / file)
    assert train.main(["--resume", str(copy)]) == 0
    text = capsys.readouterr().out
    assert bits(copy) == finished[1] and f"resumed after {3 - stage} of 3 stages" in text
    assert ("000002 is damaged; trying the one before" in text) == (stage == 2)


def test_only_the_last_checkpoints_stay(copy):
    kept = sorted(path.name for path in (copy / "checkpoints").iterdir())
    assert kept == ["000001", "000002", "000003"]
    checkpoint.save(copy, 4, [], {}, keep=2)
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["000003", "000004"]
    assert {p.suffix for p in copy.rglob("*") if p.is_file()} == {".json", ".jsonl", ".safetensors"}


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda out: [s.write_text("{") for s in out.glob("checkpoints/*/state.json")], "every checkpoint"),
        (lambda out: shutil.rmtree(out / "checkpoints"), "has finished stages but no checkpoints"),
        (lambda out: os.truncate(out / "metrics.jsonl", 99), "metrics.jsonl was cut short"),
        (lambda out: os.truncate(out / "transcripts.jsonl", 99), "transcripts.jsonl was cut short"),
    ],
)
def test_where_nothing_can_be_resumed_nothing_is_touched(copy, capsys, spoil, sentence):
    spoil(copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert sentence in refusal(capsys, train.main, "--resume", str(copy))
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_a_resume_with_another_configuration_names_what_differs(finished, capsys):
    flags = ["--resume", str(finished[0]), "--lr", "0.1", "--agents", "2", "--order", "random"]
    sentence = refusal(capsys, train.main, *flags)
    assert "--lr 0.1 (the run has 0.003), --order random (the run has fixed)" in sentence
    assert "--agents" not in sentence


def test_a_resume_of_nothing_says_so(tmp_path, capsys):
    sentence = refusal(capsys, train.main, "--resume", str(tmp_path / "nowhere"))
    assert "No such file; is" in sentence and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("modules", [["hf.weights"], ["hf.weights", "run.checkpoint"]])
def test_a_disk_that_refuses_is_a_sentence_and_the_run_resumes(
    finished, copy, capsys, monkeypatch, modules, fault
):
    """At the end of the run, or at the end of a stage, when the team cannot be saved either."""

    def refuse(tensors, path, **metadata):
        path.write_bytes(b"half a file")
        raise OSError(fault, os.strerror(fault))

    stop_after(2, copy)
    with monkeypatch.context() as patch:
        for module in modules:
            patch.setattr(f"teamtr_min.{module}.save_file", refuse)
        sentence = refusal(capsys, train.main, "--resume", str(copy))
    assert os.strerror(fault) in sentence
    if "run.checkpoint" in modules:
        assert f"continue with --resume {copy}" in sentence
        assert sorted(p.name for p in (copy / "checkpoints").iterdir()) == ["000001", "000002"]
    assert train.main(["--resume", str(copy)]) == 0
    assert bits(copy) == finished[1]


def test_an_output_directory_that_vanishes_is_a_sentence(tmp_path, capsys, monkeypatch):
    save_file, out = checkpoint.save_file, tmp_path / "run"

    def vanish(*arguments):
        shutil.rmtree(out)
        save_file(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", vanish)
    assert "cannot write a checkpoint" in refusal(capsys, train.main, *TOY, "--out", str(out))


def test_a_run_has_one_writer(copy, capsys):
    """A second process that resumes the same run is sent away before it touches anything."""

    def content() -> dict:
        return {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}

    before = content()
    with (copy / "metrics.jsonl").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "is being written by another process" in refusal(capsys, train.main, "--resume", str(copy))
        assert content() == before
    assert train.main(["--resume", str(copy)]) == 0


def test_adam_and_beta_come_back_to_the_bit(tmp_path):
    torch.manual_seed(0)

    def learners() -> list[Learner]:
        configs = [Config(agents=1, device="cpu", dtype=dtype) for dtype in ("fp32", "bf16")]
        return [Learner(load_team(config, Relay(config).roles(1)), [0], 0.01) for config in configs]

    saved, loaded = learners(), learners()
    for learner in saved:
        for p in learner.masters:
            p.grad = torch.randn_like(p)
        learner.step(1e-3)
        learner.beta = 0.3
    checkpoint.save(tmp_path, 1, saved, {}, keep=1)
    checkpoint.load(tmp_path, loaded)
    for a, b in zip(saved, loaded):
        assert a.beta == b.beta and all(map(torch.equal, a.parameters, b.parameters))
        one, two = a.snapshot(), b.snapshot()
        assert all(map(torch.equal, one.masters, two.masters))
        for s, t in zip(one.state, two.state):
            assert s and s.keys() == t.keys() and all(torch.equal(s[name], t[name]) for name in s)


def test_weights_alone_take_a_third_of_the_disk_and_go_on_from_the_same_team(finished, tmp_path):
    out = tmp_path / "run"
    run(out, *FLAGS, "--weights-only")
    assert bits(out)[:2] == finished[1][:2], "what is kept changes nothing while the run goes on"
    for file in out.glob("checkpoints/*/learner-*"):
        whole = load_file(finished[0] / file.relative_to(out))
        masters = {name: x for name, x in whole.items() if name.startswith("master.")}
        assert load_file(file).keys() == masters.keys() and len(whole) in (len(masters), 4 * len(masters))
    stop_after(1, out)
    assert train.main(["--resume", str(out)]) == 0
    assert bits(out)[:2] != finished[1][:2], "without moments the steps are others"
    first, again = (results(d)[1] for d in (finished[0], out))
    same = ("return_mean", "entropy", "lr", "rollouts", "tokens_sampled")
    after = len({u["agent"] for u in first})  # the first update after the resume, by the very same team
    assert [first[after][k] for k in same] == [again[after][k] for k in same]
