"""The enumeration against loops, samples and finite differences; Eq. 10 against the trainer's; float64."""

import itertools
import math

import pytest
import torch
from small_teams import assert_equal, by_transcript, objective, random_game, stage

from teamtr_min.objective import teamtr_loss
from teamtr_min.studies import exact
from teamtr_min.studies.exact import Game, Team


def contexts(problems: int, messages: int, turn: int) -> list[tuple[int, ...]]:
    return list(itertools.product(range(problems), *[range(messages)] * turn))


def by_loops(game: Game, theta: list, row, router) -> dict:
    """One context, one message, one token at a time, from the definitions."""
    tokens = list(itertools.product(range(game.vocabulary), repeat=game.length))

    def write(context, message) -> float:
        agent, p = router(context), 1.0
        for u, token in enumerate(tokens[message]):
            logits = theta[agent][row(agent, context, tokens[message][:u])]
            p *= math.exp(logits[token]) / sum(map(math.exp, logits))
        return p

    of_game = len(game.start), game.messages
    law, worth, J, last = {}, {}, 0.0, game.turns - 1
    for x, rollout in enumerate(contexts(*of_game, game.turns)):
        p, r = game.start[rollout[0]].item(), game.reward[x].item()
        for t in range(game.turns):
            p *= write(rollout[: t + 1], rollout[t + 1])
        J += p * game.gamma**last * r
        for t in range(game.turns):
            state, action = rollout[: t + 1], rollout[: t + 2]
            law[state] = law.get(state, 0.0) + p
            mass, total = worth.get(action, (0.0, 0.0))
            worth[action] = (mass + p, total + p * game.gamma ** (last - t) * r)
    states, every = [s for t in range(game.turns) for s in contexts(*of_game, t)], range(game.messages)
    return {
        "J": J,
        "law": [law[s] for s in states],
        "action_value": [[worth[(*s, m)][1] / worth[(*s, m)][0] for m in every] for s in states],
        "pi": [[write(s, m) for m in every] for s in states],
        "actor": [router(s) for s in states],
    }


def five_rows(agent, context, prefix) -> int:
    return (agent + sum(context) + 2 * sum(prefix) + len(prefix)) % 5


@pytest.mark.parametrize("row", [None, five_rows])
@pytest.mark.parametrize("length, turns, gamma", [(1, 4, 0.7), (2, 3, 1.0)])
def test_the_enumeration_equals_loops_over_rollouts_and_tokens(row, length, turns, gamma):
    number = {}  # a free row for each (context, prefix), in the order of the states
    for context in (c for t in range(turns) for c in contexts(2, 2**length, t)):
        for prefix in (p for u in range(length) for p in itertools.product(range(2), repeat=u)):
            number[context, prefix] = len(number)
    free, router = lambda agent, context, prefix: number[context, prefix], by_transcript(3)
    game = random_game(1, 3, turns, gamma, length=length, problems=2, router=router, row=row)
    theta = game.theta(torch.Generator().manual_seed(0))
    team, wanted = Team(game, theta), by_loops(game, theta.tolist(), row or free, router)
    assert game.actor.tolist() == wanted.pop("actor")
    for name, truth in wanted.items():
        assert_equal(getattr(team, name), torch.tensor(truth, dtype=torch.float64))


def test_at_the_old_policy_the_gradient_is_the_policy_gradient_per_message_whatever_beta():
    for agents, seed in itertools.product((2, 3), range(2)):
        game = random_game(seed, agents, 4, gamma=1.0, problems=2, router=by_transcript(agents))
        theta = game.theta(torch.Generator().manual_seed(seed)).requires_grad_()
        team = Team(game, theta)
        wanted = torch.autograd.grad(team.J, theta)[0]
        team = Team(game, theta.detach())
        for j in range(agents):
            own = team.theta[j].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(objective(team, team.replace(j, own), j, beta=0.7), own)
            assert_equal(gradient * team.messages_per_rollout(j), wanted[j])


def test_the_trainer_s_loss_over_all_rollouts_is_the_exact_objective():
    """teamtr_loss of every message, weighted by how often it is written: surrogate and k3 penalty both."""
    game = random_game(1, 2, 3, length=2, gamma=0.9)
    old, new, _ = stage(game, (0, 1), seed=2, step=0.3)
    x = exact.rollouts(old)
    own, weight = x.agent == 0, (old.rollout_law[:, None] * (x.agent == 0))[x.agent == 0]
    message = torch.arange(len(weight)).repeat_interleave(2)
    places = x.state[own][:, None], game.prefix[x.message[own]], game.tokens[x.message[own]]  # (R, U)
    logp, old_logp = (team.token_logp[places].flatten() for team in (new, old))
    advantage = old.advantage[x.state, x.message][own]
    loss, stats = teamtr_loss(logp, old_logp, message, advantage, weight=weight, clip=0.2, beta=0.3)
    assert_equal(-loss, objective(old, new, 0, clip=0.2, beta=0.3))
    assert_equal(stats["kl_k3"][0], exact.mean_message_kl(old, new, 0))
