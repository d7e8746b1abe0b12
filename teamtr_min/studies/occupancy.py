"""What fresh rollouts and the radius are each worth: every variant of Algorithm 1 at equal rollouts.

    learning_rate   {fresh, stale} x {radius, none}, and joint, at five learning rates over two decades
    variants        the paper's ablation
    team_size       stale gap and occupancy shift for n = 2 to 8 agents

Each arm is `python train.py` with a few flags, once per seed, in a directory of its own under `--out`. A run
that is there already is not made again and one that was cut off is resumed, so the study may be stopped and
started at will.

Equal rollouts: where a stage samples once instead of n times, it samples n times as many problems. So in the
first two studies every stage costs the same rollouts, but for two variants that say so (`suffix` keeps the
start of each, and one stale arm has the batches, and a third of the rollouts, of the fresh one); each agent
is updated once a stage, in a joint update all at once. The third study keeps the batch, and thus the radius'
error, equal.
"""

import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from teamtr_min.bench.plots import learning_rate, render, require_matplotlib, team_size, two_by_two
from teamtr_min.engine import rng
from teamtr_min.files import UserError, read_json, write_json

TRAIN = Path(__file__).parents[2] / "train.py"
COMMON_LR = 5e-4
RATES = [5e-5, 1.6e-4, 5e-4, 1.6e-3, 5e-3]
FULL = {"stages": 20, "problems": 24, "seeds": 3, "rates": RATES,
        "sizes": range(2, 9), "size_stages": 2, "size_problems": 16}  # fmt: skip
SHORT = {"stages": 2, "problems": 4, "seeds": 2, "rates": RATES[2:4],
         "sizes": [2, 3], "size_stages": 1, "size_problems": 4}  # fmt: skip
ARMS = {  # of the 2 x 2, and joint
    "fresh, radius": {},
    "fresh, no radius": {"kl": "none"},
    "stale, radius": {"occupancy": "stale"},
    "stale, no radius": {"occupancy": "stale", "kl": "none"},
    "joint, radius": {"occupancy": "joint"},
}
VARIANTS = {  # name: flags, and what the paper reports on AIME24 for 3 x Qwen3-8B
    "full method": ({}, 88.1),
    "adaptive KL penalty only": ({"kl": "adaptive"}, 84.9),
    "fixed KL penalty only (beta 1)": ({"kl": "fixed", "beta": 1.0}, 80.7),
    "resample every 2 updates": ({"occupancy": "every_k", "every": 2}, 79.3),
    "importance weighting": ({"occupancy": "importance"}, 74.5),
    "stale": ({"occupancy": "stale"}, 71.1),
    "no trust region": ({"kl": "none"}, 68.3),
    "delta 0.001": ({"delta": 0.001}, 82.5),
    "delta 0.1": ({"delta": 0.1}, 75.1),
    "reversed order": ({"order": "reversed"}, 86.9),
    "random order": ({"order": "random"}, 87.5),
    "no group normalisation": ({"no_group_norm": True}, 83.1),
    "no advantage clip": ({"no_advantage_clip": True}, 84.5),
    "joint update": ({"occupancy": "joint"}, None),
    "resample the suffix only": ({"resample": "suffix"}, None),
    "stale, a third of the rollouts": ({"occupancy": "stale", "problems": FULL["problems"]}, None),
}
SIZE_ARMS = ("fresh, radius", "stale, radius", "stale, no radius")
REPORTED_GAPS = {  # by the paper, for n = 2 to 8
    "reported: naive": {2: 0.08, 3: 0.21, 4: 0.41, 5: 0.68, 6: 1.02, 8: 1.89},
    "reported: TeamTR": {2: 0.03, 8: 0.15},
}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
STUDIES = ("learning_rate", "variants", "team_size")


@dataclass(frozen=True)
class Arm:
    """One setting: a study's row, column or curve; run once per seed."""

    study: str
    name: str
    flags: dict
    seeds: int

    def directory(self, root: Path, seed: int) -> Path:
        """Named by what is run, so that an arm which two studies share is run once."""
        words = [f"{name}={value}" for name, value in sorted(self.flags.items())]
        return root / ",".join([*words, f"seed={seed}"])


def arms(size: dict, studies: tuple[str, ...]) -> list[Arm]:
    """All arms of these studies at this size."""
    base = {"stages": size["stages"], "agents": 3, "lr": COMMON_LR}
    brief = {"stages": size["size_stages"], "problems": size["size_problems"], "diagnostics": True}
    settings = {
        "learning_rate": [(name, flags | {"lr": lr}) for name, flags in ARMS.items() for lr in size["rates"]],
        "variants": [(name, flags) for name, (flags, _) in VARIANTS.items()],
        "team_size": [(name, ARMS[name] | {"agents": n}) for name in SIZE_ARMS for n in size["sizes"]],
    }
    found = []
    for study in (study for study in STUDIES if study in studies):
        for name, flags in settings[study]:
            flags = equal_rollouts(base | flags, size["problems"])
            found.append(Arm(study, name, flags | brief if study == "team_size" else flags, size["seeds"]))
    return found


