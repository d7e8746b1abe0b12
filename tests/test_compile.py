"""The kernels, built on this machine for GPUs that it need not have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
KERNELS = "logprob_strips logprob_dlogits trust_messages trust_agents trust_gradient rms_norm_forward "
KERNELS += "rms_norm_backward rotary swiglu_forward swiglu_backward decode_attend decode_merge decode_draw"


def test_every_kernel_builds_without_spilling_and_with_wgmma():
    """In a process of its own: here Triton may have been told to interpret instead of compile."""
    command = [sys.executable, "-m", "kernels.compile_report", "--hidden", "64", "1536"]
    root, environment = Path(__file__).parents[1], os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    columns, *rows = map(str.split, done.stdout.splitlines())
    rows = [dict(zip(columns, row, strict=True)) for row in rows]
    for arch in ("80", "90", "100"):
        built = [row for row in rows if row["arch"] == arch]
        assert {row["kernel"].split("+")[0] for row in built} == set(KERNELS.split())
        assert all(row["spill_bytes"] == "0" < row["registers"] for row in built)
        products = [row for row in built if row["wgmma"] != "-"]
        assert [row["H"] for row in products] == ["64"] * 3 + ["1536"] * 3
        assert all(row["wgmma"] == str(arch == "90") for row in products)
