"""Several processes that share runs, without torchrun, whose start would cost more than a toy run."""

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path

import eval as evaluation
import train
from teamtr_min.engine.distributed import Ranks, join


def together(processes: int, directory: Path, target: Callable, *given) -> list[str]:
    """Calls target(*given) in so many ranks; the lines on stdout of the first. `directory` is for outputs.

    They have this process's environment as it was when the first such test began.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["several_runs", "teamtr_min.engine.shards", "torch._dynamo"])
    directory.mkdir(parents=True, exist_ok=True)
    together = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    together |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = []
    for rank in range(processes):
        environment = {"RANK": rank, "LOCAL_RANK": rank} | together
        outputs = [directory / f"{name}-{rank}" for name in ("out", "err")]
        children.append(context.Process(target=_as_rank, args=(environment, outputs, target, given)))
        children[-1].start()
    until, running = time.monotonic() + 900, list(children)
    while running and all(not child.exitcode for child in children) and time.monotonic() < until:
        connection.wait([child.sentinel for child in running], timeout=10)
        running = [child for child in running if child.is_alive()]
    for child in running:  # where one has failed, or time is up
        child.kill()
        child.join()
    complaints = "".join((directory / f"err-{rank}").read_text() for rank in range(processes))
    assert [child.exitcode for child in children] == [0] * processes, complaints
    return (directory / "out-0").read_text().splitlines()


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
    print("payload", json.dumps({}))
    leave(ranks, 0)
