"""Names of models and data sets -> directories; Hugging Face checkpoints in and out. config.json comes in two
dialects: `rope_theta`, `rope_scaling` and `torch_dtype` (transformers 4) or `rope_parameters` and `dtype`
(transformers 5). What this code would compute differently from its author is refused, never ignored."""

import dataclasses
import functools
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from teamtr_min.config import SHIPPED, Config
from teamtr_min.engine.model import ModelConfig, Transformer, checkpoint_tensors
from teamtr_min.files import UserError, read_json, replacing, write_json

ASSETS = Path(__file__).parents[1] / "assets"
RELAY = ASSETS / "relay"
FAMILIES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALIASES = {
    **{f"qwen2.5-{size.lower()}": f"Qwen/Qwen2.5-{size}-Instruct" for size in ("0.5B", "1.5B", "3B", "7B")},
    **{f"qwen3-{size.lower()}": f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B")},
    **{f"llama3.2-{size.lower()}": f"meta-llama/Llama-3.2-{size}-Instruct" for size in ("1B", "3B")},
}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DATA_FILES = (".jsonl", ".parquet")
TOKENIZER_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES = ("tokenizer.json", *TOKENIZER_CONFIGS, "chat_template.jinja", "generation_config.json")
ADAPTER_CONFIG = "adapter_config.json"  # where there is one, the directory holds no whole model
_SIZES = {  # config.json's name -> ModelConfig's
    **{name: name for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")},
    "num_hidden_layers": "layers", "num_attention_heads": "heads", "num_key_value_heads": "kv_heads",
    "max_position_embeddings": "max_positions",
}  # fmt: skip
_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def find_model(name: str | os.PathLike) -> Path:
    """The directory of a model: a shipped one, a directory, an alias such as qwen2.5-1.5b, or a hub id
    org/name[@revision], which is fetched unless it is cached. Raises UserError for any other name."""
    return locate(name)[0]


def locate(name: str | os.PathLike) -> tuple[Path, str]:
    """A model's directory, and its name from anywhere at any time: absolute path, or hub id with commit."""
    name = str(name)
    path, (alias, _, revision) = os.path.expanduser(name), name.partition("@")
    if name in SHIPPED:
        return ASSETS / name, name
    if os.path.isdir(path):
        return Path(path), os.path.realpath(path)
    repo = ALIASES.get(alias.lower(), alias)
    if os.path.isfile(path) or repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        known = ", ".join([*SHIPPED, *ALIASES])
        raise UserError(f"no model {name[:200]!r}: give a directory, a hub id org/name, or one of: {known}")
    directory = snapshot(repo, revision or "main")
    return directory, f"{repo}@{directory.name}"


@functools.cache
def snapshot(repo: str, revision: str) -> Path:
    """The directory of `repo` at `revision` (commit, tag or branch), named as the commit's hash. Weights are
    fetched last: `read_config` may refuse the model."""
    directory = _fetched(repo, revision, ["config.json", INDEX, *TOKENIZER_FILES])
    read_config(directory)
    return _fetched(repo, directory.name, weight_files(directory))


@functools.cache
def hub_data(data: str) -> tuple[Path, str] | None:
    """Of a data set org/name[@revision][:folder] of the hub: the directory of its JSONL and parquet files,
    and its name with the commit. None where `data` is a path. Raises UserError."""
    named = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:@([\w./-]+))?(?::([\w.-]+))?", data)
    if not named or os.path.exists(data) or data.endswith((*DATA_FILES, ".json")):
        return None
    repo, revision, folder = named.groups("")
    wanted = [os.path.join(folder, f"*{kind}") for kind in DATA_FILES]
    root = _fetched(repo, revision or "main", wanted, repo_type="dataset")
    return root / folder, f"{repo}@{root.name}" + (folder and f":{folder}")


def _fetched(repo: str, revision: str, wanted: list[str], **kind) -> Path:
    from huggingface_hub import errors, snapshot_download  # late: few runs need it

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, **kind))
    except (errors.HTTPError, OSError, ValueError) as error:  # which says what is wrong, also offline
        raise UserError(
            f"{repo}@{revision} cannot be had from the Hugging Face hub: {error}; a licence to accept needs "
            f"`hf auth login`; `hf download {repo} --local-dir DIR` makes a directory to give"
        ) from None


