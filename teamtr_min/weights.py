"""Model name -> directory; Hugging Face checkpoints in and out.

A checkpoint is config.json plus safetensors: one `model.safetensors`, or shards listed in
`model.safetensors.index.json`. config.json comes in two dialects: `rope_theta`, `rope_scaling` and
`torch_dtype` (transformers 4) or `rope_parameters` and `dtype` (transformers 5). Everything that this code
would compute differently from its author is refused by name, never ignored.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from teamtr_min.config import UserError
from teamtr_min.model import ModelConfig, Transformer

RELAY = Path(__file__).parent / "assets" / "relay"
ALIASES = {
    **{f"qwen2.5-{size.lower()}": f"Qwen/Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "3B", "7B")},
    **{f"qwen3-{size.lower()}": f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B")},
    **{f"llama3.2-{size.lower()}": f"meta-llama/Llama-3.2-{size}-Instruct" for size in ("1B", "3B")},
}
FAMILIES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}
ARCHITECTURES = {family: architecture for architecture, family in FAMILIES.items()}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_STORED = {"F32", "F16", "BF16"}


def find_model(name: str | os.PathLike) -> Path:
    """The directory of a model: `relay`, a directory, an alias such as qwen2.5-1.5b, a hub id in the cache."""
    if str(name) == "relay":
        return RELAY
    path = Path(name)
    if path.is_dir():
        return path
    repo = ALIASES.get(str(name).lower(), str(name))
    if repo.count("/") == 1 and not repo.startswith((".", "/", "~")):
        from huggingface_hub import try_to_load_from_cache  # imported late: most runs never need the hub
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(repo, "config.json")
        except HFValidationError as error:
            raise UserError(f"{name!r} is neither a directory nor the id of a model: {error}") from None
        if isinstance(found, str):
            return Path(found).parent
        raise UserError(
            f"{repo} is not in the Hugging Face cache; fetch it with `hf download {repo}`, "
            "or give --model the directory of a checkpoint"
        )
    raise UserError(
        f"no model {str(name)!r}: give a directory, a hub id such as Qwen/Qwen2.5-0.5B-Instruct, "
        f"or one of: relay, {', '.join(ALIASES)}"
    )


def load_model(
    name_or_dir: str | os.PathLike, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """Read a checkpoint into memory, one tensor at a time: never more than the model plus one tensor.

    Raises UserError, in one sentence, for an unsupported architecture or feature, a damaged file, and for all
    missing, unexpected, misshapen or oddly typed tensors at once.
    """
    directory = find_model(name_or_dir)
    config = read_config(directory)
    with torch.device("meta"):
        model = Transformer(config)
    expected = dict(model.named_parameters())
    stored = _index(directory)
    problems = [f"missing {name}" for name in expected if name not in stored]
    for name, (_, shape, kind) in stored.items():
        if name not in expected:
            if not _redundant(name, config):
                problems.append(f"unexpected {name}")
        elif shape != list(expected[name].shape):
            problems.append(f"{name} has shape {shape}, expected {list(expected[name].shape)}")
        elif kind not in _STORED:
            problems.append(f"{name} is stored as {kind}; supported are {', '.join(sorted(_STORED))}")
    if problems:
        raise UserError(f"{directory} does not hold this {config.family} model: " + "; ".join(problems))
    for name, tensor in _tensors(directory, stored, expected):
        parent, _, leaf = name.rpartition(".")
        value = tensor.to(device=device, dtype=dtype, copy=True)  # a copy: the file may be replaced later
        setattr(model.get_submodule(parent), leaf, nn.Parameter(value))
    return model


def save_model(model: Transformer, directory: str | os.PathLike) -> None:
    """Write config.json and model.safetensors as transformers reads them, in the model's dtype.

    Each file is written aside and renamed, so an interrupted save leaves the old one whole.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    aside = directory / ".model.safetensors.part"
    save_file(tensors, aside, metadata={"format": "pt"})
    os.replace(aside, directory / "model.safetensors")
    aside = directory / ".config.json.part"
    aside.write_text(json.dumps(config_json(model.config, model.dtype), indent=2) + "\n")
    os.replace(aside, directory / "config.json")


