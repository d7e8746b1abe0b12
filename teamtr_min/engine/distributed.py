"""Processes that share one run, as torchrun starts them; one alone is the ordinary case and pays nothing.

    torchrun --nproc-per-node 4 train.py ...

Every rank makes the same decisions from the same numbers, and does its share of what costs time: rollouts of
some problems, the gradient of those, Adam's steps for some parameters. So what one of them measures is told
to all before anything is decided on it. The first rank alone writes, to files and to the terminal.

If a process ends, its connections break, and torchrun ends the others: all are gone within seconds, and
whoever noticed first says so in one sentence.
"""

import collections
import contextlib
import datetime
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from teamtr_min.files import UserError, one_line

TIMEOUT_MINUTES = 60  # longest wait for another rank, which may sample longer messages or write a checkpoint
ENDED = (
    "a process of this run has ended, and so do all; training goes on from its last checkpoint with --resume"
)


class Lost(Exception):
    """Another rank cannot be reached."""


class Ranks:
    """This process among `size`, as number `rank`. Each method is called by all ranks alike."""

    def __init__(self, rank: int = 0, size: int = 1, on_this_machine: int = 1, store=None):
        self.rank, self.size, self.on_this_machine, self.store = rank, size, on_this_machine, store
        self.payload = collections.Counter()  # bytes handed to each kind of collective

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` things, such as problems, are this rank's: a run of them, as even as can be."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def largest_share(self, count: int) -> int:
        """How many of them a rank has at most."""
        return -(-count // self.size)

    def owners(self, sizes: list[int]) -> list[int]:
        """A rank for each of things of these sizes: the largest comes first, and goes to who has least."""
        loads, owners = [0] * self.size, [0] * len(sizes)
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            owners[i] = loads.index(min(loads))
            loads[owners[i]] += sizes[i]
        return owners

    def gather(self, value) -> list:
        """The value of each rank, at all of them. It must be JSON's: floats come through exactly."""
        if self.size == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._collective("gather", own):
            torch.distributed.all_gather(counts, torch.tensor([len(own)]))
            padded = torch.zeros(int(max(counts)), dtype=torch.uint8)
            padded[: len(own)] = own
            parts = [torch.empty_like(padded) for _ in counts]
            torch.distributed.all_gather(parts, padded)
        return [json.loads(bytes(part[:count].numpy())) for part, count in zip(parts, counts)]

    def agree(self, value):
        """The first rank's value, at all of them."""
        return self.gather(value if self.first else None)[0]

    def total(self, number: float) -> float:
        return number if self.size == 1 else sum(self.gather(number))

    def any(self, value: bool) -> bool:
        return any(self.gather(value))

    def any_of(self, value: bool) -> bool:
        """As `any`, for where it is asked at every step: one number goes around."""
        flag = torch.tensor([int(value)])
        with self._collective("any_of", flag):
            torch.distributed.all_reduce(flag)
        return bool(flag)

    def sum(self, tensors: list[Tensor]) -> None:
        """Add up each tensor over all ranks, in place."""
        if self.size > 1:
            with self._collective("sum", *tensors):
                waiting = [torch.distributed.all_reduce(x, async_op=True) for x in tensors]
                for work in waiting:
                    work.wait()

    def broadcast(self, tensors: list[Tensor], owners: list[int]) -> None:
        """Give each tensor, in place, the value that it has at its owner."""
        if self.size > 1:
            with self._collective("broadcast", *tensors):
                waiting = [
                    torch.distributed.broadcast(x, owner, async_op=True) for x, owner in zip(tensors, owners)
                ]
                for work in waiting:
                    work.wait()

    def to_first(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all ranks, fp32 on the host, at the first; the others keep their own."""
        found = dict(tensors)
        shapes = self.gather({name: list(x.shape) for name, x in tensors.items()})
        with self._collective("to_first", *(() if self.first else tensors.values())):
            for rank, named in enumerate(shapes[1:], start=1):
                for name, shape in named.items():
                    if self.first:
                        found[name] = torch.empty(shape)
                        torch.distributed.recv(found[name], rank)
                    elif rank == self.rank:
                        torch.distributed.send(tensors[name].contiguous(), 0)
        return found

    def say(self, sentence: str) -> None:
        """Why the run ends, on stderr: only from the rank that says it first."""
        try:
            heard = self.store is not None and self.store.add("said", 1) > 1
        except (RuntimeError, OSError):  # torchrun, which keeps the store, is gone
            heard = False
        if not heard:
            with contextlib.suppress(OSError):  # stderr may be full; the exit code says it too
                print(sentence, file=sys.stderr, flush=True)

    def leave(self, code: int) -> int:
        """The exit code of this process, which after a failure ends here: nobody shall wait for it."""
        if self.size > 1:
            if code:
                sys.stdout.flush()
                os._exit(code)
            torch.distributed.destroy_process_group()
        return code

    @contextlib.contextmanager
    def _collective(self, kind: str, *tensors: Tensor) -> Iterator[None]:
        self.payload[kind] += sum(x.nbytes for x in tensors)
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise Lost(f"{ENDED} ({one_line(error)})") from error

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Around other code that may talk to ranks: a connection that breaks there is a rank that is Lost."""
        try:
            yield
        except RuntimeError as error:
            if not re.search("gloo|nccl|connection", str(error), re.IGNORECASE):
                raise
            raise Lost(f"{ENDED} ({one_line(error)})") from error


ALONE = Ranks()


def join() -> Ranks:
    """The ranks that torchrun has started, this one among them; without torchrun this process alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return ALONE
    import torch.distributed as dist

    here, cuda = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    if cuda and here < torch.cuda.device_count():
        torch.cuda.set_device(here)
    timeout = datetime.timedelta(minutes=TIMEOUT_MINUTES)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this run cannot reach each other: {error}") from None
    ranks = Ranks(rank, size, int(os.environ["LOCAL_WORLD_SIZE"]), store)
    _heed_signals(ranks)
    if not ranks.first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for the program's whole life
        sys.stderr.isatty = lambda: False  # so no bars
    return ranks


def _heed_signals(ranks: Ranks) -> None:
    """SIGTERM, which torchrun sends when another rank has ended, ends this one even while it waits for that
    rank. Ctrl-C comes twice, from the terminal and from torchrun: the second shall not disturb the last
    writing."""

    def interrupt(*_) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    def watch() -> None:
        while os.read(reader, 1)[0] != signal.SIGTERM:
            pass
        ranks.say(f"stopped: {ENDED}")
        os._exit(128 + signal.SIGTERM)

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # written to whatever the main thread does
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, interrupt)
    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def unsharded(model):
    yield


def local(x):
    return x


def whole(x):
    return x


def offset(p) -> int:
    return 0


def shard(model, ranks, device, dtype):
    raise NotImplementedError
