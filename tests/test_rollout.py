"""From turns to the flat list of trainable tokens."""

import pytest
import torch
from ready import play
from tiny import refusal

from teamtr_min.rollout import agent_batches

CUT_OFF = {"group": 4, "max_new_tokens": 4}  # some messages are
TWO_ROUNDS = {"group": 4, "agents": 2, "rounds": 2}
CUT_TWICE = TWO_ROUNDS | {"max_new_tokens": 3}  # cut off, and seen again in the writer's own context


def text_of(rollouts) -> list:
    return [[(m.agent, m.tokens, m.stopped) for m in messages] for messages in rollouts.messages]


def writers(rollouts) -> list[list[int]]:
    return [[m.agent for m in messages] for messages in rollouts.messages]


def context(b, where: int) -> list[int]:
    """The tokens that position `where` of the flattened rows sees."""
    tokens, positions, end, _ = b.rows
    row, i = divmod(where, tokens.shape[1])
    end = torch.full_like(tokens, i + 1) if end is None else end
    seen = [k for k in range(i + 1) if end[row, k] > i]
    assert positions[row, seen].tolist() == list(range(len(seen)))
    return tokens[row, seen].tolist()


@pytest.mark.parametrize("knobs", [CUT_OFF, TWO_ROUNDS, CUT_TWICE, {"group": 4, "router": "random"}])
def test_every_sampled_token_is_trained_on_once_and_nothing_else(knobs):
    """End-of-message tokens are in; contexts, padding and the token that closes a cut-off message are not."""
    (team, rollouts), advantages = play(**knobs), torch.arange(20.0)
    assert any(not m.stopped for ms in rollouts.messages for m in ms) == ("max_new_tokens" in knobs)
    for j in range(len(team.agents)):
        places = [(r, t) for r, row in enumerate(writers(rollouts)) for t, k in enumerate(row) if k == j]
        trained = []
        for b in agent_batches(team, rollouts, [j], advantages, batch_tokens=60).own:
            B, T = b.rows.tokens.shape
            assert B * T <= 60 or B == 1
            assert b.message.tolist() == sorted(b.message.tolist())
            assert torch.equal(b.advantage, advantages[b.rollout])
            for m, (r, turn) in enumerate(zip(b.rollout.tolist(), b.turn.tolist())):
                own, message = b.message == m, rollouts.messages[r][turn]
                assert b.targets[b.pair[own]].tolist() == message.tokens and message.agent == j
                assert b.sampled_logp[own].tolist() == pytest.approx(message.logprobs)
                seen = team.render(j, rollouts.problems[r], rollouts.messages[r], False)
                at = [t for row, t in places if row == r].index(turn)
                for t, where in enumerate(b.where[b.pair[own]].tolist(), start=seen.spans[at][0]):
                    assert context(b, where) == seen.ids[:t], "predicted from all before it, and from no more"
                trained.append((r, turn))
        assert sorted(trained) == places


def test_routers_route():
    assert writers(play(group=4, rounds=2)[1]) == [[0, 1, 2, 0, 1, 2]] * 20
    chosen = writers(play(group=32, router="random")[1])
    counts = torch.tensor(chosen).flatten().bincount()
    assert counts.sum() == 5 * 32 * 3 and counts.min() > 120, "each of three writes about a third of the time"
    assert len(set(map(tuple, chosen))) > 20


SIGNATURE = "def router(turn, messages, agents, uniform):\n    return "


def test_a_routers_file_and_what_it_must_return(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"{SIGNATURE}agents - 1 - turn % agents\n")
    assert writers(play(group=2, router=str(file))[1]) == [[2, 1, 0]] * 10
    file.write_text(f"import numpy\n{SIGNATURE}numpy.int64(1)\n")
    assert type(play(group=2, router=str(file))[1].messages[0][0].agent) is int
    for choice in ("3", "-1", "True", "1.0", "None"):
        file.write_text(f"\n{SIGNATURE}{choice}\n")
        words = f"{file}, line 2: `router` returned {choice} at turn 0; agents are 0 to 2"
        assert refusal(play, group=2, router=str(file)) == words
