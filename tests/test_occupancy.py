"""The occupancy study: equal budgets, runs made once, a table that says what the runs' files say."""

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from toy_runs import bits, results

import train
from teamtr_min.config import parse
from teamtr_min.studies import occupancy


@pytest.fixture
def made(monkeypatch):
    """Runs of one setting and four arms are made in this process, tiny; the list says which."""
    made, tiny = [], "--problems 2 --group 4 --inner-steps 1 --eval-problems 8 --checkpoint-every 9".split()

    def run_here(command, **_):
        made.append(flags := command[2:])
        with contextlib.redirect_stderr(io.StringIO()) as said:
            train.main(flags if "--resume" in flags else [*flags, *tiny])
        return SimpleNamespace(stderr=said.getvalue())

    monkeypatch.setattr(occupancy.subprocess, "run", run_here)
    monkeypatch.setattr(occupancy, "SHOWN", occupancy.SHOWN[:1])
    for name in ("--min-ess 0.8", "--min-ess 0.5"):
        monkeypatch.delitem(occupancy.ARMS, name)
    return made


@pytest.mark.parametrize("short", [False, True])
def test_arms_make_equal_rollouts_unless_they_collect_by_need(short, tmp_path):
    budgets = {}
    for arm in occupancy.arms(tmp_path, short):
        config = parse(occupancy.words(arm["flags"]), "")
        per_stage = config.agents if config.min_ess == 1 else 1
        budgets.setdefault(arm["setting"], set()).add(config.stages * per_stage * config.problems)
    assert len(budgets) > 2 and all(len(budget) == 1 for budget in budgets.values())


def test_runs_are_made_once_resumed_where_they_were_cut_off_and_told_as_their_files_have_it(made, tmp_path):
    pytest.importorskip("matplotlib", reason="draws the figure")
    found = occupancy.run(tmp_path, True, jobs=1)
    assert len(made) == len(occupancy.ARMS) * 2 == 8 and Path(found["figure"]).stat().st_size > 10_000
    rows = {row["name"]: row for row in found["rows"]}
    collections = {name: row["collections"] for name, row in rows.items()}
    assert collections == {"fresh": [3, 3], "--min-ess 0": [1, 1], "stale": [1, 1], "joint": [1, 1]}
    assert rows["stale"]["ess_last"] == [1, 1] and max(rows["--min-ess 0"]["ess_last"]) < 1
    out = Path(made[0][made[0].index("--out") + 1])
    (summary, _, stages), first = results(out), rows["fresh"]
    assert first["return_final"][0] == summary["return_final"] and len(first["curve"][0]) == 3
    seconds = stages[-1]["seconds"] - stages[-1]["seconds_evaluation"]
    assert first["curve"][0][0] == (0, 0, summary["return_start"])
    assert first["curve"][0][-1] == (summary["rollouts"], seconds, summary["return_final"])
    assert "| relay, 3 agents, radius 0.3 | stale |" in occupancy.table(found)

    before, cut = bits(out), summary | {"return_final": None, "reason": "interrupted"}
    (out / "summary.json").write_text(json.dumps(cut))
    made.clear()
    occupancy.run(tmp_path, True, jobs=1)
    assert made == [["--resume", str(out)]] and bits(out) == before


def test_curves_are_read_at_the_fewest_rollouts_and_seconds_of_a_finished_run():
    first = [0, 0, 0.1]
    slow = {"setting": "x", "curve": [[first, [100, 4, 0.3], [300, 8, 0.7]]], "return_final": [0.7]}
    fast = {"setting": "x", "curve": [[first, [200, 20, 0.5]], [first]], "return_final": [0.5, None]}
    one, other = occupancy.at_equal_cost([slow, fast])
    assert one["at"] == 200 and one["return_at"] == pytest.approx([0.5])
    assert other["return_at"] == [0.5, None] and occupancy.interval([0.5, None]) == "diverged"
    assert one["at_seconds"] == 8 and one["return_at_seconds"] == [0.7]
    assert other["return_at_seconds"] == [pytest.approx(0.26), None]
    values = [0.5, 0.7, 0.6]
    assert occupancy.interval(values) == f"0.600 ±{4.303 * np.std(values, ddof=1) / 3**0.5:.3f}"
