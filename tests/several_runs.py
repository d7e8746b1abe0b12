"""Several processes that share runs, without torchrun, whose start would cost more than a toy run."""

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import eval as evaluation
import train
from teamtr_min.ranks import Ranks, join


def together(processes: int, directory: Path, target: Callable, *given) -> list[str]:
    """Calls target(*given) in so many ranks; the lines on stdout of the first. `directory` is for outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["several_runs", "teamtr_min.shards", "torch._dynamo"])
    directory.mkdir(parents=True, exist_ok=True)
    children = []
    for rank in range(processes):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": processes,
            "LOCAL_WORLD_SIZE": processes,
        }
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        outputs = [directory / f"{name}-{rank}" for name in ("out", "err")]
        children.append(context.Process(target=_as_rank, args=(environment, outputs, target, given)))
        children[-1].start()
    for child in children:
        child.join(300)
        child.kill()  # has no effect on one that ended
    said, complaints = (
        "".join(p.read_text() for p in sorted(directory.glob(f"{n}-*"))) for n in ("out", "err")
    )
    assert [child.exitcode for child in children] == [0] * processes, complaints
    return said.splitlines()


def _as_rank(environment: dict, outputs: list[Path], target: Callable, given: tuple) -> None:
    os.environ |= {name: str(value) for name, value in environment.items()}
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    target(*given)
    sys.stdout.flush()


def commands(*lines: list[str]) -> None:
    """`["train", flags...]`, `["eval", flags...]`, one after the other. Afterwards the first rank prints the
    bytes that each kind of collective was handed."""
    ranks, leave = join(), Ranks.leave
    train.join = evaluation.join = lambda: ranks
    Ranks.leave = lambda self, code: code
    for program, *flags in lines:
        if code := {"train": train, "eval": evaluation}[program].main(flags):
            leave(ranks, code)
    print("payload", json.dumps(ranks.payload))
    leave(ranks, 0)
