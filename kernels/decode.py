"""What only a decode step does: new tokens enter the cache and attend to it, and the next ones are drawn.

    attention   y = softmax(q k^T / sqrt(D)) v over positions 0..at of a row, q and k after norm and rotation
    draw        the first token whose cumulative probability exceeds u, u uniform in [0, 1)

B rows with one new token each, Q query heads, K key and value heads, D head size, V vocabulary; the cache is
(rows, K, capacity, D) for keys and for values, and `at` (B,) int64 the position of each row's new token.

All is bound by memory. A layer reads each live cache entry once: 256 rows at 1,024 positions of Qwen2.5-1.5B
are 268 MB, 89 microseconds at 3 TB/s. A draw reads its logits twice: 0.31 GB, 104 microseconds. A row has the
same bits in every batch. No launch depends on how long rows are, so a step can be a CUDA graph.
"""

import math

import torch
from torch import Tensor

from kernels.launch import UPCAST, jit, start, tl, triton, use_triton
from kernels.layer import turned

SPLIT = 128  # positions that one program of decode_attend reads
TILE = tl.constexpr(64)  # of these at a time
STRIP = 4096  # logits that decode_draw reads at a time


@jit
def decode_attend(
    qkv, cos, sin, at, q_norm, k_norm,  # (B, Q + 2K, D), (positions, D) twice, (B,), (D,) or None twice
    keys, values,  # in and out: (rows, K, capacity, D)
    partial, most, total,  # out: (B, K, splits, GROUP, D), (B, K, splits, GROUP) twice, fp32
    eps, K, capacity, splits, scale,
    GROUP: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One split of the positions that a row sees through one key head, for the GROUP queries that share it:
    the largest score, and sums of the weights 2^(score - most) and of values with these weights."""
    program = tl.program_id(0).to(tl.int64)
    pair, split = program // splits, program % splits
    row, head = pair // K, pair % K
    position = tl.load(at + row)
    if split * SPLIT <= position:
        g, one, d = tl.arange(0, HEADS), tl.arange(0, 1), tl.arange(0, WIDE)
        new, cos, sin = qkv + row * (GROUP + 2) * K * D, cos + position * D, sin + position * D
        q = turned(new + head * GROUP * D, g, GROUP, cos, sin, q_norm, eps, D, WIDE)  # (HEADS, WIDE)
        q = q.to(tl.float32) if UPCAST else q
        if split == position // SPLIT:  # the new token is this program's, and goes into the cache
            new_k = turned(new + (GROUP * K + head) * D, one, 1, cos, sin, k_norm, eps, D, WIDE)  # (1, WIDE)
            new_v = tl.load(new + ((GROUP + 1) * K + head) * D + d, mask=d < D, other=0.0)[None, :]
            place = (pair * capacity + position) * D + d[None, :]
            tl.store(keys + place, new_k, mask=d[None, :] < D)
            tl.store(values + place, new_v, mask=d[None, :] < D)
            tl.debug_barrier()  # all threads of the program read it below
        m = tl.full((HEADS,), float("-inf"), tl.float32)
        weights, sums = tl.zeros((HEADS,), tl.float32), tl.zeros((HEADS, WIDE), tl.float32)
        for first in range(0, SPLIT, TILE):
            t = split * SPLIT + first + tl.arange(0, TILE)
            if split * SPLIT + first <= position:
                entry = (pair * capacity + t[:, None]) * D + d[None, :]
                there = (t <= position)[:, None] & (d[None, :] < D)
                k = tl.load(keys + entry, mask=there, other=0.0).to(q.dtype)
                v = tl.load(values + entry, mask=there, other=0.0).to(q.dtype)
                score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # (HEADS, TILE)
                score = tl.where((t <= position)[None, :], score, float("-inf"))
                larger = tl.maximum(m, tl.max(score, 1))
                p, keep = tl.exp2(score - larger[:, None]), tl.exp2(m - larger)
                weights = weights * keep + tl.sum(p, 1)
                sums = sums * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
                m = larger
        slot = program * GROUP + g
        tl.store(most + slot, m, mask=g < GROUP)
        tl.store(total + slot, weights, mask=g < GROUP)
        tl.store(partial + slot[:, None] * D + d[None, :], sums, mask=(g[:, None] < GROUP) & (d[None, :] < D))


@jit
def decode_merge(
    partial, most, total, at,  # as above
    out,  # out: (B, Q, D)
    K, splits, GROUP: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One query head of one row: its splits, in order."""
    program = tl.program_id(0).to(tl.int64)
    pair, g = program // GROUP, program % GROUP
    d, one = tl.arange(0, WIDE), tl.arange(0, 1)
    m, weights = tl.full((1,), float("-inf"), tl.float32), tl.zeros((1,), tl.float32)
    sums = tl.zeros((WIDE,), tl.float32)
    for split in range(0, tl.load(at + pair // K) // SPLIT + 1):
        slot = (pair * splits + split) * GROUP + g
        other = tl.load(most + slot + one)
        larger = tl.maximum(m, other)
        keep, join = tl.exp2(m - larger), tl.exp2(other - larger)
        weights = weights * keep + tl.load(total + slot + one) * join
        sums = sums * keep + tl.load(partial + slot * D + d, mask=d < D, other=0.0) * join
        m = larger
    tl.store(out + program * D + d, (sums / weights).to(out.dtype.element_ty), mask=d < D)


def attend_cached(
    qkv: Tensor, cos: Tensor, sin: Tensor, at: Tensor, keys: Tensor, values: Tensor,
    norms: tuple[Tensor, ...] = (), eps: float = 0.0,
) -> Tensor:  # fmt: skip
    """One new token a row goes into the cache and attends to positions 0..at of its row -> (B, Q * D), as by
    engine/decode.py's `Decode._attend`. qkv (B, (Q + 2K) * D), what a layer's projection gives; cos and sin
    (positions, 1, D) as model.rope_table has them; keys and values (rows, K, capacity, D), of which the first
    B rows are written at `at` (B,) int64; norms: weights (D,) of the queries' and the keys', with `eps`."""
    (B, width), (_, K, capacity, D) = qkv.shape, keys.shape
    heads, splits = width // D - 2 * K, triton.cdiv(capacity, SPLIT)
    partial = qkv.new_empty(B * heads * splits, D, dtype=torch.float32)
    most, total = torch.empty_like(partial[:, 0]), torch.empty_like(partial[:, 0])
    out = qkv.new_empty(B, heads * D)
    sizes = {"GROUP": heads // K, "D": D, "WIDE": max(16, triton.next_power_of_2(D)), "SPLIT": SPLIT}
    start(
        decode_attend, B * K * splits, qkv.contiguous(), cos, sin, at, *(norms or (None, None)), keys, values,
        partial, most, total, eps, K, capacity, splits, math.log2(math.e) / math.sqrt(D), **sizes,
        HEADS=max(16, triton.next_power_of_2(heads // K)), num_warps=2 * qkv.itemsize, num_stages=2,
    )  # fmt: skip
    start(decode_merge, B * heads, partial, most, total, at, out, K, splits, **sizes, num_warps=1)
    return out


def draw_reference(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits = logits if temperature in (0, 1) else logits / temperature
    p = logits.softmax(-1)  # (B, V)
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)  # (B, 1)
    else:
        cumulative = p.cumsum(-1)  # (B, V)
        target = uniform[:, None] * cumulative[:, -1:]  # rounding leaves the last entry near 1, not at it
        token = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[1] - 1)
    return token[:, 0], p.gather(1, token)[:, 0].log()


@jit
def decode_draw(
    logits, uniform,  # (B, V) and (B,) fp32
    token, logprob,  # out: (B,) int64 and fp32
    V, scale, STRIP: tl.constexpr,
):  # fmt: skip
    """One row: the sum of e^(logit - largest), then the token at which as much of it has passed as u says."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    top, whole = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.float32)
    for first in range(0, V, STRIP):
        v = first + tl.arange(0, STRIP)
        z = tl.load(logits + v, mask=v < V, other=float("-inf")) * scale
        larger = tl.maximum(top, tl.max(z, 0))
        e = tl.where(z == float("-inf"), 0.0, tl.exp(z - larger))  # also where all so far are
        whole = tl.where(whole == 0.0, 0.0, whole * tl.exp(top - larger)) + tl.sum(e, 0)
        top = larger
    target, passed = tl.load(uniform + row) * whole, tl.zeros((), tl.float32)
    last, chosen = tl.zeros((), tl.int32), tl.zeros((), tl.int32) + V
    for first in range(0, V, STRIP):
        v = first + tl.arange(0, STRIP)
        z = tl.load(logits + v, mask=v < V, other=float("-inf")) * scale
        e = tl.where(v < V, tl.exp(z - top), 0.0)
        beyond = (e > 0.0) & (passed + tl.cumsum(e, 0) > target)
        chosen = tl.minimum(chosen, tl.min(tl.where(beyond, v, V), 0))
        last = tl.maximum(last, tl.max(tl.where(e > 0.0, v, 0), 0))
        passed += tl.sum(e, 0)
    chosen = tl.minimum(chosen, last)  # rounding may leave the draw past all
    tl.store(token + row, chosen.to(tl.int64))
    tl.store(logprob + row, tl.load(logits + chosen) * scale - top - tl.log(whole))


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """logits (B, V) fp32, uniform (B,) fp32 in [0, 1) -> one token a row, (B,) int64, and log-probs (B,)
    fp32. Temperature 0 is the argmax, with its log-prob at temperature 1."""
    if temperature == 0 or not use_triton(logits):
        return draw_reference(logits, uniform, temperature)
    (B, V), logits, uniform = logits.shape, logits.contiguous(), uniform.contiguous()
    token, logprob = logits.new_empty(B, dtype=torch.int64), logits.new_empty(B)
    start(decode_draw, B, logits, uniform, token, logprob, V, 1 / temperature, STRIP=STRIP, num_warps=8)
    return token, logprob
