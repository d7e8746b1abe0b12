"""LoRA: an agent is a frozen base, shared with its teammates, and a small adapter.

    y = x W^T + b + (alpha / rank) x A^T B^T         A (rank, in), B (out, rank), which starts at zero

A product that stands for several layers (model.FUSED) has an A and a B for each, stacked along rows as its
weight is: A (parts * rank, in), B (out, rank). x A^T is split into parts, and each part goes through its own
rows of B. A part without an adapter has zeros in both, whose gradients are zero. Only A and B ask for
gradients; masters, Adam, snapshots and checkpoints follow from that. On disk an adapter has PEFT's layout.
"""

import copy
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teamtr_min.engine import rng
from teamtr_min.engine.half import product
from teamtr_min.engine.model import FUSED, Transformer, checkpoint_tensors
from teamtr_min.files import UserError, read_json, write_json
from teamtr_min.hf import weights

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # all of a block
WEIGHTS = "adapter_model.safetensors"
_NAME = "base_model.model.{}.weight".format  # our name -> PEFT's
# Fields of adapter_config.json that are read below or change no logit, then those that must have one of these
# values. In plain LoRA all others are false or empty. They are compared as text, for 0 equals False.
_INERT = set(
    "auto_mapping base_model_name_or_path inference_mode lora_alpha lora_dropout megatron_core peft_version "
    "qalora_group_size r revision target_modules task_type".split()
)
_UNSET = [None, False, "", [], {}]
_PLAIN = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [None, True, False, "gaussian"]}


@dataclass(frozen=True)
class Adapter:
    base: str  # a name that finds the base from anywhere
    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS  # last names of the linear layers that have one


