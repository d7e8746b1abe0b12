"""What tests share: tiny random models of each family, a tiny tokenizer, and where the real data lie."""

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from teamtr_min.engine.model import ModelConfig, Transformer, checkpoint_tensors
from teamtr_min.files import UserError
from teamtr_min.hf.lora import Adapter, add_lora
from teamtr_min.hf.weights import RELAY, config_json
from teamtr_min.tasks.task import Message

torch.set_num_threads(1)  # with models this small a second thread only waits for the first

SHARED = Path(os.environ.get("TEAMTR_SHARED_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")

# Odd sizes on purpose; Qwen3's heads are wider than hidden / heads; Llama's waves are stretched beyond 32.
CONFIGS = {
    "qwen2": ModelConfig("qwen2", 53, 30, 41, layers=3, heads=3, kv_heads=1, head_dim=10),
    "qwen3": ModelConfig("qwen3", 47, 36, 29, layers=2, heads=6, kv_heads=3, head_dim=14, rope_theta=900.0),
    "llama": ModelConfig(
        "llama", 59, 40, 27, layers=2, heads=4, kv_heads=2, head_dim=10, norm_eps=1e-5, rope_theta=500.0,
        rope_scaling=(4.0, 1.0, 4.0, 32), max_positions=128,
    ),
}  # fmt: skip
FAMILIES = list(CONFIGS)
each_model = pytest.mark.parametrize("family, tied", list(itertools.product(FAMILIES, (True, False))))

# The stretching of CONFIGS["llama"] as config.json names it.
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def random_model(family: str, tied: bool = True, seed: int = 0, **changes) -> Transformer:
    """Every weight random: biases not zero, norms not one."""
    model = Transformer(dataclasses.replace(CONFIGS[family], tied=tied, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + (1.0 if "norm" in name else 0.0))
    return model


def adapted(model: Transformer, rank: int) -> Transformer:
    """With LoRA on all layers, every number of it random."""
    model = add_lora(model, Adapter("", rank=rank, alpha=2.0 * rank))
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(p.data, std=0.2, generator=torch.Generator().manual_seed(i))
    return model


def random_tokens(model: Transformer, *shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, shape, generator=generator)


def in_transformers(model: Transformer):
    """The same weights in transformers' own class, put there by name; skips where it is not installed."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    config = transformers.AutoConfig.for_model(**config_json(model.config, torch.float32))
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    missing, unexpected = theirs.load_state_dict(checkpoint_tensors(model), strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if model.config.tied else [])
    return theirs.eval()


def write_checkpoint(directory: Path, model, shards=1, dtype=torch.float32, config=None, change=id) -> Path:
    """Write a model without `save_model`; `config` updates config.json (None removes), `change` tensors."""
    tensors = {name: part.to(dtype).clone() for name, part in checkpoint_tensors(model).items()}
    change(tensors)
    directory.mkdir(parents=True, exist_ok=True)
    raw = config_json(model.config, dtype) | (config or {})
    raw = {key: value for key, value in raw.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    file, weight_map = f"model-0000{{}}-of-{shards:05}.safetensors", {}
    for i in range(shards):
        names = [*tensors][i::shards]
        save_file({name: tensors[name] for name in names}, directory / file.format(i + 1))
        weight_map |= dict.fromkeys(names, file.format(i + 1))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def assert_same(model: Transformer, other: Transformer) -> None:
    for (name, a), (other_name, b) in zip(*(m.state_dict().items() for m in (model, other)), strict=True):
        assert name == other_name and a.dtype == b.dtype and torch.equal(a, b), name


def refusal(function, *args, **kwargs) -> str:
    """The one line that a person is shown when this call is refused."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def said(*texts: str) -> list[Message]:
    return [Message(j, [], text, [], True) for j, text in enumerate(texts)]


def shared(path: str) -> Path:
    """A file or directory of real data; skips, saying so, where there is none."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"needs the real data at {found}; TEAMTR_SHARED_DATA can name another place")
    return found


def written(directory: Path, backend: Tokenizer, template: str | None, **config) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast", **config}
    config |= {} if template is None else {"chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def write_tokenizer(directory: Path, template: str | None = None, shift=0, bos=False, **config) -> Path:
    """A byte-level tokenizer of 262 ids, two of them merges; another `shift` gives every byte another id."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = alphabet[shift:] + alphabet[:shift]
    pieces = [*alphabet, "ab", "12"]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [("a", "b"), ("1", "2")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    if bos:
        pair = [("<s>", backend.token_to_id("<s>"))]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=pair)
    return written(directory, backend, template, **config)


SCHEMES = ["normalizer", "first", "always", "never"]  # how SentencePiece's tokenizers write spaces
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def write_sentencepiece(directory: Path, scheme: str, template=ZEPHYR, add_eos=False, **config) -> Path:
    """A tokenizer as Llama 2 has it: spaces are "▁", and one stands before a text; <s> goes before all."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(33, 127))]
    merges = [tuple(pair) for pair in ("▁▁", "▁a", "ab", "12", "▁1", "▁<", "\n\n", ":\n", "|>")]
    pieces += ["▁", "\n", *(a + b for a, b in merges)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    replace = decoders.Replace("▁", " ")
    backend.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, special=True) for token in pieces[:3]])
    how = {"single": "<s> $A </s>" if add_eos else "<s> $A", "special_tokens": [("<s>", 1), ("</s>", 2)]}
    backend.post_processor = processors.TemplateProcessing(**how)
    return written(directory, backend, template, unk_token="<unk>", add_eos_token=add_eos, **config)


def write_relabelled_tokenizer(directory: Path) -> Path:
    raw = json.loads((RELAY / "tokenizer.json").read_text())
    moved = torch.randperm(len(raw["model"]["vocab"]), generator=torch.Generator().manual_seed(0)).tolist()
    raw["model"]["vocab"] = {piece: moved[i] for piece, i in raw["model"]["vocab"].items()}
    for token in raw["added_tokens"]:  # names such as "A:\n" stand behind the pieces
        token["id"] = moved[token["id"]] if token["id"] < len(moved) else token["id"]
    raw["added_tokens"].sort(key=lambda token: token["id"])
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    shutil.copyfile(RELAY / "tokenizer_config.json", directory / "tokenizer_config.json")
    return directory


ODD_TEXTS = [
    "", " ", "two  spaces and a tab\t.", "\n\nlines\r\n\n\nof it\n", "1234567890 3.14159",
    "naïve Ωμέγα 日本語 🧮🇨🇭 e\u0301 \u200b\u00a0", "<|im_end|> and <|im_start|>user",
    "{{ 7 * 7 }} {% if %} \\n '\"&<>",
]  # fmt: skip

# In the manner of Llama 3: a BOS of its own, today's date unless told one, trimmed contents.
LLAMA3_STYLE = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") if strftime_now is defined else "2024" %}
{%- endif %}
{%- set system = messages[0]['content']|trim if messages[0]['role'] == 'system' else "" %}
{%- set messages = messages[1:] if messages[0]['role'] == 'system' else messages %}
{{- "<|header|>system\\n\\nToday: " + date_string + "\\n" + system + "</s>" }}
{%- for message in messages %}
    {{- '<|header|>' + message['role'] + '\\n\\n' + message['content'] | trim + '</s>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header|>assistant\\n\\n' }}{%- endif %}
"""


def real_model() -> Path:
    """The directory of a real instruct model; skips where the environment names none."""
    directory = os.environ.get("TEAMTR_REAL_MODEL")
    if not directory:
        pytest.skip("needs TEAMTR_REAL_MODEL, the directory of a real instruct model")
    return Path(directory)
