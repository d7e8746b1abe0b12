"""The warm start: supervised steps on demonstrations before stage 0."""

import json

import pytest
import torch
from commands import refusal
from toy_runs import TOY, parity, prepared, results, run, timeless, weights

import train
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.extras.warm_start import as_rollouts, imitate, read_demonstrations
from teamtr_min.files import UserError
from teamtr_min.learner import Learner
from teamtr_min.tasks import Relay, load_task
from teamtr_min.team import load_team

FLAGS = ["--warm-start", "6", "--warm-start-lr", "4e-4", "--problems", "12"]


def shown(agents: int = 3, count: int = 5):
    config = Config(agents=agents, device="cpu")
    task = load_task(config)
    team = load_team(config, task.roles(agents))
    return team, as_rollouts(team, task.demonstrations(count, rng.generator(0)))


def test_the_loss_is_the_next_token_loss_of_the_agents_own_messages():
    """Against a loop over single messages through plain logits, with the gradient's norm."""
    team, rollouts = shown()
    learner = Learner(team, [1], 0.0)
    model = team.agents[1].model
    losses = []
    for problem, messages in zip(rollouts.problems, rollouts.messages):
        seen = team.render(1, problem.text, messages, add_generation_prompt=False)
        (start, stop), ids = seen.spans[0], torch.tensor([seen.ids])
        assert ids[0, start:stop].tolist() == messages[1].tokens
        logp = model(ids)[0].log_softmax(-1)
        losses += [-logp[at - 1, ids[0, at]] for at in range(start, stop)]
    expected = torch.stack(losses).mean()
    expected.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    model.zero_grad()
    before = learner.clone_masters()
    got = imitate(learner, rollouts.batches([1], torch.zeros(5), batch_tokens=60), lr=0.0)
    assert got["tokens"] == len(losses)
    assert got["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert got["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.masters))  # lr 0


def test_the_end_of_a_message_is_taught_and_nothing_that_others_wrote():
    team, rollouts = shown(agents=2)
    (batch,) = rollouts.batches([0], torch.zeros(5), batch_tokens=4096)
    own = [messages[0] for messages in rollouts.messages]
    assert sorted(batch.targets[batch.pair].tolist()) == sorted(token for m in own for token in m.tokens)
    assert all(m.tokens[-1] == team.agents[0].chat.end_of_message for m in own)


def test_demonstrations_of_a_task_earn_the_full_return():
    for name, agents in (("relay", 5), ("convention", 3)):
        config = Config(task=name, agents=agents, device="cpu")
        task = load_task(config)
        team = load_team(config, task.roles(agents))
        rollouts = as_rollouts(team, task.demonstrations(50, rng.generator(0)))
        assert all(task.grade(p, m) == 1 for p, m in zip(rollouts.problems, rollouts.messages))


def test_a_run_measures_before_the_warm_start_and_after_it(tmp_path):
    out = tmp_path / "run"
    summary, _, stages = run(out, *FLAGS, "--eval-problems", "64")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    warm = [line for line in lines if line["kind"] == "warm_start"]
    assert [(line["step"], line["agents"]) for line in warm] == [(s, [j]) for s in range(6) for j in range(3)]
    assert [line["lr"] for line in warm[::3]] == pytest.approx([4e-4 * (1 - s / 6) for s in range(6)])
    assert lines[: len(warm)] == warm and len(stages) == 2
    losses = [line["loss"] for line in warm]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    assert summary["accuracy_start"] > summary["accuracy_untrained"]
    assert summary["tokens_warm_start"] == sum(line["tokens"] for line in warm)


def test_a_warm_start_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """Interrupted after its fourth step of six, with a checkpoint after every one."""
    monkeypatch.setattr("teamtr_min.run.run.SECONDS_BETWEEN_CHECKPOINTS", 0)
    expected = run(tmp_path / "whole", *FLAGS)
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return imitate(*args, **kwargs)

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr("teamtr_min.extras.warm_start.imitate", interrupted)
        assert train.main([*TOY, *FLAGS, "--out", str(out)]) == 130
    assert train.main(["--resume", str(out)]) == 0
    got = results(out)
    assert timeless([got[0], *got[1]]) == timeless([expected[0], *expected[1]])
    for a, b in zip(weights(out), weights(tmp_path / "whole")):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_demonstrations_come_from_a_file_of_transcripts(tmp_path):
    """transcripts.jsonl of another run, or one of one's own."""
    run(tmp_path / "first")
    path = tmp_path / "first" / "transcripts.jsonl"
    found = read_demonstrations(str(path), agents=3)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [d.messages for d in found] == [[m["text"] for m in r["messages"]] for r in records]
    summary, _, _ = run(tmp_path / "second", *FLAGS, "--demonstrations", str(path))
    assert summary["tokens_warm_start"] > 0


@pytest.mark.parametrize(
    "line",
    ["[]", "{}", '{"text": "1+1"}', '{"text": "1+1", "messages": []}', '{"text": 1, "messages": [{}]}',
     '{"text": "1+1", "messages": [{"agent": 3, "text": "2"}]}',
     '{"text": "1+1", "messages": [{"agent": true, "text": "2"}]}', "{"],
)  # fmt: skip
def test_what_is_no_transcript_is_refused_with_its_line(tmp_path, line):
    good = '{"text": "1+1", "messages": [{"agent": 0, "text": "2"}]}'
    (tmp_path / "bad.jsonl").write_text(f"{good}\n\n{line}\n")
    with pytest.raises(UserError, match=r"bad\.jsonl, line 3: not a transcript"):
        read_demonstrations(str(tmp_path / "bad.jsonl"), agents=3)


def test_a_task_without_demonstrations_says_what_to_give(tmp_path, capsys):
    (tmp_path / "own.py").write_text(
        "from teamtr_min.tasks import Problem\nfrom teamtr_min.team import Role\n"
        "class Own:\n"
        "    def roles(self, n): return [Role(str(j), '') for j in range(n)]\n"
        "    def sample_problems(self, n, g, held_out=False): return [Problem('1', '1+1', '2')] * n\n"
        "    def grade(self, problem, messages): return 0.0\n"
        "def task(config): return Own()\n"
    )
    flags = [*TOY, *FLAGS, "--task", str(tmp_path / "own.py"), "--model", "relay"]
    message = refusal(capsys, train.main, *flags, "--out", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert "makes no demonstrations" in message and "--demonstrations" in message


def test_an_update_after_a_warm_start_still_has_ratios_of_exactly_1():
    ready = prepared()
    team = ready.rollouts.team
    task = load_task(ready.config)
    rollouts = as_rollouts(team, task.demonstrations(4, rng.generator(1)))
    imitate(ready.learner, rollouts.batches([0], torch.zeros(4), 4096), lr=1e-4)
    assert ready.update().first["ratio_max"] == 1.0


@pytest.mark.parametrize("constant, helps", [(0.0, "--warm-start STEPS"), (1.0, "harder problems")])
def test_a_team_with_nothing_to_learn_from_is_told_so_once_and_what_helps(
    tmp_path, capsys, monkeypatch, constant, helps
):
    monkeypatch.setattr(Relay, "grade", lambda *_: constant)
    run(tmp_path / "run", "--inner-steps", "1")
    said = [line for line in capsys.readouterr().out.splitlines() if "nothing to learn from" in line]
    assert len(said) == 1 and helps in said[0]


def test_a_team_that_can_learn_is_told_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Relay, "grade", parity)
    run(tmp_path / "run", "--inner-steps", "1")
    assert "nothing to learn from" not in capsys.readouterr().out
