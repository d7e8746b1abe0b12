"""What fresh rollouts and the radius are each worth: every variant of Algorithm 1 at equal rollouts.

    learning_rate   {fresh, stale} x {radius, none}, and joint, at five learning rates over two decades
    variants        the paper's ablation
    team_size       stale gap and occupancy shift for n = 2 to 8 agents

Each arm is `python train.py` with a few flags, in a directory of its own under `--out`. A run that is there
already is not made again and one that was cut off is resumed, so the study may be stopped and started at
will.

Equal rollouts: where a stage samples once instead of n times, it samples n times as many problems. So in the
first two studies every stage costs the same rollouts, but for two variants that say so (`suffix` keeps the
start of each, and one stale arm has the batches, and a third of the rollouts, of the fresh one); each agent
is moved once a stage, in a joint update all at once. The third study keeps the batch, and thus the radius'
error, equal.
"""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from teamtr_min import rng
from teamtr_min.bench import curves
from teamtr_min.bench.plots import render
from teamtr_min.files import UserError

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
SIZE_ARMS = {
    "fresh, radius": {},
    "stale, radius": {"occupancy": "stale"},
    "stale, no radius": {"occupancy": "stale", "kl": "none"},
}
REPORTED_GAPS = {  # by the paper, for n = 2 to 8
    "reported: naive": {2: 0.08, 3: 0.21, 4: 0.41, 5: 0.68, 6: 1.02, 8: 1.89},
    "reported: TeamTR": {2: 0.03, 8: 0.15},
}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
STUDIES = ("learning_rate", "variants", "team_size")


@dataclasses.dataclass(frozen=True)
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
    seeds, base = size["seeds"], {"stages": size["stages"], "agents": 3, "lr": COMMON_LR}
    found = []
    if "learning_rate" in studies:
        for name, flags in ARMS.items():
            for lr in size["rates"]:
                wanted = base | flags | {"lr": lr}
                found.append(Arm("learning_rate", name, equal_rollouts(wanted, size["problems"]), seeds))
    if "variants" in studies:
        for name, (flags, _) in VARIANTS.items():
            wanted = equal_rollouts(base | flags, size["problems"])
            found.append(Arm("variants", name, wanted, seeds))
    if "team_size" in studies:
        for name, flags in SIZE_ARMS.items():
            for n in size["sizes"]:
                wanted = base | flags | {"agents": n, "stages": size["size_stages"], "diagnostics": True}
                found.append(Arm("team_size", name, wanted | {"problems": size["size_problems"]}, seeds))
    return found