class LoraLinear(nn.Module):
    """A linear layer with the weight and bias of another, and an adapter for each part of its `outputs`."""

    def __init__(self, linear: nn.Linear, outputs: list[int], adapter: Adapter):
        super().__init__()
        self.weight, self.bias, self.scaling = linear.weight, linear.bias, adapter.alpha / adapter.rank
        self.rank, self.outputs = adapter.rank, outputs
        self.lora_A = nn.Parameter(self.weight.new_zeros(len(outputs) * adapter.rank, linear.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(linear.out_features, adapter.rank))

    def forward(self, x: Tensor) -> Tensor:
        low = (F.linear(x, self.lora_A) * self.scaling).split(self.rank, -1)  # (..., rank) of each part
        change = [F.linear(part, B) for part, B in zip(low, self.lora_B.split(self.outputs))]
        return product(x, self.weight, self.bias) + torch.cat(change, -1)  # (..., out)


def add_lora(base: Transformer, adapter: Adapter) -> Transformer:
    """A Transformer that shares the base's parameters, frozen from now on, with adapters of zeros."""
    model = copy.deepcopy(base.requires_grad_(False), {id(p): p for p in base.parameters()})
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if not set(FUSED.get(name, [name])).isdisjoint(adapter.targets):
                    outputs = base.config.outputs(name) if name in FUSED else [linear.out_features]
                    setattr(parent, name, LoraLinear(linear, outputs, adapter))
    return model


def adapter_tensors(model: Transformer, targets: tuple[str, ...] = TARGETS) -> dict[str, Tensor]:
    """The adapter's matrices as PEFT holds them: views of what is trained, for each of the `targets`."""
    parts = checkpoint_tensors(model, trained=True)
    return {name: part for name, part in parts.items() if name.split(".")[-2] in targets}


def load_models(
    sources: list[str | Path], device, dtype: torch.dtype, rank: int = 0, alpha: float = 1.0, seed: int = 0
) -> Iterator[tuple[Transformer, Adapter | None]]:
    """The model of each agent, from checkpoints or directories of adapters. A base is loaded once. With a
    `rank` a checkpoint becomes a base and its agent gets a new adapter: B is zero, A uniform within
    1 / sqrt(in), a function of seed, agent and name. Raises UserError for an adapter that is not plain LoRA
    or of another rank, for damaged files, and for a base that is gone."""
    bases: dict[Path, Transformer] = {}
    for j, source in enumerate(sources):
        directory, name = weights.locate(source)
        adapter = adapter_in(directory, rank, alpha, name)
        if adapter is None:
            yield weights.load_model(directory, device, dtype), None
            continue
        base, _ = weights.find_base(directory)
        if base not in bases:
            bases[base] = weights.load_model(base, device, dtype)
        model = add_lora(bases[base], adapter)
        parts, file = adapter_tensors(model, adapter.targets), directory / WEIGHTS
        if model.device.type == "meta":
            parts = {}
        elif base != directory:
            fault = f"{file} does not hold the adapter of its {weights.ADAPTER_CONFIG}"
            weights.check_shapes(weights.shapes(file), {_NAME(name): p for name, p in parts.items()}, fault)
            modules = read_json(directory / weights.ADAPTER_CONFIG).get("target_modules") or []
            modules = [*TARGETS] if modules == "all-linear" else modules
            if isinstance(modules, list):  # of ends of names; else it is a pattern
                modules = rf"(.*\.)?({'|'.join(re.escape(str(name)) for name in modules)})"
            layers = {name.rpartition(".")[0] for name in checkpoint_tensors(bases[base])} | {"lm_head"}
            asked = {layer for layer in layers if re.fullmatch(modules, layer)}
            if odd := sorted(asked ^ {name.rpartition(".")[0] for name in parts}):
                raise UserError(f"{fault}: target_modules and tensors differ in {weights.listing(odd)}")
        for name, p in parts.items():
            if base != directory:
                p.copy_(weights.read(file, _NAME(name)))
            elif name.endswith("lora_A"):
                bound = 1 / math.sqrt(p.shape[1])
                draws = rng.generator(seed, "lora", j, name).uniform(-bound, bound, tuple(p.shape))
                p.copy_(torch.from_numpy(draws))
        yield model, adapter


def adapter_in(directory: Path, rank: int = 0, alpha: float = 1.0, name: str = "") -> Adapter | None:
    """The adapter that `directory` holds; else with a `rank` a new one on the model there, called `name`.
    Raises UserError for what is not known to mean plain LoRA, and for an adapter of another rank."""
    path = directory / weights.ADAPTER_CONFIG
    if not path.is_file():
        return Adapter(name, rank, alpha) if rank else None
    raw = {"peft_type": "none"} | read_json(path)
    odd = [k for k, v in raw.items() if k not in _INERT and repr(v) not in map(repr, _PLAIN.get(k, _UNSET))]
    if odd:
        shown = weights.listing([f"{key} {raw[key]!r}" for key in odd])
        raise UserError(f"{path}: not known to mean plain LoRA: {shown}")
    if type(raw.get("r")) is not int or raw["r"] < 1 or type(raw.get("lora_alpha")) not in (int, float):
        raise UserError(f"{path}: r must be a positive whole number and lora_alpha a number")
    if rank not in (0, raw["r"]):
        raise UserError(f"--lora-rank is {rank}, but {directory} is an adapter of rank {raw['r']}")
    held = {name.split(".")[-3] for name in weights.shapes(directory / WEIGHTS) if name.count(".") > 3}
    targets = tuple(target for target in TARGETS if target in held)  # target_modules may be a pattern
    return Adapter(weights.find_base(directory)[1], raw["r"], float(raw["lora_alpha"]), targets)


def save_adapter(model: Transformer, adapter: Adapter, directory: Path) -> None:
    """Write an adapter as PEFT reads it, in the model's dtype."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = adapter_tensors(model, adapter.targets)
    weights.save_tensors({_NAME(name): part for name, part in tensors.items()}, directory / WEIGHTS)
    name, _, revision = (adapter.base, "", "") if os.path.isdir(adapter.base) else adapter.base.partition("@")
    facts = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "lora_dropout": 0.0, "bias": "none"}
    facts |= {"base_model_name_or_path": name, "revision": revision or None, "inference_mode": True}
    facts |= {"r": adapter.rank, "lora_alpha": adapter.alpha, "target_modules": [*adapter.targets]}
    write_json(directory / weights.ADAPTER_CONFIG, facts)
