"""The paper's statements on teams small enough to enumerate, each also shown able to fail; float64."""

import itertools
import math

import pytest
import torch

from teamtr_min import exact
from teamtr_min.exact import Game, Team, message_kl, radius, stale_gap, surrogate
from teamtr_min.objective import teamtr_loss

ROUND_OFF = 1e-12


def by_transcript(agents: int):
    """A router that reads the whole context: which agent is next depends on what was written."""
    return lambda context: (len(context) + 2 * sum(context)) % agents


def random_game(seed: int, agents: int, turns: int, gamma: float = 0.5, **options) -> Game:
    g = torch.Generator().manual_seed(1000 + seed)
    problems, messages = options.pop("problems", 1), options.get("vocabulary", 2) ** options.get("length", 1)
    start = torch.rand(problems, generator=g, dtype=torch.float64) + 0.1
    reward = torch.rand(problems * messages**turns, generator=g, dtype=torch.float64)
    if seed % 2:
        reward = (reward > 0.5).double()  # a verifier's right or wrong
    options = {"vocabulary": 2, "start": start / start.sum(), **options}
    return Game(agents, turns=turns, reward=reward, gamma=gamma, **options)


def stage(game: Game, order, seed: int, scale: float = 1.0, step: float = 0.5) -> list[Team]:
    """team^0 ... team^n: one random update of each agent, in this order."""
    g = torch.Generator().manual_seed(seed)
    teams, target = [Team(game, game.theta(g, scale))], game.theta(g, step)
    for j in order:
        teams.append(teams[-1].replace(j, teams[0].theta[j] + target[j]))
    return teams


def orders(agents: int, seed: int) -> list[tuple[int, ...]]:
    every = list(itertools.permutations(range(agents)))
    return every if agents <= 3 else [every[0], every[-1], every[seed % len(every)]]


def random_stages(gamma: float | None = None):
    """(teams, order): n = 2..4, one round and two, all routers and kinds of policy, small steps and large."""
    tied = {"features": lambda agent, context, prefix: (context[-1] + len(prefix)) % 3}
    linear = {"features": lambda agent, context, prefix: [1.0, context[-1] - 0.5, len(context) + sum(prefix)]}
    for agents, rounds, seed in itertools.product((2, 3, 4), (1, 2), range(4)):
        kind = (
            {},
            {"router": by_transcript(agents), "problems": 2},
            {**tied, "router": by_transcript(agents)},
            {**linear, "length": 2 if agents * rounds <= 4 else 1},
        )[seed]
        game = random_game(seed, agents, agents * rounds, gamma or (0.1, 0.5, 0.9, 0.99)[seed], **kind)
        for order in orders(agents, seed):
            yield stage(game, order, seed, step=(0.02, 0.3, 1.0, 3.0)[(seed + agents) % 4]), order


def c(teams: list[Team]) -> torch.Tensor:
    """c = sqrt(2) gamma A_max / (1-gamma)^2 [paper], A_max over the advantages that the stage uses."""
    gamma, largest = teams[0].game.gamma, max(team.A.abs().max() for team in teams[:-1])
    return math.sqrt(2) * gamma * largest / (1 - gamma) ** 2


def pairs(teams: list[Team]):
    return list(zip(teams, teams[1:]))


def seqs(teams):
    """L_i^seq of a stage, i = 1..n."""
    return [surrogate(old, new) for old, new in pairs(teams)]


def stales(teams):
    """L_i^stale of a stage, i = 1..n."""
    return [surrogate(old, new, states=teams[0]) for old, new in pairs(teams)]


def deltas(teams):
    """delta_i of a stage, each under its own d^{team^{i-1}}."""
    return [radius(old, new) for old, new in pairs(teams)]


def stale_deltas(teams):
    """The same updates' KL under d^{team^0}: what a stale run can measure."""
    first = teams[0]
    return [first.occupancy @ message_kl(old, new) for old, new in pairs(teams)]


def root(delta):
    return delta.clamp(min=0).sqrt()


# The four statements, as (what is lost, what the statement allows to be lost): loss <= allowance.


def prop_33(teams):
    return stales(teams)[-1] - seqs(teams)[-1], c(teams) * sum(map(root, deltas(teams)[:-1]))