def pinned(config: Config) -> Config:
    """`config` with names of models and data that find the same ones from anywhere and at any time."""
    models = ",".join(locate(name)[1] for name in config.models)
    data = (hub_data(config.data) or ("", config.data and os.path.abspath(config.data)))[1]
    names = {"model": models, "data": data}
    if config.demonstrate and not config.resume:  # a resumed run has its demonstrations
        names["demonstrate"] = locate(config.demonstrate)[1]
    return dataclasses.replace(config, **names)


def find_base(directory: Path) -> tuple[Path, str]:
    """What `locate` says of the base of the adapter in `directory`. Any other model is its own base."""
    if not (directory / ADAPTER_CONFIG).is_file():
        return locate(directory)
    raw = read_json(directory / ADAPTER_CONFIG)
    name, revision = raw.get("base_model_name_or_path") or "", raw.get("revision")
    try:
        return locate(f"{name}@{revision}" if revision and not os.path.isdir(name) else name)
    except UserError as error:
        raise UserError(f"{directory} adapts {name}, so put that back: {error}") from None


def weight_files(directory: Path) -> list[str]:
    """Names of the files, there or not, that hold a checkpoint's weights: one, or the shards of its index."""
    if (directory / SINGLE).is_file() or not (directory / INDEX).is_file():
        return [SINGLE]
    files = read_json(directory / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{directory / INDEX} names no files in `weight_map`")
    return sorted(set(files.values()))


def load_model(
    name_or_dir: str | os.PathLike, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Transformer:
    """A checkpoint's model in `dtype` on `device`, on "meta" without looking at weights; memory holds it and
    at most one tensor more. Raises UserError for what is not supported, for missing, unexpected or misshapen
    tensors, and for NaN."""
    directory = find_model(name_or_dir)
    if (directory / ADAPTER_CONFIG).is_file():
        raise UserError(f"{directory} is an adapter; PEFT's merge_and_unload makes a model of it")
    with torch.device("meta"):
        model = Transformer(read_config(directory))
    if torch.device(device).type == "meta":
        return model
    found = {directory / file: shapes(directory / file) for file in weight_files(directory)}
    files = {name: file for file, names in found.items() for name in names}
    held = {name: shape for names in found.values() for name, shape in names.items()}
    both = ("lm_head.weight", "model.embed_tokens.weight")
    if model.config.tied and held.keys() >= {*both} and torch.equal(*(read(files[n], n) for n in both)):
        del held[both[0]]  # a repetition
    check_shapes(held, checkpoint_tensors(model), f"{directory} does not hold the model of its config.json")
    model = model.to(dtype).to_empty(device=device)
    for name, part in checkpoint_tensors(model).items():
        part.copy_(read(files[name], name))
    return model


def save_model(model: Transformer, directory: str | os.PathLike) -> None:
    """Write config.json and model.safetensors as transformers reads them, in the model's dtype."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_tensors(checkpoint_tensors(model), directory / SINGLE)
    write_json(directory / "config.json", config_json(model.config, model.dtype))


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file, whole or not at all."""
    with replacing(path) as aside:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(tensors, aside, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk
            raise OSError(f"{path} cannot be written: {error}") from None


def open_tensors(path: Path) -> safe_open:
    """A safetensors file to read from; UserError where it is not one, such as *.bin."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"no weights in {path}, a safetensors file (not *.bin): {error}") from None


def shapes(path: Path) -> dict[str, list[int]]:
    """Name -> shape of each tensor in a safetensors file."""
    with open_tensors(path) as f:
        return {name: f.get_slice(name).get_shape() for name in f.keys()}


def check_shapes(held: dict[str, list[int]], expected: dict[str, Tensor], fault: str) -> None:
    """Raises UserError, which begins with `fault`, unless a file holds what is expected and no more."""
    wanted = {f"{name} {[*p.shape]}" for name, p in expected.items()}
    there = {f"{name} {shape}" for name, shape in held.items()}
    wrong = {"missing": wanted - there, "unexpected": there - wanted}
    if found := [f"{len(names)} {what} ({listing(sorted(names))})" for what, names in wrong.items() if names]:
        raise UserError(f"{fault}: {', '.join(found)}")


def listing(names: list[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def read(file: Path, name: str) -> Tensor:
    """One tensor, finite. Its file is opened for it alone: pages of an open file stay in memory."""
    with open_tensors(file) as f:
        tensor = f.get_tensor(name)
    if not tensor.is_floating_point() or not all(bound.isfinite() for bound in tensor.aminmax()):
        raise UserError(f"{file}: {name} holds NaN or infinity, or is of type {tensor.dtype}")
    return tensor


def read_config(directory: Path) -> ModelConfig:
    """config.json -> ModelConfig, or a UserError that names what is not supported."""
    raw = read_json(directory / "config.json")
    architecture = (raw.get("architectures") or ["unknown"])[0]
    family = FAMILIES.get(architecture)
    rope = raw | (raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    kind = rope.get("rope_type") or rope.get("type") or "default"
    other_layers = {*(raw.get("layer_types") or [])} - {"full_attention"}
    refused = {
        f"architecture {architecture} (supported are {', '.join(FAMILIES)})": family is None,
        f"attention of the kinds {other_layers} (layer_types)": other_layers,
        f"activation {raw.get('hidden_act')}": raw.get("hidden_act", "silu") not in ("silu", "swish"),
        "attention_bias": family != "qwen2" and raw.get("attention_bias"),
        "attention to later tokens (is_causal)": raw.get("is_causal", True) is not True,
        f"rope scaling {kind} (supported are default and llama3)": kind not in ("default", "llama3"),
        "partial_rotary_factor": rope.get("partial_rotary_factor") not in (None, 1),
        f"{_SCALING[3]} outside of the scaling": kind == "llama3" and raw.get(_SCALING[3]),
        **{key: raw.get(key) for key in ("quantization_config", "use_sliding_window", "mlp_bias")},
    }
    for feature, used in refused.items():
        if used:
            raise UserError(f"{directory / 'config.json'}: {feature} is not supported")
    heads, hidden = raw.get("num_attention_heads"), raw.get("hidden_size")
    usual = {"num_key_value_heads": heads, "head_dim": heads and hidden and hidden // heads}
    sizes = {key: raw.get(key) or usual.get(key) for key in _SIZES}
    scaling = tuple(rope.get(key) for key in _SCALING) if kind == "llama3" else None
    for key, value in [*sizes.items(), *zip(_SCALING, scaling or ())]:
        if not isinstance(value, int | float) or not value > 0:
            raise UserError(f"{directory / 'config.json'}: {key} must be a positive number, not {value!r}")
    return ModelConfig(
        family, **{_SIZES[key]: value for key, value in sizes.items()},
        norm_eps=raw.get("rms_norm_eps") or 1e-6, rope_theta=float(rope.get("rope_theta") or 10_000.0),
        rope_scaling=scaling, tied=bool(raw.get("tie_word_embeddings")),
    )  # fmt: skip


def has_16_bits(directory: Path) -> bool:
    """Whether a model's checkpoint, or its base's, says that its weights have 16 bits."""
    raw = read_json(find_base(directory)[0] / "config.json")
    return (raw.get("dtype") or raw.get("torch_dtype")) in ("bfloat16", "float16")


def config_json(config: ModelConfig, dtype: torch.dtype) -> dict:
    """ModelConfig -> config.json, in the dialect of transformers 4, which transformers 5 reads as well."""
    scaling = config.rope_scaling and {"rope_type": "llama3", **dict(zip(_SCALING, config.rope_scaling))}
    return {
        "architectures": [name for name, family in FAMILIES.items() if family == config.family],
        "model_type": config.family, "hidden_act": "silu", "tie_word_embeddings": config.tied,
        **{key: getattr(config, ours) for key, ours in _SIZES.items()},
        "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta, "rope_scaling": scaling,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None, "eos_token_id": None,  # else transformers has defaults for them
    }  # fmt: skip
