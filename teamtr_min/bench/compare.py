"""Runs side by side: what they reached and cost, curves, and the knobs in which they differ. Runs that differ
in nothing but the seed are a group, shown by its mean and standard error: standard deviation / sqrt(runs)."""

import collections
import itertools
from pathlib import Path

import numpy as np

from teamtr_min.run.figures import COLOURS, Record, finish
from teamtr_min.run.log import COSTS, measured, violation_rate

# Knobs that decide no number but the seed: where a run writes, and what it fills in by itself.
IGNORED = "seed out resume accept_changes date batch_rows batch_tokens checkpoint_every tensorboard".split()


def grouped(records: list[Record]) -> list[dict]:
    """Groups. `name` tells the `knobs` and hashes in which they differ; if these are many, the first run."""
    found, groups = collections.defaultdict(list), []
    held_out = all(any("return_held_out" in stage for stage in record.stages) for record in records)
    for record in records:
        facts = vars(record.config) | {f"hash: {name}": value for name, value in record.fingerprint.items()}
        found[tuple(item for item in facts.items() if item[0] not in IGNORED)].append(row(record, held_out))
    alike = set.intersection(*map(set, found))
    for facts, runs in found.items():
        knobs = {name: value for name, value in facts if (name, value) not in alike}
        name = ", ".join(f"{knob} {value}" for knob, value in knobs.items())
        name = name if 0 < len(name) <= 50 else Path(runs[0]["run"]).resolve().name
        groups.append({"name": name, "knobs": knobs, "runs": runs, "held_out": held_out})
    return groups


def row(record: Record, held_out: bool) -> dict:
    """What a run reached and cost so far. `curve`: stages done -> (training rollouts, seconds without
    evaluation, mean return), on held-out problems or on those of the stage that then began."""
    summary, stages, updates = record.summary, record.stages, record.updates
    seconds = [s["seconds"] - s["seconds_evaluation"] for s in stages]
    ends = [(0, summary.get("seconds_warm_start", 0)), *zip((s["rollouts_so_far"] for s in stages), seconds)]
    returns = [u["return_mean"] for u in updates if u["update"] == 0]
    if held_out:
        returns = [summary.get("return_start"), *(s.get("return_held_out") for s in stages)]
        returns[-1] = summary.get("return_final", returns[-1])
    curve = {i: (*end, value) for i, (end, value) in enumerate(zip(ends, returns)) if value is not None}
    line = {"run": str(record.directory), "seed": record.config.seed, "state": record.state, "curve": curve}
    line |= {key: value for key, value in summary.items() if key.startswith(("accuracy_", "return_"))}
    line |= {key: sum(u.get(key, 0) for u in updates) for key in COSTS[:3]} | {"seconds": ends[-1][1]}
    rates = {f"violation_rate_{when}": violation_rate(updates, f"kl_{when}") for when in ("before", "after")}
    return measured(line | rates)


def curves(figure, what: tuple[list[dict], int]) -> None:
    """Mean return of each group as far as all its runs have come, in a band of one standard error to either
    side; thin lines are its runs."""
    (groups, axis), axes = what, figure.subplots()
    for group, colour in zip(groups, itertools.cycle(COLOURS)):
        own = [run["curve"] for run in group["runs"]]
        for curve in own:
            axes.plot([p[axis] for p in curve.values()], [p[2] for p in curve.values()], color=colour, lw=0.6)
        shared = sorted(set.intersection(*map(set, own)))
        points = np.array([[curve[done] for done in shared] for curve in own]).reshape(len(own), -1, 3)
        x, y = points[:, :, axis].mean(0), points[:, :, 2].mean(0)
        error = points[:, :, 2].std(0, ddof=1) / len(own) ** 0.5 if len(own) > 1 else 0 * y
        label = group["name"] + f" ({len(own)} runs)" * (len(own) > 1)
        axes.plot(x, y, ".-", color=colour, label=label)
        axes.fill_between(x, y - error, y + error, color=colour, alpha=0.2, lw=0)
    problems = "held-out problems" if groups[0]["held_out"] else "the problems of each stage"
    unit = ("training rollouts", "seconds, without evaluation")[axis]
    finish(figure, axes, title=f"Mean return on {problems}", ylim=(0, None), xlabel=unit)
