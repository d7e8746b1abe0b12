"""LoRA: an agent is a frozen base, shared with its teammates, and a small adapter of its own.

    y = x W^T + b + (alpha / rank) x A^T B^T         A (rank, in), B (out, rank), which starts at zero

A product of several layers (model.FUSED) has an A and a B for each, stacked along rows as its weight is: A
(parts * rank, in), B (out, rank). What x A^T gives is split into parts, and each goes through its own rows of
B. A part without an adapter has zeros in both, whose gradients are zero.
Only A and B ask for gradients, and all that trains follows from that: masters, Adam, snapshots, checkpoints.
A Transformer with adapters has the same modules as one without, so it is sampled and measured by the same
code. On disk an adapter has PEFT's layout; base.json beside it keeps the sha256 of the base's weight files,
since on another base it would be another agent.
"""

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teamtr_min.config import SHIPPED
from teamtr_min.engine import rng
from teamtr_min.engine.distributed import whole
from teamtr_min.engine.model import FUSED, Transformer, split_fused
from teamtr_min.files import UserError, read_json, write_json
from teamtr_min.hf.weights import (
    ADAPTER_CONFIG,
    find_model,
    hash_weights,
    load_model,
    open_tensors,
    save_tensors,
)
from teamtr_min.run.shapes import AdapterSize

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # all of a block
WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"
_PREFIX, _SUFFIX = "base_model.model.", ".weight"  # around our names in PEFT's files


@dataclass(frozen=True)
class Adapter:
    """What an adapter is, without its weights."""

    base: str  # name with its commit, or absolute directory
    base_sha256: str  # of the base's weight files; empty where nobody wrote it down
    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS  # last names of the linear layers that have one


