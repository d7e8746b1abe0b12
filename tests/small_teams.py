"""Random teams small enough to enumerate, updated at random, for tests against the truth."""

import functools
import itertools

import torch

from teamtr_min.studies.exact import Game, Team, mean_message_kl, rollouts

ROUND_OFF = 1e-12
assert_equal = functools.partial(torch.testing.assert_close, rtol=0, atol=ROUND_OFF)


def by_transcript(agents: int):
    """A router that reads the whole context: which agent is next depends on what was written."""
    return lambda context: (len(context) + sum(context)) % agents


def random_game(seed: int, agents: int, turns: int, gamma: float = 0.5, **options) -> Game:
    g = torch.Generator().manual_seed(1000 + seed)
    problems, messages = options.pop("problems", 1), options.get("vocabulary", 2) ** options.get("length", 1)
    start = torch.rand(problems, generator=g, dtype=torch.float64) + 0.1
    reward = torch.rand(problems * messages**turns, generator=g, dtype=torch.float64)
    if seed % 2:
        reward = (reward > 0.5).double()  # a verifier's right or wrong
    options = {"vocabulary": 2, "start": start / start.sum(), **options}
    return Game(agents, turns=turns, reward=reward, gamma=gamma, **options)


def occupancy(team: Team) -> torch.Tensor:
    """d^pi (S,) [paper] for gamma < 1; its sum is 1 - gamma^turns, the rest is in the absorbing state."""
    return (1 - team.game.gamma) * team.visits


def objective(old: Team, new: Team, agent: int, clip: float = 0.2, beta: float = 0.0) -> torch.Tensor:
    """Eq. 10 [paper] in expectation over the agent's messages in rollouts of `old`, to be maximised: (). It
    has the exact A(s, m), and the KL, which is the expectation of k3. Log-ratios are not clamped."""
    every = rollouts(old)
    advantage = old.advantage[every.state, every.message]  # (X, turns)
    weight = old.rollout_law[:, None] * (every.agent == agent)  # (X, turns)
    w = (new.logp - old.logp)[every.state, every.message].exp()
    clipped = torch.minimum(w * advantage, w.clamp(1 - clip, 1 + clip) * advantage)
    return (weight * clipped).sum() / weight.sum() - beta * mean_message_kl(old, new, agent)


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


@functools.cache
def random_stages(gamma: float | None = None) -> list[tuple[list[Team], tuple[int, ...]]]:
    """(teams, order): 2 to 4 agents, one round and two, all routers and policies, small steps and large."""
    kinds = (
        lambda agents, turns: {},
        lambda agents, turns: {"router": by_transcript(agents), "problems": 2},
        lambda agents, turns: {"router": by_transcript(agents), "row": last_word},
        lambda agents, turns: {"length": 2 if turns <= 4 else 1, "row": last_word},
    )
    stages = []
    for agents, rounds, seed in itertools.product((2, 3, 4), (1, 2), range(16)):
        turns, discount = agents * rounds, gamma or (0.1, 0.5, 0.9, 0.99)[seed // 4]
        game = random_game(seed, agents, turns, discount, **kinds[seed % 4](agents, turns))
        step = (0.02, 0.3, 1.0, 3.0)[(seed + seed // 4) % 4]
        stages += [(stage(game, order, seed, step=step), order) for order in orders(agents, seed)]
    return stages


def last_word(agent, context, prefix) -> int:
    """Tied rows: only the last message is read."""
    return (context[-1] + len(prefix)) % 3
