"""How far sampled estimates can be trusted: their bias, and the coverage of their intervals.

    python -m teamtr_min.studies.estimators        about twelve minutes on one core

Teams small enough to enumerate (exact.py) are sampled again and again. Three agents write two messages each,
two tokens long. In the first table an update goes up the exact policy gradient, to the exact KL per message
of the table; in the second one it goes up the gradient that a batch gives, as in a run.
"""

from itertools import product

import torch
from torch import Tensor

from teamtr_min.extras import diagnostics
from teamtr_min.extras.diagnostics import before_turn, bootstrap, effective_sample_share, surrogate_terms
from teamtr_min.objective import group_advantages
from teamtr_min.studies import exact
from teamtr_min.studies.exact import Game, Team, log_ratio

AGENTS, ROUNDS = 3, 2
PROBLEMS, GROUP = 64, 8  # of one batch
LAST = 2  # the agent looked at: the last to be updated, so two others have moved since the stage began


def small_game(router=None) -> Game:
    """Right when three of the six messages continue the one before as the problem asks."""

    def reward(context: tuple) -> float:
        wanted = [(context[0] + before) % 4 for before in context[:-1]]
        return float(sum(w == m for w, m in zip(wanted, context[1:])) >= 3)

    def row(agent: int, context: tuple, prefix: tuple) -> int:  # six stand for all, as parameters do
        return (context[0] + context[-1] + len(prefix) + sum(prefix)) % 6

    start = torch.full((4,), 0.25)
    return Game(AGENTS, 2, AGENTS * ROUNDS, reward, length=2, start=start, router=router, row=row)


def climb(team: Team, j: int, kl: float, direction: Tensor | None = None) -> Team:
    """Agent j up its exact policy gradient, or `direction`, until its exact KL per message is `kl`."""
    own, low, high = team.theta[j].clone().requires_grad_(), 0.0, 1.0
    if direction is None:
        (direction,) = torch.autograd.grad(exact.surrogate(team, team.replace(j, own)), own)

    def at(step: float) -> Team:
        return team.replace(j, team.theta[j] + step * direction)

    while high < 1e9 and exact.mean_message_kl(team, at(high), j) <= kl:  # no end if the direction is 0
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        inside = exact.mean_message_kl(team, at(middle), j) <= kl
        low, high = (middle, high) if inside else (low, middle)
    return at(low)


def stage(game: Game, seed: int, kl: float) -> list[Team]:
    """team^0 ... team^n: every agent once, in turn order."""
    teams = [Team(game, game.theta(torch.Generator().manual_seed(seed)))]
    for j in range(AGENTS):
        teams.append(climb(teams[-1], j, kl))
    return teams


def sample(team: Team, problems: int, seed: int) -> exact.Rollouts:
    g = torch.Generator().manual_seed(seed)
    problem = torch.multinomial(team.game.start, problems, replacement=True, generator=g)
    return exact.sample_rollouts(team, problem.repeat_interleave(GROUP), g)


def share(old: Tensor, new: Tensor) -> Tensor:
    """(E rho)^2 / E rho^2 of rho = new / old, of probabilities: the truth of an effective sample share."""
    return new.sum() ** 2 / (old.sum() * (new**2 / old).sum())


def weighted_kl(log_rho: Tensor, log_w: Tensor, writes: Tensor) -> Tensor:
    weight = log_rho.softmax(0)[:, None] * writes  # of Eq. 11's k3 over messages
    return (weight * (log_w.expm1() - log_w)).sum() / weight.sum()


