"""How far sampled estimates can be trusted: their bias, the coverage of their intervals, the monitor's.

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
from teamtr_min.objective import group_advantages, teamtr_loss
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


def small_game(tied: bool = True, router=None, needed: int = 3) -> Game:
    """Right when `needed` of the six messages continue the one before as the problem asks.

    A random team is right in a fifth of its rollouts when three are needed, in four fifths when one is.
    """

    def reward(context: tuple) -> float:
        wanted = [(context[0] + before) % 4 for before in context[:-1]]
        return float(sum(w == m for w, m in zip(wanted, context[1:])) >= needed)

    start, features = torch.full((4,), 0.25), last_word if tied else None
    return Game(AGENTS, 2, AGENTS * ROUNDS, reward, length=2, start=start, router=router, features=features)


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


def fitted(game: Game, estimator: str, delta: float, seed: int, lr: float = 0.03) -> tuple[float, bool]:
    """Exact KL over delta of an update that stopped where its own messages said delta; and if it did stop.

    Adam on Eq. 10 with Eq. 9's advantages over one batch, without the penalty, for at most 200 steps; the
    step that exceeds delta is cut short to end on it.
    """
    base = random_team(game, seed)
    x = sample_batches(base, 1, seed + 1)
    own = x.agent == LAST
    state, prefix, tokens = x.state[own][:, None], game.prefix[x.message[own]], x.tokens[own]  # (M, U)
    old, rows = base.token_logp[state, prefix], game.seen[state, prefix]  # (M, U, V) and (M, U)
    message = torch.arange(len(tokens)).repeat_interleave(tokens.shape[1])
    advantage = group_advantages(x.returns.view(-1, GROUP), clip=2.0).flatten()[own.nonzero()[:, 0]]

    def measure(theta: Tensor) -> tuple[Tensor, float]:
        new = theta[rows].log_softmax(-1)
        new_logp, old_logp = (logp.gather(-1, tokens[..., None]).flatten() for logp in (new, old))
        loss, stats = teamtr_loss(new_logp, old_logp, message, advantage)
        return loss, stats[f"kl_{estimator}"].item()

    inside, theta = base.theta[LAST].clone(), base.theta[LAST].clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=lr, betas=(0.9, 0.99))
    for _ in range(200):
        optimizer.zero_grad()
        measure(theta)[0].backward()
        optimizer.step()
        if reached := measure(theta)[1] > delta:
            break
        inside = theta.detach().clone()
    theta = theta.detach()
    share = farthest(lambda step: measure(inside.lerp(theta, step))[1] > delta) if reached else 0.0
    new = base.replace(LAST, inside.lerp(theta, share))
    return exact.mean_message_kl(base, new, LAST).item() / delta, reached


# The tables


def main(batches: int = 1000, intervals: int = 200, seeds: int = 40, delta: float = 0.02) -> None:
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

    print(f"\nExact KL / delta of updates that were to stop where their own messages said delta = {delta}")
    print(f"seeds 0, 10, ..., {10 * (seeds - 1)}; mean (95% interval), least to largest")
    for tied in (True, False):
        for needed in (3, 1):
            game = small_game(tied, needed=needed)
            right = random_team(game, 0).J
            print(f"{'six rows an agent' if tied else 'a free row for every context'}; {right:.0%} right")
            for estimator in ("k1", "k3"):
                found = [fitted(game, estimator, delta, 10 * s) for s in range(seeds)]
                for label, wanted in (("stopped", True), ("200 steps never got there", False)):
                    ratio = torch.tensor([r for r, reached in found if reached == wanted])
                    if len(ratio):
                        mean, (low, high) = bootstrap(torch.mean, ratio, group=1, seed=0)
                        spread = f"({low:.3f} to {high:.3f}), {ratio.min():.2f} to {ratio.max():.2f}"
                        print(f"  {estimator:5} {len(ratio):2d} {label}: {mean:.3f} {spread}")


def line(truth: float, values: Tensor) -> str:
    """truth, mean and its 95% interval over batches, their distance in standard errors, sd of one batch."""
    mean, sd = values.mean().item(), values.std().item()
    error = sd / len(values) ** 0.5
    low, high, z = mean - 1.96 * error, mean + 1.96 * error, (mean - truth) / error
    return f"{truth:10.5f} {mean:10.5f} ({low:8.5f} to {high:8.5f}) {z:6.1f} {sd:10.5f}"


if __name__ == "__main__":
    main()
