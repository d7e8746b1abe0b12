"""eval.py kernels, sampling, training, stage at toy sizes; how contestants are compared; floors by hand."""

import sys

import pytest
import torch
from commands import evaluate, refusal
from tiny import random_model

import eval as evaluation
from teamtr_min.bench import speed
from teamtr_min.bench.speed import Case, Machine
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.rollout import agent_batches, collect
from teamtr_min.run.loading import build_team
from teamtr_min.run.log import read_log
from teamtr_min.tasks import load_task
from teamtr_min.tasks.task import Message

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch):
    """A CPU whose limits are known: 1e6 FLOP/s, 1e3 bytes/s."""
    found = Machine(CPU, torch.float32)
    monkeypatch.setattr(found, "flops", 1e6)
    monkeypatch.setattr(found, "bytes", 1e3)
    return found


def toy_team(**changes):
    config = Config(**{"agents": 2, "rounds": 2, "problems": 3, "group": 4, "device": "cpu"} | changes)
    return config, build_team(config, load_task(config))


def work(count: int):
    """Work whose time is proportional to `count`; it returns a tensor."""
    a = torch.ones(400, 400)

    def run() -> tuple[torch.Tensor]:
        for _ in range(count):
            a @ a
        return (torch.tensor([1.0, float(count)]),)

    return run


def test_contestants_take_turns_and_are_set_beside_ours_the_floor_and_float64(machine):
    def broken() -> None:
        raise RuntimeError("not on\nthis machine")

    right = lambda: (torch.tensor([1.0, 10.5], dtype=torch.float64),)  # noqa: E731
    case = Case("work", {"ours": work(10), "slow": work(40), "broken": broken}, 100, flops=10.0, exact=right)
    ours, slow, failed = machine.compare(case, repeats=5)
    assert failed == {"case": "work", "by": "broken", "missing": "not on this machine"}
    assert ours["times_ours"] == 1 and slow["times_ours"] == slow["seconds"] / ours["seconds"]
    assert ours["error"] == pytest.approx(0.5 / 10.5) and slow["error"] == pytest.approx(29.5 / 10.5)
    for row in (ours, slow):
        assert row["tokens_per_second"] == 100 / row["seconds"]
        assert row["floor_share"] == pytest.approx(1e-5 / row["seconds"])
    (limited,) = machine.compare(Case("bytes", {"ours": work(1)}, 1, flops=1.0, bytes=1.0), 1)
    assert limited["floor_share"] == pytest.approx(1e-3 / limited["seconds"]), "the larger of the two floors"
    with pytest.raises(RuntimeError):
        machine.compare(Case("ours fails", {"ours": broken}, 1), 1)


@pytest.mark.parametrize("name", ["kernels", "sampling", "training"])
def test_a_benchmark_is_one_object_and_one_table(name, capsys):
    pytest.importorskip("transformers", reason="compares with transformers")
    result = evaluate(capsys, name, "--short")
    rows = [row for row in result["rows"] if "missing" not in row]
    assert {row["by"] for row in rows} > {"ours"} and all(row["seconds"] > 0 for row in rows)
    assert all(row["error"] < 1e-5 for row in rows if "error" in row)
    assert any("error" in row for row in rows) == (name != "sampling")
    assert any(row["floor_share"] and row["floor_share"] < 1 for row in rows if row["by"] == "ours")
    text = speed.table(result)
    assert text.startswith(f"{name}, relay, float32, on ") and "x ours" in text
    assert max(map(len, text.splitlines())) <= 80
    assert len([line for line in text.splitlines() if " ours " in line[14:22]]) == len(
        {r["case"] for r in rows}
    )


def test_a_stage_has_its_seconds_by_phase(capsys, finished):
    """Those of what runs log: the phases of all stages but the first add up to their time."""
    result = evaluate(capsys, "stage", "--short")
    names = [(v, phase) for v in ("fresh", "corrected") for phase in ("sampling", "training", "the rest")]
    assert [(row["case"], row["by"]) for row in result["rows"]] == names
    assert all(row["seconds"] > 0 for row in result["rows"]) and "training" in speed.table(result)
    lines = read_log(finished / "metrics.jsonl")
    ends = [line["seconds"] for line in lines if line["kind"] == "stage"]
    sampled = [u["tokens_sampled"] for u in lines if u["kind"] == "update" and u["stage"] > 0]
    sampling, training, rest = speed.phases(lines)
    assert sum(row["seconds"] for row in (sampling, training, rest)) == pytest.approx((ends[2] - ends[0]) / 2)
    assert sampling["tokens_per_second"] * sampling["seconds"] == pytest.approx(sum(sampled) / 2)


