"""What the benchmarks share: an example, a clock, a memory gauge and the rate to divide by."""

import platform
import resource
import time

import torch
from torch import Tensor


def example(N: int, H: int, V: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """hidden (N, H), weight (V, H), targets (N,), dL/dlogp (N,); logits spread by 4."""
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, H, generator=g, device=device).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g, device=device).mul_(4 / H**0.5).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=g, device=device)
    return hidden, weight, targets, torch.randn(N, generator=g, device=device) / N


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(step, device: str, seconds: float = 1.0) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of step()'s time, from at least 3 runs after one to warm up."""
    step()
    times, begin = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds and len(times) < 200:
        synchronize(device)
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append((time.perf_counter() - start) * 1e3)
    return tuple(
        torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8]).double()).tolist()
    )


def extra_mib(step, device: str) -> float:
    """Most memory during step() over what was there before. On a CPU this is the growth of the process's
    high-water mark, so it means something only for the first large step of a process."""
    if device == "cuda":
        step()  # the libraries' own workspaces are not the step's
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    unit = 1 if platform.system() == "Darwin" else 1024  # of ru_maxrss, in bytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit / 2**20


def matmul_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of one large square product, here and now."""
    n = 8192 if device == "cuda" else 1024
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / milliseconds(lambda: a @ b, device)[0] * 1e3


def device_name(device: str) -> str:
    return (
        torch.cuda.get_device_name() if device == "cuda" else f"a CPU with {torch.get_num_threads()} threads"
    )