def diagnoses(teams: list[Team], batches: int, seed: int) -> dict:
    """name -> (truth, statistic, its tables (batches, rollouts, ...)) for the stage's last update. The first
    five are those of --diagnostics; the others read rollouts of team^0, weighted as by --min-ess."""
    first, *_, base, new = teams
    x, y = sample(base, batches * PROBLEMS, seed), sample(first, batches * PROBLEMS, seed + 1)
    writes, wrote = x.agent == LAST, y.agent == LAST
    log_w, log_w_first = log_ratio(x, new, base) * writes, log_ratio(y, new, base) * wrote
    returns, drift, own = x.returns.view(-1, GROUP), log_ratio(y, base, first), first.game.actor == LAST
    gap = diagnostics.gap_terms(returns, log_w, before_turn(log_ratio(x, base, first)), writes)
    old = surrogate_terms(y.returns.view(-1, GROUP), log_w_first, wrote)
    before, rho, ess = before_turn(drift), drift.sum(1), effective_sample_share
    surrogate, kl = exact.surrogate(base, new), exact.mean_message_kl(base, new, LAST)
    stale = exact.surrogate(base, new, states=first)
    found = {
        "L^seq": (surrogate, torch.mean, surrogate_terms(returns, log_w, writes)),
        "gap": (surrogate - stale, torch.mean, gap),
        "D_occ": (exact.occupancy_shift(first, base, LAST), diagnostics.occupancy_shift, before, wrote),
        "ESS/B": (share(first.law[own], base.law[own]), ess, before, wrote),
        "KL held out": (kl, diagnostics.message_kl, log_w, writes),
        "L corrected": (surrogate, lambda log_rho, terms: (log_rho.softmax(0) * terms).sum(), rho, old),
        "KL corrected": (kl, weighted_kl, rho, log_w_first, wrote),
        "ESS": (share(first.rollout_law, base.rollout_law), ess, rho, torch.ones_like(rho)),
    }
    return {
        name: (truth.item(), statistic, *(t.unflatten(0, (batches, -1)) for t in tables))
        for name, (truth, statistic, *tables) in found.items()
    }


def coverage(truth: float, statistic, *tables: Tensor, intervals: int) -> float:
    """Share of the first batches whose 95% bootstrap interval holds the truth."""
    found = [bootstrap(statistic, *(t[b] for t in tables), group=GROUP, seed=b)[1] for b in range(intervals)]
    return sum(low <= truth <= high for low, high in found) / intervals


def gradient(team: Team, j: int, x: exact.Rollouts, weight: Tensor) -> Tensor:
    """Agent j's gradient (rows, V) of Eq. 10 at `team`, without the KL, by rollouts of these weights (R,)."""
    own, grouped = team.theta[j].clone().requires_grad_(), (-1, GROUP)
    advantages = group_advantages(x.returns.view(grouped), 2.0, weight=weight.view(grouped)).flatten()
    logp = team.replace(j, own).logp[x.state, x.message] * (x.agent == j)  # (R, turns)
    return torch.autograd.grad(weight * advantages @ logp.sum(1), own)[0]


def after_a_fit(first: Team, problems: int, kl: float, seed: int) -> dict[str, float]:
    """Agent 0 moves by `kl` on a batch of team `first`. Its gain, and as that batch, reweighted, or another
    one that the update has not seen, has it; then the gain of agent 1, which moves as far by each."""
    x, other = (sample(first, problems, 3 * seed + i) for i in (0, 1))
    one = torch.ones_like(x.returns)
    team = climb(first, 0, kl, gradient(first, 0, x, one))
    w, v = (log_ratio(y, team, first).sum(1).softmax(0) * len(one) for y in (x, other))  # (R,) each
    found = {"gain": team.J - first.J}
    found |= {"reweighted": ((w - 1) * x.returns).mean(), "others": ((v - 1) * other.returns).mean()}
    arms = {"fresh": (sample(team, problems, 3 * seed + 2), one), "stale": (x, one)}
    for name, (y, weight) in (arms | {"reweighted": (x, w), "others": (other, v)}).items():
        found[f"next, {name}"] = climb(team, 1, kl, gradient(team, 1, y, weight)).J - team.J
    return {name: value.item() for name, value in found.items()}


def main(batches: int = 1000, intervals: int = 200, fits: int = 200) -> None:
    print(f"| KL per update | estimate | truth | mean of {batches} batches | sd | coverage of 95% |")
    print("|---" * 6 + "|")
    for seed, kl in enumerate((0.02, 0.2, 1.0, 4.0)):
        for name, case in diagnoses(stage(small_game(), 0, kl), batches, 100 * seed).items():
            truth, statistic, *tables = case
            sd, mean = torch.std_mean(torch.vmap(statistic)(*tables))
            covered = coverage(*case, intervals=intervals)
            print(f"| {kl} | {name} | {truth:.5f} | {mean:.5f} | {sd:.5f} | {covered:.3f} |")
    first = Team(small_game(), small_game().theta(torch.Generator().manual_seed(0)))
    for problems, kl in product((6, 24, 96), (0.02, 0.1)):
        found = [after_a_fit(first, problems, kl, seed) for seed in range(fits)]
        print(f"\n{problems} problems x {GROUP}, KL {kl}: mean and standard error of {fits} batches")
        for name in found[0]:
            sd, mean = torch.std_mean(torch.tensor([fit[name] for fit in found]))
            print(f"    {name:18s} {mean:.4f} ±{sd / fits**0.5:.4f}")


if __name__ == "__main__":
    main()
