"""`eval.py training` and `eval.py stage` at toy sizes, and the floor of a step counted by hand."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import refusal
from tiny import CONFIGS, random_model

import eval as evaluation
import train
from teamtr_min import load_tokenizer
from teamtr_min.bench import gpu, stage, training
from teamtr_min.bench.peers import in_transformers
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.engine.model import split_fused
from teamtr_min.files import UserError
from teamtr_min.learner import Learner, evaluate
from teamtr_min.rollout import collect
from teamtr_min.tasks import load_task
from teamtr_min.team import load_team


def test_a_step_in_one_table_and_one_object(capsys):
    pytest.importorskip("transformers", reason="compares with transformers")
    assert evaluation.main(["training", "--short", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["agent"] for row in result["rows"]] == [0, 1, 2]
    for row in result["rows"]:
        assert row["ratio"] == pytest.approx(row["seconds"]["transformers"] / row["seconds"]["ours"])
        assert row["grad_norm"]["ours"] == pytest.approx(row["grad_norm"]["transformers"], rel=1e-5)
        at = row["positions"]
        assert at["distinct"] <= at["ours"] and at["distinct"] < at["rollouts"]
        assert 0 < row["floor_share"] < 1
    assert "ratio" in training.table(result)
    assert torch.cuda.is_available() or "on a GPU: not measured yet" in training.table(result)


def test_without_transformers_it_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert evaluation.main(["training", "--short"]) == 0
    assert "pip install transformers to compare" in capsys.readouterr().out


def test_the_peer_takes_the_same_step():
    """Not only norms: every gradient, for an agent that speaks twice."""
    pytest.importorskip("transformers", reason="compares with transformers")
    config = Config(agents=2, rounds=2, problems=3, group=4, device="cpu")
    task = load_task(config)
    team = load_team(config, task.roles(2))
    problems = task.sample_problems(3, rng.generator(0, "problems"))
    rollouts = collect(team, task, problems, 4, rng.RngPath(0, "test"))
    advantages = torch.randn(12, generator=torch.Generator().manual_seed(0))
    learner, (theirs, _) = Learner(team, [1], beta=0.0), in_transformers(team.agents[1].model)
    for p in theirs.parameters():
        p.requires_grad_()
    evaluate(learner, rollouts.batches([1], advantages, 200), config, grad=True)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.0)
    optimizer.zero_grad = lambda **_: None
    passes = training.padded_rows(rollouts, advantages, 1, 300)
    assert len(passes) > 1
    norm = training.plain_step(theirs, optimizer, passes, config)
    theirs_by_name = dict(theirs.named_parameters())
    largest = max(p.grad.abs().max() for p in learner.parameters)
    scale = min(1.0, training.GRADIENT_NORM / norm)  # clipped, where ours is not yet
    for name, p in zip(learner.names, learner.parameters):
        for part, grad in split_fused(name.removeprefix("0."), p.grad, team.agents[1].model.config).items():
            other = theirs_by_name[part].grad / scale
            torch.testing.assert_close(grad, other, atol=2e-6 * float(largest), rtol=1e-4)


def test_the_floor_of_a_step_counted_by_hand():
    model = random_model("qwen2")
    c = model.config
    H, kv, inner = c.hidden_size, c.kv_heads * c.head_dim, c.heads * c.head_dim
    layer = H * (2 * inner + 2 * kv + 3 * c.intermediate_size)
    full = (c.layers - 1) * layer * 10 + 2 * H * kv * 10  # at 10 positions; the rest of the last layer
    trained = (layer - 2 * H * kv + c.vocab_size * H) * 3  # at 3 of them
    attention = 2 * (c.layers - 1) * inner * 55  # of a single sequence of 10: 1 + 2 + ... + 10
    assert training.floor_flops(model, 10, 55, 3) == 6 * (full + trained + attention)


def test_a_stage_in_one_table_and_one_object(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = [getattr(owner, name) for fs in stage.PHASES.values() for owner, name in fs]
    assert evaluation.main(["stage", "--short", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["rows"]] == ["fresh", "fresh, suffix", "fresh, 2 agents"]
    for row in result["rows"]:
        assert all(row["seconds"][phase] > 0 for phase in stage.PHASES)
        assert row["memory_peak"] <= row["memory_planned"]
    assert "of plan" in stage.table(result)
    assert kept == [getattr(owner, name) for fs in stage.PHASES.values() for owner, name in fs]
    assert train.evaluate is evaluate and train.load_task is load_task and not any(Path("runs").iterdir())


def test_the_stopwatch_counts_each_second_once():
    watch = stage.Stopwatch(torch.device("cpu"))
    inner = watch.timed(lambda: time.sleep(0.03), lambda _: "inner")

    def outer() -> None:
        time.sleep(0.01)
        inner()
        inner()

    begin = time.perf_counter()
    watch.timed(outer, lambda _: "outer")()
    watch.lap()
    spent = time.perf_counter() - begin
    assert watch.total["inner"] >= 0.06 and 0.01 <= watch.total["outer"] < 0.06
    assert sum(watch.total.values()) == pytest.approx(spent, abs=0.01)


def test_the_half_hour_on_a_gpu_keeps_what_it_has(tmp_path, monkeypatch):
    """On a CPU, with a made-up model of toy size: a step that fails costs no other, and may be had again."""
    monkeypatch.setattr(gpu, "QWEN_1B5", dataclasses.replace(CONFIGS["qwen2"], vocab_size=300))
    steps = {
        "tests": ["-m", "pytest", "-q", "tests/test_progress.py", "-k", "no_such_test"],
        "kernels": ["eval.py", "x"],
    }
    steps["stage 1.5b"] = [*gpu.STEPS["stage 1.5b"], "--short"]
    out = tmp_path / "new" / "gpu.json"
    result = gpu.measure(steps, out)
    kept = json.loads(out.read_text())
    assert kept == json.loads(json.dumps(result)) and kept["machine"]["torch"] == torch.__version__
    assert not kept["steps"]["tests"]["passed"], "no test is no success"
    assert "no benchmark x" in kept["steps"]["kernels"]["failed"]
    stage_step = kept["steps"]["stage 1.5b"]
    assert stage_step["task"] == "sums"
    assert all(row["seconds"]["gradient"] > row["seconds"]["stepping"] > 0 for row in stage_step["rows"])
    text = gpu.table(gpu.measure({}, out))  # what is there stays
    assert "failed: " in text and "== stage 1.5b" in text and "of plan" in text
    assert refused(gpu.measure, {}, tmp_path).endswith("names the file that results go to")
    assert [*tmp_path.rglob("*")] == [out.parent, out]


def refused(f, *args) -> str:
    with pytest.raises(UserError) as error:
        f(*args)
    return str(error.value)


def test_a_made_up_tokenizer_can_write_anything(tmp_path):
    tokenizer = load_tokenizer(gpu.made_up(dataclasses.replace(CONFIGS["qwen2"], vocab_size=300), tmp_path))
    assert tokenizer.decode(tokenizer.encode("Ana has 3 eggs. é")) == "Ana has 3 eggs. é"


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert "torch sees none here" in refusal(capsys, evaluation.main, "gpu")


def test_a_flag_that_says_nothing_is_refused(capsys):
    assert "--agents says nothing to training" in refusal(
        capsys, evaluation.main, "training", "--agents", "5"
    )
