"""From turns to the flat list of trainable tokens."""

import dataclasses

import pytest
import torch

from teamtr_min import rng, rollout
from teamtr_min.config import Config
from teamtr_min.files import UserError
from teamtr_min.objective import group_advantages
from teamtr_min.rollout import collect
from teamtr_min.tasks import Relay
from teamtr_min.team import load_team


def play(config: Config, problems: int = 5, place=("train", 0, 0), **changes):
    config = dataclasses.replace(config, device="cpu", **changes)
    task = Relay(config)
    team = load_team(config, task.roles(config.agents))
    drawn = task.sample_problems(problems, rng.generator(config.seed, "problems"))
    return collect(team, drawn, config.group, task.grade, config, place), team, task


SHORT = Config(group=4, max_new_tokens=4)  # some messages are cut off at four tokens
TWO_ROUNDS = Config(group=4, agents=2, rounds=2)
CUT_TWICE = Config(
    group=4, agents=2, rounds=2, max_new_tokens=3
)  # cut off, and seen again as one's own context


def text_of(rollouts) -> list:
    return [[(m.agent, m.tokens, m.stopped) for m in messages] for messages in rollouts.messages]


@pytest.mark.parametrize("config", [SHORT, TWO_ROUNDS, CUT_TWICE, Config(group=4, router="random")])
def test_every_sampled_token_is_trained_on_once_and_nothing_else(config):
    """End-of-message tokens are in; contexts, padding and the token that closes a cut-off message are not."""
    rollouts, team, _ = play(config)
    assert any(not m.stopped for ms in rollouts.messages for m in ms) == (config.max_new_tokens < 16)
    constant = sum(len(set(group)) == 1 for group in rollouts.grouped_returns.tolist())
    assert rollouts.constant_groups == pytest.approx(constant / 5)
    advantage = torch.arange(len(rollouts.messages)).float()
    for agent in range(config.agents):
        batches = rollouts.view(agent, advantage, batch_tokens=60)
        rows = {}
        for b in batches:
            R, T = b.tokens.shape
            assert R * T <= 60 or R == 1
            assert b.message.tolist() == sorted(b.message.tolist())
            assert set(b.message.tolist()) == set(range(len(b.advantage)))
            column = b.where % T + 1
            assert torch.equal(b.tokens[b.where // T, column], b.targets), (
                "a token is predicted from the one before"
            )
            for m, a in enumerate(b.advantage.int().tolist()):
                own = b.message == m
                rows.setdefault(a, []).append((b.targets[own].tolist(), b.sampled_logp[own].tolist()))
                row = b.tokens[b.where[own][0] // T]
                view = team.view(agent, rollouts.problems[a].text, rollouts.messages[a], speak=False)
                assert row[: len(view.ids)].tolist() == view.ids
        for r, messages in enumerate(rollouts.messages):
            own = [m for m in messages if m.agent == agent]
            assert [tokens for tokens, _ in rows.get(r, [])] == [m.tokens for m in own]
            for (_, logp), m in zip(rows.get(r, []), own):
                assert logp == pytest.approx(m.logprobs)


@pytest.mark.parametrize("config", [SHORT, TWO_ROUNDS])
def test_the_samplers_logprob_is_the_trainers(config):
    rollouts, team, _ = play(config, temperature=0.7)
    for agent in range(config.agents):
        for b in rollouts.view(agent, torch.zeros(len(rollouts.messages)), 100):
            logits = team.agents[agent].model(b.tokens).flatten(0, 1)[b.where] / 0.7
            logp = logits.log_softmax(-1).gather(1, b.targets[:, None])[:, 0]
            assert torch.allclose(logp, b.sampled_logp, atol=1e-4)  # fp32 rounding of logits near 30


def test_sampling_in_small_batches_changes_no_message():
    whole, _, _ = play(TWO_ROUNDS)
    parts, _, _ = play(TWO_ROUNDS, batch_rows=3)
    assert text_of(whole) == text_of(parts)
    assert torch.equal(whole.returns, parts.returns)


def test_a_cache_goes_when_its_agent_has_spoken_for_the_last_time(monkeypatch):
    """One round needs one cache at a time; with more turns to come they stay."""
    alive, most = set(), {}
    for config in (Config(group=2), TWO_ROUNDS, Config(group=2, router="random")):
        most[config] = 0

        class Counted(rollout.Sampler):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                alive.add(id(self))
                most[config] = max(most[config], len(alive))  # noqa: B023

            def __del__(self):
                alive.discard(id(self))

        monkeypatch.setattr(rollout, "Sampler", Counted)
        play(config)
        assert not alive
    assert list(most.values()) == [1, 2, 3]


def test_a_place_is_its_own_stream():
    a, b = play(TWO_ROUNDS)[0], play(TWO_ROUNDS, place=("train", 0, 1))[0]
    assert text_of(a) != text_of(b)
    assert text_of(a) == text_of(play(TWO_ROUNDS)[0])
    assert text_of(a) != text_of(play(TWO_ROUNDS, seed=1)[0])


def test_rollouts_of_a_problem_stand_together_and_differ():
    rollouts, _, task = play(TWO_ROUNDS)
    for p in range(5):
        group = rollouts.problems[4 * p : 4 * p + 4]
        assert len({q.id for q in group}) == 1
    assert len({str(m) for m in text_of(rollouts)[:4]}) > 1
    wanted = [task.grade(p, m) for p, m in zip(rollouts.problems, rollouts.messages)]
    assert rollouts.grouped_returns.flatten().tolist() == wanted and 0 < sum(wanted) < len(wanted)


def test_routers_route():
    turns = [[m.agent for m in ms] for ms in play(Config(group=4, rounds=2))[0].messages]
    assert all(speakers == [0, 1, 2, 0, 1, 2] for speakers in turns)
    rollouts, _, _ = play(Config(group=32, router="random"))
    counts = torch.bincount(torch.tensor([m.agent for ms in rollouts.messages for m in ms]), minlength=3)
    assert counts.sum() == 5 * 32 * 3 and counts.min() > 120, (
        "each of three agents speaks about a third of the time"
    )
    assert len({tuple(m.agent for m in ms) for ms in rollouts.messages}) > 20


def test_a_router_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def router(turn, messages, agents, uniform):\n    return agents - 1 - turn % agents\n")
    rollouts, _, _ = play(Config(group=2, router=str(file)))
    assert all([m.agent for m in ms] == [2, 1, 0] for ms in rollouts.messages)
    for body, fault in {
        "return 3": "chose 3 at turn 0; agents are numbered 0 to 2",
        "return -1": "chose -1",
        "return True": "chose True",
        "return 1.0": "TypeError: 'float' object",
        "return None": "TypeError: 'NoneType' object",
        "return agents / 0": "ZeroDivisionError",
    }.items():
        file.write_text(f"def router(turn, messages, agents, uniform):\n    {body}\n")
        with pytest.raises(UserError, match=fault):
            play(Config(group=2, router=str(file)))
    file.write_text("import numpy\ndef router(turn, messages, agents, uniform):\n    return numpy.int64(1)\n")
    assert type(play(Config(group=2, router=str(file)))[0].messages[0][0].agent) is int
    file.write_text("raise SystemExit(0)\n")
    with pytest.raises(UserError, match="no usable function `router`: SystemExit"):
        play(Config(group=2, router=str(file)))
    file.write_text("def route():\n    pass\n")
    with pytest.raises(UserError, match="no usable function `router`"):
        play(Config(group=2, router=str(file)))


def test_a_changed_agent_changes_the_contexts_of_those_after_it():
    """Fresh occupancy: sampled again, agent 2 reads what the new agent 1 writes."""
    config = dataclasses.replace(Config(group=4), device="cpu")
    task = Relay(config)
    team = load_team(config, task.roles(3))
    problems = task.sample_problems(5, rng.generator(0, "problems"))
    old = collect(team, problems, 4, task.grade, config, ("train", 0, 0))
    with torch.no_grad():
        for p in team.agents[0].model.parameters():
            p.mul_(0.5)
    new = collect(team, problems, 4, task.grade, config, ("train", 0, 0))
    zero = torch.zeros(20)
    contexts = [[b.tokens.tolist() for b in r.view(1, zero)] for r in (old, new)]
    assert contexts[0] != contexts[1]
    assert [ms[0].tokens for ms in old.messages] != [ms[0].tokens for ms in new.messages]


def test_advantages_reach_the_messages_of_their_rollout():
    rollouts, _, _ = play(TWO_ROUNDS)
    advantage = group_advantages(rollouts.grouped_returns, 2.0).flatten()
    got = torch.cat([b.advantage for b in rollouts.view(0, advantage, 50)])
    assert sorted(got.tolist()) == sorted(a for a in advantage.tolist() for _ in range(2))
