"""Compile every kernel for GPUs that are not here, and say what came out.

    python -m kernels.compile_report [--hidden 64 896 1536 2048 3584]

Triton brings its own assembler, so a machine without a GPU builds the code that an A100 (sm_80), H100 (sm_90)
or B200 (sm_100) would run. The product's own functions are called on tensors without storage, and each launch
is compiled instead of started. Exit code 1 if a kernel does not compile, spills registers, needs more shared
memory than there is, or if on sm_90 its large matrix product is not wgmma.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from functools import partial
from types import SimpleNamespace

import torch

from kernels import decode, layer, trust_region
from kernels.launch import INTERPRETED, triton

logprob = importlib.import_module("kernels.linear_logprob")  # the package's name for it is the function
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have, by architecture
HEADS = {64: (4, 2, 16), 896: (14, 2, 64), 1536: (12, 2, 128), 2048: (16, 2, 128), 3584: (28, 4, 128)}
N, B, V = 16384, 256, 151936  # tokens of a training step, rows of a decode step, vocabulary
COLUMNS = ("kernel", "arch", "H", "dtype", "registers", "spill_bytes", "shared_bytes", "wgmma")


def calls(H: int) -> list[tuple]:
    """(variant, function, arguments) of all that training and decoding with a model of this size start."""
    Q, K, D = HEADS[H]
    empty = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    ids, floats = empty(N, dtype=torch.int64), empty(N, dtype=torch.float32)
    x, weight, qkv, norm = empty(B, H), empty(H), empty(B, (Q + 2 * K) * D), empty(D)
    table, cache = empty(2048, 1, D), empty(B, K, 1040, D)
    entropy, loss = partial(logprob.linear_logprob_stats, entropy=True), trust_region.trust_region_loss
    tokens, ratios = (floats, floats, ids, floats[:512]), trust_region.RATIOS
    return [
        ("", logprob.linear_logprob, empty(N, H), empty(V, H), ids),
        ("+entropy", entropy, empty(N, H), empty(V, H), ids),
        *((f"+{ratio}", partial(loss, ratio=ratio), *tokens) for ratio in ratios),
        ("", layer.rms_norm, x, weight, 1e-6),
        ("", layer.rotate, qkv.view(1, B, Q + 2 * K, D), table[None, :B], table[None, :B]),
        ("", layer.swiglu, empty(B, 2 * H)),
        ("+product", layer.swiglu, empty(B, 2 * H), empty(H, H).requires_grad_()),
        ("", decode.attend_cached, qkv, table, table, ids[:B], cache, cache),
        ("+fp32", decode.attend_cached, qkv.float(), *[table.float()] * 2, ids[:B], *[cache.float()] * 2),
        ("+norms", decode.attend_cached, qkv, table, table, ids[:B], cache, cache, (norm, norm), 1e-6),
        ("", decode.draw, empty(B, V, dtype=torch.float32), floats[:B], 1.0),
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[*HEADS], choices=HEADS, help="hidden sizes")
    hidden = parser.parse_args().hidden
    if triton is None or INTERPRETED:
        sys.exit("error: compiling needs Triton (Linux), and TRITON_INTERPRET unset")
    rows, failures = {}, []

    def build(kernel, programs, *arguments, **options):
        """In the place of `launch.start`."""
        built = kernel.warmup(*arguments, grid=(programs,), **options)
        if built.hash in rows:  # one build serves every H, or every ratio
            return
        dtype = str(getattr(arguments[0], "base", arguments[0]).dtype).removeprefix("torch.")
        wgmma = "wgmma.mma_async" in built.asm["ptx"] if "DEPTH" in options else "-"  # of products alone
        shared, (registers, spilled) = built.metadata.shared, resources(built.asm["cubin"])
        size = H if "H" in options or "D" in options else "-"
        rows[built.hash] = (kernel.__name__ + variant, arch, size, dtype, registers, spilled, shared, wgmma)
        if spilled or shared > SHARED_LIMIT[arch] or (arch == 90 and wgmma is False):
            failures.append(f"spills, takes too much shared memory or has no wgmma: {rows[built.hash]}")

    for module in (logprob, trust_region, layer, decode):
        module.start, module.use_triton = build, lambda tensor: True
    for arch in SHARED_LIMIT:
        torch.cuda.get_device_capability = lambda device, major=arch // 10: (major, 0)
        target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
        answers = {"target": target, "device": arch, "stream": 0}  # of a GPU's driver
        driver = {f"get_current_{name}": lambda *_, value=value: value for name, value in answers.items()}
        triton.runtime.driver.set_active(SimpleNamespace(**driver))
        for H in hidden:
            for variant, function, x, *others in calls(H):
                try:
                    out = function(x.requires_grad_(), *others)
                    out = out[0] if isinstance(out, tuple) else out
                    if out.requires_grad:
                        out.backward(torch.empty_like(out))
                except Exception as error:  # whatever the compiler raises is the finding
                    failures.append(f"{function}{variant} on sm_{arch} at H {H}: {error}")
    for row in (COLUMNS, *rows.values()):
        print(("{:24}" + "{:>13}" * 7).format(*map(str, row)))
    print(*failures, sep="\n", end="", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
