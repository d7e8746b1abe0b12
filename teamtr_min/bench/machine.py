"""Clocks, and what this machine can do at most: the rates that floors are computed from."""

import statistics
import time
from collections.abc import Callable

import torch

from teamtr_min.config import SHIPPED, Config
from teamtr_min.team import placement

REPEATS = 5
LARGE = {  # what a GPU trains a pretrained model on here
    "problems": 32,
    "group": 8,
    "max_new_tokens": 256,
    "inner_steps": 6,
    "temperature": 0.8,
    "lr": 1e-6,
    "delta": 0.01,
}


def subject(flags: dict, **more) -> Config:
    """The run whose parts are timed: of a shipped model on its task, of another on `sums`. `flags` and `more`
    are fields of Config."""
    model = flags.get("model", "relay")
    shipped = model in SHIPPED
    flags = flags | {"model": model, "task": model if shipped else "sums", "agents": 3 if shipped else 2}
    if not shipped and placement(Config(**flags))[0].type == "cuda":
        flags |= LARGE
    return Config(**flags | more)


def heading(config: Config) -> dict[str, str]:
    """What is timed, and on what: the head of a result."""
    device, dtype = placement(config)
    return {
        "model": config.model,
        "task": config.task,
        "device": device_name(device.type),
        "dtype": str(dtype).removeprefix("torch."),
    }


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"a CPU with {torch.get_num_threads()} threads"


def one_thread(device: torch.device) -> bool:
    return device.type == "cpu" and torch.get_num_threads() == 1


def clock_name(device: torch.device) -> str:
    return "CPU seconds" if one_thread(device) else "seconds"


def now(device: torch.device) -> float:
    """Seconds, once the device is done: of this thread's work where it is the only one, so that others' work
    on the machine does not count; else the wall's."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.thread_time() if one_thread(device) else time.perf_counter()


def seconds(f: Callable, device: torch.device) -> float:
    start = now(device)
    f()
    return now(device) - start


def interleaved(contestants: dict[str, Callable], repeats: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each, taken in turns after one run to warm up."""
    for f in contestants.values():
        f()
    times = [{name: seconds(f, device) for name, f in contestants.items()} for _ in range(repeats)]
    return {name: statistics.median(t[name] for t in times) for name in contestants}


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by one large copy, here and now."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / interleaved({"copy": lambda: target.copy_(source)}, REPEATS, device)["copy"]


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large square product, here and now."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
    return 2 * n**3 / interleaved({"product": lambda: a @ b}, REPEATS, device)["product"]
