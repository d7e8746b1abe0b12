"""A real instruct model, of 135 million parameters, all the way: a warm start, an update, evaluation."""

import os
import subprocess
import sys

from tiny import real_model
from toy_runs import evaluate, lines, results

import train

SMALL = "--agents 2 --task sums --device cpu --warm-start 4 --problems 2 --stages 1 --group 4 --inner-steps 1"


def test_a_real_team_starts_warm_trains_inside_its_radius_and_is_evaluated(tmp_path, capsys):
    flags = ["--model", str(real_model()), *SMALL.split(), "--eval-problems", "2", "--max-new-tokens", "12"]
    all_threads = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
    words = [sys.executable, train.__file__, *flags, "--out", "run"]
    subprocess.run(words, check=True, cwd=tmp_path, env=all_threads)
    out = tmp_path / "run"
    (summary, updates, _), warm = results(out), lines(out, "warm_start")
    assert len(warm) == 8 and warm[-1]["loss"] < 0.5 * warm[0]["loss"]
    assert len(updates) == 2 and summary["accuracy_final"] is not None
    assert all(u["kl_after"] <= u["delta"] and u["sampler_mismatch_max"] < 1e-2 for u in updates)
    assert 0.7 < summary["memory_planned"] / summary["memory_peak"] < 1.3
    found = evaluate(capsys, "sums", "--team", str(out), "--problems", "2")
    assert found["problems"] == 2 and found["benchmark"] == "sums"