def read_config(directory: Path) -> ModelConfig:
    """config.json -> ModelConfig, or a UserError that names what is not supported."""
    path = directory / "config.json"
    raw = read_json(path)
    architecture = (raw.get("architectures") or [raw.get("model_type", "unknown")])[0]
    family = FAMILIES.get(architecture)
    if family is None:
        raise UserError(
            f"{path}: architecture {architecture} is not supported; supported are {', '.join(FAMILIES)}"
        )
    refused = {
        "quantised weights (quantization_config)": raw.get("quantization_config"),
        "mixture of experts": raw.get("num_experts") or raw.get("num_local_experts"),
        "sliding-window attention": raw.get("use_sliding_window")
        or any(kind != "full_attention" for kind in raw.get("layer_types") or [])
        or (family == "llama" and raw.get("sliding_window")),
        f"activation {raw.get('hidden_act')}": raw.get("hidden_act", "silu") not in ("silu", "swish"),
        "attention_bias": family != "qwen2" and raw.get("attention_bias"),
        "mlp_bias": raw.get("mlp_bias"),
    }
    for feature, used in refused.items():
        if used:
            raise UserError(f"{path}: {feature} is not supported")
    try:
        heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
        theta, scaling = _rope(raw, path)
        config = ModelConfig(
            family=family,
            vocab_size=raw["vocab_size"],
            hidden_size=hidden,
            intermediate_size=raw["intermediate_size"],
            layers=raw["num_hidden_layers"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            # Qwen3 without an explicit size means 128; the others divide.
            head_dim=raw.get("head_dim") or (128 if family == "qwen3" else hidden // heads),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied=raw.get("tie_word_embeddings", False),
            max_positions=raw.get("max_position_embeddings", 32768 if family != "llama" else 2048),
        )
    except KeyError as error:
        raise UserError(f"{path}: the field {error} is missing") from None
    for name in ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"{path}: {name} must be a positive whole number, not {value!r}")
    if config.heads % config.kv_heads or config.head_dim % 2:
        raise UserError(
            f"{path}: {config.heads} heads over {config.kv_heads} key/value heads of size {config.head_dim} "
            "cannot be divided evenly"
        )
    return config


def config_json(config: ModelConfig, dtype: torch.dtype) -> dict:
    """ModelConfig -> config.json, in the dialect of transformers 4, which transformers 5 reads as well."""
    raw = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if config.rope_scaling is not None:
        factor, low, high, original = config.rope_scaling
        raw["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
    return raw


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _rope(raw: dict, path: Path) -> tuple[float, tuple | None]:
    """(theta, Llama 3 scaling or None) from either dialect."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"{path}: rope scaling {kind!r} is not supported; supported are default and llama3")
    return theta, (
        float(rope["factor"]),
        float(rope["low_freq_factor"]),
        float(rope["high_freq_factor"]),
        int(rope.get("original_max_position_embeddings") or raw["max_position_embeddings"]),
    )


def _index(directory: Path) -> dict[str, tuple[Path, list[int], str]]:
    """Tensor name -> (file, shape, stored dtype), from the headers alone."""
    single, listing = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif listing.is_file():
        names = read_json(listing).get("weight_map")
        if not isinstance(names, dict):
            raise UserError(f"{listing} has no weight_map")
        files = [directory / file for file in sorted(set(names.values()))]
        absent = [file.name for file in files if not file.is_file()]
        if absent:
            raise UserError(f"{directory} lacks shards that its index lists: {', '.join(absent)}")
    else:
        raise UserError(f"{directory} holds no model.safetensors and no model.safetensors.index.json")
    stored = {}
    for file in files:
        with _open(file) as f:
            for name in f.keys():
                if name in stored:
                    raise UserError(f"{name} is in both {stored[name][0].name} and {file.name}")
                part = f.get_slice(name)
                stored[name] = (file, part.get_shape(), part.get_dtype())
    return stored


def _tensors(directory: Path, stored: dict, expected: dict) -> Iterator[tuple[str, Tensor]]:
    for file in sorted({file for file, *_ in stored.values()}):
        with _open(file) as f:
            for name in f.keys():
                if name in expected:
                    yield name, f.get_tensor(name)


def _open(file: Path):
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or cut short: {error}") from None


def _redundant(name: str, config: ModelConfig) -> bool:
    """Tensors that some writers add and that carry nothing: a tied head's copy, old rotary tables."""
    return (name == "lm_head.weight" and config.tied) or name.endswith("rotary_emb.inv_freq")
