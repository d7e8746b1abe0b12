"""A real instruct model, of 135 million parameters, all the way: a warm start, an update, evaluation."""

import os

import pytest
import torch
from commands import evaluate
from tiny import real_model
from toy_runs import lines, results

import train

SMALL = """--agents 2 --task sums --warm-start 4 --problems 2 --stages 1 --group 4 --inner-steps 1
    --eval-problems 2 --max-new-tokens 12 --device cpu"""


@pytest.fixture(autouse=True)
def all_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())
    yield
    torch.set_num_threads(before)


def test_a_real_team_starts_warm_trains_inside_its_radius_and_is_evaluated(tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(["--model", str(real_model()), *SMALL.split(), "--out", str(out)]) == 0
    (summary, updates, _), warm = results(out), lines(out, "warm_start")
    assert len(warm) == 8 and warm[-1]["loss"] < 0.5 * warm[0]["loss"]
    assert len(updates) == 2 and summary["accuracy_final"] is not None
    assert all(u["kl_after"] <= u["delta"] and u["sampler_mismatch_max"] < 1e-2 for u in updates)
    found = evaluate(capsys, "sums", "--team", str(out), "--problems", "2")
    assert found["problems"] == 2 and found["benchmark"] == "sums"
