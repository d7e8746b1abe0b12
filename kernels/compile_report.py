"""Compile every kernel for GPUs that are not here, and say what came out.

    python -m kernels.compile_report [--json] [--hidden 64 896 1536 2048 3584]

Triton brings its own assembler, so a machine without a GPU builds the very code that an A100 (sm_80), H100
(sm_90) or B200 (sm_100) would run. The product's own functions are called on tensors without storage, and
each launch is compiled instead of started: block sizes and argument types are the ones in use. Exit code 1 if
a kernel does not compile, spills registers, needs more shared memory than there is, or if on sm_90 its large
matrix product is not wgmma.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import torch

from kernels import decode, layer
from kernels import trust_region as trust
from kernels.launch import INTERPRETED, triton

logprob = importlib.import_module("kernels.linear_logprob")  # the package's name for it is the function
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have, by architecture
HEADS = {64: (4, 2, 16), 896: (14, 2, 64), 1536: (12, 2, 128), 2048: (16, 2, 128), 3584: (28, 4, 128)}
COLUMNS = ("kernel", "arch", "H", "V", "dtype", "registers", "spill_bytes", "shared_bytes", "wgmma")


def calls(H: int, N: int = 16384, B: int = 256, V: int = 151936) -> list[tuple]:
    """(variant, function, arguments) of all that training on N tokens and decoding B rows start."""
    Q, K, D = HEADS.get(H, (H // 64, H // 64, 64))

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    ids, floats, x = empty(N, dtype=torch.int64), empty(N, dtype=torch.float32), empty(B, H)
    qkv, norm, cache, table = empty(B, (Q + 2 * K) * D), empty(D), empty(B, K, 1040, D), empty(2048, 1, D)

    def both_ways(function, x, *others):
        out = function.apply(x.clone().requires_grad_(), *others)
        out = out[0] if isinstance(out, tuple) else out
        out.backward(torch.empty_like(out))

    each = floats[:512], floats[:512], ids[:512], floats[:3]  # advantage, weight, agent, beta
    losses = [(f"+{ratio}", (floats, ids, *each, 0.2, ratio, "message")) for ratio in trust.RATIOS]
    return [
        ("", logprob.logprob_triton, empty(N, H), empty(V, H), ids, 1.0, False),
        ("+entropy", logprob.logprob_triton, empty(N, H), empty(V, H), ids, 1.0, True),
        ("", logprob.dlogits_triton, empty(N, H), empty(V, H), ids, floats, floats, slice(0, 3584), 1.0),
        *((variant, both_ways, trust.TrustRegion, floats, *others) for variant, others in losses),
        ("", both_ways, layer.RMSNorm, x, x[0], 1e-6, True),
        ("", both_ways, layer.Rotary, qkv.view(1, B, Q + 2 * K, D), table[None], table[None], 1.0),
        ("", both_ways, layer.SwiGLU, empty(B, 2 * H), None, True),
        ("+product", both_ways, layer.SwiGLU, empty(B, 2 * H), empty(H, H).requires_grad_(), True),
        ("", decode.attend_cached, qkv, table, table, ids[:B], cache, cache),
        ("+norms", decode.attend_cached, qkv, table, table, ids[:B], cache, cache, (norm, norm), 1e-6),
        ("", decode.draw_triton, empty(B, V, dtype=torch.float32), floats[:B], 1.0),
    ]


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, which these kernels use only to spill registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)


def report(hidden: list[int]) -> tuple[list[dict], list[str]]:
    """One row per kernel, shape and architecture, and a sentence for each failure."""
    rows, failures, seen = [], [], set()

    def build(kernel, programs, *arguments, **options):
        """In the place of `launch.start`."""
        built = kernel.warmup(*arguments, grid=(programs,), **options)
        if built.hash in seen:  # one build serves every H, or every ratio
            return
        seen.add(built.hash)
        product, sized = "DEPTH" in options, "H" in options or "D" in options
        dtype = str(getattr(arguments[0], "base", arguments[0]).dtype).removeprefix("torch.")
        wgmma = "wgmma.mma_async" in built.asm["ptx"] if product else None
        shared, (registers, spilled) = built.metadata.shared, resources(built.asm["cubin"])
        cells = kernel.__name__ + variant, arch, H if sized else None, 151936 if product else None, dtype
        rows.append(dict(zip(COLUMNS, (*cells, registers, spilled, shared, wgmma))))
        if spilled or shared > SHARED_LIMIT[arch] or (arch == 90 and wgmma is False):
            failures.append(f"spills, takes too much shared memory or has no wgmma: {rows[-1]}")

    for module in (logprob, trust, layer, decode):
        module.start = build
    for arch in SHARED_LIMIT:
        logprob.capability = lambda device, major=arch // 10: major
        target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
        answers = {"target": target, "device": arch, "stream": 0}  # of a GPU's driver
        driver = {f"get_current_{name}": lambda *_, value=value: value for name, value in answers.items()}
        triton.runtime.driver.set_active(SimpleNamespace(**driver))
        for H in hidden:
            for variant, function, *arguments in calls(H):
                try:
                    function(*arguments)
                except Exception as error:  # whatever the compiler raises is the finding
                    failures.append(f"{function.__name__}{variant} on sm_{arch} at H {H}: {error}")
    return rows, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object per row, nothing else")
    parser.add_argument("--hidden", type=int, nargs="+", default=[*HEADS], help="hidden sizes")
    flags = parser.parse_args()
    if triton is None or INTERPRETED:
        sys.exit("error: compiling needs Triton (Linux), and TRITON_INTERPRET unset")
    rows, failures = report(flags.hidden)
    for row in rows if flags.json else [dict(zip(COLUMNS, COLUMNS)), *rows]:
        cells = ["-" if cell is None else str(cell) for cell in row.values()]
        print(json.dumps(row) if flags.json else ("{:24}" + "{:>13}" * 8).format(*cells))
    for failure in failures:
        print(f"failure: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
