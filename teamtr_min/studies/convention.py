"""The hidden convention as a toy of one number per agent: where stale occupancy hurts, and where it does not.

Agent i holds one habit, P(code 1). The return is the chance that neighbours in the chain use the same code.
Habits start opposite, 0.7 and 0.3 by turns. An update moves its agent's habit up the slope of the return
until KL(old || new) reaches the radius, as a message's code does in `--task convention`. Fresh: an agent sees
the habits of the teammates already updated in its stage; stale: those from before the first of them.

Stale agents each adapt to the other's old habit, and when a step is longer than the way to the middle they
swap habits instead of meeting. The swap is exactly balanced, so real runs leave it by their own noise. Two
kinds are modelled: a step may fall short of the radius (the line search of update.py halves), and the sign
of a slope is read from samples.

    python -m teamtr_min.studies.convention                         the table
    python -m teamtr_min.studies.convention --figure map.png        and the map
    python -m teamtr_min.studies.convention --runs RUN RUN --figure habits.png    habits in training runs
"""

import argparse
import json
from pathlib import Path

import numpy as np

from teamtr_min.files import UserError
from teamtr_min.tasks import Convention

DELTAS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
TEAMS = (2, 3, 4, 6, 8)
EDGE = 1e-3  # no habit goes beyond [EDGE, 1 - EDGE]: a sampled policy never sees what it never does


def agreement(habits: np.ndarray) -> np.ndarray:
    """J: mean over neighbours of P(same code); habits (n, ...) -> (...)."""
    a, b = habits[:-1], habits[1:]
    return (a * b + (1 - a) * (1 - b)).mean(0)


def slope(habits: np.ndarray, i: int) -> np.ndarray:
    """dJ / dhabit_i, times the number of neighbours in the chain; habits (n, ...) -> (...)."""
    neighbours = [j for j in (i - 1, i + 1) if 0 <= j < len(habits)]
    return sum(2 * habits[j] - 1 for j in neighbours)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL of two Bernoulli habits, in nats."""
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


def move(habit: np.ndarray, direction: np.ndarray, delta: np.ndarray | float) -> np.ndarray:
    """The habit as far up or down as the radius lets it go; where the direction is 0 it stays."""
    end = np.where(direction > 0, 1 - EDGE, EDGE)
    low, high = np.zeros_like(habit), np.ones_like(habit)  # share of the way to the end: inside, outside
    for _ in range(40):
        middle = (low + high) / 2
        inside = kl(habit, habit + middle * (end - habit)) <= delta
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    return np.where(direction == 0, habit, habit + low * (end - habit))


def simulate(
    agents: int,
    delta: float,
    occupancy: str,
    *,
    stages: int = 60,
    reach: float = 1.0,
    noise: float = 0.0,
    draws: int = 1,
    seed: int = 0,
) -> np.ndarray:
    """Habits before each stage and after the last, (stages + 1, agents, draws), updated in turn order.

    `reach`: least share of a full-radius step that an update makes, uniform up to 1; `noise`: standard
    deviation of the error in an estimated slope. With 1 and 0, the defaults, nothing is random.
    """
    generator = np.random.default_rng(seed)
    start = Convention.starting_habits
    habits = np.array([[start[i % 2]] * draws for i in range(agents)])  # (n, S)
    trace = [habits.copy()]
    for _ in range(stages):
        first = habits.copy()
        for i in range(agents):
            direction = slope(first if occupancy == "stale" else habits, i)
            direction = direction + noise * generator.standard_normal(draws)
            share = generator.uniform(reach, 1, draws)  # KL grows with the square of a step
            habits[i] = move(habits[i], direction, delta * share**2)
        trace.append(habits.copy())
    return np.array(trace)


def final_agreement(agents: int, delta: float, occupancy: str, **how) -> float:
    """Mean agreement over the last two stages: a team that swaps is not read at its better half."""
    return float(np.mean([agreement(habits) for habits in simulate(agents, delta, occupancy, **how)[-2:]]))


def table(**how) -> str:
    """Agreement at the end, stale / fresh, for every team size and radius."""
    lines = ["agents " + "".join(f"{f'delta {delta:g}':>14s}" for delta in DELTAS)]
    for n in TEAMS:
        cells = [[final_agreement(n, delta, o, **how) for o in ("stale", "fresh")] for delta in DELTAS]
        lines.append(f"{n:6d} " + "".join(f"{f'{stale:.2f} / {fresh:.2f}':>14s}" for stale, fresh in cells))
    return "\n".join(lines)


def draw_map(file: Path, **how) -> None:
    """How much a team loses by stale occupancy, over radius and team size, without noise and with it."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True, layout="constrained")
    for ax, (title, kind) in zip(axes, {"exact steps": {}, "noisy steps": how}.items()):
        values = [
            [[final_agreement(n, d, o, **kind) for d in DELTAS] for n in TEAMS] for o in ("fresh", "stale")
        ]
        loss = np.subtract(*values)  # (teams, deltas)
        image = ax.imshow(loss, vmin=-0.7, vmax=0.7, cmap="RdBu_r", origin="lower", aspect="auto")
        for (row, column), value in np.ndenumerate(loss):
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8)
        ax.set_xticks(range(len(DELTAS)), [f"{d:g}" for d in DELTAS])
        ax.set_yticks(range(len(TEAMS)), TEAMS)
        ax.set(title=title, xlabel="radius delta, nats")
    axes[0].set_ylabel("agents")
    figure.colorbar(image, ax=axes, label="agreement, fresh minus stale")
    figure.savefig(file, dpi=130)


