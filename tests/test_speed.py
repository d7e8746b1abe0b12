"""eval.py kernels, sampling, training at toy sizes; how contestants are compared; floors by hand."""

import pytest
import torch
from toy_runs import evaluate

from teamtr_min.bench import speed
from teamtr_min.bench.speed import Case, Machine


def work(count: int):
    """Work whose time is proportional to `count`; it returns a tensor."""
    a = torch.ones(400, 400)

    def run() -> tuple[torch.Tensor]:
        for _ in range(count):
            a @ a
        return (torch.tensor([1.0, float(count)]),)

    return run


def test_contestants_take_turns_and_are_set_beside_ours_and_the_floor():
    def broken() -> None:
        raise RuntimeError("not on\nthis machine")

    machine = Machine(torch.device("cpu"), torch.float32)
    machine.flops, machine.bytes = 1e6, 1e3
    case = Case("work", {"ours": work(10), "slow": work(40), "broken": broken}, 100, flops=10.0)
    ours, slow, failed = machine.compare(case, repeats=5)
    assert failed == {"case": "work", "by": "broken", "missing": "not on this machine"}
    assert ours["times_ours"] == 1 and slow["times_ours"] == slow["seconds"] / ours["seconds"]
    assert "apart" not in ours and slow["apart"] == pytest.approx(3.0)  # 40 is 30 from 10
    for row in (ours, slow):
        assert row["tokens_per_second"] == 100 / row["seconds"]
        assert row["floor_share"] == pytest.approx(1e-5 / row["seconds"])
    (limited,) = machine.compare(Case("bytes", {"ours": work(1)}, 1, flops=1.0, bytes=1.0), repeats=1)
    assert limited["floor_share"] == pytest.approx(1e-3 / limited["seconds"]), "the larger of the two floors"
    with pytest.raises(RuntimeError):
        machine.compare(Case("ours fails", {"ours": broken}, 1, flops=1.0), 1)


@pytest.mark.parametrize("name", ["kernels", "sampling", "training"])
def test_a_benchmark_is_one_object_and_one_table(name, capsys, monkeypatch):
    pytest.importorskip("transformers", reason="compares with transformers")
    monkeypatch.setattr(speed, "BATCH_TOKENS", 300)  # a training step takes several passes
    result = evaluate(capsys, name, "--short")
    rows = [row for row in result["rows"] if "missing" not in row]
    assert {row["by"] for row in rows} > {"ours"} and all(row["seconds"] > 0 for row in rows)
    assert all(row["apart"] < 1e-5 for row in rows if "apart" in row)
    assert any("apart" in row for row in rows) == (name != "sampling")
    assert any(0 < row["floor_share"] < 1 for row in rows if row["by"] == "ours")
    assert speed.table(result).count("\n") == len(result["rows"]) + 1
