"""What fresh rollouts and the radius are each worth: every variant of Algorithm 1 at equal rollouts.

    learning_rate   {fresh, stale} x {radius, none}, and joint, at five learning rates over two decades
    variants        the paper's ablation
    team_size       stale gap and occupancy shift for n = 2 to 8 agents

Each arm is `python train.py` with a few flags, in a directory of its own under `--out`. A run that is there
already is not made again and one that was cut off is resumed, so the study may be stopped and started at
will.

Equal rollouts: where a stage samples once instead of n times, it samples n times as many problems. So every
arm makes the same number of updates from the same number of rollouts.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from teamtr_min.config import UserError

TRAIN = Path(__file__).parents[2] / "train.py"
COMMON_LR = 5e-4
RATES = [5e-5, 1.6e-4, 5e-4, 1.6e-3, 5e-3]
FULL = {"stages": 20, "problems": 24, "seeds": 3, "sizes": range(2, 9), "rates": RATES, "size_stages": 2}
SHORT = {"stages": 2, "problems": 4, "seeds": 2, "sizes": [2, 3], "rates": RATES[2:4], "size_stages": 1}
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
    "stale, a third of the rollouts": ({"occupancy": "stale", "problems": 1}, None),
}
SIZE_ARMS = {
    "fresh, radius": {},
    "stale, radius": {"occupancy": "stale"},
    "stale, no radius": {"occupancy": "stale", "kl": "none"},
}
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
                found.append(Arm("team_size", name, wanted | {"problems": size["problems"]}, seeds))
    return found


def equal_rollouts(flags: dict, problems: int) -> dict:
    """These flags with as many problems per collection as make n * problems a stage."""
    n, occupancy = flags["agents"], flags.get("occupancy", "fresh")
    collections = {"fresh": n, "every_k": math.ceil(n / flags.get("every", 2))}.get(occupancy, 1)
    return flags | {"problems": flags.get("problems", 0) * problems or n * problems // collections}


def run(root: Path, short: bool, studies: tuple[str, ...], jobs: int) -> dict:
    """Make what runs are missing; returns `{study: [row, ...]}`, a row per arm with its runs' results."""
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
    return {study: [row(arm, root) for arm in wanted if arm.study == study] for study in studies}


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
