"""From turns to the flat list of trainable tokens."""

import pytest
import torch

from teamtr_min import rollout
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.files import UserError
from teamtr_min.rollout import collect
from teamtr_min.tasks import Relay
from teamtr_min.team import load_team

PATH = rng.RngPath(0, "train", 0, 0)
TEAM = {"group": 4}
CUT_OFF = {"group": 4, "max_new_tokens": 4}  # some messages are
TWO_ROUNDS = {"group": 4, "agents": 2, "rounds": 2}
CUT_TWICE = TWO_ROUNDS | {"max_new_tokens": 3}  # cut off, and seen again as one's own context


def play(knobs: dict, path: rng.RngPath = PATH, change=lambda team: None):
    """Rollouts of five problems, by the team of these knobs as `change` leaves it."""
    config = Config(device="cpu", **knobs)
    task = Relay(config)
    team = load_team(config, task.roles(config.agents))
    change(team)
    problems = task.sample_problems(5, rng.generator(0, "problems"))
    return collect(team, task, problems, config.group, path)


def text_of(rollouts) -> list:
    return [[(m.agent, m.tokens, m.stopped) for m in messages] for messages in rollouts.messages]


def writers(rollouts) -> list[list[int]]:
    return [[m.agent for m in messages] for messages in rollouts.messages]


def context(b, where: int) -> list[int]:
    """The tokens that position `where` of the flattened rows sees."""
    row, i = divmod(where, b.tokens.shape[1])
    end = torch.full_like(b.tokens, i + 1) if b.end is None else b.end
    seen = [k for k in range(i + 1) if end[row, k] > i]
    assert b.positions[row, seen].tolist() == list(range(len(seen)))
    return b.tokens[row, seen].tolist()


@pytest.mark.parametrize("knobs", [CUT_OFF, TWO_ROUNDS, CUT_TWICE, TEAM | {"router": "random"}])
def test_every_sampled_token_is_trained_on_once_and_nothing_else(knobs):
    """End-of-message tokens are in; contexts, padding and the token that closes a cut-off message are not."""
    rollouts = play(knobs)
    team, advantages = rollouts.team, torch.arange(20.0)
    assert any(not m.stopped for ms in rollouts.messages for m in ms) == ("max_new_tokens" in knobs)
    for j in range(len(team.agents)):
        trained = []
        for b in rollouts.batches([j], advantages, batch_tokens=60):
            B, T = b.tokens.shape
            assert B * T <= 60 or B == 1
            assert b.message.tolist() == sorted(b.message.tolist())
            assert torch.equal(b.advantage, advantages[b.rollout])
            for m, (r, turn) in enumerate(zip(b.rollout.tolist(), b.turn.tolist())):
                own, message = b.message == m, rollouts.messages[r][turn]
                assert b.targets[b.pair[own]].tolist() == message.tokens and message.agent == j
                assert b.sampled_logp[own].tolist() == pytest.approx(message.logprobs)
                seen = team.render(j, rollouts.problems[r].text, rollouts.messages[r], False)
                at = [t for t, k in enumerate(writers(rollouts)[r]) if k == j].index(turn)
                for t, where in enumerate(b.where[b.pair[own]].tolist(), start=seen.spans[at][0]):
                    assert context(b, where) == seen.ids[:t], "predicted from all before it, and from no more"
                trained.append((r, turn))
        assert sorted(trained) == [
            (r, t) for r in range(20) for t, k in enumerate(writers(rollouts)[r]) if k == j
        ]


@pytest.mark.parametrize("knobs", [CUT_OFF, TWO_ROUNDS])
def test_the_samplers_logprob_is_the_trainers(knobs):
    rollouts = play(knobs | {"temperature": 0.7})
    for j, agent in enumerate(rollouts.team.agents):
        for b in rollouts.batches([j], torch.zeros(20), 100):
            logits = agent.model.logits(b.hidden(agent.model)) / 0.7
            logp = logits.log_softmax(-1).gather(1, b.targets[:, None])[:, 0]
            assert torch.allclose(logp[b.pair], b.sampled_logp, atol=1e-4)  # fp32 rounding of logits near 30


