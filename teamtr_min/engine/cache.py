"""The KV cache, what the layers of one forward pass have in common, and attention. Letters as in model.py;
S counts the positions that the tokens of a row may attend to."""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
UNIT = {"cuda": 64}  # rows and caches are a multiple of this long: each new shape costs plans of kernels


def aligned(positions: int, device: torch.device) -> int:
    return positions + -positions % UNIT.get(device.type, 1)


class KVCache:
    """Keys and values (layers, rows, K, capacity, D) of many sequences; row b holds its first `length[b]`
    positions. Entries past them are leftovers, which no query sees."""

    def __init__(self, model, rows: int):
        c, device = model.config, model.device
        shape = (c.layers, rows, c.kv_heads, 0, c.head_dim)  # `reserve` makes room
        self.keys, self.values = (torch.zeros(shape, device=device, dtype=model.dtype) for _ in "kv")
        self.length = torch.zeros(rows, dtype=torch.long, device=device)

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def reserve(self, positions: int) -> None:
        """Make room for so many in each row. Storage grows by half at least, so that it rarely grows."""
        if positions > self.capacity:
            longer = aligned(max(positions, self.capacity * 3 // 2), self.keys.device)
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = old.new_zeros(*old.shape[:3], longer, old.shape[4])  # pages that stay 0 are free
                new[:, :, :, : old.shape[3]] = old
                setattr(self, name, new)

    def permute(self, to: Tensor, source: Tensor) -> None:
        """Row `to[i]` becomes what row `source[i]` was; all reads come before all writes."""
        for x in (self.keys, self.values):
            x[:, to] = x[:, source]
        self.length[to] = self.length[source]


class Step:
    """One forward pass over tokens (B, T). Rows begin at position 0, or they are prefix trees (`Step.trees`),
    or each continues a row of the cache (`Step.after`)."""

    def __init__(self, positions: Tensor, span: int):
        self.positions = positions  # (B or 1, T) int64, of each token in its sequence
        self.span = span  # they are all smaller than this; the S of a cached pass
        self.mask: Tensor | None = None  # (B or 1, 1, T, S), added to scores; None: causal, the last sees all
        self.cache: KVCache | None = None  # gets the new keys and values
        self.seen: slice | Tensor | None = None  # its rows to attend to; None: the new tokens of a row alone
        self.start: int | None = None  # where the new entries of all `seen` rows begin, if it is the same
        self.source: Tensor | None = None  # (E,) which of the flattened B * T tokens it gets; None: all
        self.index: Tensor | None = None  # (E * K,) where they go in the flattened (rows * K * capacity)

    @classmethod
    def trees(cls, positions: Tensor, end: Tensor | None, dtype: torch.dtype) -> "Step":
        """positions and end (B, T) as in packing.Packed: token i sees token k where k <= i < end[k]."""
        step = cls(positions, positions.shape[1])
        if end is not None:
            t = torch.arange(end.shape[1], device=end.device)
            step.mask = additive((t <= t[:, None]) & (t[:, None] < end[:, None, None]), dtype)
        return step

    @classmethod
    def after(cls, cache: KVCache, rows: slice | Tensor, T: int, span: int, even: bool = False) -> "Step":
        """T new tokens in each of these rows, which then have at most `span`, with `even` all of them."""
        new = torch.arange(T, device=cache.keys.device)
        span = span if even else aligned(span, new.device)
        step = cls((span - T + new)[None] if even else cache.length[rows][:, None] + new, span)  # (1 or B, T)
        cache.reserve(span)
        step.cache, step.seen = cache, rows
        if not even or T > 1:
            seen = torch.arange(span, device=new.device) <= step.positions[:, None, :, None]
            step.mask = additive(seen, cache.keys.dtype)
        if even:
            step.start = span - T
        else:
            rows = torch.arange(len(cache.length), device=new.device)[rows]
            step.keep(cache, rows.repeat_interleave(T), step.positions.flatten())
        return step

    def keep(self, cache: KVCache, rows: Tensor, positions: Tensor, source: Tensor | None = None) -> None:
        """The cache gets an entry at each of these rows and positions (E,), of the tokens at `source`."""
        _, _, K, capacity, _ = cache.keys.shape
        first = (rows[:, None] * K + torch.arange(K, device=rows.device)) * capacity  # (E, K)
        self.cache, self.source, self.index = cache, source, (first + positions[:, None]).flatten()

    def exchange(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (B, K, T, D) of the new tokens -> (B, K, S, D) of all that they may attend to."""
        if self.cache is None:
            return k, v
        visible = []
        for new, kept in ((k, self.cache.keys[layer]), (v, self.cache.values[layer])):
            if self.start is not None:
                kept[self.seen, :, self.start : self.span] = new
            else:
                entries = new.transpose(1, 2).flatten(0, 1)  # (B * T, K, D)
                if self.source is not None:
                    entries = entries[self.source]
                kept.view(-1, kept.shape[3]).index_copy_(0, self.index, entries.flatten(0, 1))
            visible.append(new if self.seen is None else kept[self.seen, :, : self.span])
        return visible[0], visible[1]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, else -inf. Attention converts a mask of another dtype once a layer."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention, Q/K query heads to a key head. q (B, Q, T, D), k and v (B, K, S, D).
    `mask` (B or 1, 1, T, S) is added to the scores; without it attention is causal, and T is 1 or S."""
    (B, Q, T, D), K = q.shape, k.shape[1]
    with sdpa_kernel(NOT_CUDNN) if q.is_cuda else contextlib.nullcontext():  # cuDNN plans for every new shape
        if T == 1:  # the queries of a group stand where tokens do, so that K and V need no repetition
            q = q.reshape(B, K, Q // K, D)
            return F.scaled_dot_product_attention(q, k, v, mask).view(B, Q, 1, D)
        if q.is_cuda and (mask is not None or q.dtype == torch.float32):  # their only kernel takes no groups
            k, v = (x.repeat_interleave(Q // K, dim=1) for x in (k, v))  # (B, Q, S, D)
        grouped = k.shape[1] != Q
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
