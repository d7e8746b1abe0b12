"""Checkpoints in every layout that transformers writes, to memory and back, and where they are found."""

import itertools
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from tiny import CONFIGS, LLAMA3, assert_same, each_model, random_model, refusal, write_checkpoint
from tiny import write_tokenizer as write_bytes

from teamtr_min import load_model, load_tokenizer, save_model
from teamtr_min.config import Config
from teamtr_min.hf.weights import RELAY, config_json, find_model, pinned, read_config, snapshot

DTYPES = [torch.float32, torch.bfloat16]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def put(name: str, tensor: torch.Tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize("stored", [*DTYPES, torch.float16])
@each_dtype
def test_every_stored_precision_loads_into_every_compute_precision(tmp_path, stored, dtype):
    model = random_model("qwen2")
    loaded = load_model(write_checkpoint(tmp_path, model, dtype=stored), dtype=dtype)
    assert_same(loaded, model.to(stored).to(dtype))


def test_what_is_not_used_is_no_obstacle(tmp_path):
    """Fields that change nothing; and tensors that old writers put into a tied model."""
    unused = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 1}
    unused |= {"layer_types": ["full_attention"] * 3, "attention_bias": False}
    model = random_model("qwen2")
    repeat = put("lm_head.weight", model.model.embed_tokens.weight.detach().clone())
    assert_same(load_model(write_checkpoint(tmp_path, model, config=unused, change=repeat)), model)


