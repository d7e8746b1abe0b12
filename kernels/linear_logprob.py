"""Hidden states x output head -> log-prob of the sampled tokens, without [tokens, vocabulary] in memory.

    z = hidden @ weight^T / temperature                          (N, V), in fp32, only ever a piece at a time
    logp[t] = z[t, target[t]] - lse[t],  lse[t] = log sum_v exp z[t, v]
    dL/dz[t, v] = g[t] (1[v = target[t]] - exp(z[t, v] - lse[t])),  g = dL/dlogp

hidden (N, H) and weight (V, H) are bf16 or fp32, all after their product fp32: bf16 logits are off by 2e-2.

Work: F = 2 N H V FLOPs forward. Backward makes z again (F) and from it dX = dZ W and dW = dZ^T X (2F), so
both ways take 4F. At N 16,384, H 1,536, V 151,936, F is 7.65 TFLOP: at 790 TFLOP/s of dense bf16 the floor is
9.7 ms forward and 38.7 ms both ways. Bytes are no bound: reading the weight takes 0.16 ms at 3 TB/s.

Forward: one program holds a block of rows and walks a strip of the vocabulary with a running (max, sum), then
a second kernel merges the strips of each row in order. Nothing is shared between rows and no atomic is used,
so a log-prob is the same bits in every run and in every batch. Backward: for one chunk of the vocabulary at
a time a kernel writes dZ, which the vendor's matrix product turns into dW, written once, and dX, summed in
fp32. Gradients repeat from run to run; they may round differently in another batch.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import INTERPRETED, blocks, capability, jit, operands, start, tl, use_triton

CHUNK_BYTES = 112 * 2**20  # most of dZ, and of the reference's logits, at one time
STRIP = 2048  # vocabulary per forward program: 75 partial results a row at V = 151,936
GROUP = 16  # row blocks that share a strip of the weight while it is in L2
MERGE_ROWS = 128
NEVER = tl.constexpr(-1e30)  # the logit of a column past V; finite, so that 0 probability times it is 0


class TokenStats(NamedTuple):
    logp: Tensor  # (N,) fp32
    entropy: Tensor | None  # (N,) fp32, nats, no gradient


def _forward_reference(hidden, weight, targets, temperature, entropy):
    """-> logp, lse, entropy or None, each (N,) fp32; then every log-prob if one chunk held all.

    By the chain rule a token is its chunk, then the token within the chunk; log_share is the first.
    """
    chosen = torch.full(targets.shape, math.nan, device=hidden.device)  # stays NaN where no chunk has it
    parts = _chunks(len(hidden), len(weight), 4)
    lse, spread = [], []  # one (N,) per chunk
    for part in parts:
        z = _logits(hidden, weight[part], temperature)  # (N, chunk)
        logp = z.log_softmax(1)
        here, at = _column(targets, part)
        z_at, logp_at = z.gather(1, at)[:, 0], logp.gather(1, at)[:, 0]
        lse.append(z_at - logp_at)
        chosen = torch.where(here, logp_at, chosen)
        if entropy:
            spread.append(-torch.exp(logp, out=z).mul_(logp).sum(1))
    if len(parts) == 1:  # its log-probs spare backward making them again
        return chosen, lse[0], spread[0] if entropy else None, logp
    log_share = torch.stack(lse).log_softmax(0)  # (chunks, N)
    home = (targets // parts[0].stop).clamp(0, len(parts) - 1)
    whole = chosen + log_share.gather(0, home[None])[0]
    if entropy:
        spread = (log_share.exp() * (torch.stack(spread) - log_share)).sum(0)
    return whole, lse[0] - log_share[0], spread if entropy else None


def _dlogits_reference(hidden, weight, targets, lse, grad, part, temperature, logp=None):
    """dL / d(logits before the temperature) of one chunk of the vocabulary, (N, chunk) fp32."""
    p = _logits(hidden, weight[part], temperature).sub_(lse[:, None]).exp_() if logp is None else logp.exp()
    scale, (here, at) = (grad / temperature)[:, None], _column(targets, part)  # (N, 1), (N,), (N, 1)
    return p.mul_(-scale).scatter_add_(1, at, torch.where(here[:, None], scale, 0.0))


def _logits(hidden, weight, temperature):
    z = hidden.float() @ weight.float().t()
    return z if temperature == 1 else z.div_(temperature)


def _column(targets, part):
    """Whether each target lies in the chunk `part` (N,), and a column of the chunk to look at (N, 1)."""
    at = targets - part.start
    last = part.stop - part.start - 1
    return (at >= 0) & (at <= last), at.clamp(0, last)[:, None]


def _chunks(N: int, V: int, itemsize: int) -> list[slice]:
    """Equal pieces of the vocabulary, of which (N, piece) stays within CHUNK_BYTES."""
    width = max(CHUNK_BYTES // (max(N, 1) * itemsize) // 256 * 256, 256)
    return [slice(lo, min(lo + width, V)) for lo in range(0, V, width)]


@jit
def _product(
    x, w, row, column, N, V,
    H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    TMA: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """The (ROWS, COLUMNS) tile of x (N, H) w (V, H)^T at (row, column), fp32; arbitrary past N and V."""
    tile = tl.zeros((ROWS, COLUMNS), tl.float32)
    ks = tl.arange(0, DEPTH)
    rows = ((row + tl.arange(0, ROWS)) % N).to(tl.int64)
    columns = ((column + tl.arange(0, COLUMNS)) % V).to(tl.int64)
    for k in range(0, H, DEPTH):
        if TMA:
            a, b = x.load([row, k]), w.load([column, k])  # 0 outside
        else:
            inside = (k + ks < H)[None, :]
            a = tl.load(x + rows[:, None] * H + k + ks[None, :], mask=inside, other=0.0)
            b = tl.load(w + columns[:, None] * H + k + ks[None, :], mask=inside, other=0.0)
        if UP:  # the interpreter's bf16 product is wrong
            a, b = a.to(tl.float32), b.to(tl.float32)
        tile = tl.dot(a, b.T, tile, input_precision="ieee")
    return tile


@jit
def _fold(m, s, z):
    """Take the columns of z into a running maximum m and sum s of exponentials; also exp(z - new m), and the
    factor by which what was summed under the old m shrinks."""
    m_new = tl.maximum(m, tl.max(z, 1))
    p, keep = tl.exp(z - m_new[:, None]), tl.exp(m - m_new)
    return m_new, s * keep + tl.sum(p, 1), p, keep


@jit
def _tile_of(program, down, across, GROUP: tl.constexpr):
    """Number of this program's row block, of `down`, and of its strip, of `across`; GROUP row blocks share
    a strip at a time."""
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = program % (GROUP * across)
    return first + inside % height, inside // height


@jit
def logprob_strips(
    hidden, weight, targets,  # descriptors; (N,) int64
    chosen, lse, mean_z,  # (N,) and (strips, N) fp32; the last or None
    N, V, strips, scale,
    H: tl.constexpr, STRIP: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    TMA: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of one strip for a block of rows, the target's logit where it lies in the strip, and for
    the entropy the strip's mean of z."""
    block, strip = _tile_of(tl.program_id(0), tl.cdiv(N, ROWS), strips, GROUP)
    row = block * ROWS
    rows = row + tl.arange(0, ROWS)
    target = tl.load(targets + rows, mask=rows < N, other=-1)
    lo, hi = strip * STRIP, tl.minimum(strip * STRIP + STRIP, V)
    none, zero = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    m, s, z_target, e = none, zero, zero, zero
    for column in tl.range(lo, hi, COLUMNS, num_stages=1):  # the loop over H is the one to pipeline
        z = scale * _product(hidden, weight, row, column, N, V, H, ROWS, COLUMNS, DEPTH, TMA, UP)
        columns = column + tl.arange(0, COLUMNS)
        # Columns past V leave before the maximum: their zeros would outweigh a row of negative logits.
        z = tl.where((columns < V)[None, :], z, NEVER)
        z_target += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
        m, s, p, keep = _fold(m, s, z)
        if mean_z is not None:
            e = e * keep + tl.sum(p * z, 1)
    at = strip.to(tl.int64) * N + rows
    tl.store(lse + at, m + tl.log(s), mask=rows < N)
    tl.store(chosen + rows, z_target, mask=(rows < N) & (target >= lo) & (target < hi))
    if mean_z is not None:
        tl.store(mean_z + at, e / s, mask=rows < N)


