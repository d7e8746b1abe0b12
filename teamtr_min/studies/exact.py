"""Teams small enough to enumerate: the truth that bounds and sampled estimators are tested against.

A rollout is one problem and `turns` messages. A state is the shared context (problem, m_0, ..., m_{t-1}):
message m leads from state s of turn t to state s * M + m of turn t + 1.

    theta  --rows-->  token_logp  --sum over tokens-->  logp (S, M)        the policy in each state
    law of turn t + 1  =  flatten(law of turn t [:, None] * pi)            forward: probability of each state
    value of turn t    =  sum_m pi * gamma * reshape(value of turn t + 1)  backward: expected return

All is float64 and differentiable. The states of all turns stand in one list of S, turn after turn.
    A agents    P problems    V tokens in the vocabulary    U tokens in a message    M = V^U possible messages
    S = P (1 + M + ... + M^(turns-1)) states      X = P M^turns rollouts
    prefixes = 1 + V + ... + V^(U-1): all unfinished messages, the empty one first

Discounting [ours, where the paper leaves it open]: the last message earns the return, J = gamma^(turns-1)
E[return], then the team stays in an absorbing state. Sums over states weigh turn t by gamma^t.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

Context = tuple[int, ...]  # (problem, message numbers so far); its length less one is the turn


class Game:
    """The part of a team's work that training does not change.

    reward: (X,) in [0, 1], or a function of the finished context. start: law (P,) of the problems; None: one
    problem. router(context) names the next agent; None: round-robin. row(agent, context, token prefix)
    numbers the row of the agent's table of logits that is used there; None: a row each."""

    def __init__(
        self, agents: int, vocabulary: int, turns: int, reward: Tensor | Callable[[Context], float], *,
        length: int = 1, gamma: float = 1.0, start: Tensor | None = None,
        router: Callable[[Context], int] | None = None, row: Callable | None = None,
    ):  # fmt: skip
        self.agents, self.vocabulary, self.turns = agents, vocabulary, turns
        self.length, self.gamma = length, gamma
        self.start = torch.ones(1).double() if start is None else start.double()
        V, U, P = vocabulary, length, len(self.start)
        M = self.messages = V**U
        X = P * M**turns

        m, u = torch.arange(M)[:, None], torch.arange(U)
        self.tokens = m // V ** (U - 1 - u) % V  # (M, U): message number m spells tokens[m] in base V
        self.prefix = (V**u).cumsum(0) - V**u + m // V ** (U - u)  # (M, U): number of the prefix before each
        prefixes = [p for n in range(U) for p in product(range(V), repeat=n)]

        self.sizes = [P * M**t for t in range(turns)]  # states of each turn
        first = torch.tensor([0, *self.sizes[:-1]]).cumsum(0)
        x, t = torch.arange(X)[:, None], torch.arange(turns)
        self.turn = t.repeat_interleave(torch.tensor(self.sizes))  # (S,)
        self.discount = gamma ** self.turn.double()  # (S,); an integer exponent would give float32
        self.state = first + x // M ** (turns - t)  # (X, turns): the states of each rollout
        self.message = x // M ** (turns - 1 - t) % M  # (X, turns): the message written there

        before = [c for t in range(turns) for c in product(range(P), *[range(M)] * t)]
        self.actor = torch.tensor([router(c) for c in before]) if router else self.turn % agents  # (S,)
        self.row = torch.arange(len(before) * len(prefixes)).view(-1, len(prefixes))  # (S, prefixes)
        if row:
            actors = self.actor.tolist()
            self.row = torch.tensor([[row(a, c, p) for p in prefixes] for a, c in zip(actors, before)])

        if callable(reward):
            reward = torch.tensor([reward(c) for c in product(range(P), *[range(M)] * turns)])
        self.reward = reward.double()

    def theta(self, generator: torch.Generator, scale: float = 1.0) -> Tensor:
        shape = (self.agents, int(self.row.max()) + 1, self.vocabulary)  # (A, rows, V)
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


