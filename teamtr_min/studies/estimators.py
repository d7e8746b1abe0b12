"""How far the sampled estimators are from the truth: bias, coverage of their intervals, and the monitor's.

    python -m teamtr_min.studies.estimators        about two minutes on one core

Teams small enough to enumerate (exact.py) are sampled again and again; every estimate has its exact value
beside it. Three agents write two messages each, two tokens long; each update went up the exact policy
gradient until its exact KL per message was what the table says.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from teamtr_min.extras import certificate, exact
from teamtr_min.extras.certificate import before_turn
from teamtr_min.objective import group_advantages, teamtr_loss
from teamtr_min.studies.exact import Game, Team

AGENTS, ROUNDS = 3, 2
PROBLEMS, GROUP = 64, 8  # of one batch
LAST = 2  # the agent looked at: the last to be updated, so two others have moved since the stage began
BINS = (0.5, 0.8, 0.9, 1.0, 1.1, 1.25, 2.0)


def by_transcript(context: tuple) -> int:
    """A router that reads what was written."""
    return (len(context) + sum(context)) % AGENTS


def last_word(agent: int, context: tuple, prefix: tuple) -> int:
    """Six rows stand for all contexts, as a network's parameters do: each update is felt in many states."""
    return (context[0] + context[-1] + len(prefix) + sum(prefix)) % 6


def small_game(tied: bool = True, router=None, needed: int = 3) -> Game:
    """Right when `needed` of the six messages continue the one before as the problem asks.

    A random team is right in a fifth of its rollouts when three are needed, in four fifths when one is.
    """

    def reward(context: tuple) -> float:
        wanted = [(context[0] + before) % 4 for before in context[:-1]]
        return float(sum(w == m for w, m in zip(wanted, context[1:])) >= needed)

    return Game(
        AGENTS, 2, AGENTS * ROUNDS, reward, length=2, start=torch.full((4,), 0.25), router=router,
        features=last_word if tied else None,
    )  # fmt: skip


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


def log_ratio(x: exact.Rollouts, new: Team, old: Team) -> Tensor:
    """(R, turns) of each message of these rollouts."""
    return exact.rollouts(new, x.number).logp - exact.rollouts(old, x.number).logp


def effective_share(first: Team, base: Team) -> Tensor:
    """What effective_sample_share estimates: (E rho)^2 / E rho^2 over the agent's messages, from team^0."""
    mine = first.game.actor == LAST
    old, new = first.law[mine], base.law[mine]
    return new.sum() ** 2 / (old.sum() * (new**2 / old).sum())


def diagnoses(teams: list[Team], batches: int, seed: int) -> dict:
    """name -> (truth, statistic, its tables (batches, rollouts, ...)) for the stage's last update."""
    first, *_, base, new = teams
    x, y = sample_batches(base, batches, seed), sample_batches(first, batches, seed + 1)
    returns, speaks, spoken = x.returns.view(-1, GROUP), x.agent == LAST, y.agent == LAST
    log_w = log_ratio(x, new, base) * speaks
    seq = certificate.surrogate_terms(returns, log_w, speaks)
    gap = certificate.gap_terms(returns, log_w, before_turn(log_ratio(x, base, first)), speaks)
    drift = before_turn(log_ratio(y, base, first))
    found = {
        "L^seq": (exact.surrogate(base, new), torch.mean, seq),
        "gap": (exact.stale_gap(first, base, new), torch.mean, gap),
        "L^stale": (exact.surrogate(base, new, states=first), torch.mean, seq - gap),
        "D_occ": (exact.occupancy_shift(first, base, LAST), certificate.occupancy_shift, drift, spoken),
        "ESS/B": (effective_share(first, base), certificate.effective_sample_share, drift, spoken),
        "KL held out": (exact.mean_message_kl(base, new, LAST), certificate.message_kl, log_w, speaks),
    }
    return {
        name: (truth.item(), statistic, *(t.unflatten(0, (batches, -1)) for t in tables))
        for name, (truth, statistic, *tables) in found.items()
    }


def coverage(truth: float, statistic, *tables: Tensor, intervals: int) -> float:
    """Share of the first batches whose 95% bootstrap interval holds the truth."""
    held = 0
    for b in range(intervals):
        low, high = certificate.bootstrap(statistic, *(t[b] for t in tables), group=GROUP, seed=b)[1]
        held += low <= truth <= high
    return held / intervals


def monitors(x: exact.Rollouts, base: Team, new: Team) -> dict[str, Tensor]:
    """(M,) each: Eq. 11's k1, k3 and exact KL of every message of the agent, as the trainer computes them."""
    mine = x.agent == LAST
    every = torch.arange(int(mine.sum()))
    message = every.repeat_interleave(x.tokens.shape[-1])
    old_logp, new_logp = (team.token_logp[mine].flatten() for team in (x, exact.rollouts(new, x.number)))
    # Each message an agent of its own: means over an agent's messages are then the messages themselves.
    stats = teamtr_loss(new_logp, old_logp, message, torch.zeros(len(every)), agent=every,
                        n_agents=len(every))[1]  # fmt: skip
    kl = exact.token_kl(base, new)[x.state[..., None], base.game.prefix[x.message]].sum(-1)[mine]
    return {"k1": stats["kl_k1"], "k3": stats["kl_k3"], "exact": kl}


