"""The kernels, built on this machine for GPUs that it need not have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent


def test_every_kernel_builds_without_spilling_and_with_wgmma():
    """In a process of its own: here Triton may have been told to interpret instead of compile."""
    command = [sys.executable, "-m", "kernels.compile_report", "--json", "--hidden", "64", "1536"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    columns = ["kernel", "arch", "H", "V", "dtype", "registers", "spill_bytes", "shared_bytes", "wgmma"]
    assert all(list(row) == columns and row["registers"] > 0 for row in rows)
    kernels = {"logprob_strips", "logprob_dlogits", "trust_messages", "trust_agents", "trust_gradient"}
    kernels |= {"rms_norm_forward", "rms_norm_backward", "rotary", "swiglu_forward", "swiglu_backward"}
    kernels |= {"decode_attend", "decode_merge", "decode_draw"}
    for arch in (80, 90, 100):
        built = [row for row in rows if row["arch"] == arch]
        assert {row["kernel"].split("+")[0] for row in built} == kernels
        products = [row for row in built if row["V"]]
        assert [row["H"] for row in products] == [64] * 3 + [1536] * 3
        assert all(row["spill_bytes"] == 0 for row in built)
        assert all(row["wgmma"] == (arch == 90) for row in products)
