"""The transformer: Qwen2/2.5, Qwen3 and Llama 3.x are one architecture with three switches.

    x = x + attention(norm(x));  x = x + mlp(norm(x))          in every layer; the norms are RMSNorm

| switch         | Qwen2/2.5      | Qwen3           | Llama 3.x              |
|----------------|----------------|-----------------|------------------------|
| bias of qkv    | yes            | no              | no                     |
| `qk_norm`      | no             | yes, per head   | no                     |
| `rope_scaling` | none           | none            | "llama3" wave lengths  |

Modules are named as in Hugging Face checkpoints. Layers that read the same input are one product here:
`FUSED` names those that a checkpoint holds apart. Letters in shape comments: B rows of a batch, T tokens in a
padded row, H hidden size, Q query heads, K key/value heads, D head size, V vocabulary.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.layer import rms_norm, rotate, swiglu
from teamtr_min.engine.cache import Step, attend
from teamtr_min.engine.distributed import whole
from teamtr_min.engine.half import Product, in_fp16, product

# One product here -> the layers that checkpoints hold apart. Their outputs stand in its rows in this order.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
HEAD_PIECE = 2048  # rows of the output head in one product: on a CPU a third faster than one large product


@dataclass(frozen=True)
class ModelConfig:
    family: str  # "qwen2", "qwen3" or "llama": decides the three switches
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: tuple[float, float, float, int] | None = None  # factor, low, high, original length
    tied: bool = True  # the output head is the embedding
    max_positions: int = 2048

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    def outputs(self, module: str) -> list[int]:
        """Outputs of each layer that the product `module` stands for, see FUSED."""
        heads = [self.heads, self.kv_heads, self.kv_heads]
        return [n * self.head_dim for n in heads] if module == "qkv_proj" else [self.intermediate_size] * 2

    @property
    def pairs_per_token(self) -> float:
        """Pairs of tokens whose attention costs as many operations as a token's matrix products."""
        inner = self.heads * self.head_dim
        outputs = sum(self.outputs("qkv_proj")) + inner + 3 * self.intermediate_size
        return self.hidden_size * outputs / (2 * inner)

    @property
    def kv_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim  # numbers in the KV cache