def equal_rollouts(flags: dict, problems: int) -> dict:
    """These flags with as many problems per collection as make n * `problems` a stage.

    A variant that names `problems` gets that many once a stage, where the full method has them n times.
    """
    n, occupancy = flags["agents"], flags.get("occupancy", "fresh")
    collections = {"fresh": n, "every_k": math.ceil(n / flags.get("every", 2))}.get(occupancy, 1)
    return flags | {"problems": problems if "problems" in flags else n * problems // collections}


def run(root: Path, short: bool, studies: tuple[str, ...], jobs: int) -> dict:
    """Make what runs are missing, draw the figures; returns what occupancy.json holds: a row per arm."""
    if unknown := ",".join(sorted(set(studies) - set(STUDIES))):
        raise UserError(f"--only {unknown}: there is {', '.join(STUDIES)}")
    if jobs < 1:
        raise UserError("--jobs < 1")
    require_matplotlib()
    root, size = (root / "short", SHORT) if short else (root, FULL)
    wanted = arms(size, studies)
    todo = {arm.directory(root, seed): (arm, seed) for arm in wanted for seed in range(arm.seeds)}
    todo = {path: what for path, what in todo.items() if summary(path) is None}
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(todo), unit="run", disable=None) as bar:
        waiting = [pool.submit(train, arm, seed, path, short) for path, (arm, seed) in todo.items()]
        try:
            for job in waiting:
                job.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    rows = {study: [row(arm, root) for arm in wanted if arm.study == study] for study in studies}
    return report(rows, root)


def words(flags: dict) -> list[str]:
    """Flags as train.py's command line has them."""
    pairs = (["--" + name.replace("_", "-"), str(value)][: 1 if value is True else 2]
             for name, value in flags.items())  # fmt: skip
    return [word for pair in pairs for word in pair]


