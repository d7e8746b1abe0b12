"""What fresh rollouts are worth: arms of Algorithm 1 at equal rollouts.

    settings    fresh, reweighted, stale and joint rollouts, in teams of several sizes on relay and convention
    variants    the paper's ablation, on relay with three agents
    team_size   stale gap, occupancy shift and effective sample share for 2 to 8 agents

Each arm is `python train.py` with a few flags, once per seed, in a directory under `--out`. A finished run is
not made again and an unfinished one is resumed, so the study may be stopped and started at will.

Equal rollouts: an arm that collects once a stage has n times as many stages as one that collects before each
of its n updates. An arm with a floor on its effective sample share (`--min-ess`) collects as often as it
needs. So all curves are read at the same number of rollouts, and once more at the same number of seconds.
"""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from teamtr_min.bench.plots import COLOURS, render, require_matplotlib
from teamtr_min.files import UserError, read_json, write_json
from teamtr_min.run.log import read_log

TRAIN = Path(__file__).parents[2] / "train.py"
STUDIES = ("settings", "variants", "team_size")
ARMS = {
    "fresh": {"occupancy": "fresh"},
    "corrected, 0": {"min_ess": 0},
    "corrected, 0.5": {"min_ess": 0.5},
    "corrected, 0.8": {"min_ess": 0.8},
    "stale": {"occupancy": "stale"},
    "joint": {"occupancy": "joint"},
}
RELAY = {"task": "relay", "problems": 24}
CONVENTION = {"task": "convention", "problems": 64, "clip": 4, "inner_steps": 20}
SETTINGS = {  # name: flags, and the stages of the fresh arm
    "relay, 3 agents, radius 0.02": (RELAY | {"agents": 3, "delta": 0.02}, 20),
    "relay, 6 agents, radius 0.1": (RELAY | {"agents": 6, "delta": 0.1}, 12),
    "convention, 2 agents, radius 0.3": (CONVENTION | {"agents": 2, "delta": 0.3}, 16),
    "relay, 3 agents, radius 0.1": (RELAY | {"agents": 3, "delta": 0.1}, 20),
    "relay, 3 agents, radius 0.3": (RELAY | {"agents": 3, "delta": 0.3}, 20),
    "relay, 6 agents, radius 0.02": (RELAY | {"agents": 6, "delta": 0.02}, 12),
    "relay, 8 agents, radius 0.1": (RELAY | {"agents": 8, "delta": 0.1}, 9),
    "convention, 3 agents, radius 0.3": (CONVENTION | {"agents": 3, "delta": 0.3}, 16),
    "convention, 4 agents, radius 0.3": (CONVENTION | {"agents": 4, "delta": 0.3}, 16),
}
SHOWN, DRAWN = (
    list(SETTINGS)[:3],
    ("fresh", "corrected, 0", "stale"),
)  # in the figure; --short runs only these
VARIANTS = {  # name: flags, and the paper's figure on AIME24 for 3 x Qwen3-8B
    "full method": ({}, 88.1),
    "adaptive KL penalty only": ({"kl": "adaptive"}, 84.9),
    "fixed KL penalty only (beta 1)": ({"kl": "fixed", "beta": 1.0}, 80.7),
    "importance weighting": ({"min_ess": 0}, 74.5),
    "stale": ({"occupancy": "stale"}, 71.1),
    "no trust region": ({"kl": "none"}, 68.3),
    "delta 0.001": ({"delta": 0.001}, 82.5),
    "delta 0.1": ({"delta": 0.1}, 75.1),
    "reversed order": ({"order": "reversed"}, 86.9),
    "random order": ({"order": "random"}, 87.5),
    "no group normalisation": ({"no_group_norm": True}, 83.1),
    "no advantage clip": ({"advantage_clip": math.inf}, 84.5),
    "joint update": ({"occupancy": "joint"}, ""),
    "reweighted, floor 0.5": ({"min_ess": 0.5}, ""),
}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass(frozen=True)
class Arm:
    """A row of a table: one kind of rollouts in one setting; run once per seed."""

    study: str
    setting: str
    name: str
    flags: dict
    seeds: int

    def directory(self, root: Path, seed: int) -> Path:
        """Named by its flags, so that an arm which two studies share is run once."""
        words = [f"{name}={value}" for name, value in sorted(self.flags.items())]
        return root / ",".join([*words, f"seed={seed}"])


