"""The occupancy study: equal budgets, runs made once, tables that say what the runs' files say."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import refusal
from toy_runs import bits

import train
from teamtr_min.config import parse
from teamtr_min.studies import occupancy
from teamtr_min.studies.occupancy import Arm


@pytest.fixture
def made(monkeypatch):
    """Runs are made in this process, tiny; the list says which."""
    made = []

    def run_here(command, **_):
        flags = command[2:]
        made.append(flags)
        tiny = (
            ["--group", "4", "--inner-steps", "1", "--eval-problems", "8"] if "--resume" not in flags else []
        )
        return SimpleNamespace(returncode=train.main([*flags, *tiny]), stderr="")

    monkeypatch.setattr(occupancy.subprocess, "run", run_here)
    monkeypatch.setattr(occupancy, "SETTINGS", dict(list(occupancy.SETTINGS.items())[:1]))
    monkeypatch.setattr(occupancy, "SHOWN", list(occupancy.SETTINGS))
    return made


@pytest.mark.parametrize("short", [False, True])
def test_arms_that_do_not_collect_by_need_make_equal_rollouts(short):
    """`collections` per stage are n for fresh arms and 1 for others, without a floor."""
    budgets = {}
    for arm in occupancy.arms(short, occupancy.STUDIES):
        config = parse(occupancy.words(arm.flags), "")
        per_stage = config.agents if config.min_ess == 1 else 1
        budgets.setdefault((arm.study, arm.setting), set()).add(config.stages * per_stage * config.problems)
    assert len(budgets) > 4 and all(len(budget) == 1 for budget in budgets.values())


def test_runs_are_made_once_resumed_where_they_were_cut_off_and_told_as_their_files_have_it(made, tmp_path):
    pytest.importorskip("matplotlib", reason="draws the figure")
    found = occupancy.run(tmp_path, True, ("settings",), jobs=1)
    assert len(made) == len(occupancy.DRAWN) * 2 and Path(found["figures"][0]).stat().st_size > 10_000
    rows = {row["name"]: row for row in found["rows"]}
    assert [rows[name]["collections"] for name in ("fresh", "stale", "corrected, 0")] == [
        [3, 3],
        [1, 1],
        [1, 1],
    ]
    assert rows["stale"]["ess_last"] == [1, 1] and max(rows["corrected, 0"]["ess_last"]) < 1
    out = Path(made[0][made[0].index("--out") + 1])
    summary, first = json.loads((out / "summary.json").read_text()), rows["fresh"]
    assert (
        first["return_final"][0] == summary["return_final"]
        and first["curve"][0][0][2] == summary["return_start"]
    )
    assert (
        first["curve"][0][-1][::2] == [summary["rollouts"], summary["return_final"]]
        and len(first["curve"][0]) == 3
    )
    assert "| relay, 3 agents, radius 0.02 | stale |" in occupancy.table(found)

    made.clear()
    occupancy.run(tmp_path, True, ("settings",), jobs=1)
    assert not made, "all there"
    before = bits(out)
    cut = summary | {"return_final": None, "reason": "interrupted"}
    (out / "summary.json").write_text(json.dumps(cut))
    occupancy.run(tmp_path, True, ("settings",), jobs=1)
    assert made == [["--resume", str(out)]] and bits(out) == before


def test_a_run_that_really_diverged_has_ended_and_one_that_failed_is_named(tmp_path):
    """By the field `reason`. A step of lr 1e18 makes a loss that is no number."""
    flags = {
        "agents": 2,
        "stages": 1,
        "problems": 2,
        "kl": "none",
        "lr": 1e18,
        "eval_problems": 4,
        "device": "cpu",
    }
    arm = Arm("variants", "relay, 2 agents", "no trust region", flags, seeds=1)
    occupancy.train(arm, 0, path := arm.directory(tmp_path, 0))
    assert occupancy.summary(path)["reason"] == "diverged"
    (row,) = occupancy.at_equal_cost([occupancy.row(arm, tmp_path)])
    assert row["return_final"] == [None] and len(row["curve"][0]) == 1
    broken = Arm("variants", "relay, 2 agents", "none", {"agents": 99}, seeds=1)
    assert "failed: error: relay" in refusal(occupancy.train, broken, 0, tmp_path / "broken")


def a_row(name: str, *curves: list, finals=None) -> dict:
    finals = [c[-1][2] for c in curves] if finals is None else finals
    return {"study": "settings", "setting": "x", "name": name, "curve": [*curves], "return_final": finals}


def test_curves_are_read_at_the_fewest_rollouts_and_the_fewest_seconds_of_a_run():
    slow = a_row("slow", [[0, 0, 0.1], [100, 10, 0.3], [300, 30, 0.7]])
    fast = a_row("fast", [[0, 0, 0.1], [200, 5, 0.5]], [[0, 0, 0.1]], finals=[0.5, None])
    one, other = occupancy.at_equal_cost([slow, fast])
    assert (one["at_rollouts"], one["at_seconds"]) == (200, 5)
    assert one["return_at_rollouts"] == pytest.approx([0.5]) and one["return_at_seconds"] == pytest.approx(
        [0.2]
    )
    assert other["return_at_rollouts"] == [0.5, None] and occupancy.interval([0.5, None]) == "diverged"


def test_intervals_over_seeds_are_students():
    values = [0.5, 0.7, 0.6]
    assert occupancy.interval(values) == f"0.600 ±{4.303 * np.std(values, ddof=1) / 3**0.5:.3f}"


def test_what_cannot_be_is_said_before_any_run_is_made(made, tmp_path, monkeypatch):
    assert "--only chess: there is settings, variants, team_size" in refusal(
        occupancy.run, tmp_path, True, ("chess",), 1
    )
    assert "--jobs must be at least 1" in refusal(occupancy.run, tmp_path, True, ("settings",), 0)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refusal(occupancy.run, tmp_path, True, ("settings",), 1)
    assert not made
