"""Whatever is not a checkpoint that this code computes exactly gets one sentence that says why."""

import functools

import pytest
import torch
from tiny import LLAMA3, random_model, write_checkpoint

from teamtr_min import load_model
from teamtr_min.files import UserError


@pytest.fixture
def checkpoint(tmp_path):
    return functools.partial(write_checkpoint, tmp_path / "model")


def refusal(directory, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        load_model(directory, **kwargs)
    return str(caught.value)


def test_a_tied_model_with_another_head_is_refused(checkpoint):
    def differ(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    assert "lm_head.weight differs" in refusal(checkpoint(random_model("llama"), change=differ))


def test_an_untied_model_without_head_is_refused(checkpoint):
    directory = checkpoint(
        random_model("qwen3", tied=False), change=lambda tensors: tensors.pop("lm_head.weight")
    )
    assert "missing lm_head.weight" in refusal(directory)


def test_all_wrong_tensors_are_named_at_once(checkpoint):
    def spoil(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.k_proj.bias"]
        tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 5)
        tensors["model.embed_tokens.weight"] = torch.zeros(53, 30, dtype=torch.int8)

    for shards in (1, 2):
        sentence = refusal(checkpoint(random_model("qwen2"), shards=shards, change=spoil))
        assert "missing model.norm.weight" in sentence
        assert "missing model.layers.1.self_attn.k_proj.bias" in sentence
        assert "unexpected model.layers.7.mlp.up_proj.weight" in sentence
        assert "model.layers.0.mlp.up_proj.weight has shape [3, 5], expected [41, 30]" in sentence
        assert "model.embed_tokens.weight is stored as I8" in sentence


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_refused_by_name(checkpoint, value, dtype):
    name = "model.layers.1.mlp.down_proj.weight"

    def spoil(tensors):
        tensors[name][3, 7] = value

    assert name in refusal(checkpoint(random_model("qwen2"), dtype=dtype, change=spoil), dtype=dtype)


def test_a_weight_too_large_for_the_compute_precision_is_refused(checkpoint):
    def spoil(tensors):
        tensors["model.norm.weight"][2] = 1e5

    directory = checkpoint(random_model("qwen2"), change=spoil)
    load_model(directory)
    assert "model.norm.weight" in refusal(directory, dtype=torch.float16)


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


@pytest.mark.parametrize("named", FEATURES)
def test_what_would_be_computed_differently_is_refused_by_name(checkpoint, named):
    for family in ("llama", "qwen3"):
        model = random_model(family, rope_scaling=None)
        assert named in refusal(checkpoint(model, config=FEATURES[named]))


ABSURD = [
    ("hidden_size", None),
    ("hidden_size", "30"),
    ("hidden_size", 30.5),
    ("vocab_size", -1),
    ("vocab_size", 10**30),
    ("vocab_size", True),
    ("num_hidden_layers", 0),
    ("num_hidden_layers", 10**6),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 2),
    ("head_dim", 7),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", "small"),
    ("rope_theta", 0),
    ("rope_theta", float("inf")),
    ("rope_scaling", "llama3"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
    ("rope_scaling", {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}),
    ("tie_word_embeddings", "false"),
    ("architectures", [{}]),
    ("architectures", 7),
    ("layer_types", 7),
]


@pytest.mark.parametrize("key, value", ABSURD)
def test_missing_and_absurd_fields_are_named(checkpoint, key, value):
    names = {"num_key_value_heads": "key/value heads", "head_dim": "size 7", "architectures": "architecture"}
    names |= {"num_hidden_layers": "layers", "rope_scaling": ("factor", "rotary")}
    sentence = refusal(checkpoint(random_model("qwen2"), config={key: value}))
    wanted = names.get(key, key)
    assert any(part in sentence for part in ([wanted] if isinstance(wanted, str) else wanted)), sentence


BROKEN_CONFIGS = {
    b"{": "not valid JSON",
    b"\xff\xfe": "not valid JSON",
    b"[1]": "not an object",
    b"": "not valid",
}


@pytest.mark.parametrize("content", BROKEN_CONFIGS)
def test_a_broken_config_json_is_named(tmp_path, content):
    assert "config.json does not exist" in refusal(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    assert BROKEN_CONFIGS[content] in refusal(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    assert "config.json cannot be read" in refusal(tmp_path)


def test_damaged_weight_files_are_named(checkpoint):
    model = random_model("qwen3")
    file = checkpoint(model) / "model.safetensors"
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    damaged = [b"", whole[:5], whole[:200], whole[:-1], whole + b"\0", b"\xff" * 8 + whole[8:]]
    damaged += [whole[:8] + b"x" * size + whole[8 + size :], b"<html>no such file</html>" * 99]
    for content in damaged:
        file.write_bytes(content)
        assert "model.safetensors is damaged" in refusal(file.parent), content[:40]
    file.unlink()
    assert "holds no model.safetensors" in refusal(file.parent)


def test_missing_shards_and_broken_indices_are_named(checkpoint):
    directory = checkpoint(random_model("qwen2"), shards=3)
    index = directory / "model.safetensors.index.json"
    listing = index.read_text()
    second = directory / "model-00002-of-00003.safetensors"
    content = second.read_bytes()
    second.unlink()
    assert second.name in refusal(directory)
    second.write_bytes(content[:-7])
    assert f"{second.name} is damaged" in refusal(directory)
    second.write_bytes((directory / "model-00001-of-00003.safetensors").read_bytes())
    assert "is in both" in refusal(directory)
    second.write_bytes(content)
    load_model(directory)
    for broken in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(broken)
        assert index.name in refusal(directory)
    index.write_text(listing.replace("model.norm.weight", "model.norm.bias"))
    load_model(directory)  # the shards themselves say what they hold