def arms(short: bool, studies: tuple[str, ...]) -> list[Arm]:
    """All arms of these studies; `short` ones show the form of the tables, not results."""
    found = []

    def add(study: str, setting: str, name: str, flags: dict, stages: int) -> None:
        fresh = flags.get("occupancy", "fresh") == "fresh" and "min_ess" not in flags
        stages = (min(stages, 2) if short else stages) * (1 if fresh else flags["agents"])
        sizes = {"problems": 4, "eval_problems": 64} if short else {"eval_problems": 1024}
        sizes |= {"stages": stages, "eval_every": max(1, stages // 10), "device": "cpu"}
        found.append(Arm(study, setting, name, flags | sizes, 2 if short else 3))

    for setting in SHOWN if short else SETTINGS:
        flags, stages = SETTINGS[setting]
        for name in DRAWN if short else ARMS:
            add("settings", setting, name, flags | ARMS[name], stages)
    for name, (flags, _) in VARIANTS.items():
        add("variants", "relay, 3 agents", name, RELAY | {"agents": 3} | flags, 20)
    for n in (2, 3) if short else range(2, 9):
        for name in (*DRAWN, "corrected, 0.5"):
            flags = RELAY | {"agents": n, "diagnostics": True} | ARMS[name]
            add("team_size", f"relay, {n} agents", name, flags, 2)
    return [arm for arm in found if arm.study in studies]


def run(root: Path, short: bool, studies: tuple[str, ...], jobs: int) -> dict:
    """Make the missing runs, `jobs` at once; draw the figure; returns the content of occupancy.json."""
    if unknown := ",".join(sorted(set(studies) - set(STUDIES))):
        raise UserError(f"--only {unknown}: there is {', '.join(STUDIES)}")
    if jobs < 1:
        raise UserError("--jobs must be at least 1")
    require_matplotlib()
    root, wanted = root / "short" if short else root, arms(short, studies)
    todo = {arm.directory(root, seed): (arm, seed) for arm in wanted for seed in range(arm.seeds)}
    todo = {path: job for path, job in todo.items() if summary(path) is None}
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(todo), unit="run", disable=None) as bar:
        waiting = [pool.submit(train, arm, seed, path) for path, (arm, seed) in todo.items()]
        try:
            for job in waiting:
                job.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    found = {
        "benchmark": "occupancy",
        "rows": at_equal_cost([row(arm, root) for arm in wanted]),
        "figures": [],
    }
    if "settings" in studies:
        found["figures"].append(str(root / "occupancy.png"))
        (root / "occupancy.png").write_bytes(render(draw, found["rows"]))
    write_json(root / "occupancy.json", found)
    return found


def words(flags: dict) -> list[str]:
    """Flags as train.py's command line has them."""
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in flags.items()]
    return [word for flag, value in pairs for word in ([flag] if value is True else [flag, str(value)])]


