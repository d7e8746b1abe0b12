"""What fits is known before anything is loaded: free memory, the plan, its refusals, its peaks."""

import dataclasses
import functools
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import evaluate, refusal
from tiny import each_model, random_model, random_tokens, real_model, shared
from toy_runs import TOY, run, same, weights

import eval as evaluation
import train
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.engine.lora import TARGETS, Adapter, add_lora
from teamtr_min.engine.model import ModelConfig
from teamtr_min.hf.chat import load_tokenizer
from teamtr_min.hf.weights import RELAY
from teamtr_min.rollout import collect
from teamtr_min.run import memory, system
from teamtr_min.run.memory import choose, plan_evaluation, plan_training
from teamtr_min.run.shapes import AdapterSize, layer_numbers, parameters, token_bytes
from teamtr_min.run.system import free_memory, size
from teamtr_min.tasks import Relay
from teamtr_min.team import load_team

ROOT, CPU, GIB = Path(__file__).parents[1], torch.device("cpu"), 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:  8000 kB\n"}


def test_free_memory_is_what_is_available_without_any_group(tmp_path):
    assert free_memory(CPU, write(tmp_path, MEMINFO)) == 8000 * 1024


@pytest.mark.parametrize("full", ["job", "", "job/step"])
def test_every_level_of_control_groups_counts_in_version_2(tmp_path, full):
    """The level that leaves least decides; pages of files, which can be given up, do not count as used."""
    files = MEMINFO | {"proc/self/cgroup": "0::/job/step\n"}
    for level in ("", "job", "job/step"):
        here = f"sys/fs/cgroup/{level}".rstrip("/")
        limit = "1000000" if level == full else "max"
        files |= {f"{here}/memory.max": limit, f"{here}/memory.current": "700000\n"}
        files |= {f"{here}/memory.stat": "anon 1\ninactive_file 50000\nactive_file 9\n"}
    assert free_memory(CPU, write(tmp_path, files)) == 1000000 - 700000 + 50000


def test_control_groups_of_version_1_count_even_where_their_path_is_hidden(tmp_path):
    top = "sys/fs/cgroup/memory"
    files = MEMINFO | {
        "proc/self/cgroup": "5:cpu:/other\n4:memory:/outside/name\n0::/\n",
        f"{top}/memory.limit_in_bytes": "3000000",
        f"{top}/memory.usage_in_bytes": "2500000",
        f"{top}/memory.stat": "inactive_file 7\ntotal_inactive_file 1000\n",
    }
    assert free_memory(CPU, write(tmp_path, files)) == 501000


@pytest.mark.parametrize("kind", ["AS", "DATA"])
def test_a_limit_of_the_shell_counts(kind):
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_{kind}, ({4 * GIB}, {4 * GIB}))\n"
        "from teamtr_min.run.system import free_memory; import torch; print(free_memory(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert 0 < int(done.stdout) < 4 * GIB, done.stderr


@each_model
def test_parameters_and_activations_are_counted_right(family, tied):
    """Parameters exactly; what autograd keeps for the way back from above, by at most a quarter."""
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(family, tied).to(dtype)
        m, tokens = model.config, random_tokens(model, 3, 31)
        assert parameters(m) == sum(p.numel() for p in model.parameters())
        planned = token_bytes(m, dtype.itemsize, checkpointing=False) * tokens.numel()
        assert planned / 2.5 < kept_bytes(model, tokens) < planned
        layers = m.layers * tokens.numel() * layer_numbers(m) * dtype.itemsize
        assert dtype != torch.float32 or layers / 1.25 < kept_bytes(model, tokens)


