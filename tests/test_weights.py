"""Checkpoints in every layout that transformers writes, to memory and back, and where they are found."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import CONFIGS, LLAMA3, assert_same, each_model, random_model, refusal, write_checkpoint

from teamtr_min import load_model, save_model
from teamtr_min.config import Config
from teamtr_min.hf.weights import RELAY, config_json, find_model, pinned, read_config

ROOT = Path(__file__).resolve().parents[1]
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
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

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)

    assert_same(load_model(write_checkpoint(tmp_path, model, config=unused, change=repeat)), model)


WAVES = {"rope_theta": 500.0, **LLAMA3}
LENGTH = "original_max_position_embeddings"
DIALECTS = {
    "transformers 4": {"rope_theta": 500.0, "rope_scaling": LLAMA3},
    "older": {"rope_theta": 500, "rope_scaling": {**LLAMA3, "rope_type": None, "type": "llama3"}},
    "transformers 5": {"rope_parameters": WAVES},
    "both, where the inner one counts": {"rope_theta": 7.0, "rope_parameters": WAVES},
    "the original length outside": {LENGTH: 32, "rope_scaling": {**WAVES, LENGTH: 9}},
    "it is left out": {"max_position_embeddings": 32, "rope_scaling": {**WAVES, LENGTH: None}},
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
    assert (config.rope_theta, config.rope_scaling) == (500.0, (4.0, 1.0, 4.0, 32))
    assert config == dataclasses.replace(CONFIGS["llama"], max_positions=raw["max_position_embeddings"])


@pytest.mark.parametrize("rope", [{"rope_theta": 900.0}, {"rope_parameters": {"rope_theta": 900.0}}])
def test_fields_may_be_left_to_their_usual_values(tmp_path, rope):
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 47,
        "hidden_size": 36,
        "intermediate_size": 29,
    }
    raw |= {"num_hidden_layers": 2, "num_attention_heads": 6, "max_position_embeddings": 99, **rope}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = read_config(tmp_path)
    assert (config.rope_theta, config.norm_eps, config.tied) == (900.0, 1e-6, False)
    assert (config.kv_heads, config.head_dim) == (6, 6)


@each_dtype
@each_model
def test_what_is_saved_loads_here_and_in_transformers_and_the_other_way_round(tmp_path, family, tied, dtype):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    model = random_model(family, tied).to(dtype)
    save_model(model, tmp_path / "new")
    assert sorted(os.listdir(tmp_path / "new")) == ["config.json", "model.safetensors"]
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == dtype
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("new", "theirs"):
        loaded = load_model(tmp_path / name, dtype=dtype)
        assert_same(loaded, model)
        assert loaded.config == model.config
    tokens = torch.randint(model.config.vocab_size, (2, 61))
    torch.testing.assert_close(model.float()(tokens), theirs.float().eval()(tokens).logits, atol=1e-4, rtol=0)


PEAK = """
import sys, torch
from teamtr_min import load_model

def mib(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

load_model("relay")  # whatever is imported on the way is imported now
before = mib("VmRSS")
for dtype in (torch.bfloat16, torch.float32):  # the smaller one first: the peak never falls
    load_model(sys.argv[1], dtype=dtype)
    print(mib("VmHWM") - before)
"""


def test_loading_takes_the_model_and_one_tensor_no_more(tmp_path):
    status = Path("/proc/self/status")
    if not status.is_file() or "VmHWM" not in status.read_text():
        pytest.skip("this system does not tell a process its peak memory")
    sizes = dict(vocab_size=30_000, hidden_size=512, intermediate_size=4096, layers=4, head_dim=64)
    with torch.device("meta"):
        model = random_model("qwen2", **sizes).to_empty(device="cpu")
    write_checkpoint(tmp_path, model, change=lambda tensors: [t.fill_(0.01) for t in tensors.values()])
    stored = [p.numel() * 4 / 2**20 for p in model.parameters()]  # MiB
    assert sum(stored) > 150
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for peak, size in zip(map(float, result.stdout.split()), (sum(stored) / 2, sum(stored)), strict=True):
        assert size < peak < size + max(stored) + 16


# What is refused, by name

FEATURES = {
    "architecture MixtralForCausalLM": {"architectures": ["MixtralForCausalLM"]},
    "quantization_config": {"quantization_config": {"bits": 4}},
    "use_sliding_window": {"use_sliding_window": True}, ": sliding_window": {"sliding_window": 64},
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


def without_norms(tensors):
    for name in [name for name in tensors if "norm" in name]:
        del tensors[name]


def put(name: str, tensor: torch.Tensor):
    return lambda tensors: tensors.update({name: tensor})


NORM = "model.norm.weight"
WRONG_TENSORS = {
    "7 missing (model.layers.0.input_layernorm.weight [30], model": without_norms,
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
    (tmp_path / "model-00002-of-00003.safetensors").write_bytes(b"short")
    assert "model-00002-of-00003.safetensors is damaged" in refusal(load_model, tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "holds no model-00002-of-00003.safetensors" in refusal(load_model, tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert "holds no model.safetensors; weights must be safetensors, not *.bin" in refusal(
        load_model, tmp_path
    )
    (tmp_path / "config.json").unlink()
    assert "config.json cannot be read: No such file" in refusal(load_model, tmp_path)


# Names


def test_names_of_models_lead_to_directories(tmp_path, monkeypatch):
    assert find_model("relay") == RELAY and (RELAY / "config.json").is_file()
    assert find_model(tmp_path) == tmp_path and find_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here, too").mkdir()
    assert find_model("~/here, too") == tmp_path / "here, too"
    monkeypatch.chdir(tmp_path)
    assert find_model("here, too") == Path("here, too")
    config = pinned(Config(model="here, too,relay", agents=2, task="relay"))
    assert config.models == [str(tmp_path / "here, too"), "relay"]  # from any directory


def test_a_name_that_leads_nowhere_gets_a_helpful_sentence(tmp_path):
    (tmp_path / "model.safetensors").touch()
    for name in ("", "qwen9", "./nothing/here", "x" * 5000, str(tmp_path / "model.safetensors")):
        sentence = refusal(find_model, name)
        assert "give a directory" in sentence and "relay" in sentence and "qwen2.5-1.5b" in sentence
