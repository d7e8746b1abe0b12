"""What only a decode step does: heads go into the cache and attend to it, and a token is drawn.

Letters as in teamtr_min/model.py; B rows, one new token each. `at` (B,) int64 is the position of each row's
new token, so a row sees positions 0..at. No tile depends on the number of rows, and a program adds up what it
has in a fixed order: a row's results have the same bits in every batch. Nor does a launch depend on how long
rows are, so that a step can be a CUDA graph. Each function is the kernel alone; what it computes is defined
by the `_reference` behind it, in torch, or for `draw` by `sample_token`. engine/decode.py chooses.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.launch import INTERPRETED, jit, power_of_two, start, tl
from kernels.layer import norm_reference

SPLIT = 128  # positions that one program of decode_attend reads
TILE = 64  # of these at a time
STRIP = 4096  # logits that one program of decode_strips reads


@jit
def decode_rope_store(
    qkv, cos, sin, at, q_weight, k_weight, query, keys, values,
    eps, Q, K, capacity,
    D: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One head of one row, of qkv (B, Q + 2K, D), turned by its position's angle, to where it belongs."""
    program, heads = tl.program_id(0).to(tl.int64), Q + 2 * K
    row, head = program // heads, program % heads
    d = tl.arange(0, BLOCK)
    inside, other = d < D, (d + D // 2) % D  # the other of each pair
    x = tl.load(qkv + program * D + d, mask=inside, other=0.0).to(tl.float32)
    dtype = query.dtype.element_ty
    position = tl.load(at + row)
    if head < Q + K:
        y = tl.load(qkv + program * D + other, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            scale = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
            weight = q_weight if head < Q else k_weight
            x_weight = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
            y_weight = tl.load(weight + other, mask=inside, other=0.0).to(tl.float32)
            x = (x * scale).to(dtype).to(tl.float32) * x_weight
            y = (y * scale).to(dtype).to(tl.float32) * y_weight
        c = tl.load(cos + position * D + d, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + position * D + d, mask=inside, other=0.0).to(tl.float32)
        x = x * c + y * s
    if head < Q:
        tl.store(query + (row * Q + head) * D + d, x.to(dtype), mask=inside)
    elif head < Q + K:
        entry = (row * K + head - Q) * capacity + position
        tl.store(keys + entry * D + d, x.to(dtype), mask=inside)
    else:
        entry = (row * K + head - Q - K) * capacity + position
        tl.store(values + entry * D + d, x.to(dtype), mask=inside)


def rope_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    at: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
    norms: Sequence[Tensor] = (),
    eps: float = 0.0,
) -> Tensor:
    """Rotary embedding, behind a norm per head where there are `norms`, of what a layer's projections give.

    qkv (B, (Q + 2K) * D), `heads` is Q; cos and sin (positions, D) as model.rope_table has them, the first
    half of sin negative; norms: weights of queries' and keys' norm, (D,) each. Writes the new keys and values
    to position `at` of the first B rows of keys and values (rows, K, capacity, D). Returns the queries
    (B, Q, D).
    """
    B, (_, K, capacity, D) = len(qkv), keys.shape
    query = qkv.new_empty(B, heads, D)
    q_weight, k_weight = norms or (cos, cos)  # not read
    start(
        decode_rope_store, B * (heads + 2 * K), qkv, cos, sin, at, q_weight, k_weight, query, keys, values,
        eps, heads, K, capacity, D=D, BLOCK=power_of_two(D), NORM=bool(norms), num_warps=1,
    )  # fmt: skip
    return query


def rope_store_reference(qkv, cos, sin, at, keys, values, heads, norms=(), eps=0.0) -> Tensor:
    B, (_, K, _, D) = len(qkv), keys.shape
    q, k, v = qkv.view(B, heads + 2 * K, D).split([heads, K, K], 1)
    if norms:
        q, k = (norm_reference(x, w, eps)[0] for x, w in zip((q, k), norms))
    cos, sin = cos[at][:, None], sin[at][:, None]  # (B, 1, D)
    q, k = (x * cos + x.roll(D // 2, -1) * sin for x in (q, k))
    rows = torch.arange(B, device=qkv.device)
    keys[rows, :, at], values[rows, :, at] = k, v
    return q


@jit
def decode_attend(
    query, keys, values, at, partial, most, total,
    K, capacity, splits, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr,
    SPLIT: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One split of the positions that one row sees through one key head: GROUP queries' shares of attention.

    partial (B, K, splits, GROUP, D): sums of values weighted by 2^(score - most); total: of the weights.
    """
    program = tl.program_id(0).to(tl.int64)
    pair, split = program // splits, program % splits  # pair: (row, key head)
    end = tl.load(at + pair // K) + 1
    if split * SPLIT < end:
        g, d = tl.arange(0, HEADS), tl.arange(0, WIDE)
        here = (g[:, None] < GROUP) & (d[None, :] < D)
        q = tl.load(query + (pair * GROUP + g[:, None]) * D + d[None, :], mask=here, other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
        m = tl.full((HEADS,), float("-inf"), tl.float32)
        weights = tl.zeros((HEADS,), tl.float32)
        sums = tl.zeros((HEADS, WIDE), tl.float32)
        for first in range(0, SPLIT, TILE):
            t = split * SPLIT + first + tl.arange(0, TILE)
            seen = t < end
            if split * SPLIT + first < end:
                entry = (pair * capacity + t[:, None]) * D + d[None, :]
                there = seen[:, None] & (d[None, :] < D)
                k = tl.load(keys + entry, mask=there, other=0.0)
                v = tl.load(values + entry, mask=there, other=0.0)
                if UPCAST:
                    k, v = k.to(tl.float32), v.to(tl.float32)
                score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (HEADS, TILE)
                score = tl.where(seen[None, :], score, float("-inf"))
                new = tl.maximum(m, tl.max(score, 1))
                p = tl.exp2(score - new[:, None])
                shrink = tl.exp2(m - new)
                weights = weights * shrink + tl.sum(p, 1)
                sums = sums * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
                m = new
        slot = program * GROUP + g
        tl.store(most + slot, m, mask=g < GROUP)
        tl.store(total + slot, weights, mask=g < GROUP)
        tl.store(partial + slot[:, None] * D + d[None, :], sums, mask=here)


@jit
def decode_merge(
    partial, most, total, at, out, splits,
    GROUP: tl.constexpr, K: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One query head of one row: its splits, in order."""
    program = tl.program_id(0).to(tl.int64)  # of (B, K, GROUP)
    pair, g = program // GROUP, program % GROUP
    end = tl.load(at + pair // K) + 1
    d = tl.arange(0, WIDE)
    m = tl.full((1,), float("-inf"), tl.float32)
    weights = tl.zeros((1,), tl.float32)
    sums = tl.zeros((WIDE,), tl.float32)
    for split in range(0, tl.cdiv(end, SPLIT)):
        slot = (pair * splits + split) * GROUP + g
        other = tl.load(most + slot + tl.arange(0, 1))
        new = tl.maximum(m, other)
        keep, join = tl.exp2(m - new), tl.exp2(other - new)
        weights = weights * keep + tl.load(total + slot + tl.arange(0, 1)) * join
        sums = sums * keep + tl.load(partial + slot * D + d, mask=d < D, other=0.0) * join
        m = new
    tl.store(out + program * D + d, (sums / weights).to(out.dtype.element_ty), mask=d < D)


def attend_cached(query: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """Attention of one query per row and head -> (B, Q * D).

    query (B, Q, D), keys and values (rows, K, capacity, D), of which row b sees positions 0..at[b].
    """
    (B, Q, D), (_, K, capacity, _) = query.shape, keys.shape
    group, splits = Q // K, -(-capacity // SPLIT)
    partial = query.new_empty(B * K * splits * group, D, dtype=torch.float32)
    most, total = (query.new_empty(len(partial), dtype=torch.float32) for _ in range(2))
    out = query.new_empty(B, Q * D)
    sizes = {"GROUP": group, "D": D, "WIDE": max(16, power_of_two(D)), "SPLIT": SPLIT}
    start(
        decode_attend, B * K * splits, query, keys, values, at, partial, most, total,
        K, capacity, splits, math.log2(math.e) / math.sqrt(D), **sizes,
        HEADS=max(16, power_of_two(group)), TILE=TILE, UPCAST=INTERPRETED, num_warps=4, num_stages=2,
    )  # fmt: skip
    start(decode_merge, B * Q, partial, most, total, at, out, splits, **sizes, K=K, num_warps=1)
    return out


def attend_cached_reference(query: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> Tensor:
    B, Q, D = query.shape
    k, v = (x[:B].repeat_interleave(Q // keys.shape[1], 1) for x in (keys, values))  # (B, Q, capacity, D)
    scores = (query[:, :, None] @ k.transpose(2, 3)).float() / math.sqrt(D)  # (B, Q, 1, capacity)
    hidden = torch.arange(k.shape[2], device=at.device) > at[:, None]  # (B, capacity)
    p = scores.masked_fill(hidden[:, None, None], -math.inf).softmax(-1)
    return (p.to(v.dtype) @ v).reshape(B, Q * D)


@jit
def decode_strips(logits, most, total, best, V, strips, scale, STRIP: tl.constexpr):
    """Of one strip of one row's logits the largest, its first place, and the sum of e^(logit - largest)."""
    program = tl.program_id(0).to(tl.int64)
    v = program % strips * STRIP + tl.arange(0, STRIP)
    z = tl.load(logits + program // strips * V + v, mask=v < V, other=float("-inf")) * scale
    m = tl.max(z, 0)
    e = tl.where(z == float("-inf"), 0.0, tl.exp(z - m))  # also where all are
    tl.store(most + program, m)
    tl.store(total + program, tl.sum(e, 0))
    tl.store(best + program, tl.min(tl.where(z == m, v, V), 0))


@jit
def decode_draw(
    logits, uniform, most, total, best, token, logprob, V, strips, scale,
    STRIPS: tl.constexpr, STRIP: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    """One row: the strip in which the draw falls, then the token in it."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, STRIPS)
    there = i < strips
    m = tl.load(most + row * strips + i, mask=there, other=float("-inf"))
    top = tl.max(m, 0)
    mass = tl.load(total + row * strips + i, mask=there, other=0.0)
    mass = tl.where(there & (mass != 0.0), mass * tl.exp(m - top), 0.0)
    whole = tl.sum(mass, 0)
    if GREEDY:
        place = tl.load(best + row * strips + i, mask=there & (m == top), other=V)
        chosen = tl.minimum(tl.min(place, 0), V - 1)  # NaN equals nothing
        z = tl.load(logits + row * V + chosen) * scale
    else:
        target = tl.load(uniform + row) * whole
        passed = tl.cumsum(mass, 0)
        last = tl.max(tl.where(mass > 0.0, i, 0), 0)
        strip = tl.minimum(tl.sum((there & (passed <= target)).to(tl.int32), 0), last)
        before = tl.sum(tl.where(i == strip - 1, passed, 0.0), 0)  # no more than target, to the last bit
        j = tl.arange(0, STRIP)
        v = strip * STRIP + j
        logit = tl.load(logits + row * V + v, mask=v < V, other=float("-inf")) * scale
        e = tl.where(v < V, tl.exp(logit - top), 0.0)
        within = before + tl.cumsum(e, 0)
        last = tl.max(tl.where(e > 0.0, j, 0), 0)
        inner = tl.minimum(tl.sum((within <= target).to(tl.int32), 0), last)
        chosen = strip * STRIP + inner
        z = tl.sum(tl.where(j == inner, logit, 0.0), 0)
    tl.store(token + row, chosen.to(tl.int64))
    tl.store(logprob + row, z - top - tl.log(whole))


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What `sample_token` computes, by kernels that read each logit once, and those of one
    strip again.

    logits (B, V) fp32, uniform (B,) -> tokens (B,) int64, log-probs (B,) fp32.
    """
    B, V = logits.shape
    strips, scale = -(-V // STRIP), 1.0 / (temperature or 1.0)
    most, total = (logits.new_empty(B * strips) for _ in range(2))
    best = logits.new_empty(B * strips, dtype=torch.int32)
    token, logprob = logits.new_empty(B, dtype=torch.int64), logits.new_empty(B)
    start(decode_strips, B * strips, logits, most, total, best, V, strips, scale, STRIP=STRIP, num_warps=8)
    start(
        decode_draw, B, logits, uniform, most, total, best, token, logprob, V, strips, scale,
        STRIPS=power_of_two(strips), STRIP=STRIP, GREEDY=temperature == 0, num_warps=8,
    )  # fmt: skip
    return token, logprob