def equal_rollouts(flags: dict, problems: int) -> dict:
    """These flags with as many problems per collection as make n * problems a stage."""
    n, occupancy = flags["agents"], flags.get("occupancy", "fresh")
    collections = {"fresh": n, "every_k": math.ceil(n / flags.get("every", 2))}.get(occupancy, 1)
    return flags | {"problems": problems if "problems" in flags else n * problems // collections}


def run(root: Path, short: bool, studies: tuple[str, ...], jobs: int) -> dict:
    """Make what runs are missing, draw the figures; returns what occupancy.json holds: a row per arm."""
    unknown = sorted(set(studies) - set(STUDIES))
    if unknown or jobs < 1:
        raise UserError(
            f"--only {','.join(unknown)}: there is {', '.join(STUDIES)}" if unknown else "--jobs < 1"
        )
    if importlib.util.find_spec("matplotlib") is None:  # hours before it is needed
        raise UserError("the figures of this study need matplotlib: pip install matplotlib")
    root = root / "short" if short else root
    size = SHORT if short else FULL
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


def train(arm: Arm, seed: int, path: Path, short: bool) -> None:
    """One run in a process of its own, on one thread; goes on with what an interrupted one left."""
    flags = arm.flags | {"seed": seed, "device": "cpu", "eval_problems": 256 if short else 2048, "out": path}
    words = [["--" + name.replace("_", "-"), str(value)][: 1 if value is True else 2]
             for name, value in flags.items()]  # fmt: skip
    if (path / "config.json").is_file():
        words = [["--resume", str(path)]]
    command = [sys.executable, str(TRAIN), *(word for pair in words for word in pair)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    diverged = done.returncode == 1 and summary(path) is not None  # a result like any other
    if done.returncode and not diverged:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")


def summary(path: Path) -> dict | None:
    """The run's summary if it has come to its end: all stages, or weights that are no numbers any more."""
    try:
        found = json.loads((path / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return found if found["accuracy_final"] is not None or "finite" in (found["stopped"] or "") else None


def row(arm: Arm, root: Path) -> dict:
    """What one arm's runs came to, a list over seeds each."""
    runs = [arm.directory(root, seed) for seed in range(arm.seeds)]
    summaries = [summary(path) for path in runs]
    metrics = [[json.loads(line) for line in (path / "metrics.jsonl").open()] for path in runs]
    updates = [[m for m in lines if m["kind"] == "update"] for lines in metrics]
    stages = [[m for m in lines if m["kind"] == "stage"] for lines in metrics]
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
        "kl_largest": [max(u["kl_after"] for u in one) for one in updates],
        "delta_stale": [mean(s["delta_stale"] for s in one) for one in stages],
        "gap": [mean(u["gap"] for u in one if u["update"]) for one in updates],
        "occupancy_shift": [mean(u["occupancy_shift"] for u in one if u["update"]) for one in updates],
        "ess_last": [
            mean(u["ess"] for u in one if u["update"] == arm.flags["agents"] - 1) for one in updates
        ],
        "vacuous": [mean(s["vacuous"] for s in one) for one in stages],
    }


def mean(values) -> float | None:
    """The mean, or None where nothing was measured."""
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else None


def report(rows: dict[str, list[dict]], root: Path) -> dict:
    """Draw the figures under `root` and write everything into occupancy.json; returns what that holds."""
    found, figures = {"benchmark": "occupancy", "rows": rows, "fits": {}}, {}
    if "learning_rate" in rows:
        figures["two_by_two"] = (curves.two_by_two, two_by_two(rows["learning_rate"]))
        figures["learning_rate"] = (curves.learning_rate, rows["learning_rate"])
    if "team_size" in rows:
        figures["team_size"] = (curves.team_size, rows["team_size"])
        for name in SIZE_ARMS:
            own = [row for row in rows["team_size"] if row["name"] == name]
            found["fits"][name] = {key: exponent(own, key) for key in ("delta_stale", "occupancy_shift")}
    found["figures"] = [str(root / f"{name}.png") for name in figures]
    (root / "occupancy.json").write_text(json.dumps(found, indent=1) + "\n")
    for name, (draw, what) in figures.items():
        (root / f"{name}.png").write_bytes(render(draw, what, "light"))
    return found


def two_by_two(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """The four arms at the common learning rate and at each one's own best: {panel: {arm: row}}.

    The best one is chosen on training problems, by the mean of the last stage over seeds, so that the
    held-out figure stays what it is called.
    """
    four = [name for name in ARMS if not name.startswith("joint")]
    own = {name: [row for row in rows if row["name"] == name] for name in four}
    rates = [row["flags"]["lr"] for row in own[four[0]]]
    common = min(rates, key=lambda lr: abs(lr - COMMON_LR))
    return {
        "at one learning rate": {
            name: next(row for row in own[name] if row["flags"]["lr"] == common) for name in four
        },
        "at its own best of five": {
            name: max(
                own[name], key=lambda row: mean(one[-1] for one in row["curve"]) if whole(row) else -1.0
            )
            for name in four
        },
    }


def whole(row: dict) -> bool:
    """Whether no seed diverged."""
    return None not in row["accuracy_final"]


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
    lines, rows = [], found["rows"]
    if "variants" in rows:
        lines += [
            "Variants at equal rollouts (relay, 3 agents). ± is Student's 95% interval over seeds; "
            "reported: the paper, AIME24, 3 x Qwen3-8B.",
            "",
            "| variant | final accuracy | rollouts | tokens sampled | tokens trained | "
            "passed delta before / after enforcement | reported |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in rows["variants"]:
            reported = VARIANTS[row["name"]][1]
            before, after = mean(row["violation_rate_before"]), mean(row["violation_rate_after"])
            lines.append(
                f"| {row['name']} | {interval(row['accuracy_final'])} | {row['rollouts'][0]:,} | "
                f"{mean(row['tokens_sampled']):,.0f} | {mean(row['tokens_trained']):,.0f} | "
                f"{before:.0%} / {after:.0%} | {reported or ''} |"
            )
        lines.append("")
    if "learning_rate" in rows:
        rates = list(dict.fromkeys(row["flags"]["lr"] for row in rows["learning_rate"]))
        lines += [
            "Final held-out accuracy against the peak learning rate, at equal rollouts.",
            "",
            f"| arm | {' | '.join(f'{lr:g}' for lr in rates)} |",
            "|---" * (len(rates) + 1) + "|",
        ]
        for name in ARMS:
            own = [row for row in rows["learning_rate"] if row["name"] == name]
            lines.append(f"| {name} | {' | '.join(interval(row['accuracy_final']) for row in own)} |")
        lines.append("")
    if "team_size" in rows:
        sizes = list(dict.fromkeys(row["flags"]["agents"] for row in rows["team_size"]))
        for key, text in (("delta_stale", "Stale gap"), ("occupancy_shift", "Occupancy shift D_occ")):
            lines += [
                f"{text} by number of agents, and the exponent of a power of n fitted to it.",
                "",
                f"| arm | {' | '.join(map(str, sizes))} | exponent |",
                "|---" * (len(sizes) + 2) + "|",
            ]
            for name in SIZE_ARMS:
                own = [row for row in rows["team_size"] if row["name"] == name]
                slope, (low, high) = found["fits"][name][key]
                values = " | ".join(f"{mean(row[key]):.4f}" for row in own)
                lines.append(f"| {name} | {values} | {slope:.2f} [{low:.2f}, {high:.2f}] |")
            if key == "delta_stale":
                for name, values in REPORTED_GAPS.items():
                    lines.append(f"| {name} | {' | '.join(str(values.get(n, '')) for n in sizes)} | |")
            lines.append("")
        share = mean(v for row in rows["team_size"] for v in row["vacuous"])
        lines.append(f"The certificate was vacuous in {share:.0%} of these stages.")
    return "\n".join([*lines, "", "figures  " + "  ".join(found["figures"])])
