"""Agents on one frozen base: only adapters train, are saved and come back, and peft reads the same policy."""

import copy
import dataclasses
import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from commands import evaluate
from commands import refusal as sentence
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, assert_same, each_model, in_transformers, random_model, random_tokens, refusal
from toy_runs import TOY, prepared, results, run, timeless

import eval as evaluation
import train
from teamtr_min import load_model, save_model
from teamtr_min.config import PRESETS, Config
from teamtr_min.engine.lora import (
    TARGETS,
    Adapter,
    adapter_tensors,
    add_lora,
    load_models,
    merge,
    save_adapter,
    trained,
)
from teamtr_min.engine.model import checkpoint_tensors, split_fused
from teamtr_min.engine.sampler import generate
from teamtr_min.files import write_sums
from teamtr_min.hf.weights import RELAY, hash_weights
from teamtr_min.learner import Learner
from teamtr_min.learner import evaluate as measure
from teamtr_min.tasks import Relay
from teamtr_min.team import load_team

LORA = ["--agents", "2", "--lora-rank", "3"]
close = torch.testing.assert_close


def adapted(base, seed: int = 0, rank: int = 3, alpha: float = 5.0, targets=TARGETS):
    """A model on `base` whose adapter is random in both parts."""
    model = add_lora(base, Adapter("", "", rank, alpha, targets))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trained(model).values():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def dense(base, model):
    """The definition: a copy of the base, its matrices W + alpha / rank * B A."""
    whole = copy.deepcopy(base)
    weights, lora = checkpoint_tensors(whole), adapter_tensors(model)
    with torch.no_grad():
        for name in [name for name in lora if name.endswith("A")]:
            A, B = lora[name], lora[name[:-1] + "B"]
            weights[name.replace("lora_A", "weight")] += 5.0 / len(A) * (B @ A)
    return whole


