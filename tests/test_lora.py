"""Agents on one frozen base: only adapters train, are saved and come back, and peft reads the same policy."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from commands import evaluate
from commands import refusal as refused
from ready import team_of
from safetensors.torch import load_file, save_file
from tiny import each_model, in_transformers, random_model, random_tokens, refusal, write_tokenizer
from toy_runs import TOY, bits, results, run

import train
from teamtr_min import load_model, load_tokenizer, save_model
from teamtr_min.engine.model import checkpoint_tensors, split_fused
from teamtr_min.hf.chat import ChatFormat
from teamtr_min.hf.lora import TARGETS, Adapter, adapter_tensors, add_lora, load_models, save_adapter
from teamtr_min.hf.weights import RELAY

WEIGHTS = "adapter_model.safetensors"
close = torch.testing.assert_close
SOME = ("q_proj", "v_proj", "up_proj")  # parts of products


def dense(base, model):
    """The definition: a copy of the base, its matrices W + alpha / rank * B A."""
    whole, lora = copy.deepcopy(base), adapter_tensors(model)
    weights = checkpoint_tensors(whole)  # views
    for name in [name for name in lora if name.endswith("A")]:
        A, B = lora[name], lora[name[:-1] + "B"]
        weights[name.replace("lora_A", "weight")] += 5.0 / len(A) * (B @ A)
    return whole


def loaded(*directories: Path) -> list:
    return [*load_models(directories, "cpu", torch.float32)]


@each_model
@pytest.mark.parametrize("targets", [TARGETS, SOME])
def test_an_adapter_is_a_change_of_the_weights(family, tied, targets):
    base = random_model(family, tied)
    model, tokens = add_lora(base, Adapter("", 3, 5.0, targets)), random_tokens(base, 3, 11)
    generator = torch.Generator().manual_seed(0)
    for part in adapter_tensors(model, targets).values():  # random in both
        part.data.normal_(std=0.2, generator=generator)
    expected = dense(base, model)(tokens)
    assert (expected - base(tokens)).abs().max() > 0.1
    close(model(tokens), expected, atol=1e-4, rtol=1e-4)
    model(tokens).log_softmax(-1)[..., 1].sum().backward()
    for name, p in model.named_parameters():  # a part of a product without an adapter keeps its zeros
        for part, grad in split_fused(name, p.grad, base.config).items() if p.requires_grad else ():
            assert bool(grad.any()) == (part.split(".")[-2] in targets)
    assert all(p.grad is None for p in base.parameters())


@pytest.fixture
def base(tmp_path):
    model = random_model("qwen2")
    save_model(model, tmp_path / "base")
    return model


def by_peft(base, directory: Path, **fields):
    """An adapter as peft makes and writes it, every field of its configuration included."""
    peft = pytest.importorskip("peft", reason="compares with peft")
    named = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    config = peft.LoraConfig(r=2, lora_alpha=7, **named | fields)
    theirs = peft.get_peft_model(in_transformers(base), config).eval()
    config.base_model_name_or_path = str(directory.parent / "base")
    theirs.save_pretrained(directory)
    return theirs


PLAIN = {
    "two targets": {}, "drawn as Gaussians": {"init_lora_weights": "gaussian"},
    "all layers": {"target_modules": "all-linear"}, "by a pattern": {"target_modules": r".*\.(q|up)_proj"},
    "with dropout": {"lora_dropout": 0.1, "task_type": "CAUSAL_LM"},
}  # fmt: skip


@pytest.mark.parametrize("kind", PLAIN)
def test_pefts_own_adapter_has_the_same_logits_here_and_again_in_peft(tmp_path, base, kind):
    theirs = by_peft(base, tmp_path / "adapter", **PLAIN[kind])
    ((ours, adapter),) = loaded(tmp_path / "adapter")
    save_adapter(ours, adapter, tmp_path / "again")
    again = type(theirs).from_pretrained(in_transformers(base), str(tmp_path / "again"))
    tokens = random_tokens(base, 3, 11)
    with torch.no_grad():
        for one in (ours(tokens), again(tokens).logits):
            close(one, theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    assert (adapter.rank, adapter.alpha, adapter.base) == (2, 7.0, str(tmp_path / "base"))


NOT_PLAIN = {
    "init_lora_weights 'pissa'": {"init_lora_weights": "pissa"}, "peft_type 'IA3'": {"peft_type": "IA3"},
    "use_dora True": {"use_dora": True}, "use_rslora True": {"use_rslora": True},
    "bias 'all'": {"bias": "all"}, "rank_pattern {'q_proj': 1}": {"rank_pattern": {"q_proj": 1}},
    "lora_bias True": {"lora_bias": True}, "alpha_pattern {'q_proj': 1}": {"alpha_pattern": {"q_proj": 1}},
    "layers_to_transform [0]": {"layers_to_transform": [0]}, "peft_type None": {"peft_type": None},
    "modules_to_save ['norm']": {"modules_to_save": ["norm"]},
    "use_next_years_idea 0.5": {"use_next_years_idea": 0.5}, "another 0": {"another": 0},
    "a_third 0.0": {"a_third": 0.0}, "init_lora_weights 1": {"init_lora_weights": 1},
}  # fmt: skip


@pytest.mark.parametrize("reason", NOT_PLAIN)
def test_what_is_not_known_to_mean_plain_lora_is_refused_by_name(tmp_path, base, reason):
    by_peft(base, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_config.json"
    raw = json.loads(file.read_text()) | {"an_idea_that_is_not_used": None, "another": [], "a_third": False}
    file.write_text(json.dumps(raw))
    assert len(loaded(file.parent)) == 1
    file.write_text(json.dumps(raw | NOT_PLAIN[reason]))
    assert refusal(loaded, file.parent) == f"{file}: not known to mean plain LoRA: {reason}"


def edit(directory: Path, **fields):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


V = "model.layers.0.self_attn.v_proj"
DIFFER = {
    "model.layers.0.mlp.down_proj, model.layers.0.self_attn.v_proj,": ["q_proj", "down_proj"],
    "model.layers.1.self_attn.q_proj, model.layers.2.self_attn.q_proj": r".*\.(0\.self_attn\.q|v)_proj",
    "lm_head": ["q_proj", "v_proj", "lm_head"], "model.layers.0.self_attn.q_proj,": None,
    V: ["q_proj", *(V.replace("0", n) for n in "12")], ".mlp.gate_proj": "all-linear",
}  # fmt: skip


@pytest.mark.parametrize("reason", DIFFER)
def test_an_adapter_whose_tensors_are_others_than_its_target_modules_is_refused(tmp_path, base, reason):
    by_peft(base, tmp_path / "adapter")
    edit(tmp_path / "adapter", target_modules=["self_attn.q_proj", "v_proj", "absent"])
    assert len(loaded(tmp_path / "adapter")) == 1
    edit(tmp_path / "adapter", target_modules=DIFFER[reason])
    sentence = refusal(loaded, tmp_path / "adapter")
    assert "target_modules and tensors differ in " in sentence and reason in sentence


@pytest.mark.parametrize("fields", [
    {"r": "2"}, {"r": None}, {"r": 0}, {"lora_alpha": None}, {"lora_alpha": "7"},
])  # fmt: skip
def test_the_size_of_an_adapter_is_a_number(tmp_path, base, fields):
    by_peft(base, tmp_path / "adapter")
    edit(tmp_path / "adapter", **fields)
    sentence = refusal(loaded, tmp_path / "adapter")
    assert "r must be a positive whole number and lora_alpha a number" in sentence


def test_adapters_that_cannot_be_read_get_one_short_sentence(tmp_path, base):
    by_peft(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / WEIGHTS
    whole, odd = load_file(file), {"base_model.model.lm_head.weight": torch.ones(1)}
    renamed = {name.replace(".model.model", "._orig_mod.model"): p for name, p in whole.items()}
    spoilt = {
        "holds NaN": {name: p * math.nan for name, p in whole.items()},
        "12 missing (base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight [2, 30], ": renamed,
        ": 1 unexpected (base_model.model.lm_head.weight [1])": whole | odd,
    }
    for reason, tensors in spoilt.items():
        save_file(tensors, file)
        sentence = refusal(loaded, file.parent)
        assert reason in sentence and len(sentence) < 650
    file.write_bytes(b"short")
    assert f"no weights in {file}, a safetensors file" in refusal(loaded, file.parent)
    file.unlink()
    assert "No such file" in refusal(loaded, file.parent)
    assert "is an adapter" in refusal(load_model, file.parent)
    shutil.rmtree(tmp_path / "base")
    save_file(whole, file)
    sentence = refusal(loaded, file.parent)
    assert sentence.startswith(f"{file.parent} adapts {tmp_path}/base, so put that back: no model")


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(tmp_path, base):
    by_peft(base, tmp_path / "adapter")
    write_tokenizer(tmp_path / "base")
    (tmp_path / "base/generation_config.json").write_text('{"eos_token_id": [3]}')
    for same in (True, False):
        tokenizer = load_tokenizer(tmp_path / "adapter")
        assert (tokenizer.hash == load_tokenizer(tmp_path / "base").hash) == same
        assert 3 in ChatFormat(tokenizer).end_tokens
        write_tokenizer(tmp_path / "adapter", shift=1)


def test_agents_share_one_base_and_start_as_it():
    _, team = team_of(agents=3, lora_rank=3)
    agents, whole = team.agents, load_model(RELAY)
    tokens = random_tokens(whole, 2, 9)
    bases = [{n: p for n, p in agent.model.named_parameters() if not p.requires_grad} for agent in agents]
    assert bases[0].keys() == dict(whole.named_parameters()).keys()
    for name in bases[0]:
        assert len({base[name].data_ptr() for base in bases}) == 1
    with torch.no_grad():
        assert all(torch.equal(agent.model(tokens), whole(tokens)) for agent in agents)
    others = (team_of(agents=1, lora_rank=3, seed=seed)[1].agents[0] for seed in (0, 1))
    name = "model.layers.1.mlp.down_proj.lora_A"
    first, second, again, other = (adapter_tensors(a.model)[name] for a in (*agents[:2], *others))
    bound = 1 / math.sqrt(first.shape[1])
    assert first.equal(again) and not first.equal(second) and not first.equal(other)
    assert 0.9 * bound < first.abs().max() < bound


LORA = ["--agents", "2", "--lora-rank", "3", "--stages", "3", "--temperature", "1", "--task", "relay"]


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("lora")
    shutil.copytree(RELAY, root / "base")
    run(root / "run", *LORA, "--model", str(root / "base"), "--max-new-tokens", "16", "--inner-steps", "2")
    return root / "run"


def test_a_run_leaves_its_base_and_writes_adapters_alone(trained_run):
    _, updates, _ = results(trained_run)
    assert any(u["steps"] for u in updates) and all(u["kl_after"] <= u["delta"] for u in updates)
    base = trained_run.parent / "base"
    assert (base / "model.safetensors").read_bytes() == (RELAY / "model.safetensors").read_bytes()
    for j in range(2):
        agent = trained_run / "agents" / str(j)
        tensors = load_file(agent / WEIGHTS)
        assert not (agent / "model.safetensors").exists() and (agent / "tokenizer.json").is_file()
        assert any(tensors[name].any() for name in tensors if ".lora_B." in name)
        facts = json.loads((agent / "adapter_config.json").read_text())
        assert facts["base_model_name_or_path"] == str(base)
        assert (facts["r"], facts["lora_alpha"]) == (3, 6.0)


def test_a_stopped_run_resumes_to_the_same_bits_unless_its_base_has_changed(trained_run, tmp_path, capsys):
    copy = shutil.copytree(trained_run, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints/000003")
    weights = trained_run.parent / "base/model.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))  # one bit of one weight
    said = refused(capsys, train.main, "--resume", str(copy))
    assert f"rests on other things now than when it began: LoRA base {weights.parent};" in said
    weights.write_bytes(right)
    assert train.main(["--resume", str(copy)]) == 0
    assert bits(copy) == bits(trained_run)


def test_an_evaluation_does_not_hash_the_base(trained_run, capsys, monkeypatch):
    monkeypatch.setattr("teamtr_min.run.run.sha256", lambda path: pytest.fail("gigabytes, read for nothing"))
    assert evaluate(capsys, "relay", "--team", str(trained_run), "--problems", "4")["fingerprint"]


def test_a_trained_adapter_is_itself_a_model_to_start_from(trained_run, tmp_path, capsys):
    flags = [*LORA, "--model", ",".join(str(trained_run / "agents" / str(j)) for j in range(2))]
    flags += ["--max-new-tokens", "16", "--lr", "0", "--stages", "1"]
    run(tmp_path / "run", *flags)
    for j in range(2):
        file = Path("agents") / str(j) / WEIGHTS
        assert (trained_run / file).read_bytes() == (tmp_path / "run" / file).read_bytes()
    said = refused(capsys, train.main, *TOY, *flags, "--lora-rank", "2", "--out", str(tmp_path / "no"))
    assert "--lora-rank is 2, but" in said and "of rank 3" in said
