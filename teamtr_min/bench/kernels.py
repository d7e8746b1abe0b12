"""The log-prob kernel beside its peers: time, memory, error and repeatability, in one run on one machine.

Times are put beside the plain matrix products of the same run (one forward; four both ways, with the logits
made twice, as the kernels do it; eager torch and, where one chunk holds them all, our reference keep them and
do three) and beside the floor, their FLOPs at the rate of one large product. Errors are against float64, at
most 512 rows. What no machine here can measure is not printed.
"""

import functools
import importlib
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from teamtr_min.bench.machine import device_name, matmul_rate
from teamtr_min.bench.measure import example, measured, milliseconds, peak_mib, setting
from teamtr_min.objective import teamtr_loss, trust_region_loss

MEMORY_SHAPE = (2048, 896, 151936)  # of the CPU's memory rows: Qwen2.5-0.5B


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What one writes first: all logits, in fp32."""
    return -F.cross_entropy((hidden @ weight.t()).float(), targets, reduction="none")


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's own fused operation, in chunks of tokens."""
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


def liger(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger-Kernel's fused linear cross-entropy, gradients accumulated in fp32."""
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction="none", accum_dtype=torch.float32)
    return -loss(weight, hidden, targets)


def cut(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """cut-cross-entropy without its gradient filter."""
    module = importlib.import_module("cut_cross_entropy")
    return -module.linear_cross_entropy(hidden, weight, targets, reduction="none", impl="cce_exact")


def implementations(device: str) -> dict[str, Callable]:
    found = {"ours": kernels.linear_logprob, "eager torch": eager, "torch.compile": torch.compile(eager)}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13
        found["F.linear_cross_entropy"] = linear_cross_entropy
    if device == "cuda":  # both are Triton and need a GPU
        found |= {"liger-kernel": liger, "cut-cross-entropy": cut}
    return found


def run() -> dict:
    """Everything that `python eval.py kernels` prints, as one object."""
    device, dtype, (N, H, V) = setting()
    data = example(N, H, V, dtype, device)
    rate = matmul_rate(torch.device(device), dtype)
    return {
        "benchmark": "kernels",
        "device": device_name(device),
        "by": "Triton" if kernels.use_triton(data[0]) else "the torch reference",
        "N": N, "H": H, "V": V, "dtype": str(dtype).removeprefix("torch."),
        "matmul_tflops": rate / 1e12,
        "floor_ms": [2 * N * H * V / rate * 1e3, 8 * N * H * V / rate * 1e3],
        "products_ms": products(data[0].detach(), data[1].detach(), device),
        "rows": [measure(name, f, data) for name, f in implementations(device).items()],
        "trust_region": trust_region(N, device),
        "cpu_memory": None if device == "cuda" else [memory(name) for name in ("ours", "eager")],
    }  # fmt: skip


def products(hidden: Tensor, weight: Tensor, device: str) -> list[float]:
    """ms of the plain products: forward alone, and both ways with the logits made twice."""
    one = milliseconds(lambda: hidden @ weight.t(), device)[0]
    dz = hidden @ weight.t()
    two = milliseconds(lambda: (dz @ weight, dz.t() @ hidden), device)[0]
    return [one, 2 * one + two]


def measure(name: str, f: Callable, data: tuple[Tensor, ...]) -> dict:
    """One row of the table; of an implementation that cannot run here, the reason."""
    try:
        row = {"name": name} | measured(f, *data)
    except ModuleNotFoundError as error:
        return {"name": name, "missing": f"pip install {name} to compare ({error})"}
    except Exception as error:  # a peer may refuse this shape, device or torch: that is its row
        return {"name": name, "missing": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:90]}"}
    if not data[0].is_cuda:
        row["peak_mib"] = None  # only the first implementation's would mean something; see `memory`
    return row


def trust_region(N: int, device: str) -> dict:
    """Microseconds of loss, KL and statistics with their gradient, N tokens in messages of 64."""
    logp = (-torch.rand(N, device=device)).requires_grad_()
    old_logp, message = logp.detach() + 0.01, torch.arange(N, device=device) // 64
    advantage = torch.randn(int(message[-1]) + 1, device=device)
    times = {"tokens": N}
    for name, f in (("ours_us", trust_region_loss), ("definition_us", teamtr_loss)):
        step = functools.partial(f, logp, old_logp, message, advantage, beta=0.1)
        times[name] = milliseconds(lambda step=step: step()[0].backward(), device, 0.5)[0] * 1e3
    return times


def memory(name: str) -> dict:
    """Peak of one step on the CPU, read in a process of its own."""
    command = [sys.executable, "-m", "teamtr_min.bench.kernels", name]
    done = subprocess.run(command, capture_output=True, text=True)
    mib = float(done.stdout) if done.returncode == 0 else None
    return {"name": name, "shape": list(MEMORY_SHAPE), "peak_mib": mib}


def memory_of(name: str) -> float:
    f = {"ours": kernels.linear_logprob, "eager": eager}[name]
    return peak_mib(f, *example(*MEMORY_SHAPE, torch.float32, "cpu"))


def table(result: dict) -> str:
    N, H, V, dtype, device = (result[name] for name in ("N", "H", "V", "dtype", "device"))
    (product, products), (floor, floors) = result["products_ms"], result["floor_ms"]
    trust, memory_rows = result["trust_region"], result["cpu_memory"] or ()
    lines = [f"log-probs of {N:,} tokens, H {H:,}, V {V:,}, {dtype}, on {device}; ours is {result['by']}"]
    if memory_rows:
        lines.append("this is a CPU and a small shape; on a GPU: not measured yet")
    lines += [
        f"matrix rate {result['matmul_tflops']:.2f} TFLOP/s; plain products {product:.1f} ms forward, "
        f"{products:.1f} both ways; floors {floor:.1f} and {floors:.1f}",
        f"{'ms (p20-p80)':24}{'forward':>24}{'both ways':>24}{'products':>9}{'floor':>6}{'MiB':>6}"
        f"{'logp err':>9}{'dX':>8}{'dW':>8}  same bits",
    ]
    for row in result["rows"]:
        if "missing" in row:
            lines.append(f"{row['name']:24}{row['missing']}")
            continue
        both, peak = row["both_ms"][0], row["peak_mib"]
        times = (f"{ms:.1f} ({low:.1f}-{high:.1f})" for ms, low, high in (row["forward_ms"], row["both_ms"]))
        cells = "".join(f"{cell:>24}" for cell in times) + f"{products / both:>9.0%}{floors / both:>6.0%}"
        cells += f"{'-' if peak is None else round(peak):>6}{row['error'][0]:>9.1e}"
        cells += "".join(f"{error:>8.0e}" for error in row["error"][1:])
        lines.append(f"{row['name']:24}{cells}  {'yes' if row['repeats'] else 'NO'}")
    lines += [
        "products, floor: their share of the time both ways; MiB: over inputs and gradients; dX, dW: largest "
        "error over largest entry",
        f"trust-region loss and gradient of {trust['tokens']:,} tokens: {trust['ours_us']:.0f} us, "
        f"as defined in plain torch {trust['definition_us']:.0f} us",
    ]
    for row in memory_rows:
        peak = "failed (out of memory?)" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f} MiB"
        lines.append(f"CPU memory, {row['name']}, (N, H, V) = {tuple(row['shape'])} in fp32: {peak}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(memory_of(sys.argv[1]))
