"""The occupancy study: equal budgets, runs made once, tables that say what the runs' files say."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from toy_runs import results, timeless

import eval as evaluation
import train
from teamtr_min import cli
from teamtr_min.occupancy import RolloutSource
from teamtr_min.studies import occupancy

TINY = {"stages": 1, "problems": 2, "seeds": 2, "rates": [5e-4, 5e-3],
        "sizes": [2, 3], "size_stages": 1, "size_problems": 2}  # fmt: skip


@pytest.fixture
def made(monkeypatch):
    """Runs are made in this process, tiny; the list says which."""
    made = []

    def run_here(command, **_):
        made.append(command[2:])
        short = ["--eval-problems", "8", "--group", "4", "--inner-steps", "1"]
        flags = command[2:] if "--resume" in command else [*command[2:], *short]
        return SimpleNamespace(returncode=train.main(flags), stderr="")

    monkeypatch.setattr(occupancy.subprocess, "run", run_here)
    monkeypatch.setattr(occupancy, "SHORT", TINY)
    return made


@pytest.mark.parametrize("size", [occupancy.FULL, occupancy.SHORT])
def test_every_arm_but_the_one_that_says_so_makes_equal_rollouts_and_updates(size):
    for arm in occupancy.arms(size, ("learning_rate", "variants")):
        config = cli.parse(occupancy.words(arm.flags), "")
        n, every = len(config.update_groups), RolloutSource(config, None, None, [], 0).every
        rollouts = len(range(0, n, every)) * config.problems
        share = 1 if arm.name == "stale, a third of the rollouts" else 3
        assert rollouts == share * size["problems"], arm
        assert n == (1 if "joint" in arm.name else 3)


def test_runs_are_made_once_and_resumed_where_they_were_cut_off(made, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="draws figures")
    flags = ["occupancy", "--short", "--only", "learning_rate,team_size", "--jobs=1", "--out", str(tmp_path)]
    assert evaluation.main([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(made) == 5 * 2 * 2 + 3 * 2 * 2
    assert [Path(figure).stem for figure in found["figures"]] == ["two_by_two", "learning_rate", "team_size"]
    assert all(Path(figure).stat().st_size > 10_000 for figure in found["figures"])
    row = found["rows"]["learning_rate"][0]
    summary = json.loads((Path(made[0][made[0].index("--out") + 1]) / "summary.json").read_text())
    assert row["name"] == "fresh, radius" and row["accuracy_final"][0] == summary["accuracy_final"]

    made.clear()
    assert evaluation.main(flags) == 0 and not made  # all there
    text = capsys.readouterr().out
    assert "| stale, no radius |" in text and "reported: naive | 0.08 | 0.21 |" in text

    unfinished = next((tmp_path / "short").glob("*lr=0.005*seed=1"))
    summary, *before = results(unfinished)
    summary |= {"accuracy_final": None, "stopped": "killed"}
    (unfinished / "summary.json").write_text(json.dumps(summary))
    assert evaluation.main(flags) == 0
    assert made == [["--resume", str(unfinished)]]
    _, *after = results(unfinished)
    assert list(map(timeless, before)) == list(map(timeless, after)) != [[], []]


def test_an_exponent_is_that_of_the_power_it_was_made_from():
    rows = [{"flags": {"agents": n}, "gap": [0.1 * n**2, 0.1 * n**2 * 1.01]} for n in (2, 3, 5, 8)]
    slope, (low, high) = occupancy.exponent(rows, "gap")
    assert slope == pytest.approx(2) and low <= slope <= high + 1e-9


def test_intervals_over_seeds_are_students():
    values = [0.5, 0.7, 0.6]
    half = 4.303 * np.std(values, ddof=1) / 3**0.5
    assert occupancy.interval(values) == f"0.600 ±{half:.3f}"
    assert occupancy.interval([0.5, None]) == "diverged"


def test_the_best_rate_is_chosen_on_training_problems():
    """A rate that looks best only on held-out problems is not chosen."""
    rows = [
        {"name": name, "flags": {"lr": lr}, "seeds": [0], "curve": [[0.1, last]], "accuracy_final": [final]}
        for name in occupancy.ARMS
        for lr, last, final in ((5e-4, 0.3, 0.9), (5e-3, 0.4, 0.2))
    ]
    chosen = occupancy.four_arms(occupancy.by_name(rows))
    common, best = chosen["at one learning rate"], chosen["at its own best of five"]
    assert {row["flags"]["lr"] for row in common.values()} == {5e-4}
    assert {row["flags"]["lr"] for row in best.values()} == {5e-3} and len(best) == 4


def test_a_seed_that_diverged_is_a_result_and_no_crash(tmp_path):
    """One seed without a finished stage, one cut short: never the best rate, and still drawn."""
    pytest.importorskip("matplotlib", reason="draws figures")
    rows = [
        {"name": name, "flags": {"lr": lr}, "seeds": [0, 1], "curve": curves, "curve_rollouts": [8, 16],
         "accuracy_start": [0.1, 0.1], "accuracy_final": finals}
        for name in occupancy.ARMS
        for lr, curves, finals in (
            (5e-4, [[0.1, 0.2], [0.1, 0.2]], [0.2, 0.2]),
            (1.6e-3, [[0.1, 0.9], [0.1]], [0.3, None]),
            (5e-3, [[0.1, 0.9], []], [0.3, None]),
        )
    ]  # fmt: skip
    found = occupancy.report({"learning_rate": rows}, tmp_path)
    assert all(Path(figure).stat().st_size > 10_000 for figure in found["figures"])
    assert "| 0.200 ±0.000 | diverged | diverged |" in occupancy.table(found)
    best = occupancy.four_arms(occupancy.by_name(rows))["at its own best of five"]
    assert {row["flags"]["lr"] for row in best.values()} == {5e-4}


def test_what_was_not_measured_is_none_and_the_rest_is_read(tmp_path):
    """metrics.jsonl has no line or key for it: an agent that took no turn, a run without --diagnostics."""
    arm = occupancy.Arm("variants", "stale", {"agents": 2}, seeds=1)
    directory = arm.directory(tmp_path, 0)
    directory.mkdir()
    names = ("accuracy_start accuracy_final rollouts tokens_sampled tokens_trained seconds "
             "violation_rate_before violation_rate_after")  # fmt: skip
    summary = dict.fromkeys(names.split(), 0.5) | {"stopped": None}
    (directory / "summary.json").write_text(json.dumps(summary))
    metrics = [
        {"kind": "update", "update": 0, "kl_after": 0.01},
        {"kind": "update", "update": 1},
        {"kind": "stage", "accuracy": 0.3, "rollouts_so_far": 8},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    row = occupancy.row(arm, tmp_path)
    assert row["kl_largest"] == [0.01] and row["curve"] == [[0.3]] and row["accuracy_final"] == [0.5]
    for name in ("delta_stale", "gap", "occupancy_shift", "ess_last", "vacuous"):
        assert row[name] == [None], name


@pytest.mark.parametrize("flags, complaint", [
    (["--only", "chess"], "--only chess: there is learning_rate, variants, team_size"),
    (["--jobs", "0"], "--jobs < 1"),
    ([], "figures need matplotlib: pip install matplotlib"),
])  # fmt: skip
def test_what_cannot_be_is_said_before_any_run_is_made(made, flags, complaint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert evaluation.main(["occupancy", "--short", "--out", str(tmp_path), *flags]) == 2
    assert complaint in capsys.readouterr().err and not made
