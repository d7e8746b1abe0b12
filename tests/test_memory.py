"""What fits is known before anything is loaded: free memory, the plan, its refusals, its peaks."""

import dataclasses
import itertools
import json
import subprocess
import sys

import pytest
import torch
from ready import Prepared
from tiny import each_model, random_model, random_tokens, refusal
from toy_runs import TOY, refused, run, same, weights

import train
from teamtr_min.config import Config
from teamtr_min.engine import model, rng
from teamtr_min.engine.distributed import ALONE, Ranks, halving
from teamtr_min.engine.sampler import Sampler
from teamtr_min.files import UserError
from teamtr_min.hf.chat import load_tokenizer
from teamtr_min.hf.lora import load_models
from teamtr_min.hf.weights import RELAY, load_model, save_model
from teamtr_min.learner import Learner
from teamtr_min.rollout import AgentBatch, collect
from teamtr_min.run import memory
from teamtr_min.run.loading import build_team
from teamtr_min.run.memory import free_memory, plan_evaluation, plan_training, token_bytes
from teamtr_min.tasks import Relay

N = 91264  # parameters of the relay model


@pytest.mark.parametrize("full, version", [*itertools.product([None, "job", "", "job/step"], [1, 2])])
def test_every_level_of_control_groups_counts(tmp_path, version, full):
    """The level that leaves least decides. Pages of files, which can be given up, do not count as used."""
    limit, used, cache = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    files = {"proc/meminfo": "MemTotal:  9000 kB\nMemFree:  10 kB\nMemAvailable:  8000 kB\n"}
    files["proc/self/cgroup"] = {1: "5:cpu:/other\n4:memory:/job/step\n0::/\n", 2: "0::/job/step\n"}[version]
    for level in ("", "job", "job/step"):
        here = f"sys/fs/cgroup/{'memory/' if version == 1 else ''}{level}".rstrip("/")
        files |= {f"{here}/{limit}": "1000000\n" if level == full else "max\n", f"{here}/{used}": "700000\n"}
        files |= {f"{here}/memory.stat": f"anon 1\n{cache} 50000\nactive_file 9\n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    left = 8000 * 1024 if full is None else 1000000 - 700000 + 50000
    assert free_memory(torch.device("cpu"), tmp_path) == left


@each_model
def test_activations_are_counted_right(family, tied):
    """Bytes that a forward pass keeps for its backward: of its layers within a tenth, of all from above."""
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(family, tied).to(dtype)
        m, tokens, kept = model.config, random_tokens(model, 3, 31), {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(x):
            kept[x.untyped_storage().data_ptr()] = x  # noqa: B023  alive, so that no address comes twice
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.hidden(tokens)
        found = sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in own)
        more = dataclasses.replace(m, layers=2 * m.layers)
        planned, twice = (token_bytes(x, dtype.itemsize) * tokens.numel() for x in (m, more))
        assert 0.9 < (twice - planned) / found < 1.1 and found < planned


def planned(**knobs) -> tuple[Config, Relay, memory.Plan]:
    config = Config(**{"device": "cpu", "stages": 2, "problems": 8, "eval_problems": 64} | knobs)
    config, plan = plan_training(config, task := Relay(config))
    return config, task, plan


@pytest.mark.parametrize("rounds, router", [(1, "round-robin"), (2, "random")])
def test_no_transcript_is_longer_than_planned(rounds, router):
    config, task, plan = planned(agents=2, rounds=rounds, router=router, max_new_tokens=9)
    assert (config.batch_rows, config.batch_tokens, plan.checkpointing) == (2048, 4096, False)
    team = build_team(config, task)
    for agent in team.agents:
        agent.model.model.norm.weight.data.zero_()  # any token, so that messages reach the limit
    problems = task.sample_problems(8, rng.generator(0, "problems", 0))
    rollouts = collect(team, problems, 4, rng.RngPath(0, "train"))
    rows = zip(rollouts.problems, rollouts.messages)
    seen = [len(team.render(j, *row, add_generation_prompt=False).ids) for row in rows for j in range(2)]
    assert 0.7 * plan.longest < max(seen) <= plan.longest


def test_the_plan_counts_parameters_by_purpose(tmp_path):
    joint = {"occupancy": "joint"}
    kinds = {}, joint, joint | {"inner_steps": 1}, {"dtype": "bf16"}, {"lora_rank": 2}
    one, joint, once, bf16, lora = (planned(**knobs)[2] for knobs in kinds)
    assert one.weights == 3 * 4 * N and one.optimizer == 3 * 8 * N
    assert joint.update - one.update == 2 * N * (4 + 2 * 12)  # gradients, two snapshots
    assert once.update == joint.update - 3 * N * 12
    assert bf16.weights == 3 * 2 * N and bf16.optimizer == 3 * 12 * N
    ((model, _),) = load_models([RELAY], "meta", torch.float32, rank=2)
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lora.weights == 4 * (N + 3 * adapter) and lora.optimizer == 3 * 8 * adapter
    config, task, _ = planned()
    problems = task.sample_problems(9, rng.generator(0))
    shared = memory.Plan(config, task, problems, Ranks(0, 4))
    assert shared.weights == 4 * 3 * N // 4 + 4 * N and shared.optimizers[0] == 8 * N // 4
    save_model(load_model("relay", dtype=torch.bfloat16), tmp_path / "bf16")
    load_tokenizer("relay").save(tmp_path / "bf16")
    assert plan_evaluation(config, task, problems, 3, [tmp_path / "bf16"] * 3)[1].weights == 3 * (4 + 2) * N
    config, plan = plan_evaluation(config, task, problems, 3, ["relay"] * 3)
    assert plan.optimizer == plan.update == 0 and plan.weights == 3 * 4 * N and config.batch_rows == plan.rows


def plans(monkeypatch, mebibytes, **knobs) -> list[memory.Plan]:
    monkeypatch.setattr(memory, "in_use", lambda *_: 0)
    found, refused = [], False
    for mib in mebibytes:
        monkeypatch.setenv("TEAMTR_MEMORY", f"{mib}MiB")
        try:
            found.append(planned(max_new_tokens=100, **knobs)[2])
            assert not refused and found[-1].total <= found[-1].budget
        except UserError as error:
            refused = True
            assert f"{mib:.1f} MiB usable on c" in str(error) and "--lora-rank 16" in str(error)
    assert refused
    return found


def test_less_memory_means_smaller_batches_then_activations_twice_then_a_refusal(monkeypatch):
    fit = plans(monkeypatch, [400, *range(160, 50, -10), *range(50, 40, -1)])
    for field in ("rows", "tokens"):
        values = [getattr(plan, field) for plan in fit if not plan.checkpointing]
        assert values == sorted(values, reverse=True) and len(set(values)) > 2
    assert [plan.checkpointing for plan in fit] == sorted(plan.checkpointing for plan in fit)
    assert fit[0].rows == 2048 and fit[0].tokens == 4096 and fit[-1].tokens >= fit[-1].longest
    assert "activations computed twice" in str(fit[-1])
    monkeypatch.setenv("TEAMTR_MEMORY", "8 parsecs")
    assert "a size such as 8GiB" in refusal(planned)


def test_on_a_gpu_optimizers_wait_on_the_host_before_activations_are_computed_twice(monkeypatch):
    monkeypatch.setattr(memory, "placement", lambda config: (torch.device("cuda"), torch.bfloat16))
    monkeypatch.setattr(memory, "free_memory", lambda device: 1 << 40)
    sizes = [190.0, *torch.arange(176, 164, -0.5).tolist()]
    fit = plans(monkeypatch, sizes, problems=2, eval_problems=2, batch_rows=2)
    ways = [(plan.offload, plan.checkpointing) for plan in fit]
    assert ways == sorted(ways) and set(ways) == {(False, False), (True, False), (True, True)}


def test_what_cannot_fit_is_refused_before_anything_is_loaded_or_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "build_team", lambda *_: pytest.fail("loaded"))
    monkeypatch.setenv("TEAMTR_MEMORY", "40MiB")
    monkeypatch.chdir(tmp_path)
    assert "40.0 MiB usable" in refused(capsys, train.main, *TOY) and not [*tmp_path.iterdir()]


