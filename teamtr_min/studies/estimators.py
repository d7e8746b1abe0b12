"""How far sampled estimates can be trusted: their bias, and the coverage of their intervals.

    python -m teamtr_min.studies.estimators        about two minutes on one core

Teams small enough to enumerate (exact.py) are sampled again and again; every estimate has its exact value
beside it. Three agents write two messages each, two tokens long; each update goes up the exact policy
gradient until its exact KL per message is the number in the table.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from teamtr_min.extras import diagnostics
from teamtr_min.extras.diagnostics import before_turn, bootstrap
from teamtr_min.studies import exact
from teamtr_min.studies.exact import Game, Team, log_ratio

AGENTS, ROUNDS = 3, 2
PROBLEMS, GROUP = 64, 8  # of one batch
LAST = 2  # the agent looked at: the last to be updated, so two others have moved since the stage began
FLOORS = (0.0, 0.5, 0.8, 1.0)  # of --min-ess


# Teams


def by_transcript(context: tuple) -> int:
    """A router that reads the transcript."""
    return (len(context) + sum(context)) % AGENTS


def last_word(agent: int, context: tuple, prefix: tuple) -> int:
    """Six rows stand for all contexts, as a network's parameters do: each update changes many states."""
    return (context[0] + context[-1] + len(prefix) + sum(prefix)) % 6


def small_game(router=None) -> Game:
    """Right when three of the six messages continue the one before as the problem asks: of a random team's
    rollouts a fifth are."""

    def reward(context: tuple) -> float:
        wanted = [(context[0] + before) % 4 for before in context[:-1]]
        return float(sum(w == m for w, m in zip(wanted, context[1:])) >= 3)

    start = torch.full((4,), 0.25)
    return Game(AGENTS, 2, AGENTS * ROUNDS, reward, length=2, start=start, router=router, features=last_word)


def random_team(game: Game, seed: int) -> Team:
    return Team(game, game.theta(torch.Generator().manual_seed(seed)))


def farthest(outside: Callable[[float], bool], high: float = 1.0) -> float:
    """The longest step in [0, high] that is not outside, where `high` is."""
    low = 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if outside(middle) else (middle, high)
    return low


def climb(team: Team, j: int, kl: float) -> Team:
    """Agent j up its exact policy gradient, until its exact KL per message is `kl`."""
    direction = exact.objective_gradient(team, team, j)

    def at(step: float) -> Team:
        return team.replace(j, team.theta[j] + step * direction)

    def outside(step: float) -> bool:
        return bool(exact.mean_message_kl(team, at(step), j) > kl)

    high = 1.0
    while not outside(high):
        high *= 2
    return at(farthest(outside, high))


def stage(game: Game, seed: int, kl: float) -> list[Team]:
    """team^0 ... team^n: every agent once, in turn order."""
    teams = [random_team(game, seed)]
    for j in range(AGENTS):
        teams.append(climb(teams[-1], j, kl))
    return teams


def sample_batches(team: Team, batches: int, seed: int, problems: int = PROBLEMS) -> exact.Rollouts:
    """Batches of problems x GROUP rollouts, one after the other."""
    g = torch.Generator().manual_seed(seed)
    problem = torch.multinomial(team.game.start, batches * problems, replacement=True, generator=g)
    return exact.sample_rollouts(team, problem.repeat_interleave(GROUP), g)


# Estimates beside their truths


def effective_share(first: Team, base: Team) -> Tensor:
    """(E rho)^2 / E rho^2 over LAST's messages in rollouts of `first`: the truth of ESS/B."""
    own = first.game.actor == LAST
    old, new = first.law[own], base.law[own]
    return new.sum() ** 2 / (old.sum() * (new**2 / old).sum())


def rollout_share(first: Team, base: Team) -> Tensor:
    """1 / E rho^2 over whole rollouts of `first`: the truth of Rollouts.ess, which --min-ess reads."""
    return 1 / (base.rollout_law**2 / first.rollout_law).sum()


def sampled_share(log_rho: Tensor) -> Tensor:
    """ESS of weights rho (R,): (sum rho)^2 / (R sum rho^2)."""
    return 1 / (len(log_rho) * log_rho.softmax(0).square().sum())


def weighted_mean(log_rho: Tensor, terms: Tensor) -> Tensor:
    """sum rho x / sum rho of terms x (R,)."""
    return (log_rho.softmax(0) * terms).sum()


def weighted_kl(log_rho: Tensor, log_w: Tensor, writes: Tensor) -> Tensor:
    """Eq. 11's k3 as a weighted mean over messages."""
    weight = log_rho.softmax(0)[:, None] * writes
    return (weight * (log_w.expm1() - log_w)).sum() / weight.sum()


