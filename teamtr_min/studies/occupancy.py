"""What fresh rollouts are worth: fresh, stale, joint and reweighted arms of Algorithm 1 at equal cost.

Each arm is `python train.py` with a few flags, once per seed, in a directory under `--out`. A finished run is
not made again and an unfinished one is resumed. An arm that collects once a stage has n times as many stages
as one that collects before each of its n updates; an arm with a floor (`--min-ess`) collects as it needs. All
are compared at the fewest rollouts that one of their runs took, and at the fewest seconds without evaluation.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm.contrib.concurrent import thread_map

from teamtr_min.bench import report
from teamtr_min.files import UserError, read_json, write_json
from teamtr_min.run import figures

TRAIN = Path(__file__).parents[2] / "train.py"
ARMS = {
    "fresh": {"occupancy": "fresh"},
    "--min-ess 0.8": {"min_ess": 0.8},
    "--min-ess 0.5": {"min_ess": 0.5},
    "--min-ess 0": {"min_ess": 0},
    "stale": {"occupancy": "stale"},
    "joint": {"occupancy": "joint"},
}
RELAY = {"task": "relay", "problems": 24}
WARM = RELAY | {"delta": 0.1, "warm_start": 8}  # without one larger teams start near chance, and stay
CONVENTION = {"task": "convention", "problems": 64, "clip": 4, "inner_steps": 20, "delta": 0.3}
SETTINGS = {  # name: flags, and the stages of the fresh arm
    "relay, 3 agents, radius 0.3": (RELAY | {"agents": 3, "delta": 0.3}, 20),
    "relay, 6 agents, warm start": (WARM | {"agents": 6}, 12),
    "convention, 2 agents, radius 0.3": (CONVENTION | {"agents": 2}, 16),
    "relay, 3 agents, radius 0.1": (RELAY | {"agents": 3, "delta": 0.1}, 20),
    "relay, 3 agents, radius 0.02": (RELAY | {"agents": 3, "delta": 0.02}, 20),
    "relay, 8 agents, warm start": (WARM | {"agents": 8}, 9),
    "convention, 3 agents, radius 0.3": (CONVENTION | {"agents": 3}, 16),
    "convention, 4 agents, radius 0.3": (CONVENTION | {"agents": 4}, 16),
}
SHOWN = list(SETTINGS)[:3]  # in the figure; --short runs only these
STUDENT = {2: 12.706, 3: 4.303}  # seeds: 97.5% quantile
ROLLOUTS, SECONDS, RETURN = 0, 1, 2  # places in a point of a curve


def arms(root: Path, short: bool) -> Iterator[dict]:
    """The rows of the table, before anything is run; `runs` are directories, one per seed."""
    for setting in SHOWN if short else SETTINGS:
        flags, stages = SETTINGS[setting]
        for name, rollouts in ARMS.items():
            count = (2 if short else stages) * (1 if name == "fresh" else flags["agents"])
            sizes = {"stages": count, "eval_every": max(1, count // 10), "device": "cpu"}
            sizes |= {"problems": 4, "eval_problems": 64} if short else {"eval_problems": 1024}
            runs = [str(root / setting / name / f"seed {seed}") for seed in range(2 if short else 3)]
            yield {"setting": setting, "name": name, "flags": flags | rollouts | sizes, "runs": runs}


def run(root: Path, short: bool, jobs: int) -> dict:
    """Make the missing runs, `jobs` at once; draw the figure; returns the content of occupancy.json."""
    figures.require_matplotlib()
    root = root / "short" if short else root
    rows, figure = [*arms(root, short)], root / "occupancy.png"
    todo = [(row["flags"] | {"seed": i}, Path(path)) for row in rows for i, path in enumerate(row["runs"])]
    todo = [job for job in todo if not ended(job[1])]
    thread_map(lambda job: train(*job), todo, max_workers=max(1, jobs), unit="run", disable=None)
    keys = [key for key, _ in COLUMNS.values()] + ["return_final", "curve"]
    for row in rows:  # what its runs came to: lists over seeds
        runs = [of_run(Path(path), row["flags"]["agents"] - 1) for path in row["runs"]]
        row |= {key: [run.get(key) for run in runs] for key in keys}
    rows = at_equal_cost(rows)
    figure.write_bytes(figures.render(rows, draw))
    found = {"benchmark": "occupancy", "rows": rows, "figure": str(figure)}
    write_json(root / "occupancy.json", found)
    return found


def words(flags: dict) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def train(flags: dict, path: Path) -> None:
    """One run in a process of its own, on one thread; an interrupted one is resumed."""
    flags = {"resume": path} if (path / "config.json").is_file() else flags | {"out": path}
    command = [sys.executable, str(TRAIN), *words(flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if not ended(path):
        raise UserError(f"{' '.join(command)} failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")


def ended(path: Path) -> bool:
    """Whether all stages of a run are done, or it has diverged."""
    found = read_json(path / "summary.json") if (path / "summary.json").is_file() else {}
    return found.get("return_final") is not None or found.get("reason") == "diverged"


def of_run(path: Path, last: int) -> dict:
    """Its row in a comparison of runs, with collections a stage and the mean ESS of update `last`."""
    record = figures.read(path)
    found, updates = report.row(record, held_out=True), record.updates
    ess = [u.get("ess_weights", 1.0) for u in updates if u["update"] == last]
    return found | {
        "curve": [*found["curve"].values()],  # of (rollouts, seconds, held-out return)
        "collections": sum(u["rollouts"] > 0 for u in updates) / max(1, len(record.stages)),
        "ess_last": sum(ess) / len(ess) if ess else None,  # a joint stage has one update
    }


def at_equal_cost(rows: list[dict]) -> list[dict]:
    """Adds returns at the fewest rollouts and seconds of a finished run of the setting; None: diverged."""
    for row in rows:
        peers = [r for r in rows if r["setting"] == row["setting"]]
        ends = [c[-1] for r in peers for c, final in zip(r["curve"], r["return_final"]) if final is not None]
        for name, cost in (("at", ROLLOUTS), ("at_seconds", SECONDS)):
            at = row[name] = min((end[cost] for end in ends), default=0)
            returns = [read(c, at, cost).item() if c[-1][cost] >= at else None for c in row["curve"]]
            row[f"return_{name}"] = returns
    return rows


def read(curve: list[list[float]], at, cost: int = ROLLOUTS) -> np.ndarray:
    """The return of a curve at some cost, or at several."""
    points = np.transpose(curve)
    return np.interp(at, points[cost], points[RETURN])


def interval(values: list[float | None]) -> str:
    """Mean and half-width of Student's 95% interval over seeds."""
    if None in values:
        return "diverged"
    half = STUDENT[len(values)] * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{np.mean(values):.3f} ±{half:.3f}"


