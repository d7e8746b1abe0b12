"""Chosen before any test imports Triton, which reads TRITON_INTERPRET while it defines the kernels.

Without a GPU the whole suite runs with Triton's interpreter at hand, so that kernel tests execute the kernels
themselves, and with TEAMTR_KERNELS=torch, so that all other tests take the fast references.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("TEAMTR_KERNELS", "torch")


@pytest.fixture
def launches(monkeypatch):
    """The test runs the kernels; the counter says which started, and none at all is a failure."""
    from kernels.launch import launches

    monkeypatch.setenv("TEAMTR_KERNELS", "triton")
    launches.clear()
    yield launches
    assert launches, "no kernel was started: this test ran on the torch reference"