def diagnoses(teams: list[Team], batches: int, seed: int) -> dict:
    """name -> (truth, statistic, its tables (batches, rollouts, ...)) for the stage's last update.

    The first six are those of --diagnostics. The `corrected` ones read rollouts of team^0, weighted.
    """
    first, *_, base, new = teams
    x, y = sample_batches(base, batches, seed), sample_batches(first, batches, seed + 1)
    writes, wrote = x.agent == LAST, y.agent == LAST
    log_w, log_w_first = log_ratio(x, new, base) * writes, log_ratio(y, new, base) * wrote
    returns, drift = x.returns.view(-1, GROUP), log_ratio(y, base, first)
    seq = diagnostics.surrogate_terms(returns, log_w, writes)
    gap = diagnostics.gap_terms(returns, log_w, before_turn(log_ratio(x, base, first)), writes)
    old = diagnostics.surrogate_terms(y.returns.view(-1, GROUP), log_w_first, wrote)
    before, rho = before_turn(drift), drift.sum(1)
    found = {
        "L^seq": (exact.surrogate(base, new), torch.mean, seq),
        "gap": (exact.stale_gap(first, base, new), torch.mean, gap),
        "L^stale": (exact.surrogate(base, new, states=first), torch.mean, seq - gap),
        "D_occ": (exact.occupancy_shift(first, base, LAST), diagnostics.occupancy_shift, before, wrote),
        "ESS/B": (effective_share(first, base), diagnostics.effective_sample_share, before, wrote),
        "KL held out": (exact.mean_message_kl(base, new, LAST), diagnostics.message_kl, log_w, writes),
        "L corrected": (exact.surrogate(base, new), weighted_mean, rho, old),
        "KL corrected": (exact.mean_message_kl(base, new, LAST), weighted_kl, rho, log_w_first, wrote),
        "ESS": (rollout_share(first, base), sampled_share, rho),
    }
    return {
        name: (truth.item(), statistic, *(t.unflatten(0, (batches, -1)) for t in tables))
        for name, (truth, statistic, *tables) in found.items()
    }


def coverage(truth: float, statistic, *tables: Tensor, intervals: int) -> float:
    """Share of the first batches whose 95% bootstrap interval holds the truth."""
    held = 0
    for b in range(intervals):
        low, high = bootstrap(statistic, *(t[b] for t in tables), group=GROUP, seed=b)[1]
        held += low <= truth <= high
    return held / intervals


def with_floor(teams: list[Team], floor: float, batches: int, seed: int) -> tuple[float, float]:
    """A stage with --min-ess `floor`, many times: its mean number of collections, and the relative error, a
    root mean square, of the corrected surrogate of its last update."""
    count, errors, truth = 0, [], exact.surrogate(*teams[-2:]).item()
    for b in range(batches):
        x, first = None, None  # the latest rollouts, and the team that wrote them
        for i, team in enumerate(teams[:-1]):
            log_rho = None if x is None else log_ratio(x, team, first).sum(1)
            if log_rho is None or floor == 1 or sampled_share(log_rho) < floor:
                x, first, count = sample_batches(team, 1, seed + AGENTS * b + i), team, count + 1
                log_rho = torch.zeros_like(x.returns)
        writes = x.agent == LAST
        log_w = log_ratio(x, teams[-1], teams[-2]) * writes
        terms = diagnostics.surrogate_terms(x.returns.view(-1, GROUP), log_w, writes)
        errors.append(weighted_mean(log_rho, terms).item() / truth - 1)
    return count / batches, torch.tensor(errors).square().mean().sqrt().item()


# The tables


def main(batches: int = 1000, intervals: int = 200) -> None:
    size = f"{PROBLEMS} problems x {GROUP} rollouts"
    print(f"a batch is {size}; the update is the last of its stage's {AGENTS}")
    cases = [("round-robin", None, 0.02), ("router that reads the transcript", by_transcript, 0.02)]
    cases += [("round-robin", None, kl) for kl in (0.2, 1.0, 4.0)]
    for seed, (name, router, kl) in enumerate(cases):
        print(f"\n{name}, KL {kl} per update: {batches} batches, intervals of {intervals}; seed {seed}")
        print("estimator       truth      mean (95% interval)            z   sd of one  coverage of 95%")
        teams = stage(small_game(router=router), 0, kl)
        for label, case in diagnoses(teams, batches, 100 * seed).items():
            truth, statistic, *tables = case
            share = coverage(*case, intervals=intervals)
            spread = (share * (1 - share) / intervals) ** 0.5
            print(f"{label:12} {line(truth, torch.vmap(statistic)(*tables))}  {share:.3f} +- {spread:.3f}")
        for floor in FLOORS:
            count, error = with_floor(teams, floor, 100, seed)
            print(f"--min-ess {floor:4}: {count:.2f} collections, error of L corrected {error:.2f} of it")


def line(truth: float, values: Tensor) -> str:
    """truth, mean and its 95% interval over batches, their distance in standard errors, sd of one batch."""
    mean, sd = values.mean().item(), values.std().item()
    error = sd / len(values) ** 0.5
    low, high, z = mean - 1.96 * error, mean + 1.96 * error, (mean - truth) / error
    return f"{truth:10.5f} {mean:10.5f} ({low:8.5f} to {high:8.5f}) {z:6.1f} {sd:10.5f}"


if __name__ == "__main__":
    main()