@jit
def _merge(lse, mean, rows, N, strips, BLOCK: tl.constexpr):
    """Log-sum-exp over all strips, first to last, and the mean of `mean` under each strip's share."""
    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    e = tl.zeros((BLOCK,), tl.float32)
    for strip in range(strips):
        at = tl.cast(strip, tl.int64) * N + rows
        x = tl.load(lse + at, mask=rows < N, other=0.0)
        m_new = tl.maximum(m, x)
        p, keep = tl.exp(x - m_new), tl.exp(m - m_new)
        s = s * keep + p
        if mean is not None:
            e = e * keep + p * tl.load(mean + at, mask=rows < N, other=0.0)
        m = m_new
    return m + tl.log(s), e / s


@jit
def logprob_merge(
    chosen, lse, mean_z,  # what logprob_strips wrote
    logp, total, entropy,  # (N,) fp32; the last or None
    N, strips, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    whole, mean = _merge(lse, mean_z, rows, N, strips, BLOCK)
    tl.store(total + rows, whole, mask=rows < N)
    tl.store(logp + rows, tl.load(chosen + rows, mask=rows < N, other=0.0) - whole, mask=rows < N)
    if entropy is not None:
        tl.store(entropy + rows, whole - mean, mask=rows < N)


@jit
def logprob_dlogits(
    hidden, weight, targets, lse, grad,  # as above; the last three (N,)
    dz,  # (N, width of the chunk), its rows `stride` apart
    N, V, first, width, stride, scale,
    H: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    TMA: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """One tile of dL / d(logits before the temperature), for the chunk of the vocabulary at `first`."""
    across = tl.cdiv(width, COLUMNS)
    block, tile = _tile_of(tl.program_id(0), tl.cdiv(N, ROWS), across, GROUP)
    row, column = block * ROWS, tile * COLUMNS
    z = scale * _product(hidden, weight, row, first + column, N, V, H, ROWS, COLUMNS, DEPTH, TMA, UP)
    rows = row + tl.arange(0, ROWS)
    columns = first + column + tl.arange(0, COLUMNS)
    target = tl.load(targets + rows, mask=rows < N, other=-1)
    total = tl.load(lse + rows, mask=rows < N, other=0.0)
    g = tl.load(grad + rows, mask=rows < N, other=0.0) * scale
    hit = tl.where(columns[None, :] == target[:, None], 1.0, 0.0)
    d = (hit - tl.exp(z - total[:, None])) * g[:, None]
    at = rows.to(tl.int64)[:, None] * stride + (column + tl.arange(0, COLUMNS))[None, :]
    inside = (rows < N)[:, None] & (columns < first + width)[None, :]
    tl.store(dz + at, d.to(dz.dtype.element_ty), mask=inside)


def _forward_triton(hidden, weight, targets, temperature, entropy):
    """-> logp, lse, entropy or None; each (N,) fp32."""
    N, V = len(hidden), len(weight)
    strips = -(-V // STRIP)
    tile = blocks(hidden.dtype, capability(hidden.device), hidden.shape[1])

    def empty(wanted, *shape):
        return torch.empty(*shape, N, device=hidden.device) if wanted else None

    chosen = torch.full((N,), math.nan, device=hidden.device)  # stays NaN where no strip has the target
    lse, mean_z = empty(True, strips), empty(entropy, strips)
    logp, total, spread = empty(True), empty(True), empty(entropy)
    if N == 0:
        return logp, total, spread
    start(
        logprob_strips, -(-N // tile["ROWS"]) * strips,
        *operands(tile, hidden, weight), targets, chosen, lse, mean_z, N, V, strips, 1 / temperature,
        H=hidden.shape[1], STRIP=STRIP, GROUP=GROUP, UP=INTERPRETED, **tile,
    )  # fmt: skip
    start(
        logprob_merge, -(-N // MERGE_ROWS), chosen, lse, mean_z, logp, total, spread,
        N, strips, BLOCK=MERGE_ROWS,
    )  # fmt: skip
    return logp, total, spread


def _dlogits_triton(hidden, weight, targets, lse, grad, part, temperature):
    """dL / d(logits before the temperature) of one chunk of the vocabulary, (N, chunk) in hidden's dtype."""
    N, V, width = len(hidden), len(weight), part.stop - part.start
    tile = blocks(hidden.dtype, capability(hidden.device), hidden.shape[1])
    dtype = torch.float32 if INTERPRETED else hidden.dtype  # the interpreter truncates what it stores as bf16
    dz = torch.empty(N, -(-width // 64) * 64, dtype=dtype, device=hidden.device)[:, :width]  # aligned rows
    if N:
        start(
            logprob_dlogits, -(-N // tile["ROWS"]) * -(-width // tile["COLUMNS"]),
            *operands(tile, hidden, weight), targets, lse, grad.contiguous(), dz,
            N, V, part.start, width, dz.stride(0), 1 / temperature,
            H=hidden.shape[1], GROUP=GROUP, UP=INTERPRETED, **tile,
        )  # fmt: skip
    return dz


class _Logprob(torch.autograd.Function):
    """The chunks, the recomputation and the two gradient products are the same whoever makes the logits."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy, by_triton):
        forward = _forward_triton if by_triton else _forward_reference
        logp, lse, entropy, *kept = forward(hidden, weight, targets, temperature, entropy)
        ctx.save_for_backward(hidden, weight, targets, lse, *kept)
        ctx.temperature, ctx.by_triton = temperature, by_triton
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        hidden, weight, targets, lse, *kept = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dlogits = _dlogits_triton if ctx.by_triton else _dlogits_reference
        dx = torch.zeros(hidden.shape, device=hidden.device) if need_hidden else None  # fp32 for all chunks
        dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else None
        for part in _chunks(len(hidden), len(weight), hidden.itemsize if ctx.by_triton else 4):
            dz = dlogits(hidden, weight, targets, lse, grad, part, ctx.temperature, *kept)  # (N, chunk)
            if need_weight:
                dw[part] = dz.t() @ hidden.to(dz.dtype)
            if need_hidden and dz.dtype == torch.bfloat16:
                torch.addmm(dx, dz, weight[part], out_dtype=torch.float32, out=dx)
            elif need_hidden:
                dx.addmm_(dz, weight[part].to(dz.dtype))
            del dz  # before the next chunk is made
        return None if dx is None else dx.to(hidden.dtype), dw, *[None] * 4


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """hidden (N, H), weight (V, H), targets (N,) integers -> log-probs (N,) fp32 at `temperature`.

    hidden and weight are both bf16 or both fp32, in any layout (Triton copies what is not in aligned rows).
    N may be 0. A target outside 0..V-1 raises ValueError on a CPU; on CUDA, where looking would stall the
    stream, its log-prob is NaN. Anything else that does not fit raises ValueError or TypeError.
    """
    return linear_logprob_stats(hidden, weight, targets, temperature).logp


def linear_logprob_stats(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, entropy: bool = False
) -> TokenStats:
    """`linear_logprob` and, if wanted, the entropy from the same logits; only logp carries a gradient."""
    shapes, dtypes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}", f"{hidden.dtype} and {weight.dtype}"
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or weight.numel() == 0:
        raise ValueError(f"hidden must be (N, H) and weight (V, H), V and H at least 1; they are {shapes}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be ({len(hidden)},), one per row; they are {tuple(targets.shape)}")
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"hidden and weight must both be bfloat16 or both float32; they are {dtypes}")
    if targets.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"targets must be integers, not {targets.dtype}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; it must be positive and finite")
    for name, x in (("weight", weight), ("targets", targets)):
        if x.device != hidden.device:
            raise ValueError(f"hidden is on {hidden.device}, but {name} is on {x.device}")
    targets = targets.long().contiguous()
    if not targets.is_cuda and len(targets) and not (0 <= targets.min() and targets.max() < len(weight)):
        t = int(((targets < 0) | (targets >= len(weight))).nonzero()[0])
        raise ValueError(f"target {t} is {targets[t]}; it must be within 0..{len(weight) - 1}")
    temperature = float(temperature)
    return TokenStats(*_Logprob.apply(hidden, weight, targets, temperature, entropy, use_triton(hidden)))