def split_fused(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """A parameter of ours as a checkpoint holds it: its names -> views of the rows. LoRA's A has as many rows
    for each part, all else has rows as the product has outputs."""
    module = name.split(".")[-2]
    if module not in FUSED:
        return {name: tensor}
    parts = FUSED[module]
    rows = len(tensor) // len(parts) if name.endswith("lora_A") else config.outputs(module)
    return {name.replace(module, part): view for part, view in zip(parts, tensor.split(rows))}


def checkpoint_tensors(model: nn.Module, trained: bool = False) -> dict[str, Tensor]:
    """Every parameter, or those that are `trained`, under the names of a checkpoint, in the model's dtype.
    They are views, so that writing to them fills the model; of a sharded one they are whole copies."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad or not trained:
            found |= split_fused(name, whole(p.detach()).to(model.dtype), model.config)
    return found


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)  # made while sampling, it also serves training
def rope_table(config: ModelConfig, positions: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """cos and sin of every angle, as `kernels.layer.rotate` wants them: two of (positions, 1, D)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent  # (D/2,), the angle per position
    if config.rope_scaling:  # Llama 3's: slow down long waves by `factor`, keep short ones, else interpolate
        factor, low, high, original_length = config.rope_scaling
        rotations = original_length * frequency / (2 * math.pi)  # full ones, within the original context
        keep = ((rotations - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / factor
    angle = torch.arange(positions, device=device)[:, None, None] * frequency  # (positions, 1, D/2)
    cos, sin = angle.cos(), angle.sin()
    return [torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        biased, outputs = config.family == "qwen2", sum(config.outputs("qkv_proj"))
        self.qkv_proj = Product(config.hidden_size, outputs, bias=biased)
        self.o_proj = Product(config.heads * config.head_dim, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x: Tensor, rope: list[Tensor], layer: int, step: Step, where: Tensor | None) -> Tensor:
        (B, T, _), Q, K = x.shape, self.heads, self.kv_heads
        qkv = self.qkv_proj(x).view(B, T, Q + 2 * K, self.head_dim)
        turned, v = qkv.split([Q + K, K], 2)  # (B, T, Q + K, D), (B, T, K, D)
        if hasattr(self, "q_norm"):
            q, k = turned.split([Q, K], 2)
            turned = torch.cat([self.q_norm(q), self.k_norm(k)], 2)
        elif v.requires_grad:
            v = v.contiguous()  # a view would keep all of qkv for the way back, as the norms do
        q, k = rotate(turned, *rope).split([Q, K], 2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, Q or K, T, D)
        y = attend(q, *step.exchange(layer, k, v), step.mask)  # (B, Q, T, D)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, Q * D)
        return self.o_proj(y if where is None else y.flatten(0, 1)[where])  # (B, T, H) or (pairs, H)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = Product(config.hidden_size, sum(config.outputs("gate_up_proj")), bias=False)
        self.down_proj = Product(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate_up, down = self.gate_up_proj(x), self.down_proj  # (..., 2I)
        plain = type(down) is Product and torch.is_grad_enabled()  # no adapter, and something is kept
        return swiglu(gate_up, down.weight) if plain else down(swiglu(gate_up))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: list[Tensor], layer: int, step: Step, where: Tensor | None) -> Tensor:
        """(B, T, H) -> (B, T, H); with `where` (pairs,) only these of the flattened B * T, (pairs, H)."""
        y = self.self_attn(self.input_layernorm(x), rope, layer, step, where)
        x = (x if where is None else x.flatten(0, 1)[where]) + y
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({  # everything below the output head
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.layers)),
            "norm": RMSNorm(config.hidden_size, config.norm_eps),
        })  # fmt: skip
        self.checkpointing = False  # keep each layer's input alone for the way back, compute the rest again
        self.sharded = False  # over processes, by distributed.py; it then computes in `compute_dtype`
        self.compute_dtype: torch.dtype | None = None
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        return self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight  # (V, H)

    @property
    def device(self) -> torch.device:
        return self.head.device

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or self.head.dtype

    def hidden(self, tokens: Tensor, step: Step | None = None, where: Tensor | None = None) -> Tensor:
        """Final hidden states, tokens (B, T) int64 -> (B, T, H); with `where` (pairs,) only those at these
        places of the flattened B * T, (pairs, H). Without a `step` rows start at position 0, and shorter ones
        are padded on the right. Where a step continues a cache, the caller advances `cache.length`."""
        T = tokens.shape[1]
        step = step or Step(torch.arange(T, device=tokens.device)[None], T)
        table = rope_table(self.config, 1 << step.span.bit_length(), tokens.device, self.dtype)
        rope = [x[step.positions] for x in table]  # cos and sin, (B or 1, T, 1, D)
        x = self.model.embed_tokens(tokens)  # (B, T, H)
        for layer, block in enumerate(self.model.layers, 1):
            only = where if layer == self.config.layers else None  # later tokens see K and V of it alone
            inputs = (x, rope, layer - 1, step, only)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing draws
            else:
                x = block(*inputs)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V) fp32, never rounded to the compute dtype: bf16 logits are off by 2e-2."""
        flat, V = hidden.flatten(0, -2), len(self.head)
        if hidden.is_cuda and hidden.dtype != torch.float32 and not torch.is_grad_enabled():
            logits = torch.mm(flat, self.head.t(), out_dtype=torch.float32)
        elif in_fp16(self.head) is not None:
            logits = product(flat, self.head)
        elif torch.is_grad_enabled() or hidden.is_cuda or V <= 2 * HEAD_PIECE:
            logits = F.linear(flat.float(), self.head.float())
        else:
            flat, logits = flat.float(), torch.empty(len(flat), V)
            for piece in (slice(v, v + HEAD_PIECE) for v in range(0, V, HEAD_PIECE)):
                torch.mm(flat, self.head[piece].float().t(), out=logits[:, piece])
        return logits.view(*hidden.shape[:-1], V)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V) fp32."""
        return self.logits(self.hidden(tokens))