def flip_rates(delta: float, batches: int, seed: int) -> dict[tuple[str, float], list[float]]:
    """(estimator, share) -> per bin of dhat/delta: how often that share of the messages decides differently.

    One update, stopped at 19 distances from delta/4 to 5/2 delta, each measured on all batches.
    """
    base = stage(small_game(), seed, delta)[-2]
    x, g = sample_batches(base, batches, seed + 1), torch.Generator().manual_seed(seed + 2)
    found = [monitors(x, base, climb(base, LAST, delta * (0.25 + 0.125 * i))) for i in range(19)]
    count = len(found[0]["k1"]) // batches
    shuffled = torch.rand(len(found), batches, count, generator=g).argsort(-1)
    rates = {}
    for name in ("k1", "k3"):
        kl = torch.stack([kls[name].view(batches, count) for kls in found]).gather(-1, shuffled) / delta
        whole = kl.mean(-1)  # (distances, batches)
        for share in (0.25, 0.5):
            flipped = (whole > 1) != (kl[..., : int(share * count)].mean(-1) > 1)
            inside = [(whole > a) & (whole <= b) for a, b in pairwise(BINS)]
            rates[name, share] = [flipped[i].double().mean().item() for i in inside]
    return rates


def fitted(
    game: Game, estimator: str, delta: float, seed: int, lr: float = 0.03, most: int = 200
) -> tuple[float, bool]:
    """Exact KL over delta of an update that stopped where its own messages said delta; and if it did stop.

    Adam on Eq. 10 with Eq. 9's advantages over one batch, without the penalty, for at most that many steps;
    the step that exceeds delta is cut short to end on it.
    """
    base = random_team(game, seed)
    x = sample_batches(base, 1, seed + 1)
    mine = x.agent == LAST
    state, prefix, tokens = x.state[mine][:, None], game.prefix[x.message[mine]], x.tokens[mine]  # (M, U)
    old, rows = base.token_logp[state, prefix], game.features[state, prefix]  # (M, U, V) and (M, U)
    message = torch.arange(len(tokens)).repeat_interleave(tokens.shape[1])
    advantage = group_advantages(x.returns.view(-1, GROUP), clip=2.0).flatten()[mine.nonzero()[:, 0]]

    def measure(theta: Tensor) -> tuple[Tensor, float]:
        new = theta[rows].log_softmax(-1)
        new_logp, old_logp = (logp.gather(-1, tokens[..., None]).flatten() for logp in (new, old))
        loss, stats = teamtr_loss(new_logp, old_logp, message, advantage)
        stats["kl_exact"] = (old.exp() * (old - new)).sum() / len(tokens)
        return loss, stats[f"kl_{estimator}"].item()

    inside, theta = base.theta[LAST].clone(), base.theta[LAST].clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=lr, betas=(0.9, 0.99))
    for _ in range(most):
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
        if router is None:
            base, new = teams[-2:]
            truth = exact.mean_message_kl(base, new, LAST).item()
            for label, values in monitors(sample_batches(base, batches, 100 * seed), base, new).items():
                print(f"{label + ' tokens':12} {line(truth, values.view(batches, -1).mean(1))}")

    print("\nHow often a share of the 1,024 messages decides otherwise than all of them, "
          f"delta {delta}; seed 0")  # fmt: skip
    print("dhat/delta        " + "".join(f"{a:6.2f}-{b:.2f}" for a, b in pairwise(BINS)))
    for (name, share), rates in flip_rates(delta, 100, seed=0).items():
        print(f"{name}, {share:4.0%} of them " + "".join(f"{rate:11.3f}" for rate in rates))

    print(f"\nExact KL / delta of updates that were to stop where their own messages said delta = {delta}")
    print(f"seeds 0, 10, ..., {10 * (seeds - 1)}; mean (95% interval), least to largest")
    for tied in (True, False):
        for needed in (3, 1):
            game = small_game(tied, needed=needed)
            right = random_team(game, 0).J
            print(f"{'six rows an agent' if tied else 'a free row for every context'}; {right:.0%} right")
            for estimator in ("k1", "k3", "exact"):
                found = [fitted(game, estimator, delta, 10 * s) for s in range(seeds)]
                for label, wanted in (("stopped", True), ("200 steps never got there", False)):
                    ratio = torch.tensor([r for r, reached in found if reached == wanted])
                    if len(ratio):
                        mean, (low, high) = certificate.mean_with_interval(ratio, seed=0)
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
