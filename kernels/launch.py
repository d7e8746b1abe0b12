"""Where a kernel may run, and the one way to start it."""

import os
from collections import Counter
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ModuleNotFoundError:  # Triton is built for Linux alone; elsewhere only the torch references run
    triton = TensorDescriptor = None
    tl = SimpleNamespace(constexpr=lambda value: value)

# TRITON_INTERPRET=1 makes every kernel a Python function on CPU tensors. Triton reads it when a kernel is
# defined, so it has to be set before this package is imported.
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
NEEDS = "needs Triton and a CUDA tensor, or TRITON_INTERPRET=1 for the CPU"

launches: Counter[str] = Counter()  # kernel name -> times started in this process


def jit(kernel):
    """triton.jit, where there is Triton."""
    return kernel if triton is None else triton.jit(kernel)


def runs_on(tensor: Tensor) -> bool:
    """Whether Triton can work on `tensor`: one on CUDA, or in the interpreter one on the CPU."""
    return triton is not None and (tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu"))


def use_triton(tensor: Tensor) -> bool:
    """Whether the kernels handle `tensor`: wherever they can, unless TEAMTR_KERNELS=torch.

    TEAMTR_KERNELS=triton insists: it raises where `auto`, the default, would take the torch reference.
    """
    mode = os.environ.get("TEAMTR_KERNELS") or "auto"
    if mode not in ("auto", "triton", "torch"):
        raise ValueError(f"TEAMTR_KERNELS is {mode!r}; it must be auto, triton or torch")
    if mode == "triton" and not runs_on(tensor):
        raise ValueError(f"TEAMTR_KERNELS=triton {NEEDS}; this tensor is on {tensor.device}")
    return mode != "torch" and runs_on(tensor)


def capability(device: torch.device) -> int:
    """Major compute capability: 8 is A100, 9 H100, 10 B200. Elsewhere 9, whose code the interpreter runs."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def start(kernel, programs: int, *arguments, **options) -> None:
    """Run `programs` programs of a kernel, and count the start."""
    launches[kernel.__name__] += 1
    device = next(a for a in arguments if isinstance(a, Tensor)).device
    with torch.cuda.device(device if device.type == "cuda" else -1):  # Triton starts on the current device
        kernel[(programs,)](*arguments, **options)


def power_of_two(size: int) -> int:
    """The least that is no less."""
    return 1 << (size - 1).bit_length()


def warps(block: int) -> int:
    """Of a program that holds `block` numbers at a time."""
    return min(8, max(1, block // 256))


def blocks(dtype: torch.dtype, major: int, H: int) -> dict:
    """The pinned tile of the kernels with a matrix product; compile_report shows what each compiles to.

    Never chosen by N, so that a row's sums are added in the same order in every batch. fp32 runs without
    tensor cores, exact.
    """
    wide = major in (9, 10)  # TMA, matrix products that leave the registers alone, 227 KB of shared memory
    # The compiler unrolls a loop of one step over H (on sm_100, of three), and a full tile would then spill.
    short = H <= (192 if major == 10 else 64)
    if dtype == torch.float32:
        rows, columns, depth, stages = 64, 64, 32, 2
    elif wide:
        rows, columns, depth, stages = 64 if short else 128, 256, 64, 4
    else:
        rows, columns, depth, stages = 64 if short else 128, 128, 64, 3
    tile = {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "TMA": wide}
    return tile | {"num_warps": 8, "num_stages": stages}


def operands(tile: dict, x: Tensor, w: Tensor) -> tuple:
    """x (N, H) and w (V, H) as a product's kernel reads them: TMA descriptors, or without TMA contiguous."""
    if not tile["TMA"]:
        return x.contiguous(), w.contiguous()
    return (
        TensorDescriptor.from_tensor(_aligned(x), [tile["ROWS"], tile["DEPTH"]]),
        TensorDescriptor.from_tensor(_aligned(w), [tile["COLUMNS"], tile["DEPTH"]]),
    )


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy of it as TMA needs it: rows in one piece that begin at multiples of 16 bytes."""
    unit = 16 // x.itemsize
    if x.stride(1) == 1 and x.stride(0) % unit == 0 and x.stride(0) >= x.shape[1] and x.data_ptr() % 16 == 0:
        return x
    copy = x.new_empty(x.shape[0], -(-x.shape[1] // unit) * unit)[:, : x.shape[1]]
    return copy.copy_(x)