def train(arm: Arm, seed: int, path: Path, short: bool) -> None:
    """One run in a process of its own, on one thread; goes on with what an interrupted one left."""
    flags = arm.flags | {"seed": seed, "device": "cpu", "eval_problems": 256 if short else 2048, "out": path}
    if (path / "config.json").is_file():
        flags = {"resume": path}
    command = [sys.executable, str(TRAIN), *words(flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    diverged = done.returncode == 1 and summary(path) is not None  # a result like any other
    if done.returncode and not diverged:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")


def summary(path: Path) -> dict | None:
    """The run's summary if it has come to its end: all stages, or weights that are no numbers any more."""
    try:
        found = read_json(path / "summary.json")
    except UserError:
        return None
    return found if found["accuracy_final"] is not None or "finite" in (found["stopped"] or "") else None


def row(arm: Arm, root: Path) -> dict:
    """What one arm's runs came to, a list over seeds each."""
    runs = [arm.directory(root, seed) for seed in range(arm.seeds)]
    summaries = [summary(path) for path in runs]
    metrics = [[json.loads(line) for line in (path / "metrics.jsonl").open()] for path in runs]
    updates, stages = ([[m for m in lines if m["kind"] == kind] for lines in metrics]
                       for kind in ("update", "stage"))  # fmt: skip
    later = [[u for u in one if u["update"]] for one in updates]  # the first of a stage sees no shift
    last = [[u for u in one if u["update"] == arm.flags["agents"] - 1] for one in updates]

    def means(records: list[list[dict]], key: str) -> list[float | None]:
        return [mean(r.get(key) for r in one) for one in records]

    kept = ("accuracy_start", "accuracy_final", "rollouts", "tokens_sampled", "tokens_trained", "seconds",
            "violation_rate_before", "violation_rate_after")  # fmt: skip
    return {
        "study": arm.study,
        "name": arm.name,
        "flags": arm.flags,
        "seeds": list(range(arm.seeds)),
        **{name: [s[name] for s in summaries] for name in kept},
        "curve": [[s["accuracy"] for s in one] for one in stages],
        "curve_rollouts": [s["rollouts_so_far"] for s in stages[0]],
        "kl_largest": [max(measured(u.get("kl_after") for u in one), default=None) for one in updates],
        "delta_stale": means(stages, "delta_stale"),
        "gap": means(later, "gap"),
        "occupancy_shift": means(later, "occupancy_shift"),
        "ess_last": means(last, "ess"),
        "vacuous": means(stages, "vacuous"),
    }


def measured(values) -> list:
    return [v for v in values if v is not None]


def mean(values) -> float | None:
    """The mean, or None where nothing was measured."""
    values = measured(values)
    return sum(values) / len(values) if values else None


def report(rows: dict[str, list[dict]], root: Path) -> dict:
    """Draw the figures under `root` and write everything into occupancy.json; returns what that holds."""
    found, figures = {"benchmark": "occupancy", "rows": rows, "fits": {}}, []
    if "learning_rate" in rows:
        by_arm = by_name(rows["learning_rate"])
        figures += [(two_by_two, four_arms(by_arm)), (learning_rate, by_arm)]
    if "team_size" in rows:
        by_arm = by_name(rows["team_size"])
        figures.append((team_size, by_arm))
        for name, own in by_arm.items():
            found["fits"][name] = {key: exponent(own, key) for key in ("delta_stale", "occupancy_shift")}
    found["figures"] = [str(root / f"{draw.__name__}.png") for draw, _ in figures]
    write_json(root / "occupancy.json", found)
    for (draw, what), path in zip(figures, found["figures"]):
        Path(path).write_bytes(render(draw, what))
    return found


def by_name(rows: list[dict]) -> dict[str, list[dict]]:
    """Each arm's rows: one per learning rate, or per team size."""
    found = {}
    for row in rows:
        found.setdefault(row["name"], []).append(row)
    return found


def four_arms(by_arm: dict[str, list[dict]]) -> dict[str, dict[str, dict]]:
    """The arms of the 2 x 2 at the common learning rate and at each one's own best: {panel: {arm: row}}.

    The best one is chosen on training problems, by the mean of the last stage over seeds, so that the
    held-out figure stays what it is called. A rate at which a seed diverged is never it.
    """
    four = {name: rows for name, rows in by_arm.items() if not name.startswith("joint")}

    def distance(row: dict) -> float:
        return abs(row["flags"]["lr"] - COMMON_LR)

    def last_stage(row: dict) -> float:
        return -1.0 if None in row["accuracy_final"] else mean(one[-1] for one in row["curve"])

    return {
        "at one learning rate": {name: min(rows, key=distance) for name, rows in four.items()},
        "at its own best of five": {name: max(rows, key=last_stage) for name, rows in four.items()},
    }


def exponent(rows: list[dict], key: str, resamples: int = 2000) -> tuple[float, list[float]]:
    """Slope of log value against log n, and its 95% bootstrap interval over seeds."""
    x = np.log([row["flags"]["agents"] for row in rows])
    y = np.log(np.maximum(np.array([row[key] for row in rows], dtype=float), 1e-9))  # (sizes, seeds)
    choices = rng.generator(0, "exponent").integers(y.shape[1], size=(resamples, y.shape[1]))
    slopes = [np.polyfit(x, y[:, choice].mean(1), 1)[0] for choice in choices]
    return float(np.polyfit(x, y.mean(1), 1)[0]), [float(q) for q in np.quantile(slopes, (0.025, 0.975))]


def interval(values: list[float]) -> str:
    """Mean and half-width of Student's 95% interval over seeds."""
    n = len(values)
    if None in values:
        return "diverged"
    half = STUDENT.get(n, 2.0) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return f"{np.mean(values):.3f} ±{half:.3f}"


def table(found: dict) -> str:
    """The studies as Markdown tables."""
    rows, lines = found["rows"], []

    def add(caption: str, head: list, body: list[list]) -> None:
        lines.extend([caption, "", f"| {' | '.join(map(str, head))} |", "|---" * len(head) + "|"])
        lines.extend(f"| {' | '.join(map(str, cells))} |" for cells in body)
        lines.append("")

    if "variants" in rows:
        add(
            "Variants at equal rollouts (relay, 3 agents). ± is Student's 95% interval over seeds; "
            "reported: the paper, AIME24, 3 x Qwen3-8B.",
            ["variant", "final accuracy", "rollouts", "tokens sampled", "tokens trained",
             "exceeded delta before / after enforcement", "reported"],
            [[row["name"], interval(row["accuracy_final"]), f"{row['rollouts'][0]:,}",
              f"{mean(row['tokens_sampled']):,.0f}", f"{mean(row['tokens_trained']):,.0f}",
              f"{mean(row['violation_rate_before']):.0%} / {mean(row['violation_rate_after']):.0%}",
              VARIANTS[row["name"]][1] or ""] for row in rows["variants"]],
        )  # fmt: skip
    if "learning_rate" in rows:
        rates = dict.fromkeys(f"{row['flags']['lr']:g}" for row in rows["learning_rate"])
        add(
            "Final held-out accuracy against the peak learning rate, at equal rollouts.",
            ["arm", *rates],
            [[name, *(interval(row["accuracy_final"]) for row in own)]
             for name, own in by_name(rows["learning_rate"]).items()],
        )  # fmt: skip
    if "team_size" in rows:
        sizes = dict.fromkeys(row["flags"]["agents"] for row in rows["team_size"])
        for key, text in (("delta_stale", "Stale gap"), ("occupancy_shift", "Occupancy shift D_occ")):
            body = []
            for name, own in by_name(rows["team_size"]).items():
                slope, (low, high) = found["fits"][name][key]
                values = [f"{mean(row[key]):.4f}" for row in own]
                body.append([name, *values, f"{slope:.2f} [{low:.2f}, {high:.2f}]"])
            for name, gaps in REPORTED_GAPS.items() if key == "delta_stale" else ():
                body.append([name, *(gaps.get(n, "") for n in sizes), ""])
            caption = f"{text} by number of agents, and the exponent of a power of n fitted to it."
            add(caption, ["arm", *sizes, "exponent"], body)
        share = mean(v for row in rows["team_size"] for v in row["vacuous"])
        lines.append(f"The certificate was vacuous in {share:.0%} of these stages.")
    return "\n".join([*lines, "", "figures  " + "  ".join(found["figures"])])
