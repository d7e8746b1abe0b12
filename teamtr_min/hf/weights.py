"""Model name -> directory; Hugging Face checkpoints in and out.

A checkpoint is config.json plus safetensors: one `model.safetensors`, or shards listed in
`model.safetensors.index.json`. config.json comes in two dialects: `rope_theta`, `rope_scaling` and
`torch_dtype` (transformers 4) or `rope_parameters` and `dtype` (transformers 5). Everything that this code
would compute differently from its author is refused by name, never ignored.
"""

import dataclasses
import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from teamtr_min.config import SHIPPED, Config
from teamtr_min.engine.distributed import whole
from teamtr_min.engine.model import ModelConfig, Transformer, checkpoint_tensors, split_fused
from teamtr_min.files import UserError, one_line, plain_file, read_json, replacing, sha256, write_json
from teamtr_min.hf import hub

ASSETS = Path(__file__).parents[1] / "assets"
RELAY = ASSETS / "relay"
FAMILIES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}
ARCHITECTURES = {family: architecture for architecture, family in FAMILIES.items()}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ADAPTER_CONFIG = "adapter_config.json"  # where there is one, the directory holds no whole model
_STORED = ("BF16", "F16", "F32")
_SIZES = {  # config.json's name -> ModelConfig's
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_positions",
}
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def find_model(name: str | os.PathLike) -> Path:
    """The directory of a model: a shipped one, a directory, an alias such as qwen2.5-1.5b, or a hub id.

    A hub id may name a revision, `org/name@revision`, and is fetched when the Hugging Face cache does not
    hold it. Raises UserError, which says what would do, for any other name.
    """
    return _find(str(name))[0]


def pinned(config: Config) -> Config:
    """`config` with the commit in the name of every model from the hub: what makes a run repeatable."""
    return dataclasses.replace(config, model=",".join(_find(name)[1] for name in config.models))


def _find(name: str) -> tuple[Path, str]:
    """(directory, name); the name of a model from the hub becomes org/name@commit."""
    if name in SHIPPED:
        return ASSETS / name, name
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return Path(path), name
    if os.path.isfile(path):
        raise UserError(f"{name} is a file; give the directory that holds config.json and the weights")
    repo, _, revision = hub.hub_id(name).partition("@")
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise UserError(
            f"no model {name!r}: give a directory, a hub id such as Qwen/Qwen2.5-0.5B-Instruct, "
            f"or one of: {', '.join([*SHIPPED, *hub.ALIASES])}"
        )
    directory = hub.snapshot(repo, revision or "main", accept=read_config)
    return directory, f"{repo}@{directory.name}"