def test_a_run_in_little_memory_makes_the_same_team(tmp_path, monkeypatch, capsys):
    def tight(*given):
        config, plan = plan_training(*given)
        plan.checkpointing = True
        return config, plan

    calls, again = [], model.checkpoint
    monkeypatch.setattr(model, "checkpoint", lambda *a, **k: calls.append(1) or again(*a, **k))
    flags = "--batch-tokens", "256", "--eval-problems", "64"
    run(tmp_path / "plenty", *flags)
    assert "\nmemory  " in capsys.readouterr().out and not calls
    monkeypatch.setattr(memory, "in_use", lambda *_, **__: 300 << 20)
    monkeypatch.setenv("TEAMTR_MEMORY", "352MiB")
    monkeypatch.setattr(train, "plan_training", tight)
    run(tmp_path / "lean", *flags)
    assert calls, "activations were computed again"
    lean, plenty = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("lean", "plenty"))
    assert lean["batch_rows"] < 64 < plenty["batch_rows"] == 2048
    assert same(weights(tmp_path / "plenty"), weights(tmp_path / "lean"))


def test_overlong_problems_are_found_among_all_or_dropped(tmp_path, capsys):
    texts = [p.text for p in Relay(Config()).sample_problems(40, rng.generator(0))]
    lines = [{"question": text, "answer": "1"} for text in texts]
    lines[17]["question"] = texts[17] * 3000
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--task", "jsonl", "--model", "relay", "--data", str(data), "--device", "cpu", "--agents", "2"]
    flags += "--stages 1 --problems 2 --group 2 --max-new-tokens 3 --eval-problems 1 --inner-steps 1".split()
    sentence = refused(capsys, train.main, *flags, "--out", str(tmp_path / "run"))
    assert "data.jsonl, line 18" in sentence and "the model has 512 positions" in sentence
    assert "(1 of 40 problems are too long): --drop-long" in sentence
    assert train.main([*flags, "--out", str(tmp_path / "run"), "--drop-long"]) == 0
    assert "1 problems of" in capsys.readouterr().out


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory")])
def test_work_that_fills_memory_goes_on_in_halves(error):
    sizes = []

    def work(size: int, most: int = 5, error: Exception = error) -> int:
        sizes.append(size)
        if size > most:
            raise error
        return -size

    assert halving(work, 40) == (-5, 5) and sizes == [40, 20, 10, 5]
    for failing, ranks, tried in (
        (lambda size: work(size, most=0), ALONE, [16, 8, 4, 2, 1]),
        (work, Ranks(0, 2), [16]),
        (lambda size: work(size, error=RuntimeError("shapes")), ALONE, [16]),
    ):
        sizes.clear()
        with pytest.raises(RuntimeError):
            halving(failing, 16, ranks)
        assert sizes == tried


