"""The hidden convention as a toy of one number per agent: where stale occupancy hurts, and where it does not.

Agent i holds one habit, P(code 1). The return is the chance that neighbours in the chain use the same code.
Habits start opposite, 0.7 and 0.3 by turns. An update moves its agent's habit up the slope of the return
until KL(old || new) reaches the radius, as a message's code does in `--task convention`. Fresh: an agent sees
the habits of the teammates already updated in its stage; stale: those from before the first of them.

Stale agents each adapt to the other's old habit, and when a step is longer than the way to the middle they
swap habits instead of meeting. The swap is exactly balanced, so real runs leave it by their own noise. Two
kinds are modelled: a step may fall short of the radius (learner.py backtracks by halves), and the sign of a
slope is read from samples.

    python -m teamtr_min.studies.convention                         the table
    python -m teamtr_min.studies.convention --figure map.png        and the map
    python -m teamtr_min.studies.convention --runs RUN RUN --figure habits.png    habits in training runs
"""

import argparse
import json
from pathlib import Path

import numpy as np

from teamtr_min.bench.plots import agreement_map, habit_curves, render, require_matplotlib
from teamtr_min.files import UserError, read_json
from teamtr_min.tasks import Convention

DELTAS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
TEAMS = (2, 3, 4, 6, 8)
EDGE = 1e-3  # no habit goes beyond [EDGE, 1 - EDGE]: a sampled policy never sees what it never does


def agreement(habits: np.ndarray) -> np.ndarray:
    """J: mean over neighbours of P(same code); habits (A, ...) -> (...)."""
    a, b = habits[:-1], habits[1:]
    return (a * b + (1 - a) * (1 - b)).mean(0)


def slope(habits: np.ndarray, i: int) -> np.ndarray:
    """dJ / dhabit_i, times the number of neighbours in the chain; habits (A, ...) -> (...)."""
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
    """Habits before each stage and after the last, (stages + 1, A, draws), updated in turn order.

    `reach`: least share of a full-radius step that an update makes, uniform up to 1; `noise`: standard
    deviation of the error in an estimated slope. With 1 and 0, the defaults, nothing is random.
    """
    generator = np.random.default_rng(seed)
    start = Convention.starting_habits
    now = np.array([[start[i % 2]] * draws for i in range(agents)])  # (A, draws)
    trace = [now.copy()]
    for _ in range(stages):
        for i in range(agents):
            direction = slope(trace[-1] if occupancy == "stale" else now, i)
            direction = direction + noise * generator.standard_normal(draws)
            share = generator.uniform(reach, 1, draws)  # KL grows with the square of a step
            now[i] = move(now[i], direction, delta * share**2)
        trace.append(now.copy())
    return np.array(trace)


def final_agreement(agents: int, delta: float, occupancy: str, **how) -> float:
    """Mean agreement over the last two stages: a team that swaps is not read at its better half."""
    return float(np.mean([agreement(habits) for habits in simulate(agents, delta, occupancy, **how)[-2:]]))


def agreements(**how) -> np.ndarray:
    """Agreement at the end for every team size and radius, (teams, deltas, 2): stale and fresh."""
    return np.array([
        [[final_agreement(n, delta, o, **how) for o in ("stale", "fresh")] for delta in DELTAS] for n in TEAMS
    ])  # fmt: skip


def table(found: np.ndarray) -> str:
    """The same in words, stale / fresh."""
    lines = ["agents " + "".join(f"{f'delta {delta:g}':>14s}" for delta in DELTAS)]
    for n, cells in zip(TEAMS, found):
        lines.append(f"{n:6d} " + "".join(f"{f'{stale:.2f} / {fresh:.2f}':>14s}" for stale, fresh in cells))
    return "\n".join(lines)


def swaps(habits: np.ndarray) -> int:
    """Stages after which every agent stands on the other side of 1/2 and neighbours still disagree.

    habits: (stages, A), NaN where an agent wrote in neither code.
    """
    side = np.array(habits, dtype=float) > 0.5
    crossed, apart = side[1:] != side[:-1], side[1:, 1:] != side[1:, :-1]
    return int((crossed.all(1) & apart.all(1)).sum())


def read(run: Path) -> tuple[str, dict[str, np.ndarray]]:
    """A run's name in a figure; its habits (stages, A) and return (stages,) at the start of each stage.

    `explained` is the return that these habits give if no agent's code depends on another's in the same
    rollout.
    """
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    updates = [line for line in lines if line["kind"] == "update" and line["update"] == 0]
    if not updates or "habits" not in updates[0]:
        raise UserError(f"{run} is not a run of --task convention that has made an update")
    config, habits = read_json(run / "config.json"), np.array([u["habits"] for u in updates], dtype=float)
    return f"{config['occupancy']}, delta {config['delta']:g}, seed {config['seed']}", {
        "habits": habits,
        "return": np.array([u["return_mean"] for u in updates]),
        "explained": agreement(habits.T),
    }


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
    if args.figure:
        require_matplotlib()
    if args.runs:
        runs = [read(directory) for directory in args.runs]
        for directory, (_, run) in zip(args.runs, runs):
            whole, own = run["return"], run["explained"]
            print(
                f"{directory}: {swaps(run['habits'])} swaps in {len(whole)} stages, "
                f"return {whole[0]:.3f} -> {whole[-1]:.3f}, {own[0]:.3f} -> {own[-1]:.3f} by the habits alone"
            )
        figure = habit_curves, runs
    else:
        exact = agreements(stages=args.stages)
        print(f"agreement after {args.stages} stages, stale / fresh; exact steps\n{table(exact)}")
        noisy = agreements(stages=args.stages, reach=args.reach, noise=args.noise, draws=200)
        print(f"\nsteps of {args.reach:g} to 1 of the radius, slopes with noise {args.noise:g}")
        print(table(noisy))
        losses = {"exact steps": exact, "noisy steps": noisy}
        losses = {name: found[..., 1] - found[..., 0] for name, found in losses.items()}
        figure = agreement_map, (losses, TEAMS, DELTAS)
    if args.figure:
        args.figure.write_bytes(render(*figure))


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