def draw_habits(file: Path, runs: list[Path]) -> None:
    """Each agent's habit at the start of each stage, one panel per run.

    Where the return lies above what independent habits would give, readers see through the code.
    """
    plt = pyplot()
    rows = [metrics(run) for run in runs]
    columns = min(len(runs), 3)
    shape = -(-len(runs) // columns), columns
    figure, axes = plt.subplots(
        *shape, figsize=(4 * columns, 2.4 * shape[0]), sharey=True, squeeze=False, layout="constrained"
    )
    for ax, run, updates in zip(axes.flat, runs, rows):
        config = json.loads((run / "config.json").read_text())
        for j, habits in enumerate(zip(*(u["habits"] for u in updates))):
            ax.plot([np.nan if h is None else h for h in habits], marker=".", label="ABCD"[j])
        ax.plot([u["return_mean"] for u in updates], color="0.4", linestyle="--", label="return")
        ax.plot([explained(u) for u in updates], color="0.4", linestyle=":", label="by the habits alone")
        ax.set_title(f"{config['occupancy']}, delta {config['delta']:g}, seed {config['seed']}", fontsize=10)
        ax.set(xlabel="stage", ylim=(-0.03, 1.03))
        ax.axhline(0.5, color="0.85", zorder=0)
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax in axes[:, 0]:
        ax.set_ylabel("share of code 1")
    axes[0, 0].legend(fontsize=8, loc="center right")
    figure.savefig(file, dpi=130)


def metrics(run: Path) -> list[dict]:
    """The first update of each stage of a run: rollouts of the team as the stage found it."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "update" and line["update"] == 0]


def explained(update: dict) -> float:
    """The return that these habits give if no agent's code depends on another's in the same rollout."""
    habits = [np.nan if h is None else h for h in update["habits"]]
    return float(agreement(np.array(habits)))


def swaps(habits: list[list[float]]) -> int:
    """Stages after which every agent stands on the other side of 1/2 and neighbours still disagree."""
    count = 0
    for before, after in zip(habits, habits[1:]):
        side, new = ([h > 0.5 for h in row] for row in (before, after))
        apart = all(a != b for a, b in zip(new, new[1:]))
        count += apart and all(a != b for a, b in zip(side, new))
    return count


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise UserError("figures need matplotlib: pip install -r requirements-dev.txt") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs", type=Path, nargs="+", help="directories of runs of --task convention")
    parser.add_argument("--figure", type=Path, help="PNG to write")
    parser.add_argument("--stages", type=int, default=60)
    parser.add_argument("--reach", type=float, default=0.8, help="least share of a full step (default 0.8)")
    parser.add_argument("--noise", type=float, default=0.05, help="of a slope (default 0.05: 400 rollouts)")
    args = parser.parse_args(argv)
    if args.runs:
        for run in args.runs:
            updates = metrics(run)
            if not updates or "habits" not in updates[0]:
                raise UserError(f"{run} is not a run of --task convention that has made an update")
            first, last = updates[0], updates[-1]
            print(
                f"{run}: {swaps([u['habits'] for u in updates])} swaps in {len(updates)} stages, "
                f"return {first['return_mean']:.3f} -> {last['return_mean']:.3f}, "
                f"{explained(first):.3f} -> {explained(last):.3f} by the habits alone"
            )
        if args.figure:
            draw_habits(args.figure, args.runs)
        return
    how = {"stages": args.stages, "reach": args.reach, "noise": args.noise, "draws": 200}
    print(f"agreement after {args.stages} stages, stale / fresh; exact steps\n{table(stages=args.stages)}")
    print(f"\nsteps of {args.reach:g} to 1 of the radius, slopes with noise {args.noise:g}\n{table(**how)}")
    if args.figure:
        draw_map(args.figure, **how)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