def test_a_collection_and_an_update_that_fill_memory_come_out_the_same(monkeypatch):
    plenty, lean = Prepared(), Prepared()
    whole, start, hidden = plenty.update(), Sampler.start, AgentBatch.hidden
    limit = max(batch.rows.tokens.numel() for batch in lean.batches.own) // 2

    def full(size: int, most: int) -> None:
        if size > most:
            raise torch.OutOfMemoryError("no memory")

    def climb(tokens: int):
        lean.config = dataclasses.replace(lean.config, batch_tokens=tokens)
        lean.batches = lean.batch(lean.rollouts)
        return lean.update()

    monkeypatch.setattr(Sampler, "start", lambda self, rows: full(rows, 20) or start(self, rows))
    again = collect(lean.team, lean.rollouts.problems[::6], 6, rng.RngPath(0, "train", 0, 0))
    for one, other in zip(again.messages, lean.rollouts.messages, strict=True):
        assert [m.tokens for m in one] == [m.tokens for m in other]
    assert lean.team.batch_rows == 16
    monkeypatch.setattr(
        AgentBatch, "hidden", lambda b, *m: full(b.rows.tokens.numel(), limit) or hidden(b, *m)
    )
    update, tokens = halving(climb, 4096)
    assert tokens < 512 and update.steps == whole.steps
    assert update.kept["kl"] == pytest.approx(whole.kept["kl"], rel=1e-3)


def test_where_memory_runs_out_behind_an_accepted_step_the_update_ends_with_it(monkeypatch):
    """A second attempt would measure another pi_old, and so leave the radius unseen."""
    ready = Prepared(lr=3e-4, inner_steps=6)
    aside, passes, backward = ready.batch(ready.rollouts), [], Learner.backward
    ready.learner.measure(aside, ready.config)  # stores log pi_old

    def lean(*given):
        passes.append(given)
        if len(passes) == 3:
            raise RuntimeError("CUDA error: out of memory")
        return backward(*given)

    monkeypatch.setattr(Learner, "backward", lean)
    update, tokens = halving(lambda tokens: ready.update(), 4096)
    kept = ready.learner.measure(aside, ready.config)
    assert tokens == 4096 and len(passes) == 3 and 0 < update.kept["kl"] <= ready.config.delta
    assert update.kept["kl"] == pytest.approx(kept.kl, rel=1e-4)
    torch.testing.assert_close(update.log_ratio, kept.log_ratio, atol=1e-5, rtol=0)


def test_train_runs_as_a_program_and_its_planned_peak_is_near_the_measured_one(tmp_path):
    flags = "--problems 32 --group 8 --eval-problems 256".split()
    words = [sys.executable, train.__file__, *TOY, *flags]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "held-out accuracy" in done.stdout, done.stderr
    (directory,) = (tmp_path / "runs").iterdir()
    summary = json.loads((directory / "summary.json").read_text())
    assert 0.7 < summary["memory_planned"] / summary["memory_peak"] < 1.3