def test_without_transformers_it_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("sampling", "training"):
        assert evaluation.main([name, "--short"]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "  transformers  " in line]
        assert lines and all("transformers" in line[30:] for line in lines)


@torch.no_grad()
def test_the_peer_has_the_same_weights():
    pytest.importorskip("transformers", reason="compares with transformers")
    for family, tied in (("qwen2", True), ("llama", False)):
        model = random_model(family, tied)
        tokens = torch.arange(20)[None]
        theirs = speed.in_transformers(model)(tokens).logits
        torch.testing.assert_close(theirs, model(tokens), atol=1e-4, rtol=0)


def test_the_plain_step_is_the_same_step_in_other_passes(monkeypatch):
    """Its gradient's norm does not hang on how rows are cut into passes, and follows the advantages."""
    pytest.importorskip("transformers", reason="compares with transformers")
    config, team = toy_team()
    problems = team.task.sample_problems(3, rng.generator(0, "problems"))
    rollouts = collect(team, problems, 4, rng.RngPath(0, "test"))
    advantages = torch.randn(12, generator=torch.Generator().manual_seed(0))
    model, norms = team.agents[1].model, []
    for tokens, scale in ((10_000, 1), (150, 1), (150, 3)):
        monkeypatch.setattr(speed, "BATCH_TOKENS", tokens)
        passes = [*speed.padded_rows(team, rollouts, advantages * scale, 1)]
        norms += [len(passes), speed.plain_step(model, passes, config.temperature)[0].item()]
    assert norms[0] == 1 < norms[2] and norms[1] == pytest.approx(norms[3], rel=1e-5)
    assert norms[5] == pytest.approx(3 * norms[3], rel=1e-5)


def test_the_floor_of_a_step_counted_by_hand():
    """Products at every distinct start of a transcript, found here as a set of all starts."""
    _, team = toy_team()
    problems = team.task.sample_problems(3, rng.generator(0, "problems"))
    rollouts = collect(team, problems, 4, rng.RngPath(0, "test"))
    starts = set()
    for problem, messages in zip(rollouts.problems, rollouts.messages):
        ids = team.render(0, problem, messages, False).ids[:-1]
        starts |= {tuple(ids[: t + 1]) for t in range(len(ids))}
    (batch,) = agent_batches(team, rollouts, [0], torch.randn(12), 10_000).own
    c = team.agents[0].model.config
    H, inner = c.hidden_size, c.heads * c.head_dim
    layer = H * (2 * inner + 2 * c.kv_heads * c.head_dim + 3 * c.intermediate_size)
    trained = (layer + c.vocab_size * H) * len(batch.targets)
    expected = 6 * ((c.layers - 1) * layer * len(starts) + trained)
    assert speed.step_flops(team, rollouts, 0, len(batch.targets)) == pytest.approx(
        expected, rel=0.02
    )  # norms, biases


def test_the_floor_of_sampling_counted_by_hand():
    config, team = toy_team()
    case = next(speed.sampling_cases(team, config, short=True))  # 3 rows, 5 new tokens
    c = team.agents[0].model.config
    layers = sum(p.numel() for name, p in team.agents[0].model.named_parameters() if ".layers." in name)
    head = c.vocab_size * c.hidden_size
    assert case.tokens == 15 and case.flops == 2 * 3 * (layers * (32 + 5 - 1) + head * 5)
    cached = 3 * (32 + 2.5) * 2 * c.layers * c.kv_heads * c.head_dim
    assert case.bytes == 5 * 4 * (layers + head + cached)


def test_a_grade_by_hash_gives_any_model_something_to_learn():
    task = speed.task(Config(task="sums", agents=2, model="relay"))
    grades = {task.grade(None, [Message(0, [token], "", [0.0], True)]) for token in range(8)}
    assert grades == {0.0, 1.0} and task.roles(2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_a_gpu_benchmark_without_a_gpu_says_so(capsys):
    assert "torch sees none here" in refusal(capsys, evaluation.main, "gpu")


def test_a_flag_without_effect_is_refused(capsys):
    assert "--agents has no effect on training" in refusal(
        capsys, evaluation.main, "training", "--agents", "5"
    )