class Team:
    """A game played with theta (A, rows, V). token_logp (S, prefixes, V), logp and pi (S, M) are the policy
    of the agent that writes in each state. law (S,) is the probability that a rollout passes through a
    state, visits (S,) gamma^t law, rollout_law (X,) that of a rollout. action_value, advantage (S, M), value
    (S,) and J () are of the discounted return."""

    def __init__(self, game: Game, theta: Tensor):
        self.game, self.theta = game, theta = game, theta.double()
        self.token_logp = theta[game.actor[:, None], game.row].log_softmax(-1)
        self.logp = self.token_logp[:, game.prefix, game.tokens].sum(-1)  # (S, M, U) -> (S, M)
        self.pi = self.logp.exp()
        by_turn = self.pi.split(game.sizes)

        laws = [game.start]
        for pi in by_turn:
            laws.append((laws[-1][:, None] * pi).flatten())
        self.law, self.rollout_law = torch.cat(laws[:-1]), laws[-1]
        self.visits = game.discount * self.law

        action_values, values, ahead = [], [], game.reward  # the last message earns the return
        for pi in reversed(by_turn):
            action_values.append(ahead.view(-1, game.messages))
            values.append((pi * action_values[-1]).sum(-1))
            ahead = game.gamma * values[-1]
        self.action_value, self.value = torch.cat(action_values[::-1]), torch.cat(values[::-1])
        self.advantage = self.action_value - self.value[:, None]
        self.J = game.start @ values[-1]

    def replace(self, agent: int, theta: Tensor) -> "Team":
        """The team with one agent's parameters (rows, V) replaced; differentiable in them."""
        chosen = (torch.arange(self.game.agents) == agent)[:, None, None]
        return Team(self.game, torch.where(chosen, theta, self.theta))

    def messages_per_rollout(self, agent: int) -> Tensor:
        return self.law[self.game.actor == agent].sum()  # () in expectation


def message_kl(old: Team, new: Team) -> Tensor:
    """Eq. 5 [paper]: KL(old || new) of the message: (S,)."""
    return (old.pi * (old.logp - new.logp)).sum(-1)


def mean_message_kl(old: Team, new: Team, agent: int) -> Tensor:
    """The expectation of Eq. 11's monitor [paper]: KL () per message of the agent, undiscounted."""
    own = old.law * (old.game.actor == agent)
    return own @ message_kl(old, new) / own.sum()


def surrogate(base: Team, new: Team, states: Team | None = None) -> Tensor:
    """L () = (1/(1-gamma)) E_{s ~ d^states, m ~ new}[A_base(s, m)] [paper], or the plain sum for gamma = 1.
    L_i^seq is surrogate(team^{i-1}, team^i); L_i^stale takes its states from team^0."""
    return ((states or base).visits[:, None] * new.pi * base.advantage).sum()


def occupancy_shift(first: Team, base: Team, agent: int) -> Tensor:
    """D_occ () [ours]: total variation between the laws of two teams over the states where the agent acts, in
    each turn of the laws given that it does; a mean over turns, weighted by how often it does in `first`."""
    total, acts = torch.zeros((), dtype=torch.float64), base.game.actor == agent
    for t in base.game.turn[acts].unique():
        old, new = (team.law[acts & (base.game.turn == t)] for team in (first, base))
        total = total + old.sum() * (old / old.sum() - new / new.sum()).abs().sum() / 2
    return total / first.messages_per_rollout(agent)


class Rollouts(NamedTuple):  # R of a game's rollouts, with the log-probs of the team that wrote them
    number: Tensor  # (R,) in 0..X-1
    state: Tensor  # (R, turns) numbers in 0..S-1
    agent: Tensor  # (R, turns)
    message: Tensor  # (R, turns) numbers in 0..M-1
    logp: Tensor  # (R, turns) of whole messages
    returns: Tensor  # (R,)


def rollouts(team: Team, number: Tensor | None = None) -> Rollouts:
    """The rollouts of these numbers (R,), or all X of them; the probability of x is team.rollout_law[x]."""
    game = team.game
    number = torch.arange(len(game.reward)) if number is None else number
    state, message = game.state[number], game.message[number]
    logp, returns = team.logp[state, message], game.reward[number]
    return Rollouts(number, state, game.actor[state], message, logp, returns)


def sample_rollouts(team: Team, problem: Tensor, generator: torch.Generator) -> Rollouts:
    """One sampled rollout for each problem number (R,), message by message; repeat a problem for a group."""
    number = problem
    for pi in team.pi.detach().split(team.game.sizes):
        message = torch.multinomial(pi[number], 1, generator=generator)[:, 0]
        number = number * team.game.messages + message
    return rollouts(team, number)


def log_ratio(x: Rollouts, new: Team, old: Team) -> Tensor:
    """log new(m | s) - log old(m | s) (R, turns) of each message of these rollouts."""
    return rollouts(new, x.number).logp - rollouts(old, x.number).logp
