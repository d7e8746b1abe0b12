"""The kernels' benchmarks at a toy shape; the memory rows, which need half a minute, are made up."""

import json

import pytest
import torch

import eval as evaluation
import kernels
from teamtr_min.bench import kernels as bench
from teamtr_min.bench import measure

BOUND = 1e-2 if torch.cuda.is_available() else 1e-5


@pytest.fixture
def toy(monkeypatch):
    device, dtype, _ = measure.setting()

    def broken(hidden, weight, targets):
        raise RuntimeError("not on this machine")

    peers = {"ours": kernels.linear_logprob, "eager torch": bench.eager, "broken": broken}
    monkeypatch.setattr(bench, "implementations", lambda device: peers)
    monkeypatch.setattr(bench, "memory", lambda name: {"name": name, "shape": [8, 16, 40], "peak_mib": None})
    monkeypatch.setattr(bench, "setting", lambda: (device, dtype, (8, 16, 40)))
    monkeypatch.setattr(bench, "matmul_rate", lambda dtype, device: 1e12)
    for user in (bench, measure):
        monkeypatch.setattr(user, "milliseconds", lambda step, *_: (step(), (2.0, 1.0, 3.0))[1])


def test_one_table_and_one_object(toy, capsys):
    assert evaluation.main(["kernels", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    ours, eager, broken = result["rows"]
    assert ours["repeats"] and max(ours["error"] + eager["error"]) < BOUND
    assert (ours["peak_mib"] is None) == (result["device"].startswith("a CPU"))
    assert broken["missing"] == "RuntimeError: not on this machine"
    assert evaluation.main(["kernels"]) == 0
    text = capsys.readouterr().out
    assert "ours" in text and "not on this machine" in text
    assert torch.cuda.is_available() or "on a GPU: not measured yet" in text


def test_the_memory_gauge_takes_the_gradients_off_once(monkeypatch):
    """They are allocated within the step that is gauged, and its warm-up must leave none behind."""
    data = measure.example(8, 16, 40, torch.float32, "cpu")

    def gauge(step, device):
        step()
        assert data[0].grad is None and data[1].grad is None
        return 1.0

    monkeypatch.setattr(measure, "extra_mib", gauge)
    assert measure.peak_mib(bench.eager, *data) == 1 - (8 * 16 + 40 * 16) * 4 / 2**20