class LoraLinear(nn.Module):
    """A linear layer whose weight and bias are another's, with an adapter of its own for each part."""

    def __init__(self, linear: nn.Linear, outputs: list[int], adapter: Adapter):
        """`outputs` of each part, which together are those of `linear`."""
        super().__init__()
        self.weight, self.bias, self.scaling = linear.weight, linear.bias, adapter.alpha / adapter.rank
        self.rank, self.outputs = adapter.rank, outputs
        self.lora_A = nn.Parameter(self.weight.new_zeros(len(outputs) * adapter.rank, linear.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(linear.out_features, adapter.rank))

    def forward(self, x: Tensor) -> Tensor:
        low = (F.linear(x, self.lora_A) * self.scaling).split(self.rank, -1)  # (..., rank) of each part
        change = [F.linear(part, B) for part, B in zip(low, self.lora_B.split(self.outputs))]
        return F.linear(x, self.weight, self.bias) + torch.cat(change, -1)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + scaling B A, fp32."""
        pairs = zip(self.lora_B.float().split(self.outputs), self.lora_A.float().split(self.rank))
        return self.weight.float() + self.scaling * torch.cat([B @ A for B, A in pairs])


def add_lora(base: Transformer, adapter: Adapter) -> Transformer:
    """A Transformer of the base's own parameters, frozen by this, with adapters that are all zero yet."""
    model = base.requires_grad_(False).copy()
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if not set(FUSED.get(name, [name])).isdisjoint(adapter.targets):
                    outputs = base.config.outputs(name) if name in FUSED else [linear.out_features]
                    setattr(parent, name, LoraLinear(linear, outputs, adapter))
    return model


@torch.no_grad()
def draw_adapter(model: Transformer, seed: int, agent: int) -> None:
    """Start as LoRA does: A uniform within 1 / sqrt(in), a function of seed, agent and name; B zero."""
    for name, p in adapter_tensors(model).items():
        if name.endswith("lora_A"):
            bound = 1 / math.sqrt(p.shape[1])
            draws = rng.generator(seed, "lora", agent, name).uniform(-bound, bound, tuple(p.shape))
            p.copy_(torch.from_numpy(draws))


@torch.no_grad()
def merge(model: Transformer) -> Transformer:
    """The same policy without adapters, in fp32: bf16 would round off part of what was trained."""
    weights = {name: p.float() for name, p in model.named_parameters() if not p.requires_grad}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            weights[f"{name}.weight"] = module.merged()
    with torch.device("meta"):
        whole = Transformer(model.config)
    whole.load_state_dict(weights, assign=True)
    return whole


def trained(model: Transformer) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adapter_tensors(model: Transformer, targets: tuple[str, ...] = TARGETS) -> dict[str, Tensor]:
    """The adapter's matrices as PEFT holds them: views of what is trained, for each of the `targets`."""
    parts = {}
    for name, p in trained(model).items():
        parts |= split_fused(name, whole(p.detach()).to(model.dtype), model.config)
    return {name: part for name, part in parts.items() if name.split(".")[-2] in targets}


def load_models(
    sources: list[str | Path], device, dtype: torch.dtype, rank: int = 0, alpha: float = 0.0, seed: int = 0
) -> Iterator[tuple[Transformer, Adapter | None]]:
    """The model of each agent, from checkpoints or directories of adapters, whose bases are loaded once each.

    With a `rank` a checkpoint becomes a base, and its agent gets a new adapter. Raises UserError for an
    adapter that cannot be read or is of another rank, and where its base is gone or has changed.
    """
    bases: dict[Path, tuple[Transformer, str]] = {}  # directory -> model, hash
    for j, source in enumerate(sources):
        directory, found = find_model(source), None
        if (directory / ADAPTER_CONFIG).is_file():
            found = read_adapter(directory)
            if rank not in (0, found.rank):
                raise UserError(f"--lora-rank is {rank}, but {directory} is an adapter of rank {found.rank}")
            directory = base_of(found, directory)
        elif not rank:
            yield load_model(directory, device, dtype), None
            continue
        if directory not in bases:
            bases[directory] = load_model(directory, device, dtype), hash_weights(directory)
        base, base_hash = bases[directory]
        if found is None:
            adapter = Adapter(_lasting(source, directory), base_hash, rank, alpha)
            model = add_lora(base, adapter)
            draw_adapter(model, seed, j)
        else:
            if found.base_sha256 not in ("", base_hash):
                raise UserError(f"{source} adapts {found.base}, whose weights are others now: restore them")
            adapter = Adapter(found.base, base_hash, found.rank, found.alpha, found.targets)
            model = add_lora(base, adapter)
            _load_weights(model, adapter, find_model(source) / WEIGHTS)
        yield model, adapter


def save_adapter(model: Transformer, adapter: Adapter, directory: Path) -> None:
    """Write an adapter as PEFT reads it, in the model's dtype, and base.json."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{_PREFIX}{name}{_SUFFIX}": part.cpu().contiguous()
        for name, part in adapter_tensors(model, adapter.targets).items()
    }
    save_tensors(tensors, directory / WEIGHTS)
    write_json(directory / BASE, {"sha256": adapter.base_sha256})
    name, _, revision = (adapter.base, "", "") if _is_path(adapter.base) else adapter.base.partition("@")
    write_json(
        directory / ADAPTER_CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": name,
            "revision": revision or None,
            "r": adapter.rank,
            "lora_alpha": adapter.alpha,
            "target_modules": list(adapter.targets),
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        },
    )


def adapter_size(directory: Path, rank: int) -> AdapterSize | None:
    """The adapter that this directory holds, or that with a `rank` its agent will get."""
    if (directory / ADAPTER_CONFIG).is_file():
        adapter = read_adapter(directory)
        return AdapterSize(base_of(adapter, directory), adapter.rank, adapter.targets)
    return AdapterSize(directory, rank, TARGETS) if rank else None


def read_adapter(directory: Path) -> Adapter:
    """adapter_config.json -> Adapter; UserError for what would be computed differently here."""
    path = directory / ADAPTER_CONFIG
    raw = read_json(path)
    refused = [
        key
        for key in (
            "use_rslora", "use_dora", "use_qalora", "rank_pattern", "alpha_pattern", "modules_to_save",
            "layers_to_transform", "exclude_modules", "target_parameters", "trainable_token_indices",
            "layer_replication", "fan_in_fan_out", "lora_bias", "alora_invocation_tokens",
        )
        if raw.get(key)
    ]  # fmt: skip
    refused += [f"peft_type {raw.get('peft_type')}"] * (raw.get("peft_type") != "LORA")
    refused += [f"bias {raw.get('bias')}"] * (raw.get("bias", "none") != "none")
    if refused:
        raise UserError(f"{path}: {', '.join(refused)} not supported")
    base, rank, alpha = (raw.get(key) for key in ("base_model_name_or_path", "r", "lora_alpha"))
    targets = raw.get("target_modules")
    if not isinstance(base, str) or not isinstance(targets, list) or not set(targets) <= set(TARGETS):
        known = ", ".join(TARGETS)
        raise UserError(f"{path}: needs base_model_name_or_path, and target_modules among {known}")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not 0 < alpha < math.inf:
        raise UserError(f"{path}: r {rank!r} and lora_alpha {alpha!r} must be positive numbers")
    if not _is_path(base) and raw.get("revision"):
        base = f"{base}@{raw['revision']}"
    # An adapter that PEFT has written comes without the hash.
    base_hash = read_json(directory / BASE).get("sha256") if (directory / BASE).is_file() else ""
    return Adapter(base, base_hash, rank, float(alpha), tuple(targets))


def base_of(adapter: Adapter, directory: Path) -> Path:
    """Where the base of the adapter in `directory` lies."""
    try:
        return find_model(adapter.base)
    except UserError as error:
        raise UserError(f"{directory} adapts {adapter.base}, so put that back: {error}") from None


def hash_agent(directory: Path) -> str:
    """sha256 over all that makes a policy of this directory: a checkpoint's weights, or base and adapter."""
    if not (directory / ADAPTER_CONFIG).is_file():
        return hash_weights(directory)
    adapter = read_adapter(directory)
    parts = (
        hash_weights(base_of(adapter, directory)),
        hashlib.sha256((directory / WEIGHTS).read_bytes()).hexdigest(),
        repr(adapter.alpha / adapter.rank),
    )
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _lasting(source: str | Path, directory: Path) -> str:
    """A name that finds the base from anywhere: the model's own, or its absolute directory."""
    name = str(source)
    return str(directory.resolve()) if _is_path(name) and name not in SHIPPED else name


def _is_path(name: str) -> bool:
    return os.path.isabs(name) or os.path.isdir(os.path.expanduser(name))


@torch.no_grad()
def _load_weights(model: Transformer, adapter: Adapter, file: Path) -> None:
    parts = adapter_tensors(model, adapter.targets)
    wanted = {f"{_PREFIX}{name}{_SUFFIX}": part for name, part in parts.items()}
    with open_tensors(file) as f:
        held = {name: f.get_slice(name).get_shape() for name in f.keys()}
        if held != {name: list(p.shape) for name, p in wanted.items()}:
            raise UserError(f"{file} does not hold the adapter that its {ADAPTER_CONFIG} describes")
        for name, p in wanted.items():
            p.copy_(f.get_tensor(name))
            if not p.isfinite().all():
                raise UserError(f"{file}: {name} holds NaN or infinity")
