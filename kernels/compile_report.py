"""Compile every kernel for GPUs that are not here, and say what came out.

    python -m kernels.compile_report [--json] [--hidden 64 896 1536 2048 3584]

Triton brings its own assembler, so a machine without a GPU builds the very code that an A100 (sm_80), H100
(sm_90) or B200 (sm_100) would run. The launches are recorded from the product's own calls on tensors without
storage, so block sizes and argument types are the ones in use. Exit code 1 if a kernel does not compile, if
one spills registers, if on sm_90 that product is not wgmma, or if one does not fit.
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch

from kernels import decode, layer
from kernels import trust_region as trust
from kernels.launch import INTERPRETED, triton

logprob = importlib.import_module("kernels.linear_logprob")  # the package's name for it is the function
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a program may have, by architecture
HIDDEN = (64, 896, 1536, 2048, 3584)  # the models that ship; Qwen2.5 0.5B, 1.5B, 3B and 7B
HEADS = {
    64: (4, 2, 16),
    896: (14, 2, 64),
    1536: (12, 2, 128),
    2048: (16, 2, 128),
    3584: (28, 4, 128),
}  # Q, K, D
N, V = 16384, 151936
COLUMNS = ("kernel", "arch", "H", "V", "dtype", "registers", "spill_bytes", "shared_bytes", "wgmma")


def launches(arch: int, H: int) -> dict[str, tuple]:
    """name -> (kernel, arguments, options) of every kernel that a training or decode step may start."""
    found, suffix = {}, ""

    def record(kernel, programs, *arguments, **options):
        found.setdefault(kernel.__name__ + suffix, (kernel, arguments, options))

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype, device="meta")

    hidden, weight = empty(N, H, dtype=torch.bfloat16), empty(V, H, dtype=torch.bfloat16)
    ids, floats = empty(N, dtype=torch.int64), empty(N)
    with (
        patch.object(logprob, "capability", lambda device: arch // 10),
        patch.object(logprob, "start", record),
        patch.object(trust, "start", record),
    ):
        for suffix in ("", "+entropy"):
            logprob._forward_triton(hidden, weight, ids, 1.0, suffix == "+entropy")
        suffix = ""
        logprob._dlogits_triton(hidden, weight, ids, floats, floats, slice(0, 3584), 1.0)
        for ratio in trust.RATIOS:
            suffix = f"+{ratio}"
            logp = floats.clone().requires_grad_()
            loss, _ = trust._TrustRegion.apply(
                logp, floats, ids, empty(512), empty(512), ids[:512], empty(3), 0.2, ratio, "message"
            )
            loss.backward()
    suffix, B, (Q, K, D) = "", 256, HEADS.get(H, (H // 64, H // 64, 64))
    with patch.object(decode, "start", record), patch.object(layer, "start", record):
        x, cache = (empty(*shape, dtype=torch.bfloat16) for shape in ((B, H), (B, K, 1040, D)))
        table, at = empty(2048, 1, D, dtype=torch.bfloat16), ids[:B]
        layer.norm_forward(x, x[0], 1e-6)
        qkv, logits = empty(B, (Q + 2 * K) * D, dtype=torch.bfloat16), empty(B, V)
        query = decode.rope_store(qkv, table, table, at, cache, cache, Q)
        decode.attend_cached(query, cache, cache, at)
        layer.silu_mul(*x.chunk(2, 1))
        suffix = "+training"
        layer.norm_forward(x, x[0], 1e-6, floats[:B])
        layer._norm_backward(x, x[0], floats[:B], x)
        layer._turn(empty(1, B, Q, D, dtype=torch.bfloat16), table[None], table[None], -1.0)
        layer._swiglu_backward(x, x, x, again=True)
        decode.draw(logits, floats[:B], 1.0)
        suffix = "+without product"
        layer._swiglu_backward(x, x, x, again=False)
        suffix = "+norms"
        decode.rope_store(qkv, table, table, at, cache, cache, Q, (x[0, :D], x[0, :D]), 1e-6)
        suffix = "+greedy"
        decode.draw(logits, floats[:B], 0.0)
    return found


def compiled(kernel, arguments: tuple, options: dict, arch: int):
    """The kernel, built for `arch` as a launch with these arguments would build it."""
    named = dict(zip(kernel.arg_names, arguments))
    settings = {name: options[name] for name in ("num_warps", "num_stages") if name in options}
    constants = {name: value for name, value in options.items() if name not in settings}
    constants |= {
        name: value
        for name, value in named.items()
        if value is None or (isinstance(value, int) and value == 1)
    }
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = named.get(name)
        signature[name] = "constexpr" if name in constants else triton.runtime.jit.mangle_type(value)
        aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned and name not in constants:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget("cuda", arch, 32)
    return triton.compile(source, target=target, options=settings)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of stack, which these kernels use only to spill registers."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text).groups()
    return int(registers), int(stack) + int(local)


def report(hidden: list[int]) -> tuple[list[dict], list[str]]:
    """One row per kernel, shape and architecture, and a sentence for each failure."""
    rows, failures, seen = [], [], set()
    for arch, limit in SHARED_LIMIT.items():
        for H in hidden:
            for name, (kernel, arguments, options) in launches(arch, H).items():
                matrix, sized = "H" in options, "H" in options or "D" in options
                row = dict.fromkeys(COLUMNS) | {"kernel": name, "arch": arch}
                row |= {"H": H if sized else None, "V": V if matrix else None}
                row["dtype"] = str(next(a.dtype for a in arguments if hasattr(a, "dtype"))).split(".")[1]
                where = f"{name} on sm_{arch}" + (f" at H {H}" if sized else "")
                try:
                    built = compiled(kernel, arguments, options, arch)
                except Exception as error:  # whatever the compiler raises is the finding
                    rows.append(row)
                    failures.append(f"{where} does not compile: {error}")
                    continue
                if built.hash in seen:  # one build serves every H, or every ratio
                    continue
                seen.add(built.hash)
                rows.append(row)
                row["registers"], row["spill_bytes"] = resources(built.asm["cubin"])
                row["shared_bytes"] = built.metadata.shared
                if row["shared_bytes"] > limit:
                    failures.append(f"{where} needs {row['shared_bytes']} bytes of shared memory")
                if row["spill_bytes"]:
                    failures.append(f"{where} spills {row['spill_bytes']} bytes")
                if matrix:
                    row["wgmma"] = "wgmma.mma_async" in built.asm["ptx"]
                    if arch == 90 and not row["wgmma"]:
                        failures.append(f"{where} does not use wgmma")
    return rows, failures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per row, nothing else")
    parser.add_argument(
        "--hidden", type=int, nargs="+", default=HIDDEN, help="hidden sizes (default: %(default)s)"
    )
    flags = parser.parse_args(argv)
    if triton is None or INTERPRETED:
        print("error: compiling needs Triton (Linux), and TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    rows, failures = report(flags.hidden)
    if flags.json:
        print(*(json.dumps(row) for row in rows), sep="\n")
    else:
        width = max(len(row["kernel"]) for row in rows)
        print(f"{COLUMNS[0]:{width}}", *(f"{name:>12}" for name in COLUMNS[1:]))
        for row in rows:
            cells = ("-" if row[name] is None else str(row[name]) for name in COLUMNS[1:])
            print(f"{row['kernel']:{width}}", *(f"{cell:>12}" for cell in cells))
    for failure in failures:
        print(f"failure: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
