"""A toy run is killed (SIGKILL) at random moments; every other time a file of its newest checkpoint is
damaged, or a half-written one left beside it. Resumed, it ends with the bits of a run left alone."""

import itertools
import multiprocessing
import os
import random
import shutil
import sys
import threading
import time
from pathlib import Path

FLAGS = ["--agents", "2", "--stages", "4", "--warm-start", "2"]
KINDS = [[], ["--occupancy", "stale", "--order", "random", "--router", "random", "--checkpoint-every", "2"]]


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def start_or_resume(out: Path, flags: list[str]) -> None:
    from tqdm import tqdm

    import train

    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a kill would leak
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    begun = (out / "config.json").exists()
    sys.exit(train.main(["--resume", str(out)] if begun else [*flags, "--out", str(out)]))


def campaign(out: Path, seed: int, kills: int) -> None:
    """At least so many kills; AssertionError if a run ends otherwise than the one that was left alone."""
    from toy_runs import TOY, bits

    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train", "torch._dynamo"])  # else most kills hit a child that imports
    moments, done, expected = random.Random(seed), 0, []

    def spawn(out: Path, flags: list[str]) -> multiprocessing.Process:
        child = processes.Process(target=start_or_resume, args=(out, [*TOY, *FLAGS, *flags]))
        child.start()
        return child

    for flags in ([], *KINDS):  # the first warms up
        begin = time.monotonic()
        spawn(out, flags).join()
        lasts = time.monotonic() - begin
        expected.append(bits(out))
        shutil.rmtree(out)
    for flags, wanted in itertools.cycle(zip(KINDS, expected[1:])):
        while True:
            child = spawn(out, flags)
            child.join(moments.uniform(0.1, 0.9) * lasts if done < kills else None)
            if not child.is_alive():
                break
            child.kill()
            child.join()
            done += 1
            if moments.random() < 0.5:
                harm(out, moments)
        assert child.exitcode == 0 and bits(out) == wanted, f"seed {seed}, after {done} kills"
        shutil.rmtree(out)
        if done >= kills:
            return


def harm(out: Path, moments: random.Random) -> None:
    """Damage a file of the newest checkpoint, if there is another, and leave a half-written one."""
    checkpoints = sorted((out / "checkpoints").glob("[0-9]*"))
    if len(checkpoints) > 1:
        damage = moments.choice([cut, flip_a_bit, Path.unlink])
        damage(moments.choice(sorted(checkpoints[-1].iterdir())))
    if checkpoints:
        shutil.copytree(checkpoints[-1], out / "checkpoints" / ".000099.part", dirs_exist_ok=True)
