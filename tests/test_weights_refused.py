"""Whatever is not a checkpoint that this code computes exactly gets one sentence that says why."""

import pytest
import torch
from tiny import LLAMA3, random_model, refusal, write_checkpoint

from teamtr_min import load_model

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


# Tensors


def test_a_tied_model_with_another_head_is_refused(tmp_path):
    def differ(tensors):
        tensors[HEAD] = tensors[EMBEDDING] * 2

    write_checkpoint(tmp_path, random_model("llama"), change=differ)
    assert "lm_head.weight differs" in refusal(load_model, tmp_path)


def test_an_untied_model_without_head_is_refused(tmp_path):
    write_checkpoint(tmp_path, random_model("qwen3", tied=False), change=lambda tensors: tensors.pop(HEAD))
    assert "missing lm_head.weight" in refusal(load_model, tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_all_wrong_tensors_are_named_at_once(tmp_path, shards):
    def spoil(tensors):
        del tensors[NORM], tensors["model.layers.1.self_attn.k_proj.bias"]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 5)
        tensors[EMBEDDING] = torch.zeros(53, 30, dtype=torch.int8)

    sentence = refusal(load_model, write_checkpoint(tmp_path, random_model("qwen2"), shards, change=spoil))
    assert "missing model.norm.weight" in sentence
    assert "missing model.layers.1.self_attn.k_proj.bias" in sentence
    assert "unexpected model.layers.7.mlp.up_proj.weight" in sentence
    assert "model.layers.0.mlp.up_proj.weight has shape [3, 5], expected [41, 30]" in sentence
    assert "model.embed_tokens.weight is stored as I8; supported are BF16, F16, F32" in sentence


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_refused_by_name(tmp_path, value, dtype):
    name = "model.layers.1.mlp.down_proj.weight"

    def spoil(tensors):
        tensors[name][3, 7] = value

    write_checkpoint(tmp_path, random_model("qwen2"), dtype=dtype, change=spoil)
    assert f"{name} holds NaN or infinity" in refusal(load_model, tmp_path, dtype=dtype)


def test_a_weight_too_large_for_the_compute_precision_is_refused(tmp_path):
    def spoil(tensors):
        tensors[NORM][2] = 1e5

    load_model(write_checkpoint(tmp_path, random_model("qwen2"), change=spoil))
    assert f"{NORM} holds NaN or infinity" in refusal(load_model, tmp_path, dtype=torch.float16)


# config.json


FEATURES = {
    "MistralForCausalLM": {"architectures": ["MistralForCausalLM"]},
    "gpt2": {"architectures": None, "model_type": "gpt2"},
    "quantised": {"quantization_config": {"bits": 4}},
    "mixture of experts": {"num_experts": 8},
    "sliding-window": {"use_sliding_window": True, "sliding_window": 64},
    "sliding_attention": {"layer_types": ["full_attention", "sliding_attention"]},
    "activation gelu": {"hidden_act": "gelu"},
    "'yarn'": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
    "'linear'": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "rotary parameters": {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("named", FEATURES)
def test_what_would_be_computed_differently_is_refused_by_name(tmp_path, named, family):
    write_checkpoint(tmp_path, random_model(family, rope_scaling=None), config=FEATURES[named])
    sentence = refusal(load_model, tmp_path)
    assert sentence.startswith(str(tmp_path / "config.json")) and named in sentence


ABSURD = [
    ("hidden_size", None, "the field hidden_size is missing"),
    ("hidden_size", "30", "hidden_size"),
    ("hidden_size", 30.5, "hidden_size"),
    ("vocab_size", -1, "vocab_size"),
    ("vocab_size", 10**30, "vocab_size"),
    ("vocab_size", True, "vocab_size"),
    ("num_hidden_layers", 0, "num_hidden_layers"),
    ("num_hidden_layers", 10**6, "too few for 1000000 layers"),
    ("num_attention_heads", 0, "num_attention_heads"),
    ("num_key_value_heads", 2, "3 heads over 2 key/value heads"),
    ("head_dim", 7, "heads of size 7"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps"),
    ("rms_norm_eps", "small", "rms_norm_eps"),
    ("rope_theta", 0, "rope_theta"),
    ("rope_theta", float("inf"), "rope_theta"),
    ("rope_scaling", "llama3", "rotary parameters"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "the field low_freq_factor is missing"),
    ("rope_scaling", {**LLAMA3, "low_freq_factor": 4.0}, "low_freq_factor 4.0 must lie below"),
    ("tie_word_embeddings", "false", "tie_word_embeddings must be true or false"),
    ("architectures", [{}], "architecture {}"),
    ("architectures", 7, "architecture 7"),
    ("layer_types", 7, "layer_types 7"),
]


@pytest.mark.parametrize("key, value, words", ABSURD)
def test_missing_and_absurd_fields_are_named(tmp_path, key, value, words):
    assert words in refusal(
        load_model, write_checkpoint(tmp_path, random_model("qwen2"), config={key: value})
    )


def test_a_broken_config_json_is_named(tmp_path):
    file = tmp_path / "config.json"
    assert "config.json does not exist" in refusal(load_model, tmp_path)
    for content in (b"", b"{", b"\xff\xfe"):
        file.write_bytes(content)
        assert "config.json is not valid JSON" in refusal(load_model, tmp_path)
    file.write_bytes(b"[1]")
    assert "config.json holds a JSON list, not an object" in refusal(load_model, tmp_path)
    file.unlink()
    file.mkdir()
    assert "config.json cannot be read" in refusal(load_model, tmp_path)


# Files


def test_damaged_weight_files_are_named(tmp_path):
    file = write_checkpoint(tmp_path, random_model("qwen3")) / "model.safetensors"
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    damaged = [b"", whole[:5], whole[:200], whole[:-1], whole + b"\0", b"\xff" * 8 + whole[8:]]
    damaged += [whole[:8] + b"x" * size + whole[8 + size :], b"<html>no such file</html>" * 99]
    for content in damaged:
        file.write_bytes(content)
        assert "model.safetensors is damaged" in refusal(load_model, tmp_path), content[:40]
    file.unlink()
    assert "holds no model.safetensors" in refusal(load_model, tmp_path)


def test_missing_shards_and_broken_indices_are_named(tmp_path):
    write_checkpoint(tmp_path, random_model("qwen2"), shards=3)
    index, second = tmp_path / "model.safetensors.index.json", tmp_path / "model-00002-of-00003.safetensors"
    listing, content = index.read_text(), second.read_bytes()
    second.unlink()
    assert f"lacks shards that its index lists: {second.name}" in refusal(load_model, tmp_path)
    second.write_bytes(content[:-7])
    assert f"{second.name} is damaged" in refusal(load_model, tmp_path)
    second.write_bytes((tmp_path / "model-00001-of-00003.safetensors").read_bytes())
    assert "is in both" in refusal(load_model, tmp_path)
    second.write_bytes(content)
    for broken in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(broken)
        assert f"{index.name} has no weight_map" in refusal(load_model, tmp_path)
    for broken in ("{", "[]"):
        index.write_text(broken)
        assert index.name in refusal(load_model, tmp_path)
    index.write_text(listing.replace(NORM, "model.norm.bias"))
    load_model(tmp_path)  # the shards themselves say what they hold