def kept_bytes(model, tokens) -> int:
    """Bytes that a forward pass keeps for its backward, weights apart."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x  # alive, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.hidden(tokens)
    return sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in own)


@each_model
def test_checkpointing_gives_the_same_gradients_to_the_bit(family, tied):
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = random_model(family, tied)
        model.checkpointing = checkpointing
        block = model.model.layers[0]
        block.register_forward_pre_hook(lambda *_: calls.append(1))
        (model.hidden(random_tokens(model, 3, 11)) ** 2).sum().backward()
        gradients.append([p.grad for p in model.model.layers.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and len(calls) == 1 + 2


def test_a_number_of_ones_own_stands_and_else_the_default_or_what_fits():
    fits = functools.partial(choose, bytes_of=lambda count: 10 * count, room=105)
    assert fits(0, 8, 100) == 8 and fits(0, 2048, 9) == 2048  # the default; no more than it are useful
    assert fits(0, 2048, 100) == 8 and fits(0, 2048, 100, least=3) == 6 and fits(0, 5, 100, least=7) == 5
    assert fits(77, 8, 100) == 77 and fits(0, 2048, 100, room=0) == 1


@pytest.mark.parametrize("rounds, router", [(1, "round-robin"), (2, "random")])
def test_no_transcript_is_longer_than_planned(monkeypatch, rounds, router):
    monkeypatch.setenv("TEAMTR_MEMORY", "64GiB")
    config = Config(agents=2, rounds=rounds, router=router, problems=8, device="cpu", max_new_tokens=9)
    task = Relay(config)
    config, plan = plan_training(config, task)
    assert (config.batch_rows, config.batch_tokens, plan.checkpointing) == (2048, 4096, False)
    team = load_team(config, task.roles(2))
    for agent in team.agents:
        agent.model.model.norm.weight.data.zero_()  # any token, so that messages reach the limit
    problems = task.sample_problems(8, rng.generator(0, "problems", 0))
    rollouts = collect(team, task, problems, 4, rng.RngPath(0, "train"))
    seen = [
        len(team.render(j, p.text, m, add_generation_prompt=False).ids)
        for p, m in zip(rollouts.problems, rollouts.messages)
        for j in range(2)
    ]
    assert 0.7 * plan.longest < max(seen) <= plan.longest


def planned(monkeypatch, limit: str, **knobs):
    monkeypatch.setenv("TEAMTR_MEMORY", limit)
    monkeypatch.setattr(memory, "in_use", lambda device: 300 << 20)
    config = Config(device="cpu", **knobs)
    return plan_training(config, Relay(config))


def test_less_memory_means_fewer_rows_and_tokens_then_checkpointing_then_a_refusal(monkeypatch):
    plans = [planned(monkeypatch, limit, eval_problems=64) for limit in ("64GiB", "440MiB", "420MiB")]
    rows, tokens = ([getattr(config, f"batch_{what}") for config, _ in plans] for what in ("rows", "tokens"))
    assert rows[0] == 2048 > rows[1] >= rows[2] >= 1 and tokens[0] == 4096 > tokens[1] >= tokens[2]
    for limit, (_, plan) in zip((64 << 30, 440 << 20, 420 << 20), plans):
        assert plan.total <= limit and plan.tokens >= plan.longest
    config = Config(device="cpu", max_new_tokens=100, batch_rows=1)
    task = Relay(config)
    needs = memory.needs_of(config, task, task.sample_problems(9, rng.generator(0)), ["relay"] * 3)
    tried = [
        memory.fit_training(dataclasses.replace(needs, budget=needs.base + room), 512)[1]
        for room in range(5 << 20, 50 << 20, 1 << 18)
    ]
    assert [plan.checkpointing for plan in tried] == sorted([p.checkpointing for p in tried], reverse=True)
    lean = next(plan for plan in tried if plan.total <= plan.budget)  # the least memory that will do
    assert lean.checkpointing and "activations recomputed" in str(lean) and not tried[-1].checkpointing
    assert lean.tokens == lean.longest


def test_the_plan_counts_the_agents_of_an_update_and_adam_for_all(monkeypatch):
    one, joint = (planned(monkeypatch, "64GiB", occupancy=o)[1] for o in ("fresh", "joint"))
    n = 91264
    assert one.weights == 3 * 4 * n and one.optimizer == 3 * 8 * n
    assert joint.update - one.update == 2 * n * (4 + 12 + 4)  # gradient, point to go back to, attempt
    bf16 = planned(monkeypatch, "64GiB", dtype="bf16")[1]
    assert bf16.weights == 3 * 2 * n and bf16.optimizer == 3 * 12 * n
    assert one.disk == 3 * 3 * 12 * n + 3 * 4 * n
    config = Config(device="cpu")
    beside = plan_training(config, Relay(config), beside=["relay"])[1]
    assert beside.weights - one.weights == 4 * n and beside.optimizer == one.optimizer


def test_disk_is_counted_for_the_checkpoints_that_a_run_can_write(monkeypatch):
    for checkpoints, flags in [(1, {"stages": 1}), (2, {"stages": 5, "checkpoint_every": 3}),
                               (3, {"stages": 1, "warm_start": 500})]:  # fmt: skip
        assert planned(monkeypatch, "64GiB", **flags)[1].disk == (3 * 12 * checkpoints + 3 * 4) * 91264


@pytest.mark.parametrize(
    "limit, flags, helps",
    [
        ("300MiB", "", "fewer --agents or a smaller --model would help"),
        ("430MiB", "--batch-rows 2048 --eval-problems 2048", "a lower --batch-rows would help"),
        ("450MiB", "--problems 64 --group 64 --batch-rows 1 --batch-tokens 90000", "a lower --batch-tokens"),
        ("8 parsecs", "", "TEAMTR_MEMORY is '8 parsecs'; it is a size such as 8GiB or 500MiB"),
    ],
)
def test_what_cannot_fit_is_refused_before_anything_is_loaded_or_written(
    tmp_path, capsys, monkeypatch, limit, flags, helps
):
    monkeypatch.setenv("TEAMTR_MEMORY", limit)
    monkeypatch.setattr(memory, "in_use", lambda device: 300 << 20)
    monkeypatch.setattr(train, "load_team", lambda *_: pytest.fail("loaded"))
    sentence = refusal(capsys, train.main, *TOY, "--out", str(tmp_path / "run"), *flags.split())
    assert helps in sentence and not (tmp_path / "run").exists()
    assert "parsecs" in limit or f"{float(limit[:3]):.1f} MiB may be used on cpu" in sentence


def test_a_full_disk_is_found_before_the_start(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "free_disk", lambda path: 5 << 20)
    out = str(tmp_path / "run")
    sentence = refusal(capsys, train.main, *TOY, "--out", out)
    assert "7.3 MiB of disk and 5.0 MiB are free: a lower --keep" in sentence
    assert "--keep" not in refusal(capsys, train.main, *TOY, "--out", out, "--keep", "1", "--agents", "4")
    assert not Path(out).exists() and system.free_disk(Path(out) / "a" / "b") > 0


def test_a_run_says_its_plan_first_and_keeps_it_for_its_resume(tmp_path, capsys, monkeypatch):
    """With less memory: the same team, by smaller waves and batches that config.json names."""
    monkeypatch.setenv("TEAMTR_MEMORY", "64GiB")
    flags = "--batch-tokens", "256", "--eval-problems", "128"
    run(tmp_path / "plenty", *flags)
    said = capsys.readouterr().out
    assert said.startswith("memory  ") and said.index("\ndisk") < said.index("\nteam")
    assert "memory peak " in said and " planned\n" in said
    monkeypatch.setattr(memory, "in_use", lambda device: 300 << 20)
    monkeypatch.setenv("TEAMTR_MEMORY", "421MiB")
    run(tmp_path / "lean", *flags)
    rows = json.loads((tmp_path / "lean" / "config.json").read_text())["batch_rows"]
    assert rows < 128 and same(weights(tmp_path / "plenty"), weights(tmp_path / "lean"))
    monkeypatch.setenv("TEAMTR_MEMORY", "64GiB")
    again = train.main(["--resume", str(tmp_path / "lean")])
    assert again == 0 and f" {rows:,} rows at once" in capsys.readouterr().out


def test_an_evaluation_in_waves_gives_the_same_rollouts(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "relay", "--agents", "2", "--device", "cpu", "--problems", "40", "--k", "2", "--again"
    results = []
    for limit, rows in (("64GiB", ()), ("440MiB", ()), ("64GiB", ("--batch-rows", "3"))):
        monkeypatch.setenv("TEAMTR_MEMORY", limit)
        monkeypatch.setattr(memory, "in_use", lambda device: 325 << 20)
        results.append(evaluate(capsys, *flags, *rows))
    for result in results:
        measured = ("time", "seconds", "memory_planned", "memory_peak")
        assert all([result.pop(name) for name in measured])
    assert results[0] == results[1] == results[2]
    config = Config(agents=2, device="cpu")
    problems = Relay(config).sample_problems(40, rng.generator(0, "held-out"), held_out=True)
    monkeypatch.setenv("TEAMTR_MEMORY", "440MiB")
    assert plan_evaluation(config, Relay(config), problems, 2, [RELAY] * 2)[1].rows < 80
    monkeypatch.setenv("TEAMTR_MEMORY", "300MiB")
    sentence = refusal(capsys, evaluation.main, *flags)
    assert "optimizer" not in sentence and "of memory (weights 713.0 KiB, sampling " in sentence


def test_the_tokenizer_and_the_task_alone_give_the_length(monkeypatch):
    config = Config(agents=3, device="cpu")
    plan = planned(monkeypatch, "64GiB")[1]
    chat = memory.ChatFormat(load_tokenizer(RELAY))
    problem = Relay(config).sample_problems(1, rng.generator(0))[0].text
    opening = len(chat.opening(Relay.system, problem))
    assert opening + 3 * 16 < plan.longest < opening + 3 * (16 + 10)


def child(*words: str, limit: int | None = None, **environment: str) -> str:
    """Output of a program of this repository, with `limit` bytes of data enforced by the system."""
    done = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_runs_peak_stays_within_its_plan(tmp_path):
    child(str(ROOT / "train.py"), *TOY, "--out", str(tmp_path / "run"), "--eval-problems", "256")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["memory_peak"] <= summary["memory_planned"] < 1.5 * summary["memory_peak"]


def test_a_real_model_is_evaluated_within_4_gib(tmp_path):
    """An enforced limit, which ends a process that goes beyond it."""
    data = str(shared("gsm8k") / "test.jsonl")
    flags = f"--model {real_model()} --data {data} --agents 1 --problems 64 --k 2 --max-new-tokens 2 --json"
    result = json.loads(child(str(ROOT / "eval.py"), "gsm8k", *flags.split(), limit=4 * GIB))
    assert result["problems"] == 64 and result["memory_peak"] <= result["memory_planned"] < 4 * GIB


def test_a_real_model_is_trained_within_8_gib(tmp_path):
    flags = f"--model {real_model()} --task relay --agents 2 --problems 2 --group 2 --max-new-tokens 8 "
    flags += f"--stages 1 --inner-steps 1 --eval-problems 2 --out {tmp_path / 'run'} --keep 1"
    child(str(ROOT / "train.py"), *flags.split(), limit=8 * GIB)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["memory_peak"] <= summary["memory_planned"] < 8 * GIB


SHAPES = {  # by their published configurations
    "qwen2.5-0.5b": ModelConfig("qwen2", 151936, 896, 4864, 24, 14, 2, 64),
    "qwen2.5-1.5b": ModelConfig("qwen2", 151936, 1536, 8960, 28, 12, 2, 128),
    "qwen2.5-3b": ModelConfig("qwen2", 151936, 2048, 11008, 36, 16, 2, 128),
    "qwen2.5-7b": ModelConfig("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, tied=False),
}


def row_of_what_fits(name: str, rank: int) -> str:
    """As docs/models.md has it: three agents on GPUs of 24, 80 and 141 GB."""
    m, config = SHAPES[name], Config(model=name, agents=3, device="cuda", lora_rank=rank)
    adapter = AdapterSize(Path(), rank, TARGETS)
    counts = [adapter.parameters(m) if rank else parameters(m)] * 3
    weights, cells = 2 * (sum(counts) + parameters(m) * bool(rank)), []
    needs = memory.Needs(config, torch.device("cuda"), 2, [m] * 3, counts, weights, longest=1100)
    for usable in (24e9 * 0.9, 80e9 * 0.9, 141e9 * 0.9):
        _, plan = memory.fit_training(dataclasses.replace(needs, budget=int(usable)), 256)
        fits = f"{plan.tokens:,}{' recomputed' * plan.checkpointing}, {plan.rows}"
        cells.append(fits if plan.total <= plan.budget else f"needs {size(plan.total)}")
    called = f"{name}, `--lora-rank {rank}`" if rank else name
    cells = [called, size(weights), *cells, size(needs.host()), size(needs.disk())]
    return f"| {' | '.join(cells)} |"


def test_the_table_of_what_fits_follows_from_the_plan():
    page = (ROOT / "docs" / "models.md").read_text()
    for rank in (0, 16):
        for name in SHAPES:
            assert row_of_what_fits(name, rank) in page


def test_an_adapter_is_counted_as_it_is_made():
    adapter = Adapter("relay", "", 3, 6.0)
    model = add_lora(random_model("qwen3"), adapter)
    counted = AdapterSize(Path(), 3, TARGETS).parameters(model.config)
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)