def draw(figure, rows: list[dict]) -> None:
    """Held-out return over rollouts; bands from the lowest seed to the highest."""
    figure.set_size_inches(3.2 * len(SHOWN), 3.4)
    for axes, setting in zip(figure.subplots(1, len(SHOWN), sharey=True, squeeze=False)[0], SHOWN):
        for colour, row in zip(figures.COLOURS, [row for row in rows if row["setting"] == setting]):
            x = np.linspace(0, row["at"])
            seeds = np.array([read(curve, x) for curve in row["curve"]])  # (seeds, len(x))
            axes.fill_between(x, seeds.min(0), seeds.max(0), color=colour, alpha=0.15, lw=0)
            axes.plot(x, seeds.mean(0), color=colour, label=row["name"])
        axes.set(title=setting, ylim=(0, 1), xlim=(0, None), xlabel="training rollouts")
        axes.locator_params(axis="x", nbins=4)
    figure.axes[0].set_ylabel("held-out return")
    figure.axes[0].legend()


COLUMNS = {  # title: key and form
    "rollouts": ("rollouts", ",.0f"),
    "tokens sampled": ("tokens_sampled", ",.0f"),
    "seconds": ("seconds", ",.0f"),
    "collections a stage": ("collections", ".2f"),
    "ESS, last update": ("ess_last", ".2f"),
    "exceeded delta": ("violation_rate_before", ".0%"),
    "after enforcement": ("violation_rate_after", ".0%"),
}


def table(found: dict) -> str:
    """The study as a Markdown table."""
    heads = ["setting", "arm", "return at equal rollouts", "return at equal seconds", *COLUMNS]
    note = "± is Student's 95% interval over seeds. Seconds leave out evaluation; they need an idle machine."
    lines = [note, "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in found["rows"]:
        cells = [row["setting"], row["name"], interval(row["return_at"]), interval(row["return_at_seconds"])]
        for key, form in COLUMNS.values():
            cells.append("" if None in row[key] else format(np.mean(row[key]), form))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"figure  {found['figure']}"])
