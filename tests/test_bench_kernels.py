"""`python eval.py kernels` at a toy shape; the memory rows, which need half a minute, are made up."""

import json

import pytest
import torch

import eval as evaluation
from teamtr_min.bench import kernels as bench


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", {"cpu": (8, 16, 40), "cuda": (8, 16, 40)})
    monkeypatch.setattr(bench, "matmul_rate", lambda dtype, device: 1e12)
    monkeypatch.setattr(bench, "milliseconds", lambda step, device, seconds=1.0: (step(), (2.0, 1.0, 3.0))[1])
    monkeypatch.setattr(bench, "memory", lambda name: {"name": name, "shape": [8, 16, 40], "peak_mib": None})

    def broken(hidden, weight, targets):
        raise RuntimeError("not on this machine")

    peers = {"ours": bench.kernels.linear_logprob, "eager torch": bench.eager, "broken": broken}
    monkeypatch.setattr(bench, "implementations", lambda device: peers)


def test_one_table_and_one_object(toy, capsys):
    assert evaluation.main(["kernels", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    ours, eager, broken = result["rows"]
    assert ours["repeats"] and max(ours["error"] + eager["error"]) < (
        1e-2 if torch.cuda.is_available() else 1e-5
    )
    assert broken["missing"] == "RuntimeError: not on this machine"
    assert evaluation.main(["kernels"]) == 0
    text = capsys.readouterr().out
    assert "ours" in text and "not on this machine" in text
    assert torch.cuda.is_available() or "on a GPU: not measured yet" in text