@each_model
def test_an_adapter_is_a_change_of_the_weights(family, tied):
    base = random_model(family, tied)
    model, tokens = adapted(base), random_tokens(base, 3, 11)
    expected = dense(base, model)(tokens)
    assert (expected - base(tokens)).abs().max() > 0.1
    close(model(tokens), expected, atol=1e-4, rtol=1e-4)
    close(merge(model)(tokens), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_gradient_is_that_of_the_dense_formula(family):
    """In float64: with W' = W + s B A, the chain rule gives dA = s B^T dW' and dB = s dW' A^T."""
    base = random_model(family).double()
    model, tokens = adapted(base), random_tokens(base, 2, 9)
    whole = dense(base, model).requires_grad_(True)
    for one in (model, whole):
        one(tokens).log_softmax(-1)[..., 1].sum().backward()
    lora, grads, weights = adapter_tensors(model), {}, {}
    for name, p in trained(model).items():
        grads |= split_fused(name, p.grad, base.config)
    for name, p in whole.named_parameters():
        weights |= split_fused(name, p.grad, base.config)
    assert len(lora) == 2 * len(TARGETS) * base.config.layers
    for name in [name for name in lora if name.endswith("A")]:
        A, B = lora[name], lora[name[:-1] + "B"]
        grad = weights[name.replace("lora_A", "weight")] * 5.0 / len(A)
        close(grads[name], B.T @ grad)
        close(grads[name[:-1] + "B"], grad @ A.T)
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cached_sampler_draws_from_it(family):
    base = random_model(family)
    model = adapted(base)
    prompts = [random_tokens(base, n, seed=n).tolist() for n in (5, 2, 7)]
    drawn, plain = (generate(m, prompts, 6, seed=1) for m in (model, base))
    assert drawn != plain
    for prompt, completion in zip(prompts, drawn):
        logp = model(torch.tensor([prompt + completion.tokens]))[0].log_softmax(-1)[len(prompt) - 1 : -1]
        chosen = logp.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
        close(torch.tensor(completion.logprobs), chosen, atol=1e-4, rtol=1e-4)


@each_model
def test_peft_computes_the_same_logits(tmp_path, family, tied):
    peft = pytest.importorskip("peft", reason="compares with peft")
    base = random_model(family, tied)
    model, tokens = adapted(base), random_tokens(base, 3, 11)
    save_adapter(model, Adapter("nowhere/base@main", "", 3, 5.0), tmp_path)
    theirs = peft.PeftModel.from_pretrained(in_transformers(base), str(tmp_path))
    with torch.no_grad():
        close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj")])
def test_pefts_own_adapter_is_read_to_the_same_logits(tmp_path, targets):
    peft = pytest.importorskip("peft", reason="compares with peft")
    base = random_model("qwen2")
    save_model(base, tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=7, target_modules=list(targets), init_lora_weights=False)
    theirs = peft.get_peft_model(in_transformers(base), config).eval()
    config.base_model_name_or_path = str(tmp_path / "base")
    theirs.save_pretrained(tmp_path / "adapter")
    ours, adapter = next(load_models([tmp_path / "adapter"], "cpu", torch.float32))
    tokens = random_tokens(base, 3, 11)
    with torch.no_grad():
        close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    assert set(adapter.targets) == set(targets) and (adapter.rank, adapter.alpha) == (2, 7.0)


def team(**more):
    config = Config(agents=3, device="cpu", lora_rank=3, **more)
    return load_team(config, Relay(config).roles(3))


def test_agents_share_one_base_and_start_as_it():
    agents, whole = team().agents, load_model(RELAY)
    tokens = random_tokens(whole, 2, 9)
    bases = [{n: p for n, p in agent.model.named_parameters() if not p.requires_grad} for agent in agents]
    assert bases[0].keys() == dict(whole.named_parameters()).keys()
    for name in bases[0]:
        assert len({base[name].data_ptr() for base in bases}) == 1
    with torch.no_grad():
        assert all(torch.equal(agent.model(tokens), whole(tokens)) for agent in agents)
    first, second = (trained(agent.model) for agent in agents[:2])
    name = "model.layers.1.mlp.down_proj.lora_A"
    bound = 1 / math.sqrt(first[name].shape[1])
    assert not first[name].equal(second[name]) and 0.9 * bound < first[name].abs().max() < bound
    assert trained(team().agents[0].model)[name].equal(first[name])  # of the seed
    assert not trained(team(seed=1).agents[0].model)[name].equal(first[name])


def test_a_copy_shares_what_is_frozen_and_nothing_else():
    model = adapted(random_model("qwen3"))
    for p, q in zip(model.parameters(), model.copy().parameters(), strict=True):
        assert (p is q) == (not p.requires_grad) and p.equal(q)
        assert p.requires_grad == q.requires_grad


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_only_adapters_step_and_go_back(dtype):
    config = Config(agents=2, device="cpu", lora_rank=3, dtype=dtype)
    pair = load_team(config, Relay(config).roles(2))
    models, learner = [agent.model for agent in pair.agents], Learner(pair, [0], 0.01)
    before = copy.deepcopy([dict(model.named_parameters()) for model in models])
    start = learner.snapshot()
    assert learner.names == [f"0.{name}" for name in trained(models[0])]
    parts = {k: v for n, p in before[0].items() for k, v in split_fused(n, p, models[0].config).items()}
    assert learner.trained == 3 * sum(sum(p.shape) for n, p in parts.items() if is_target(n))
    assert all(p.dtype == torch.float32 for p in learner.masters)
    for p in learner.masters:
        p.grad = torch.ones_like(p)
    learner.step(1e-2)
    for name, p in models[0].named_parameters():
        assert p.equal(before[0][name]) == (not p.requires_grad), name
    learner.restore(start)
    for model, old in zip(models, before):
        assert all(p.equal(old[name]) for name, p in model.named_parameters())


def is_target(name: str) -> bool:
    return name.endswith("weight") and name.split(".")[-2] in TARGETS


@pytest.mark.parametrize("estimator", ["k3", "exact"])
def test_the_radius_holds_on_adapters(estimator):
    """An attempt far outside comes back inside, measured anew against a copy of the old one."""
    ready = prepared(lora_rank=3, lr=0.3, delta=0.01, kl_estimator=estimator)
    old, learner = ready.model.copy(), ready.learner
    base = {name: p.clone() for name, p in ready.model.named_parameters() if not p.requires_grad}
    outcome = train.update(learner, ready.batches, ready.config, 0.3)
    assert outcome.attempted["kl"] > 0.01 >= outcome.kept["kl"] and outcome.halvings
    assert all(p.equal(base[name]) for name, p in ready.model.named_parameters() if name in base)
    kls = []
    for batch in ready.batches:
        both = [batch.logps(model, ready.config.temperature) for model in (ready.model, old)]
        d = batch.per_message(both[1] - both[0])
        kls.append(torch.expm1(-d) + d)
    assert torch.cat(kls).mean().item() == pytest.approx(outcome.kept["kl_k3"], rel=1e-3, abs=1e-7)
    again, _ = measure(learner, ready.batches, ready.config, grad=False)
    assert math.isfinite(again["loss"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three stages with all its checkpoints, on a base in a directory of its own."""
    root = tmp_path_factory.mktemp("runs")
    shutil.copytree(RELAY, root / "base")
    out = root / "run"
    run(out, *LORA, "--model", str(root / "base"), "--task", "relay", "--temperature", "1",
        "--max-new-tokens", "16", "--stages", "3", "--keep", "3")  # fmt: skip
    return out


@pytest.fixture
def fresh(finished, tmp_path):
    """A copy of that run, which may be spoilt; so may the base, which is put back."""
    yield shutil.copytree(finished, tmp_path / "copy")
    shutil.copytree(RELAY, finished.parent / "base", dirs_exist_ok=True)


def bits(out: Path) -> tuple:
    summary, updates, stages = results(out)
    files = [*out.glob("agents/*/*.safetensors"), *out.glob("checkpoints/000003/*.safetensors")]
    return timeless([summary, *updates, *stages]), {str(f.relative_to(out)): f.read_bytes() for f in files}


def test_a_run_leaves_its_base_and_writes_adapters_alone(finished):
    summary, updates, _ = results(finished)
    assert any(u["steps"] for u in updates) and all(u["kl_after"] <= u["delta"] for u in updates)
    assert hash_weights(finished.parent / "base") == hash_weights(RELAY)
    for j in range(2):
        agent = finished / "agents" / str(j)
        tensors = load_file(agent / "adapter_model.safetensors")
        assert not (agent / "model.safetensors").exists() and (agent / "tokenizer.json").is_file()
        assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
        assert any(tensors[name].any() for name in tensors if ".lora_B." in name)
        facts = json.loads((agent / "adapter_config.json").read_text())
        assert facts["base_model_name_or_path"] == str(finished.parent / "base")
        assert (facts["r"], facts["lora_alpha"]) == (3, 6.0)
    whole = sum(p.numel() for p in load_model(RELAY).parameters())
    assert (finished / "checkpoints/000003/learner-0.safetensors").stat().st_size < 12 * whole / 3


def test_a_stopped_run_resumes_to_the_same_bits(finished, fresh):
    shutil.rmtree(fresh / "checkpoints/000003")
    shutil.rmtree(fresh / "agents")
    (fresh / "summary.json").unlink()
    assert train.main(["--resume", str(fresh)]) == 0
    assert bits(fresh) == bits(finished)


def change(base: Path) -> None:
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 0.5
    save_file(tensors, file)


def test_another_base_is_refused_by_name(finished, fresh, capsys):
    base = finished.parent / "base"
    change(base)
    shutil.rmtree(fresh / "checkpoints/000003")
    assert "is not the one that it began with" in sentence(capsys, train.main, "--resume", str(fresh))
    for flags in (["relay"], ["export", "--merge"]):
        assert evaluation.main([*flags, "--team", str(fresh), "--problems", "2"]) == 2
        said = capsys.readouterr().err.splitlines()[-1]  # below the plan of memory
        assert said.startswith("error: ") and f"adapts {base}, whose weights are others now" in said
    shutil.rmtree(base)
    said = sentence(capsys, evaluation.main, "relay", "--team", str(fresh), "--problems", "2")
    assert f"adapts {base}, so put that back: no model" in said


def test_an_evaluation_hashes_base_and_adapter(finished, fresh, capsys):
    flags = ["relay", "--team", str(fresh), "--problems", "8", "--device", "cpu"]
    first = evaluate(capsys, *flags)
    assert evaluate(capsys, *flags)["model_hash"] == first["model_hash"]
    config = fresh / "agents/1/adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 6.0', '"lora_alpha": 12'))
    write_sums(fresh / "agents")
    scaled = evaluate(capsys, *flags)["model_hash"]
    change(finished.parent / "base")
    for j in range(2):
        (fresh / f"agents/{j}/base.json").unlink()  # as if peft had written it
    write_sums(fresh / "agents")
    assert len({first["model_hash"], scaled, evaluate(capsys, *flags)["model_hash"]}) == 3


def test_export_writes_adapters_or_whole_models_of_the_same_policy(finished, tmp_path, capsys):
    flags = ["export", "--team", str(finished), "--out", str(tmp_path / "out")]
    plain = evaluate(capsys, *flags)
    assert "exists; give another --out" in sentence(capsys, evaluation.main, *flags)
    whole = evaluate(capsys, *flags[:-1], str(tmp_path / "whole"), "--merge")
    tokens = random_tokens(load_model(RELAY), 3, 11)
    pairs = zip(load_models(plain["agents"], "cpu", torch.float32), whole["agents"], strict=True)
    for (model, _), directory in pairs:
        with torch.no_grad():
            close(load_model(directory)(tokens), model(tokens), atol=1e-4, rtol=1e-4)
            if importlib.util.find_spec("transformers"):
                transformers = importlib.import_module("transformers")
                theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
                close(theirs(tokens).logits, model(tokens), atol=1e-4, rtol=1e-4)
        assert (Path(directory) / "tokenizer.json").is_file()


def test_export_copies_the_agents_of_a_run_without_adapters(tmp_path, capsys):
    run(tmp_path / "run", "--agents", "2", "--stages", "1")
    result = evaluate(capsys, "export", "--team", str(tmp_path / "run"), "--merge")
    assert result["merged"] == []
    for j, directory in enumerate(result["agents"]):
        assert_same(load_model(directory), load_model(tmp_path / "run/agents" / str(j)))


def test_a_trained_adapter_is_itself_a_model_to_start_from(finished, tmp_path, capsys):
    agents = ",".join(str(finished / "agents" / str(j)) for j in range(2))
    again = [*LORA, "--task", "relay", "--temperature", "1", "--stages", "1", "--model", agents]
    run(tmp_path / "run", *again, "--lr", "0", "--max-new-tokens", "16")
    for j in range(2):
        file = Path("agents") / str(j) / "adapter_model.safetensors"
        assert (finished / file).read_bytes() == (tmp_path / "run" / file).read_bytes()
    said = sentence(capsys, train.main, *TOY, *again, "--lora-rank", "2", "--out", str(tmp_path / "no"))
    assert "--lora-rank is 2, but" in said and "of rank 3" in said


@pytest.mark.parametrize(
    "spoil, reason",
    [
        ({"use_dora": True}, "use_dora not supported"),
        ({"peft_type": "IA3"}, "peft_type IA3 not supported"),
        ({"bias": "all"}, "bias all not supported"),
        ({"r": 4}, "does not hold the adapter that its adapter_config.json describes"),
        ({"r": 0}, "must be positive"),
        ({"target_modules": "all-linear"}, "target_modules among"),
    ],
)
def test_an_adapter_that_would_be_computed_differently_is_refused(fresh, spoil, reason):
    config = fresh / "agents/0/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | spoil))
    assert reason in refusal(lambda: list(load_models([config.parent], "cpu", torch.float32)))


def test_a_damaged_adapter_is_a_sentence(fresh):
    file = fresh / "agents/0/adapter_model.safetensors"
    whole = load_file(file)
    save_file({name: p * math.nan for name, p in whole.items()}, file)
    load = lambda: list(load_models([file.parent], "cpu", torch.float32))  # noqa: E731
    assert "holds NaN" in refusal(load)
    file.write_bytes(b"short")
    assert "damaged or cut short" in refusal(load)
    assert "is an adapter" in refusal(load_model, file.parent)


def test_the_rank_decides_scale_and_learning_rate():
    plain, config = Config(), Config(lora_rank=4)
    presets = PRESETS["shipped"]
    assert (config.lora_alpha, config.lr) == (8.0, 10 * presets["lr"])
    assert config.warm_start_lr == 10 * presets["warm_start_lr"]
    assert (plain.lora_alpha, plain.lr) == (0.0, presets["lr"])
    assert Config(lora_rank=4, lr=1e-3, lora_alpha=1.0).lr == 1e-3
    assert dataclasses.replace(config, seed=1).lr == config.lr
    for wrong in ({"lora_alpha": 4.0}, {"lora_rank": 2, "lora_alpha": 0.0}, {"lora_rank": -1}):
        assert "--lora-" in refusal(Config, **wrong)