def load_model(
    name_or_dir: str | os.PathLike, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """Read a checkpoint into memory, one tensor at a time: never more than the model plus one tensor.

    Parameters arrive in `dtype` on `device`, whatever they are stored in. Raises UserError, in one sentence,
    for an unsupported architecture or feature, a damaged file, a tensor with NaN or infinity, and for all
    missing, unexpected, misshapen or oddly typed tensors at once.
    """
    directory = find_model(name_or_dir)
    if (directory / ADAPTER_CONFIG).is_file():
        raise UserError(f"{directory} is an adapter; `eval.py export --merge` makes a model of it")
    config, stored = read_config(directory), _headers(directory)
    if config.layers > len(stored):
        raise UserError(f"{directory} has {len(stored)} tensors, too few for {config.layers} layers")
    with torch.device("meta"):
        model = Transformer(config)
    expected = checkpoint_tensors(model)
    problems = [f"missing {name}" for name in expected if name not in stored]
    for name, (_, shape, kind) in stored.items():
        if name not in expected:
            problems += _surplus(name, stored, config)
        elif shape != list(expected[name].shape):
            problems.append(f"{name} has shape {shape}, expected {list(expected[name].shape)}")
        elif kind not in _STORED:
            problems.append(f"{name} is stored as {kind}; supported are {', '.join(_STORED)}")
    if problems:
        raise UserError(f"{directory} does not hold this {config.family} model: " + "; ".join(problems))
    model = model.to(dtype).to_empty(device=device)
    for name, part in checkpoint_tensors(model).items():
        part.copy_(_read(stored, name))
        if not all(bound.isfinite() for bound in part.aminmax()):  # NaN spreads to both bounds
            raise UserError(f"{directory}: {name} holds NaN or infinity")
    return model


def save_model(model: Transformer, directory: str | os.PathLike) -> None:
    """Write config.json and model.safetensors as transformers reads them, in the model's dtype.

    Each file is written whole or not at all, so an interrupted save leaves the old one as it was.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        part: rows.cpu().contiguous()
        for name, p in model.named_parameters()
        for part, rows in split_fused(name, whole(p.detach()).to(model.dtype), model.config).items()
    }
    save_tensors(tensors, directory / hub.SINGLE)
    write_json(directory / "config.json", config_json(model.config, model.dtype))


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file, whole or not at all; OSError says why not."""
    with replacing(path) as aside:
        try:
            save_file(tensors, aside, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {aside}: {error}") from None


def open_tensors(path: Path) -> safe_open:
    """A safetensors file to read from; UserError where it is not one."""
    try:
        return safe_open(plain_file(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short: {one_line(error)}") from None


def hash_weights(directory: Path) -> str:
    """sha256 over a checkpoint's files of weights, by name."""
    sums = [sha256(directory / file) for file in hub.weight_files(directory)]
    return hashlib.sha256(bytes.fromhex("".join(sums))).hexdigest()


def read_config(directory: Path) -> ModelConfig:
    """config.json -> ModelConfig, or a UserError that names what is not supported."""
    path = directory / "config.json"
    raw = read_json(path)
    try:
        return _model_config(raw)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _model_config(raw: dict) -> ModelConfig:
    architectures = raw.get("architectures") or [raw.get("model_type", "unknown")]
    architecture = str(architectures[0] if isinstance(architectures, list) else architectures)
    family = FAMILIES.get(architecture)
    if family is None:
        raise UserError(f"architecture {architecture} is not supported; supported are {', '.join(FAMILIES)}")
    kinds = raw.get("layer_types") or []
    refused = {
        "quantised weights (quantization_config)": raw.get("quantization_config"),
        "mixture of experts": raw.get("num_experts") or raw.get("num_local_experts"),
        "sliding-window attention (use_sliding_window)": raw.get("use_sliding_window"),
        "sliding-window attention (sliding_window)": family == "llama" and raw.get("sliding_window"),
        f"attention of another kind than full_attention (layer_types {kinds})": not isinstance(kinds, list)
        or any(kind != "full_attention" for kind in kinds),
        f"activation {raw.get('hidden_act')}": raw.get("hidden_act", "silu") not in ("silu", "swish"),
        "attention_bias": family != "qwen2" and raw.get("attention_bias"),
        "mlp_bias": raw.get("mlp_bias"),
    }
    for feature, used in refused.items():
        if used:
            raise UserError(f"{feature} is not supported")
    hidden, heads = _number(raw, "hidden_size", int), _number(raw, "num_attention_heads", int)
    usual = {
        "num_key_value_heads": heads,
        "head_dim": 128 if family == "qwen3" else hidden // heads,  # Qwen3's is not derived
        "max_position_embeddings": 2048 if family == "llama" else 32768,
    }
    sizes = {ours: _number(raw, key, int, usual.get(key)) for key, ours in _SIZES.items()}
    theta, scaling = _rope(raw)
    tied = raw.get("tie_word_embeddings") or False
    if not isinstance(tied, bool):
        raise UserError(f"tie_word_embeddings must be true or false, not {tied!r}")
    norm_eps = _number(raw, "rms_norm_eps", float, 1e-6)
    config = ModelConfig(
        family, **sizes, norm_eps=norm_eps, rope_theta=theta, rope_scaling=scaling, tied=tied
    )
    if config.heads % config.kv_heads or config.head_dim % 2:
        shape = f"{config.heads} heads over {config.kv_heads} key/value heads of size {config.head_dim}"
        raise UserError(f"{shape} cannot be divided evenly")
    return config


def config_json(config: ModelConfig, dtype: torch.dtype) -> dict:
    """ModelConfig -> config.json, in the dialect of transformers 4, which transformers 5 reads as well."""
    scaling = config.rope_scaling and {"rope_type": "llama3", **dict(zip(_SCALING, config.rope_scaling))}
    return {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        **{key: getattr(config, ours) for key, ours in _SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": config.tied,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _number(raw: dict, key: str, kind: type, default: float | None = None) -> int | float:
    """A positive number of config.json; a null counts as not given."""
    value = default if raw.get(key) is None else raw[key]
    if value is None:
        raise UserError(f"the field {key} is missing")
    # A weight's shape is the product of up to three sizes; with these bounds its bytes fit an int64.
    most = 2**20 if key in _SIZES and key != "max_position_embeddings" else 2**53
    if type(value) not in (int, kind) or not 0 < value <= most:  # also catches NaN
        wanted = "whole number" if kind is int else "number"
        raise UserError(f"{key} must be a positive {wanted} up to {most}, not {one_line(repr(value))}")
    return kind(value)


def _rope(raw: dict) -> tuple[float, tuple | None]:
    """(theta, Llama 3 scaling or None) from either dialect."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(f"rotary parameters must be one object, not {rope!r}")
    rope = {**raw, **rope}
    theta = _number(rope, "rope_theta", float, 10_000.0)
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise UserError("partial_rotary_factor is not supported")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"rope scaling {kind!r} is not supported; supported are default and llama3")
    factor, low, high = (_number(rope, key, float) for key in _SCALING[:3])
    if low >= high:
        raise UserError(f"low_freq_factor {low} must lie below high_freq_factor {high}")
    # Where both levels name the original length the outer one counts, and the current length is the fallback.
    original = _number({**rope, **raw}, _SCALING[3], int, raw.get("max_position_embeddings"))
    return theta, (factor, low, high, original)


def _headers(directory: Path) -> dict[str, tuple[Path, list[int], str]]:
    """Tensor name -> (file, shape, stored dtype), from the headers of the files alone."""
    files = [directory / name for name in hub.weight_files(directory)]
    absent = [file.name for file in files if not file.is_file()]
    if absent == [hub.SINGLE]:
        raise UserError(f"{directory} holds no {hub.SINGLE} and no {hub.INDEX}")
    if absent:
        raise UserError(f"{directory} lacks shards that its index lists: {', '.join(absent)}")
    stored = {}
    for file in files:
        with open_tensors(file) as f:
            for name in f.keys():
                if name in stored:
                    raise UserError(f"{name} is in both {stored[name][0].name} and {file.name}")
                part = f.get_slice(name)
                stored[name] = (file, part.get_shape(), part.get_dtype())
    return stored


def _read(stored: dict, name: str) -> Tensor:
    """One tensor, as stored. Its file is opened for it alone: pages of an open file stay in memory."""
    with open_tensors(stored[name][0]) as f:
        return f.get_tensor(name)


def _surplus(name: str, stored: dict, config: ModelConfig) -> list[str]:
    """What is wrong with a tensor that the model has no place for: nothing, if it repeats what is known."""
    embedding = "model.embed_tokens.weight"
    if name == "lm_head.weight" and config.tied and embedding in stored:
        if stored[name][1:] == stored[embedding][1:] and _read(stored, name).equal(_read(stored, embedding)):
            return []
        return [f"{name} differs from the embedding, though tie_word_embeddings is set"]
    return [] if name.endswith("rotary_emb.inv_freq") else [f"unexpected {name}"]