def test_sampling_in_small_batches_changes_no_message():
    whole, parts = play(TWO_ROUNDS), play(TWO_ROUNDS | {"batch_rows": 3})
    assert text_of(whole) == text_of(parts) and torch.equal(whole.returns, parts.returns)


@pytest.mark.parametrize("knobs, most", [(TEAM, 1), (TWO_ROUNDS, 2), (TEAM | {"router": "random"}, 3)])
def test_a_cache_goes_when_its_agent_has_written_for_the_last_time(monkeypatch, knobs, most):
    """One round needs one cache at a time; with more turns to come they stay."""
    alive, counts = set(), []

    class Counted(rollout.Sampler):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            alive.add(id(self))
            counts.append(len(alive))

        def __del__(self):
            alive.discard(id(self))

    monkeypatch.setattr(rollout, "Sampler", Counted)
    play(knobs)
    assert max(counts) == most and not alive


def test_a_path_is_its_own_stream():
    messages = text_of(play(TWO_ROUNDS))
    assert messages == text_of(play(TWO_ROUNDS))
    for other in (rng.RngPath(0, "train", 0, 1), rng.RngPath(1, "train", 0, 0)):
        assert messages != text_of(play(TWO_ROUNDS, other))


def test_rollouts_of_a_problem_stand_together_differ_and_are_graded():
    rollouts = play(TWO_ROUNDS)
    for p in range(0, 20, 4):
        assert len({problem.id for problem in rollouts.problems[p : p + 4]}) == 1
    assert len({str(messages) for messages in text_of(rollouts)[:4]}) > 1
    wanted = [
        float(ms[-1].text == problem.answer) for problem, ms in zip(rollouts.problems, rollouts.messages)
    ]
    assert rollouts.grouped_returns.flatten().tolist() == wanted and 0 < sum(wanted) < len(wanted)
    alike = [len(set(wanted[p : p + 4])) == 1 for p in range(0, 20, 4)]
    assert rollouts.zero_variance_groups == pytest.approx(sum(alike) / 5)


def test_routers_route():
    assert writers(play({"group": 4, "rounds": 2})) == [[0, 1, 2, 0, 1, 2]] * 20
    chosen = writers(play({"group": 32, "router": "random"}))
    counts = torch.tensor(chosen).flatten().bincount()
    assert counts.sum() == 5 * 32 * 3 and counts.min() > 120, "each of three writes about a third of the time"
    assert len(set(map(tuple, chosen))) > 20


SIGNATURE = "def router(turn, messages, agents, uniform):\n    return "


def test_a_router_of_ones_own(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"{SIGNATURE}agents - 1 - turn % agents\n")
    assert writers(play({"group": 2, "router": str(file)})) == [[2, 1, 0]] * 10
    file.write_text(f"import numpy\n{SIGNATURE}numpy.int64(1)\n")
    assert type(play({"group": 2, "router": str(file)}).messages[0][0].agent) is int


@pytest.mark.parametrize(
    "source, fault",
    [
        (SIGNATURE + "3", "chose 3 at turn 0; agents are numbered 0 to 2"),
        (SIGNATURE + "-1", "chose -1"),
        (SIGNATURE + "True", "chose True"),
        (SIGNATURE + "1.0", "TypeError: 'float' object"),
        (SIGNATURE + "None", "TypeError: 'NoneType' object"),
        (SIGNATURE + "agents / 0", "ZeroDivisionError"),
        ("raise SystemExit(0)", "no usable function `router`: SystemExit"),
        ("def route():\n    pass", "no usable function `router`"),
    ],
)
def test_a_router_of_ones_own_that_fails_is_named(tmp_path, source, fault):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UserError, match=fault):
        play({"group": 2, "router": str(tmp_path / "mine.py")})


@torch.no_grad()
def test_an_updated_agent_changes_the_contexts_of_those_after_it():
    """Fresh occupancy: sampled again on the same path, agent 1 reads what the new agent 0 writes."""

    def update(team):
        for p in team.agents[0].model.parameters():
            p.mul_(0.5)

    old, new = play(TEAM), play(TEAM, change=update)
    assert [ms[0].tokens for ms in old.messages] != [ms[0].tokens for ms in new.messages]
    contexts = [[b.tokens.tolist() for b in r.batches([1], torch.zeros(20), 4096)] for r in (old, new)]
    assert contexts[0] != contexts[1]