def train(arm: Arm, seed: int, path: Path) -> None:
    """One run in a process of its own, on one thread; an interrupted one is resumed."""
    flags = {"resume": path} if (path / "config.json").is_file() else arm.flags | {"seed": seed, "out": path}
    command = [sys.executable, str(TRAIN), *words(flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if summary(path) is None:  # a run that diverged has ended too
        raise UserError(f"{' '.join(command)} failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")


def summary(path: Path) -> dict | None:
    """The run's summary if it has ended: all stages are done, or it has diverged."""
    try:
        found = read_json(path / "summary.json")
    except UserError:
        return None
    return found if found["return_final"] is not None or found["reason"] == "diverged" else None


# Tables


def row(arm: Arm, root: Path) -> dict:
    """What one arm's runs came to: lists over seeds."""
    runs = [arm.directory(root, seed) for seed in range(arm.seeds)]
    summaries, logs = [summary(path) for path in runs], [read_log(path / "metrics.jsonl") for path in runs]
    stages, updates = (
        [[m for m in log if m["kind"] == kind] for log in logs] for kind in ("stage", "update")
    )
    last = [[u for u in one if u["update"] == arm.flags["agents"] - 1] for one in updates]
    kept = ("return_final", "rollouts", "tokens_sampled", "seconds", "violation_rate_before",
            "violation_rate_after")  # fmt: skip
    return {
        "study": arm.study,
        "setting": arm.setting,
        "name": arm.name,
        "flags": arm.flags,
        **{name: [s[name] for s in summaries] for name in kept},
        "curve": [curve(*pair) for pair in zip(summaries, stages)],
        "collections": [
            sum(u["rollouts"] > 0 for u in us) / max(1, len(ss)) for us, ss in zip(updates, stages)
        ],
        "ess_last": [mean(u.get("ess_weights", 1.0) for u in one) for one in last],
        "delta_stale": [mean(s.get("delta_stale") for s in one) for one in stages],
        "occupancy_shift": [mean(u.get("occupancy_shift") for u in one) for one in last],
    }


def curve(summary: dict, stages: list[dict]) -> list[list[float]]:
    """[rollouts, seconds without evaluation, held-out return] at the start, where measured, at the end."""

    def point(stage: dict, value: float) -> list[float]:
        return [stage["rollouts_so_far"], stage["seconds"] - stage["seconds_evaluation"], value]

    points = [[0, 0.0, summary["return_start"]]]
    points += [point(stage, stage["return_held_out"]) for stage in stages if "return_held_out" in stage]
    return (
        points if summary["return_final"] is None else [*points, point(stages[-1], summary["return_final"])]
    )


def at_equal_cost(rows: list[dict]) -> list[dict]:
    """The rows with returns at the fewest rollouts, and the fewest seconds, that a run of their setting took.

    None for a seed that diverged before.
    """
    for row in rows:
        peers = [r for r in rows if (r["study"], r["setting"]) == (row["study"], row["setting"])]
        runs = [(curve, final) for r in peers for curve, final in zip(r["curve"], r["return_final"])]
        for axis, name in enumerate(("rollouts", "seconds")):
            at = row[f"at_{name}"] = min((c[-1][axis] for c, final in runs if final is not None), default=0)
            row[f"return_at_{name}"] = [
                read(c, axis, at) if c[-1][axis] >= at else None for c in row["curve"]
            ]
    return rows


def read(curve: list[list[float]], axis: int, at):
    """The return of a curve at some number of rollouts (axis 0) or seconds (axis 1)."""
    points = np.transpose(curve)
    return np.interp(at, points[axis], points[2]).tolist()


def mean(values) -> float | None:
    """The mean of the values that were measured; None without any."""
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def interval(values: list[float | None]) -> str:
    """Mean and half-width of Student's 95% interval over seeds."""
    if None in values:
        return "diverged"
    n = len(values)
    half = STUDENT.get(n, 2.0) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return f"{np.mean(values):.3f} ±{half:.3f}"


def draw(figure, rows: list[dict]) -> None:
    """Held-out return over rollouts: fresh, reweighted, stale; bands from the lowest seed to the highest."""
    figure.set_size_inches(3.2 * len(SHOWN), 3.4)
    for axes, setting in zip(figure.subplots(1, len(SHOWN), sharey=True, squeeze=False)[0], SHOWN):
        for colour, name in zip(COLOURS, DRAWN):
            (row,) = (r for r in rows if (r["study"], r["setting"], r["name"]) == ("settings", setting, name))
            x = np.linspace(0, row["at_rollouts"])
            seeds = np.array([read(curve, 0, x) for curve in row["curve"]])  # (seeds, len(x))
            axes.fill_between(x, seeds.min(0), seeds.max(0), color=colour, alpha=0.15, lw=0)
            axes.plot(x, seeds.mean(0), color=colour, label=name)
        axes.set(title=setting, ylim=(0, 1), xlim=(0, None), xlabel="training rollouts")
        axes.locator_params(axis="x", nbins=4)
    figure.axes[0].set_ylabel("held-out return")
    figure.axes[0].legend()


CAPTIONS = {
    "settings": "Held-out return at equal rollouts and seconds; ± is Student's 95% interval over seeds.",
    "variants": "Variants at equal rollouts. Reported: by the paper, on AIME24, with 3 x Qwen3-8B.",
    "team_size": "Team size. Reported stale gap, n = 2, 4, 8: naive 0.08, 0.41, 1.89; TeamTR 0.03 to 0.15.",
}
COLUMNS = {  # title: key and form
    "rollouts": ("rollouts", ",.0f"),
    "tokens sampled": ("tokens_sampled", ",.0f"),
    "seconds": ("seconds", ",.0f"),
    "collections a stage": ("collections", ".2f"),
    "ESS, last update": ("ess_last", ".2f"),
    "exceeded delta": ("violation_rate_before", ".0%"),
    "after enforcement": ("violation_rate_after", ".0%"),
    "stale gap": ("delta_stale", ".4f"),
    "occupancy shift": ("occupancy_shift", ".3f"),
}


def table(found: dict) -> str:
    """The studies as Markdown tables; a column that a study does not measure is left out."""
    lines = []
    for study in dict.fromkeys(row["study"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["study"] == study]
        columns = {t: c for t, c in COLUMNS.items() if any(mean(row[c[0]]) is not None for row in rows)}
        heads = ["setting", "arm", "at equal rollouts", "at equal seconds", *columns]
        heads += ["reported"] if study == "variants" else []
        lines += [CAPTIONS[study], "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in rows:
            costs = [interval(row[f"return_at_{axis}"]) for axis in ("rollouts", "seconds")]
            values = [(mean(row[key]), form) for key, form in columns.values()]
            cells = [row["setting"], row["name"], *costs]
            cells += ["" if value is None else format(value, form) for value, form in values]
            cells += [str(VARIANTS[row["name"]][1])] if study == "variants" else []
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, "figures  " + "  ".join(found["figures"])])
