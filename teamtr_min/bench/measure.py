"""Of the kernels' benchmark: an example, a clock, a memory gauge, and one implementation's figures."""

import platform
import resource
import time
from collections.abc import Callable

import torch
from torch import Tensor

CHECKED_ROWS = 512  # float64 logits of more would not fit


def setting() -> tuple[str, torch.dtype, tuple[int, int, int]]:
    """Device, dtype and (N, H, V) to measure at on this machine."""
    if torch.cuda.is_available():
        return "cuda", torch.bfloat16, (16384, 1536, 151936)
    return "cpu", torch.float32, (512, 256, 8192)


def example(N: int, H: int, V: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """hidden (N, H), weight (V, H), targets (N,), dL/dlogp (N,); logits spread by 4."""
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, H, generator=g, device=device).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g, device=device).mul_(4 / H**0.5).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=g, device=device)
    return hidden, weight, targets, torch.randn(N, generator=g, device=device) / N


def milliseconds(step: Callable, device: str, seconds: float = 1.0) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of step()'s time, from at least 3 runs after one to warm up."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    step()
    times, begin = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds and len(times) < 200:
        synchronize()
        start = time.perf_counter()
        step()
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    shares = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    return tuple(torch.tensor(times, dtype=torch.float64).quantile(shares).tolist())


def extra_mib(step: Callable, device: str) -> float:
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


def both_ways(f: Callable, hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor, rows: int) -> tuple:
    """logp, dX and dW of the first `rows` tokens, by an implementation f of linear_logprob."""
    hidden.grad = weight.grad = None
    logp = f(hidden[:rows], weight, targets[:rows])
    logp.backward(grad[:rows].to(logp.dtype))
    return logp.detach(), hidden.grad, weight.grad


def peak_mib(f: Callable, hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor) -> float:
    """Most memory that f takes both ways, over its inputs and their gradients."""

    def step() -> None:
        both_ways(f, hidden, weight, targets, grad, len(hidden))
        hidden.grad = weight.grad = None  # what is here before the gauge's next step must not include them

    return extra_mib(step, hidden.device.type) - (hidden.nbytes + weight.nbytes) / 2**20


def measured(f: Callable, hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor) -> dict:
    """Times, memory, repeatability and error of an implementation f of linear_logprob.

    The error is against float64, of CHECKED_ROWS: nats for logp; for dX and dW a share of the largest entry.
    """
    data, device = (hidden, weight, targets, grad), hidden.device.type

    def forward() -> None:
        with torch.no_grad():
            f(hidden, weight, targets)

    row = {"peak_mib": peak_mib(f, *data)}  # first, for the sake of a CPU
    row["forward_ms"] = milliseconds(forward, device)
    row["both_ms"] = milliseconds(lambda: both_ways(f, *data, len(hidden)), device)
    got, again = (both_ways(f, *data, CHECKED_ROWS) for _ in range(2))
    row["repeats"] = all(torch.equal(a, b) for a, b in zip(got, again))

    def by_definition(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
        return (x @ w.t()).log_softmax(1).gather(1, ids[:, None])[:, 0]

    x, w = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    exact = both_ways(by_definition, x, w, targets, grad, CHECKED_ROWS)
    off = [(a.double() - b).abs().max().item() for a, b in zip(got, exact)]
    sizes = (1.0, *(b.abs().max().item() for b in exact[1:]))
    return row | {"error": [error / size for error, size in zip(off, sizes)]}