WAVES = {"rope_theta": 500.0, **LLAMA3}
DIALECTS = {
    "transformers 4": {"rope_theta": 500.0, "rope_scaling": LLAMA3},
    "older": {"rope_theta": 500, "rope_scaling": {**LLAMA3, "rope_type": None, "type": "llama3"}},
    "transformers 5": {"rope_parameters": WAVES},
    "both, where the inner one counts": {"rope_theta": 7.0, "rope_parameters": WAVES},
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_both_dialects_of_config_json_mean_the_same(tmp_path, dialect):
    raw = config_json(CONFIGS["llama"], torch.float32)
    for key in ("rope_theta", "rope_scaling", "torch_dtype"):
        del raw[key]
    raw |= DIALECTS[dialect]
    raw["dtype" if dialect == "transformers 5" else "torch_dtype"] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = read_config(tmp_path)
    assert config == CONFIGS["llama"]
    kept = {"architectures", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"}
    kept |= {"num_attention_heads", "max_position_embeddings", *DIALECTS[dialect]}
    (tmp_path / "config.json").write_text(json.dumps({key: raw[key] for key in kept}))
    usual = read_config(tmp_path)  # fields that are left out have their usual values
    assert (usual.rope_theta, usual.norm_eps, usual.tied) == (500.0, 1e-6, False)
    assert (usual.kv_heads, usual.head_dim) == (4, 10)


@each_dtype
@each_model
def test_what_is_saved_loads_here_and_in_transformers_and_the_other_way_round(tmp_path, family, tied, dtype):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    model = random_model(family, tied).to(dtype)
    save_model(model, tmp_path / "new")
    assert sorted(os.listdir(tmp_path / "new")) == ["config.json", "model.safetensors"]
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, info = load(tmp_path / "new", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == dtype
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("new", "theirs"):
        loaded = load_model(tmp_path / name, dtype=dtype)
        assert_same(loaded, model)
        assert loaded.config == model.config
    tokens = torch.randint(model.config.vocab_size, (2, 61))
    torch.testing.assert_close(model.float()(tokens), theirs.float().eval()(tokens).logits, atol=1e-4, rtol=0)


FEATURES = {
    "architecture MixtralForCausalLM": {"architectures": ["MixtralForCausalLM"]},
    "quantization_config": {"quantization_config": {"bits": 4}},
    "use_sliding_window": {"use_sliding_window": True}, "is_causal": {"is_causal": False},
    "original_max_position_embeddings outside": {"original_max_position_embeddings": 9},
    "{'chunked'}": {"layer_types": ["full_attention", "chunked"]}, "activation gelu": {"hidden_act": "gelu"},
    "attention_bias": {"attention_bias": True}, "mlp_bias": {"mlp_bias": True},
    "rope scaling yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "vocab_size must be a positive number": {"vocab_size": None},
    "low_freq_factor must be a positive number": {"rope_scaling": {**LLAMA3, "low_freq_factor": "1"}},
}  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
def test_what_would_be_computed_differently_is_refused(tmp_path, feature):
    write_checkpoint(tmp_path, random_model("llama"), config=FEATURES[feature])
    (tmp_path / "model.safetensors").unlink()  # config.json alone says it
    sentence = refusal(load_model, tmp_path)
    assert sentence.startswith(f"{tmp_path}/config.json: ") and feature in sentence


NORM = "model.norm.weight"
WRONG_TENSORS = {
    "7 missing (model.layers.0.input_layernorm.weight [30], model": lambda tensors: [
        tensors.pop(name) for name in [*tensors] if "norm" in name
    ],
    "1 unexpected (odd [1])": put("odd", torch.ones(1)),
    f"1 missing ({NORM} [30]), 1 unexpected ({NORM} [1])": put(NORM, torch.ones(1)),
    f"{NORM} holds NaN or infinity, or is of type torch.int64": put(NORM, torch.ones(30).long()),
    "1 unexpected (lm_head.weight [53, 30])": put("lm_head.weight", torch.ones(53, 30)),
    f"{NORM} holds NaN": lambda tensors: tensors[NORM][3:4].fill_(math.nan),
    f"{NORM} holds": lambda tensors: tensors[NORM][3:4].fill_(-math.inf),
}


@pytest.mark.parametrize("reason", WRONG_TENSORS)
def test_wrong_tensors_get_one_short_sentence(tmp_path, reason):
    model = random_model("qwen2")
    sentence = refusal(load_model, write_checkpoint(tmp_path, model, change=WRONG_TENSORS[reason]))
    assert sentence.startswith(str(tmp_path)) and reason in sentence and len(sentence) < 350


def test_missing_and_damaged_files_get_a_sentence(tmp_path):
    write_checkpoint(tmp_path, random_model("qwen2"), shards=3)
    for name in ("model-00002-of-00003.safetensors", "model.safetensors.index.json", "config.json"):
        (tmp_path / name).write_bytes(b"short")
        assert f"{tmp_path}/{name}" in refusal(load_model, tmp_path)
        (tmp_path / name).unlink()
        sentence = refusal(load_model, tmp_path)
        assert "No such file" in sentence and ("not *.bin" in sentence or name == "config.json")
    write_checkpoint(tmp_path, random_model("qwen2"), shards=3)
    for index in ("{}", '{"weight_map": {}}', '{"weight_map": ["model.safetensors"]}', "[]"):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        assert f"{tmp_path}/model.safetensors.index.json" in refusal(load_model, tmp_path)


def test_names_of_models_lead_to_directories(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here, too").mkdir()
    names = {"relay": RELAY, tmp_path: tmp_path, "~/here, too": tmp_path / "here, too"}
    for name, path in (names | {"here, too": Path("here, too")}).items():
        assert find_model(name) == path
    config = pinned(Config(model="here, too,relay", agents=2, task="relay"))
    assert config.models == [str(tmp_path / "here, too"), "relay"]  # from any directory


def test_a_name_that_leads_nowhere_gets_a_helpful_sentence_before_anything_is_asked(tmp_path, hub):
    (tmp_path / "model.safetensors").touch()
    for name in ("", "qwen9", "a/b/c", "/nowhere", "~/no", "x" * 5000, f"{tmp_path}/model.safetensors"):
        sentence = refusal(find_model, name)
        assert "give a directory" in sentence and "relay" in sentence and "qwen2.5-1.5b" in sentence
    assert not hub.asked


COMMIT = "c" * 40


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stands for snapshot_download: copies files of `directory` to a cache, and remembers the requests."""
    cache = tmp_path / "snapshots" / COMMIT
    hub = SimpleNamespace(directory=tmp_path / "repo", cache=cache, asked=[], fails=None)
    hub.directory.mkdir()

    def download(repo, revision, allow_patterns):
        hub.asked.append((repo, revision))
        if hub.fails:
            raise hub.fails
        hub.cache.mkdir(parents=True, exist_ok=True)
        for file in itertools.chain(*map(hub.directory.glob, allow_patterns)):
            shutil.copy(file, hub.cache)
        return str(hub.cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    snapshot.cache_clear()
    yield hub
    snapshot.cache_clear()


@pytest.mark.parametrize("shards", [1, 3])
def test_only_what_is_read_is_fetched_and_asked_for_once(hub, shards):
    model = random_model("qwen2")
    write_bytes(write_checkpoint(hub.directory, model, shards=shards))
    wanted = {file.name for file in hub.directory.iterdir()}
    for name in ("pytorch_model.bin", "README.md", "consolidated.safetensors"):
        (hub.directory / name).write_bytes(b"never read")
    assert_same(load_model("org/tiny@v2"), model)
    assert load_tokenizer("org/tiny@v2").encode("ab") and find_model("org/tiny@v2").name == COMMIT
    assert {file.name for file in hub.cache.iterdir()} == wanted
    assert hub.asked == [("org/tiny", "v2"), ("org/tiny", COMMIT)]


def test_an_alias_is_a_hub_id_in_capitals_or_not_with_a_revision_or_without(hub):
    write_bytes(write_checkpoint(hub.directory, random_model("qwen2")))
    for name, revision in (("qwen2.5-1.5b", "main"), ("Qwen2.5-1.5B@v2", "v2")):
        find_model(name)
        assert hub.asked[-2] == ("Qwen/Qwen2.5-1.5B-Instruct", revision)
    config = pinned(Config(model="qwen3-0.6b,relay", agents=2, task="relay"))
    assert config.models == [f"Qwen/Qwen3-0.6B@{COMMIT}", "relay"]


def test_a_model_that_is_not_supported_is_refused_before_its_weights_are_fetched(hub):
    write_bytes(write_checkpoint(hub.directory, random_model("qwen2"), config={"mlp_bias": True}))
    assert "mlp_bias is not supported" in refusal(find_model, "org/tiny")
    assert not list(hub.cache.glob("*.safetensors"))


@pytest.mark.parametrize("error", [
    errors.GatedRepoError("403, restricted", response=Mock(headers={})), OSError(28, "No space left"),
    errors.LocalEntryNotFoundError("traffic has been disabled"), errors.HTTPError("connection broke off"),
])  # fmt: skip
def test_a_failure_is_one_sentence_with_the_model_the_reason_and_ways_out(hub, error):
    hub.fails = error
    sentence = refusal(find_model, "org/tiny")
    assert sentence.startswith("org/tiny@main cannot be had from the Hugging Face hub: ")
    assert str(error) in sentence and "hf auth login" in sentence and "--local-dir" in sentence
