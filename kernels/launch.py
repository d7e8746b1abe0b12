"""Where a kernel may run, and the one way to start it."""

import os
from collections import Counter
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    import triton.tools.tensor_descriptor  # which `import triton` leaves out
    from triton import jit
except ModuleNotFoundError:  # Triton is built for Linux alone; elsewhere only the torch references run
    triton, tl, jit = None, SimpleNamespace(constexpr=lambda value: value), lambda kernel: kernel

# Triton reads TRITON_INTERPRET=1, which makes every kernel a Python function on CPU tensors, when a kernel is
# defined: it has to be set before this package is imported.
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
UPCAST = tl.constexpr(INTERPRETED)  # whether products take fp32: the interpreter's in bf16 are wrong
launches: Counter[str] = Counter()  # kernel name -> times started in this process


def use_triton(tensor: Tensor) -> bool:
    """Whether the kernels handle `tensor`: wherever they can, unless TEAMTR_KERNELS=torch. Where they cannot,
    TEAMTR_KERNELS=triton raises ValueError, and `auto`, the default, takes the torch reference."""
    mode = os.environ.get("TEAMTR_KERNELS") or "auto"
    if mode not in ("auto", "triton", "torch"):
        raise ValueError(f"TEAMTR_KERNELS is {mode!r}; it must be auto, triton or torch")
    able = triton is not None and (tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu"))
    if mode == "triton" and not able:
        raise ValueError(f"TEAMTR_KERNELS=triton needs CUDA or TRITON_INTERPRET=1, not {tensor.device} alone")
    return mode != "torch" and able


def start(kernel, programs: int, *arguments, **options) -> None:
    """Run `programs` programs of a kernel, and count the start; for 0 there is nothing to do."""
    if programs == 0:
        return
    launches[kernel.__name__] += 1
    device = next(a for a in arguments if isinstance(a, Tensor)).device
    with torch.cuda.device(device if device.type == "cuda" else -1):  # Triton starts on the current device
        kernel[(programs,)](*arguments, **options)
