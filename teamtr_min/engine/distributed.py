"""Processes that share one run, as torchrun starts them; a single process is the ordinary case.

    torchrun --nproc-per-node 4 train.py ...

Each process, a rank, samples the rollouts of its share of the problems and computes their gradients. Numbers
that decide what happens next are gathered first. The first rank writes all files and prints. torch's FSDP2
shards what is trained: a rank keeps a part of each parameter, gradient and moment, as fp32 DTensors. The
weights of a model are gathered for a turn of sampling, or for a pass over its batches (`unsharded`).
"""

import contextlib
import datetime
import gc
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

TIMEOUT_MINUTES = 60  # longest wait for another rank, which may sample longer messages or write a checkpoint


class Ranks:
    """This process, number `rank` of `size`. Where a method communicates, all ranks must call it."""

    def __init__(self, rank: int = 0, size: int = 1, on_this_machine: int = 1, store=None):
        self.rank, self.size, self.on_this_machine, self.store = rank, size, on_this_machine, store
        self.first = rank == 0

    def share(self, count: int) -> range:
        """This rank's part of `count` things, such as problems: neighbours, split as evenly as possible."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def largest_share(self, count: int) -> int:
        return -(-count // self.size)

    def gather(self, value) -> list:
        """The value of each rank, at all ranks. It goes through JSON, which keeps floats exactly."""
        if self.size == 1:
            return [value]
        text = json.dumps(value)  # ASCII; the shorter ones end with spaces
        longest = torch.tensor(len(text))
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        own = torch.frombuffer(bytearray(text.ljust(longest).encode()), dtype=torch.uint8)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return [json.loads(part.numpy().tobytes()) for part in parts]

    def total(self, number: float) -> float:
        return sum(self.gather(number))

    def sum(self, x: Tensor) -> None:
        """Add up a tensor over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)

    def say(self, sentence: str) -> None:
        """Print why the run ends, on stderr; only the rank that comes first does."""
        with contextlib.suppress(RuntimeError):  # torchrun, which keeps the store, may be gone
            if self.store is not None and self.store.add("said", 1) > 1:
                return
        print(sentence, file=sys.stderr, flush=True)

    def leave(self, code: int) -> int:
        """The exit code. After a failure the process ends here, as the others wait in vain for it."""
        if self.size > 1:
            if code:
                sys.stdout.flush()
                os._exit(code)
            dist.destroy_process_group()
        return code


ALONE = Ranks()


def join() -> Ranks:
    """The ranks that torchrun has started, with this process among them; ALONE without torchrun."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return ALONE
    here, cuda = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    if cuda and here < torch.cuda.device_count():
        torch.cuda.set_device(here)
    timeout = datetime.timedelta(minutes=TIMEOUT_MINUTES)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)

    def interrupt(number: int, frame) -> None:
        signal.signal(number, signal.SIG_IGN)  # Ctrl-C comes twice: torchrun repeats it
        raise KeyboardInterrupt if number == signal.SIGINT else RuntimeError("connection: ended by torchrun")

    for number in (signal.SIGINT, signal.SIGTERM):  # torchrun ends what goes on after another rank has died
        signal.signal(number, interrupt)
    if rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for the program's whole life
        sys.stderr.isatty = lambda: False  # tqdm draws no bar then
    return Ranks(rank, size, int(os.environ["LOCAL_WORLD_SIZE"]), store)


def lost(ranks: Ranks, error: Exception) -> str | None:
    """A sentence for an error that says that another process is gone; else None."""
    sentence = "a process of this run has ended, and so do all; --resume continues from the last checkpoint"
    found = re.search("connection|peer|timed out|nccl", str(error), re.IGNORECASE)
    return sentence if ranks.size > 1 and isinstance(error, RuntimeError) and found else None


def shard(model: nn.Module, ranks: Ranks, device: torch.device, dtype: torch.dtype) -> None:
    """Shard the trainable parameters of a model, which lies on the host, over the ranks' devices: they become
    fp32 DTensors, and the model computes in `dtype`, within `unsharded` alone. Frozen ones, such as the base
    of LoRA adapters, stay whole, in `dtype`; agents may share them."""
    from torch.distributed.device_mesh import init_device_mesh  # these imports take a second
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (ranks.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    frozen = {p for p in model.parameters() if not p.requires_grad}
    for p in model.parameters():
        p.data = p.data.to(device, dtype) if p in frozen else p.data.float()
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=frozen, reshard_after_forward=False)
        part.set_gradient_divide_factor(1.0)  # gradients are summed: losses are shares of all ranks'
        part.set_force_sum_reduction_for_comms(True)
    model.set_reshard_after_backward(False)
    register_fsdp_forward_method(model, "hidden")
    model.sharded, model.compute_dtype = True, dtype


@contextlib.contextmanager
def unsharded(*models: nn.Module) -> Iterator[None]:
    """Whole weights within, gathered once; without effect where models are not sharded. All ranks must enter,
    and make equally many backward passes, which sum gradients. Forward passes involve no other rank."""
    parts = [part for model in models for part in model.modules() if hasattr(part, "unshard")]
    with torch.inference_mode(False), torch.no_grad():
        for part in parts:
            part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def halving(work: Callable[[int], Any], size: int, ranks: Ranks = ALONE) -> tuple[Any, int]:
    """work(size), and where memory runs out again with half the size, unless other processes wait for this
    one; the result, and the size that did it."""
    while True:
        try:
            return work(size), size
        except (RuntimeError, MemoryError) as error:
            if not memory_is_full(error) or size == 1 or ranks.size > 1:
                raise
        size //= 2
        gc.collect()
        torch.cuda.empty_cache()
        print(f"memory is full: going on with batches of {size:,}", file=sys.stderr)


def memory_is_full(error: BaseException) -> bool:
    return bool(re.search("MemoryError|out of memory|allocate memory|ALLOC_FAILED", repr(error)))


def local(x: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


def whole(x: Tensor) -> Tensor:
    """All of a DTensor, at all ranks, which must all ask for it; any other tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def like(x: Tensor, p: Tensor) -> Tensor:
    """x, whole at each rank, on the device of p and sharded as p is; x itself where its shape is another."""
    if x.shape != p.shape or not hasattr(p, "device_mesh"):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