def thm_34(teams):
    return seqs(teams)[0] - (teams[1].J - teams[0].J), c(teams) * root(deltas(teams)[0])


def thm_36(teams):
    return sum(seqs(teams)) - (teams[-1].J - teams[0].J), c(teams) * sum(map(root, deltas(teams)))


def thm_37(teams):
    n = len(teams) - 1
    return sum(stales(teams)) - (teams[-1].J - teams[0].J), c(teams) * n * sum(map(root, deltas(teams)))


def stale_ours(teams):
    """Thm 3.7 with every KL under d^{team^0} and roots of sums [ours]; see the test below for the proof."""
    total = torch.stack(stale_deltas(teams)).cumsum(0)
    return sum(stales(teams)) - (teams[-1].J - teams[0].J), c(teams) * root(total).sum()


# Enumeration


def by_loops(game: Game, theta: torch.Tensor, features) -> dict:
    """One context, one message, one token at a time, from the definitions; no tensors but theta."""
    tokens = list(itertools.product(range(game.vocabulary), repeat=game.length))
    theta = theta.tolist()

    def write(context, message) -> float:
        agent, p = game.router_used(context), 1.0
        for u, token in enumerate(tokens[message]):
            x = features(agent, context, tokens[message][:u])
            rows = theta[agent]
            logits = rows[x] if isinstance(x, int) else [
                sum(f * row[v] for f, row in zip(x, rows)) for v in range(game.vocabulary)
            ]  # fmt: skip
            p *= math.exp(logits[token]) / sum(map(math.exp, logits))
        return p

    B, M, T = len(game.start), game.messages, game.turns
    law, worth, J = {}, {}, 0.0
    every = list(itertools.product(range(B), *[range(M)] * T))
    for x, rollout in enumerate(every):
        p, r = game.start[rollout[0]].item(), game.reward[x].item()
        for t in range(T):
            p *= write(rollout[: t + 1], rollout[t + 1])
        J += p * game.gamma ** (T - 1) * r
        for t in range(T):
            s, a = rollout[: t + 1], rollout[: t + 2]
            law[s] = law.get(s, 0.0) + p
            mass, total = worth.get(a, (0.0, 0.0))
            worth[a] = (mass + p, total + p * game.gamma ** (T - 1 - t) * r)
    states = [s for t in range(T) for s in itertools.product(range(B), *[range(M)] * t)]
    Q = [[worth[(*s, m)][1] / worth[(*s, m)][0] for m in range(M)] for s in states]
    pi = [[write(s, m) for m in range(M)] for s in states]
    return {
        "J": J,
        "law": [law[s] for s in states],
        "Q": Q,
        "pi": pi,
        "actor": list(map(game.router_used, states)),
    }


SEEN = {
    "rows": lambda agent, context, prefix: (agent + sum(context) + 2 * sum(prefix) + len(prefix)) % 5,
    "floats": lambda agent, context, prefix: [1.0, len(context) - sum(prefix), context[-1] + len(prefix)],
}


@pytest.mark.parametrize("seen", ["free", "rows", "floats"])
@pytest.mark.parametrize("length, turns, gamma", [(1, 4, 0.7), (2, 2, 0.7), (2, 3, 1.0)])
def test_the_enumeration_equals_loops_over_rollouts_and_tokens(seen, length, turns, gamma):
    number = {}  # a free row for each (context, prefix), in the order of the states
    for context in (c for t in range(turns) for c in itertools.product(range(2), *[range(2**length)] * t)):
        for prefix in (p for u in range(length) for p in itertools.product(range(2), repeat=u)):
            number[context, prefix] = len(number)
    features = SEEN.get(seen, lambda agent, context, prefix: number[context, prefix])
    router = by_transcript(3)
    game = random_game(1, 3, turns, gamma, length=length, problems=2, router=router, features=SEEN.get(seen))
    game.router_used = router
    theta = game.theta(torch.Generator().manual_seed(0))
    team, wanted = Team(game, theta), by_loops(game, theta, features)
    assert team.J.item() == pytest.approx(wanted["J"], abs=ROUND_OFF)
    for name in ("law", "Q", "pi"):
        torch.testing.assert_close(
            getattr(team, name), torch.tensor(wanted[name], dtype=torch.float64), rtol=0, atol=1e-12
        )
    assert game.actor.tolist() == wanted["actor"]
