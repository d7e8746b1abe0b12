"""A run is the same for any number of processes, and ends as a whole when one of them does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from by_rank import check_all, commands, together
from safetensors.torch import load_file
from toy_runs import evaluate, results

import train

ROOT = Path(__file__).parents[1]
TOY = "--agents 2 --stages 3 --problems 5 --group 4 --inner-steps 2 --device cpu --eval-problems 7".split()
TOY += "--lr 3e-5 --delta 8e-5 --date 2026-01-01".split()
KINDS = {
    "plain": "",
    "lora": "--lora-rank 2 --lr 3e-4 --stages 1 --warm-start 1 --warm-start-lr 1e-4 --diagnostics",
    "joint": "--occupancy joint --stages 2",
    # What processes do unequally often: turns of one agent, waves of rows, batches.
    "uneven": "--router random --rounds 2 --occupancy corrected --batch-tokens 64 --batch-rows 3 --stages 1",
}
THREE = ("plain", "uneven")  # also by three processes
EVAL = "relay --problems 5 --k 2 --device cpu".split()


def test_sharded_weights_gradients_rounding_and_numbers_are_those_of_one_process(tmp_path):
    together(3, tmp_path, check_all)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict:
    """Toy runs by one process, by two and by three; those of two went on with one and with three."""
    root = tmp_path_factory.mktemp("ranks")

    def lines(processes: int, kinds: Iterable[str] = KINDS) -> list[list[str]]:
        outs = {kind: str(root / f"{kind}-{processes}") for kind in kinds}
        return [["train", *TOY, *KINDS[kind].split(), "--out", out] for kind, out in outs.items()]

    for _, *flags in lines(1):
        assert train.main(flags) == 0
    evaluation = ["eval", *EVAL, "--json", "--team", str(root / "plain-1")]
    said = together(2, root, commands, *lines(2), evaluation)
    for other in ("plain-21", "plain-23"):  # as a kill after two stages leaves a run
        shutil.copytree(root / "plain-2", root / other)
        shutil.rmtree(root / other / "checkpoints" / "000003")
        shutil.rmtree(root / other / "agents")
    assert train.main(["--resume", str(root / "plain-21")]) == 0
    together(3, root, commands, *lines(3, THREE), ["train", "--resume", str(root / "plain-23")])
    return {"root": root, "said": said}


NAMES = ["plain-21", "plain-23", *(f"{kind}-2" for kind in KINDS), *(f"{kind}-3" for kind in THREE)]


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_processes_trains_the_same_team(runs, name):
    """5 problems, 7 held out: uneven shares. A resume may have another number of processes."""
    alone, shared = runs["root"] / f"{name.split('-')[0]}-1", runs["root"] / name
    assert (alone / "transcripts.jsonl").read_text() == (shared / "transcripts.jsonl").read_text()
    ones, others = results(alone)[1], results(shared)[1]
    for one, other in zip(ones, others, strict=True):
        for key in {key for key in one if not key.startswith(("kind", "seconds"))}:
            assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), key
    assert any(u["steps"] for u in ones)
    files = [file.relative_to(alone) for file in alone.rglob("*.safetensors")]
    assert {file.parts[0] for file in files} == {"agents", "checkpoints"}
    for file in files:
        a, b = load_file(alone / file), load_file(shared / file)
        assert a.keys() == b.keys()
        for key, x in a.items():
            assert b[key].shape == x.shape and b[key].dtype == x.dtype
            bound = 1e-5 if "adam" not in key else 1e-3 * x.abs().max().item()
            assert (b[key] - x).abs().max().item() <= bound, (file, key)


def test_two_processes_evaluate_as_one_does_and_only_the_first_speaks(runs, capsys):
    *lines, said = runs["said"]
    shared, alone = json.loads(said), evaluate(capsys, *EVAL, "--team", str(runs["root"] / "plain-1"))
    for result in (shared, alone):
        assert all([result.pop(name) for name in ("seconds", "memory_peak", "memory_planned")])
    assert shared == alone
    assert sum(line.startswith("stage ") for line in lines) == 3 + 1 + 2 + 1


@pytest.mark.parametrize("ctrl_c", [False, True])
def test_when_one_process_ends_all_do_with_one_sentence_and_resume_goes_on(tmp_path, ctrl_c):
    out, torchrun = tmp_path / "run", [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=2", "train.py", *TOY, "--stages", "8", "--out", str(out)]
    options = {"cwd": ROOT, "process_group": 0, "stdout": subprocess.DEVNULL, "text": True}
    child = subprocess.Popen(command, stderr=subprocess.PIPE, **options)
    while not list(out.glob("checkpoints/[0-9]*")):
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.02)
    ids = sorted(map(int, Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()))
    begin = time.monotonic()
    # Ctrl-C as a terminal sends it: to torchrun and to its processes
    os.killpg(child.pid, signal.SIGINT) if ctrl_c else os.kill(ids[0], signal.SIGKILL)
    while any(Path(f"/proc/{i}").exists() for i in ids):  # torchrun takes care of those that have ended
        assert time.monotonic() - begin < 30
        time.sleep(0.05)
    _, err = child.communicate(timeout=120)  # torchrun's own report takes a while on a busy machine
    sentence = "interrupted" if ctrl_c else "error: a process of this run has ended"
    assert child.returncode and err.count(sentence) == 1, err
    assert max(path.name for path in out.glob("checkpoints/[0-9]*")) < "000008"
    assert train.main(["--resume", str(out)]) == 0 and results(out)[0]["stages"] == 8
