"""The kernels, built on this machine for GPUs that it need not have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
KERNELS = "logprob_strips logprob_dlogits trust_messages trust_agents rms_norm_forward "
KERNELS += "rms_norm_backward rotary swiglu_kernel decode_attend decode_merge decode_draw"


def test_every_kernel_builds_for_every_gpu_without_spilling():
    """In a process of its own: here Triton may have been told to interpret instead of compile."""
    command = [sys.executable, "-m", "kernels.compile_report", "64", "1536"]
    root, environment = Path(__file__).parents[1], os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    for arch in ("sm_80", "sm_90", "sm_100"):
        assert {row[0] for row in rows if row[1] == arch} == set(KERNELS.split())
    assert all(int(row[4]) > 0 == int(row[6]) for row in rows)
