"""Supervised steps: the warm start before stage 0, and the program that makes the shipped models."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from ready import Prepared
from safetensors.torch import load_file
from tiny import refusal
from toy_runs import TOY, bits, interrupt_at, lines, refused, results, run

import train
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.extras import warm_start
from teamtr_min.extras.warm_start import as_rollouts, descend, next_token_losses, read_demonstrations
from teamtr_min.hf.chat import load_tokenizer
from teamtr_min.hf.weights import ASSETS
from teamtr_min.learner import Diverged
from teamtr_min.rollout import agent_batches
from teamtr_min.studies import pretrain
from teamtr_min.tasks import Relay, load_task

FLAGS = ["--warm-start", "6", "--warm-start-lr", "4e-4", "--problems", "12", "--eval-problems", "64"]


def shown():
    """Three agents, five demonstrations as their rollouts, and the batches of agent 1."""
    ready = Prepared([1], agents=3)
    rollouts = as_rollouts(ready.team, ready.team.task.demonstrations(5, rng.generator(0)))
    return ready, rollouts, agent_batches(ready.team, rollouts, [1], torch.zeros(5), batch_tokens=60)


def test_the_loss_is_the_next_token_loss_of_the_agents_own_messages():
    ready, rollouts, batches = shown()
    model, losses = ready.model, []
    for problem, messages in zip(rollouts.problems, rollouts.messages):
        seen = ready.team.render(1, problem, messages, add_generation_prompt=False)
        (start, stop), ids = seen.spans[0], torch.tensor([seen.ids])
        assert seen.ids[start:stop] == messages[1].tokens
        assert messages[1].tokens[-1] == ready.team.agents[1].chat.end_of_message
        logp = model(ids)[0].log_softmax(-1)
        losses += [-logp[at - 1, ids[0, at]] for at in range(start, stop)]
    expected = torch.stack(losses).mean()
    expected.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    model.zero_grad()
    before = ready.learner.clone_masters()
    got = descend(ready.learner, next_token_losses(batches), lr=0.0)
    assert batches.tokens == len(losses)
    assert [got["loss"], got["grad_norm"]] == pytest.approx([expected.item(), norm], rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, ready.learner.masters))  # lr 0


def test_an_error_after_the_step_or_within_it_leaves_the_weights_of_before(monkeypatch):
    ready, _, batches = shown()
    descend(ready.learner, next_token_losses(batches), lr=1e-3)
    before = copy.deepcopy(ready.learner.snapshot())

    def broken(lr: float) -> float:
        ready.learner.optimizer.step()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ready.learner, "step", broken)
        descend(ready.learner, next_token_losses(batches), lr=1e-2)
    after = ready.learner.snapshot()
    assert all(torch.equal(a, b) for a, b in zip(after.masters, before.masters))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(after.state, before.state) for k in b)
    with torch.no_grad():
        ready.model.model.norm.weight[0] = torch.nan
    with pytest.raises(Diverged, match="the loss of a supervised step is nan"):
        descend(ready.learner, next_token_losses(batches), lr=1e-3)
    assert all(p.grad is None for p in ready.learner.masters)


@pytest.fixture(scope="module")
def warmed(tmp_path_factory):
    out = tmp_path_factory.mktemp("warm") / "run"
    run(out, *FLAGS)
    return out


def test_a_run_measures_before_the_warm_start_and_after_it(warmed):
    summary, _, stages = results(warmed)
    warm = lines(warmed, "warm_start")
    assert [(line["step"], line["agents"]) for line in warm] == [(s, [j]) for s in range(6) for j in range(3)]
    assert [line["lr"] for line in warm[::3]] == pytest.approx([4e-4 * (1 - s / 6) for s in range(6)])
    losses = [line["loss"] for line in warm]
    assert len(stages) == 2 and sum(losses[-6:]) < 0.9 * sum(losses[:6])
    assert summary["accuracy_start"] > summary["accuracy_untrained"]
    assert summary["tokens_warm_start"] == sum(line["tokens"] for line in warm)


@pytest.mark.parametrize("moment, most, done", [
    ((11, warm_start, "descend"), 2, 2), ((1, train, "update"), 10, 6)
])  # fmt: skip
def test_a_stopped_warm_start_resumes(warmed, tmp_path, monkeypatch, capsys, moment, most, done):
    """To the same bits. `most`: steps between checkpoints; `done`: steps of the last one."""
    monkeypatch.setattr("teamtr_min.run.run.WARM_STEPS_BETWEEN_CHECKPOINTS", most)
    with monkeypatch.context() as patch:
        interrupt_at(moment[0], patch, *moment[1:])
        assert train.main([*TOY, *FLAGS, "--out", str(tmp_path / "run")]) == 130
    saved = load_file(tmp_path / "run/checkpoints" / f"{done:06d}" / "learner-0.safetensors")
    momentum = any(moment.any() for name, moment in saved.items() if name.startswith("adam.exp_avg."))
    assert momentum == (done < 6), "the first updates would follow the demonstrations"
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
    assert f"resumed after {done} steps of warm start and 0 of 2 stages" in capsys.readouterr().out
    assert bits(tmp_path / "run") == bits(warmed)


def write(path, text: str, more: str = "", **fields) -> str:
    path.write_text(json.dumps({"text": text, "messages": [{"agent": 0, "text": "2", **fields}]}) + more)
    return str(path)


def read(path: str):
    config = Config(agents=3, warm_start=1, demonstrations=path, device="cpu")
    return read_demonstrations(config, load_task(config))


def test_right_transcripts_of_a_run_are_demonstrations_but_for_held_out_problems(finished, tmp_path, capsys):
    path, written = tmp_path / "transcripts.jsonl", (finished / "transcripts.jsonl").read_text().splitlines()
    records = [json.loads(line) | {"return": i % 2} for i, line in enumerate(written)]
    path.write_text("\n".join(map(json.dumps, records)))
    found = read(str(path))
    training = [r for r in records if r["split"] == "train" and r["return"] == 1]
    assert [d.messages for d in found] == [[m["text"] for m in r["messages"]] for r in training]
    left_out = f"{len(records) - len(training)} transcripts that are not right, or of held-out problems,"
    assert len(training) > 1 and left_out in capsys.readouterr().out
    summary, _, _ = run(tmp_path / "second", *FLAGS, "--demonstrations", str(path))
    assert summary["tokens_warm_start"] > 0


def test_what_cannot_be_shown_is_refused_before_any_training(tmp_path, capsys):
    for line in (
        "{}", '{"text": "1+1", "messages": []}', '{"text": 1, "messages": [{}]}',
        '{"text": "1+1", "messages": [{"agent": 3, "text": "2"}]}',
        '{"text": "1", "messages": [{"agent": 0, "text": 2}]}',
    ):  # fmt: skip
        path = write(tmp_path / "bad.jsonl", "1+1+1+1", f"\n\n{line}\n")
        assert "bad.jsonl, line 3: not a transcript" in refusal(read, path)
    path = write(tmp_path / "long.jsonl", "1" + "+1" * 400)
    flags = [*TOY, "--warm-start", "1", "--demonstrations", path, "--out", str(tmp_path / "run")]
    assert "agent 0, whose model has 512 positions" in refused(capsys, train.main, *flags)
    held_out = next(text for text in map("1+{}+1+1".format, range(100)) if Relay(Config()).is_held_out(text))
    assert "holds no transcripts of training problems" in refusal(read, write(tmp_path / "held", held_out))
    assert "cannot be read" in refusal(read, str(tmp_path / "none"))
    said = refusal(read_demonstrations, Config(warm_start=1, device="cpu"), SimpleNamespace())
    assert "makes no demonstrations; give --demonstrations FILE" in said


def test_demonstrations_are_right_rollouts_on_training_problems_and_made_once(tmp_path, monkeypatch, capsys):
    flags = [*TOY, *FLAGS, "--warm-start", "4", "--problems", "6", "--out", str(tmp_path / "run")]
    assert train.main([*flags, "--demonstrate", "relay"]) == 0
    said, task = capsys.readouterr().out, Relay(Config())
    records = [json.loads(line) for line in open(tmp_path / "run" / "demonstrations.jsonl")]
    assert f"{len(records)} different right ones of {24 * 4} rollouts" in said and len(records) > 5
    for record in records:
        assert record["messages"][-1]["text"] == record["answer"] and not task.is_held_out(record["text"])
    with monkeypatch.context() as patch:
        interrupt_at(5, patch, warm_start, "descend")
        flags[-1] = str(tmp_path / "stopped")
        assert train.main([*flags, "--demonstrate", "relay"]) == 130
        patch.setattr(warm_start, "collect", None)  # nothing is sampled again
        assert train.main(["--resume", flags[-1]]) == 0
    assert bits(tmp_path / "stopped") == bits(tmp_path / "run")
    flags[-1], finished = str(tmp_path / "none"), str(tmp_path / "run")
    others = refused(capsys, train.main, *flags, "--demonstrate", finished, "--agents", "2")
    monkeypatch.setattr(Relay, "grade", lambda *_: 0.5)
    nothing = refused(capsys, train.main, *flags, "--demonstrate", finished)
    assert "has 3 agents, this run has 2" in others and "none of 96 rollouts has a return of 1" in nothing


def test_a_message_that_was_cut_off_is_taught_without_an_end_token(tmp_path):
    team = Prepared(agents=3).team
    for stopped in (True, False):
        ((message,),) = as_rollouts(team, read(write(tmp_path / "one", "1+1+1+1", stopped=stopped))).messages
        assert (message.tokens[-1] == team.agents[0].chat.end_of_message) == stopped == message.stopped


@pytest.mark.parametrize("task", pretrain.COURSES)
def test_pretraining_lowers_the_loss_to_the_same_bits(task, monkeypatch):
    monkeypatch.setattr(pretrain, "ROWS", 16)
    tokenizer, losses = load_tokenizer(ASSETS / task), []
    for steps in (2, 24, 24):
        torch.rand(3)  # the state of torch's generator has no part in it
        model = pretrain.initial_model(tokenizer.vocab_size)
        losses.append(pretrain.train(model, tokenizer, pretrain.COURSES[task]._replace(steps=steps)))
    assert losses[1] == losses[2] < 0.9 * losses[0]
