"""Compile every kernel for GPUs that are not here, and say what came out.

    python -m kernels.compile_report [hidden sizes, such as 64 1536]

A machine without a GPU builds the code that an A100 (sm_80), H100 (sm_90) or B200 (sm_100) would run: the
product's own functions are called on tensors without storage, and each launch is compiled instead of started.
Exit code 1 if a kernel does not compile or spills registers.
"""

import importlib
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget

from kernels import decode, layer, trust_region
from kernels.launch import triton
from kernels.trust_region import RATIOS, trust_region_loss

logprob = importlib.import_module("kernels.linear_logprob")  # the package's name for it is the function
HEADS = {64: (4, 2, 16), 896: (14, 2, 64), 1536: (12, 2, 128), 2048: (16, 2, 128), 3584: (28, 4, 128)}
N, B, V = 16384, 256, 151936  # tokens of a training step, rows of a decode step, vocabulary


def calls(H: int) -> list[tuple]:  # (function, arguments) of training and decoding with this hidden size
    Q, K, D = HEADS[H]
    empty = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    ids, floats = empty(N, dtype=torch.int64), empty(N, dtype=torch.float32)
    x, weight, qkv, norm = empty(B, H), empty(H), empty(B, (Q + 2 * K) * D), empty(D)
    table, cache = empty(2048, 1, D), empty(B, K, 1040, D)
    return [
        (logprob.linear_logprob, empty(N, H), empty(V, H), ids),
        (partial(logprob.linear_logprob_stats, entropy=True), empty(N, H), empty(V, H), ids),
        *((partial(trust_region_loss, ratio=r), floats, floats, ids, floats[:512]) for r in RATIOS),
        (layer.rms_norm, x, weight, 1e-6),
        (layer.rotate, qkv.view(1, B, Q + 2 * K, D), table[None, :B], table[None, :B]),
        (layer.swiglu, empty(B, 2 * H)),
        (layer.swiglu, empty(B, 2 * H), empty(H, H).requires_grad_()),
        (decode.attend_cached, qkv, table, table, ids[:B], cache, cache),
        (decode.attend_cached, qkv.float(), *[table.float()] * 2, ids[:B], *[cache.float()] * 2),
        (decode.attend_cached, qkv, table, table, ids[:B], cache, cache, (norm, norm), 1e-6),
        (decode.draw, empty(B, V, dtype=torch.float32), floats[:B], 1.0),
    ]


def main() -> int:
    spills = {}

    def build(kernel, programs, *arguments, **options):  # in the place of `launch.start`
        built = kernel.warmup(*arguments, grid=(programs,), **options)
        if built.hash in spills:  # one build serves every H, or every ratio
            return
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(built.asm["cubin"])
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage).groups())
        spilled = spills[built.hash] = stack + local  # bytes; these kernels use a stack for nothing else
        print(f"{kernel.__name__:18} sm_{arch:<4} H {H:<5} {registers:4} registers {spilled:4} bytes spilled")

    for module in (logprob, trust_region, layer, decode):
        module.start, module.use_triton = build, lambda tensor: True
    for arch in (80, 90, 100):
        torch.cuda.get_device_capability = lambda device, major=arch // 10: (major, 0)
        current = {"target": GPUTarget("cuda", arch, 32), "device": arch, "stream": 0}
        driver = {f"get_current_{name}": lambda *_, value=value: value for name, value in current.items()}
        triton.runtime.driver.set_active(SimpleNamespace(**driver))
        for H in map(int, sys.argv[1:] or HEADS):
            for function, x, *others in calls(H):
                out = function(x.requires_grad_(), *others)
                out = out[0] if isinstance(out, tuple) else out
                if out.requires_grad:
                    out.backward(torch.empty_like(out))
    return int(any(spills.values()))


if __name__ == "__main__":
    sys.exit(main())
