"""The transformer: Qwen2/2.5, Qwen3 and Llama 3.x are one architecture with three switches.

    x = x + attention(norm(x));  x = x + mlp(norm(x))          in every layer; the norms are RMSNorm

| switch         | Qwen2/2.5      | Qwen3           | Llama 3.x              |
|----------------|----------------|-----------------|------------------------|
| `qkv_bias`     | yes            | no              | no                     |
| `qk_norm`      | no             | yes, per head   | no                     |
| `rope_scaling` | none           | none            | "llama3" wave lengths  |

Modules are named as in Hugging Face checkpoints, so loading a weight file is a loop and not a mapping.
Letters in shape comments: B rows of a batch, T tokens in a padded row, H hidden size, Q query heads, K
key/value heads, D head size, V vocabulary. `span` counts the cached positions that a row may attend to.
"""

import copy
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    @property
    def pairs_per_token(self) -> float:
        """Pairs of tokens whose attention costs as many operations as a token's matrix products."""
        inner = self.heads * self.head_dim
        weights = self.hidden_size * (
            2 * inner + 2 * self.kv_heads * self.head_dim + 3 * self.intermediate_size
        )
        return weights / (2 * inner)

    @property
    def kv_per_token(self) -> int:
        """Numbers that one token occupies in the KV cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        scaled = x.float()  # the mean of squares always in fp32, whatever the compute dtype
        scaled = scaled * torch.rsqrt(scaled.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


@functools.lru_cache
def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Angle per position of each pair of head dimensions, (D/2,) fp32, with Llama 3's stretching if asked."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return frequency
    # Long waves are slowed down by `factor`, short ones kept, those in between interpolated.
    factor, low, high, original_length = config.rope_scaling
    rotations = original_length * frequency / (2 * math.pi)  # full ones, within the original context
    keep = ((rotations - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding: pair d with d + D/2. x (B, T, Q or K, D), cos and sin (B or 1, T, 1, D/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class KVCache:
    """Keys and values of many sequences of different lengths; row b holds its first `length[b]` positions.

    `keys[layer]` is (rows, capacity, K, D). Entries past a row's length are leftovers that no query sees.
    """

    def __init__(self, config: ModelConfig, rows: int, capacity: int, device, dtype):
        shape = (config.layers, rows, capacity, config.kv_heads, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = torch.zeros(rows, dtype=torch.long, device=device)
        self.span = capacity

    def reserve(self, span: int) -> None:
        """Attend to `span` positions from now on, no less than the longest row will reach.

        Storage grows by half at least, so that growing is rare.
        """
        self.span = span
        extra = span - self.keys.shape[2]
        if extra > 0:
            extra = max(extra, self.keys.shape[2] // 2)
            self.keys = F.pad(self.keys, (0, 0, 0, 0, 0, extra))
            self.values = F.pad(self.values, (0, 0, 0, 0, 0, extra))

    def permute(self, to: Tensor, source: Tensor) -> None:
        """Row `to[i]` becomes what row `source[i]` was; all reads come before all writes."""
        self.keys[:, to] = self.keys[:, source]
        self.values[:, to] = self.values[:, source]
        self.length[to] = self.length[source]


@dataclass
class CachedStep:
    """Where one cached forward pass reads and writes: the same for every layer."""

    cache: KVCache
    rows: slice | Tensor  # rows of the cache that the batch stands for; a slice costs no copy
    row_index: Tensor  # (B, 1) the same rows as indices
    positions: Tensor  # (B, T) of the new tokens
    mask: Tensor  # (B, 1, T, span): which cached positions each new token sees

    def write_then_read(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.row_index, self.positions] = k
        values[self.row_index, self.positions] = v
        return keys[self.rows, : self.cache.span], values[self.rows, : self.cache.span]  # (B, span, K, D)


@dataclass
class PackedStep:
    """A forward pass over rows that hold prefix trees (packing.py): the same for every layer."""

    positions: Tensor  # (B, T) int64, of each token in its sequences
    end: Tensor | None  # (B, T) int64: where what descends from a token ends; None if each row is a sequence
    where: Tensor  # (pairs,) int64: positions in the flattened (B * T) whose final hidden states are wanted
    dtype: torch.dtype = torch.bool  # of the mask: the model's own is not converted, and kept, once a layer

    @functools.cached_property
    def mask(self) -> Tensor | None:
        """Which tokens each token sees, (B, 1, T, T): bool, or in another dtype 0 there and else -inf."""
        if self.end is None:
            return None
        index = torch.arange(self.end.shape[1], device=self.end.device)
        seen = (index <= index[:, None]) & (index[:, None] < self.end[:, None, None])
        if self.dtype == torch.bool:
            return seen
        return torch.zeros_like(seen, dtype=self.dtype).masked_fill_(~seen, -math.inf)

    def write_then_read(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v


Step = CachedStep | PackedStep | None


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        inner, kv_inner = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_inner, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_inner, bias=config.qkv_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, step: Step, where: Tensor | None
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.heads, self.head_dim)  # (B, T, Q, D)
        k = self.k_proj(x).view(B, T, self.kv_heads, self.head_dim)  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.head_dim)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if step is not None:
            k, v = step.write_then_read(layer, k, v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, Q or K, T or span, D)
        y = attend(q, k, v, None if step is None else step.mask)  # (B, Q, T, D)
        y = y.transpose(1, 2).reshape(B, T, -1)
        return self.o_proj(y if where is None else y.flatten(0, 1)[where])  # (B, T, H) or (pairs, H)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention, Q/K query heads to a key head; causal when `mask` is None."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


def attend_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What `attend` computes, written out. q (B, Q, T, D), k and v (B, K, span, D), mask (B, 1, T, span)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))  # (B, Q, span, D)
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])  # (B, Q, T, span)
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ v


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, step: Step, where: Tensor | None = None
    ) -> Tensor:
        """(B, T, H) -> (B, T, H); with `where` (pairs,) only these of the flattened B * T, (pairs, H)."""
        y = self.self_attn(self.input_layernorm(x), cos, sin, layer, step, where)
        x = (x if where is None else x.flatten(0, 1)[where]) + y
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything below the output head; checkpoints call it `model`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.checkpointing = False  # keep each layer's input alone for the way back, compute the rest again
        if not config.tied:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """Output projection, (V, H)."""
        return self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.head.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.dtype

    def copy(self) -> "Transformer":
        """A model that training this one leaves alone; what is frozen in both is shared."""
        return copy.deepcopy(self, {id(p): p for p in self.parameters() if not p.requires_grad})

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        rows: slice | Tensor | None = None,
        packed: PackedStep | None = None,
    ) -> Tensor:
        """Final hidden states, tokens (B, T) int64 -> (B, T, H), or (pairs, H) where `packed` wants them.

        Without a cache row b starts at position 0; shorter rows are padded on the right with any token, which
        no earlier position can see. With a cache the tokens continue the sequences `rows` from their current
        lengths; the caller advances `cache.length` by what was not padding.
        """
        step = packed
        if cache is not None:
            step = self._cached_step(tokens, cache, slice(0, len(tokens)) if rows is None else rows)
        if step is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        else:
            positions = step.positions  # (B, T)
        frequencies = rope_frequencies(self.config, tokens.device)  # (D/2,)
        angle = positions[:, :, None, None] * frequencies  # (B or 1, T, 1, D/2)
        cos, sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)
        x = self.model.embed_tokens(tokens)  # (B, T, H)
        last = len(self.model.layers) - 1
        for layer, block in enumerate(self.model.layers):
            where = packed.where if packed and layer == last else None  # all later ones see of it is K and V
            if self.checkpointing and torch.is_grad_enabled():
                more = {"use_reentrant": False, "preserve_rng_state": False}  # nothing here draws
                x = checkpoint(block, x, cos, sin, layer, step, where, **more)
            else:
                x = block(x, cos, sin, layer, step, where)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (..., V) fp32. The product accumulates in fp32 and is never rounded to the compute
        dtype: bf16 logits are off by 2e-2, more than a trust region of 0.01 can bear."""
        if hidden.is_cuda and hidden.dtype != torch.float32 and not torch.is_grad_enabled():
            flat = torch.mm(hidden.flatten(0, -2), self.head.t(), out_dtype=torch.float32)
            return flat.view(*hidden.shape[:-1], -1)
        return F.linear(hidden.float(), self.head.float())

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V) fp32."""
        return self.logits(self.hidden(tokens))

    def _cached_step(self, tokens: Tensor, cache: KVCache, rows: slice | Tensor) -> CachedStep:
        T = tokens.shape[1]
        start = cache.length[rows]  # (B,)
        positions = start[:, None] + torch.arange(T, device=tokens.device)  # (B, T)
        cached = torch.arange(cache.span, device=tokens.device)  # (span,)
        mask = cached <= positions[:, None, :, None]  # (B, 1, T, span)
        index = torch.arange(rows.start, rows.stop, device=tokens.device) if isinstance(rows, slice) else rows
        return CachedStep(cache, rows, index[:, None], positions, mask)
