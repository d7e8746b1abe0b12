"""Hidden states x output head -> log-prob of the sampled tokens, without [tokens, vocabulary] in memory.

    z = hidden @ weight^T / temperature                          (N, V), in fp32, only ever a piece at a time
    logp[t] = z[t, target[t]] - lse[t],  lse[t] = log sum_v exp z[t, v]
    entropy[t] = lse[t] - sum_v z[t, v] exp(z[t, v] - lse[t])
    dL/dz[t, v] = g[t] (1[v = target[t]] - exp(z[t, v] - lse[t])),  g = dL/dlogp

hidden (N, H) and weight (V, H) are bf16 or fp32; z comes from fp32 accumulators: bf16 logits are off by 2e-2,
which over a message of 256 tokens is more than a trust region.

Work: F = 2 N H V FLOPs forward; backward makes z again, and from it dX = dZ W and dW = dZ^T X: 4F both ways.
At N 16,384, H 1,536, V 151,936, F is 7.65 TFLOP: at 790 TFLOP/s of dense bf16 the floor is 9.7 ms forward and
38.7 ms both ways. Bytes are no bound: reading the weight takes 0.16 ms at 3 TB/s.

Forward: one program holds a block of rows and walks one strip of the vocabulary with a running maximum and
sum; the strips of a row are merged in order. Rows share nothing and there are no atomics, so a log-prob has
the same bits in every run and in every batch. Backward: for one chunk of the vocabulary at a time a kernel
writes dZ; the vendor's matrix products turn it into dW, written once, and dX, summed in fp32. Gradients
repeat from run to run; they may round differently in another batch.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import INTERPRETED, jit, start, tl, triton, use_triton

CHUNK_BYTES = 112 * 2**20  # most of dZ, and of the reference's logits, at one time
STRIP = 2048  # vocabulary per forward program: 75 partial results a row at V = 151,936
GROUP = tl.constexpr(16)  # row blocks that share a tile of the weight while it is in L2
NEVER = tl.constexpr(-1e30)  # the logit of a column past V; finite, so that 0 probability times it is 0
UPCAST = tl.constexpr(INTERPRETED)  # the interpreter's bf16 product is wrong


class TokenStats(NamedTuple):
    logp: Tensor  # (N,) fp32
    entropy: Tensor | None  # (N,) fp32, nats, no gradient


def logprob_reference(hidden, weight, targets, temperature, entropy):
    """-> logp, lse, entropy or None, each (N,) fp32; then the logits, if one chunk held them all."""
    chosen = torch.full(targets.shape, math.nan, device=hidden.device)  # stays NaN where no chunk has it
    parts, lse, mean_z = _chunks(len(hidden), len(weight), 4), [], []
    for part in parts:
        z = _logits(hidden, weight[part], temperature)  # (N, chunk)
        here, at = _column(targets, part)
        chosen = torch.where(here, z.gather(1, at)[:, 0], chosen)
        lse.append(z.logsumexp(1))
        if entropy:
            mean_z.append((z.softmax(1) * z).sum(1))
    mean_z = torch.stack(mean_z) if entropy else None
    return *_merge(chosen, torch.stack(lse), mean_z), *([z] if len(parts) == 1 else [])


def _merge(chosen, lse, mean_z):
    """Target's logit (N,), each part's log-sum-exp and mean logit (parts, N) -> logp, lse, entropy."""
    most = lse.amax(0)
    share = lse.sub_(most).exp_()
    mass = share.cumsum(0)[-1]  # from part to part, in the same order for any N
    total = most + mass.log()
    spread = None if mean_z is None else total - mean_z.mul_(share).cumsum(0)[-1] / mass
    return chosen - total, total, spread


def dlogits_reference(hidden, weight, targets, lse, grad, part, temperature, z=None):
    """dL / d(logits before the temperature) of one chunk of the vocabulary, (N, chunk) fp32."""
    z = _logits(hidden, weight[part], temperature) if z is None else z
    scale, (here, at) = (grad / temperature)[:, None], _column(targets, part)  # (N, 1), (N,), (N, 1)
    return (z - lse[:, None]).exp_().mul_(-scale).scatter_add_(1, at, torch.where(here[:, None], scale, 0.0))


def _logits(hidden, weight, temperature):
    return (hidden.float() / temperature) @ weight.float().t()


def _column(targets, part):
    """Whether each target lies in the chunk `part` (N,), and a column of the chunk to look at (N, 1)."""
    at = targets.clamp(part.start, part.stop - 1)
    return at == targets, (at - part.start)[:, None]


def _chunks(N: int, V: int, itemsize: int) -> list[slice]:
    """Equal pieces of the vocabulary, of which (N, piece) stays within CHUNK_BYTES."""
    width = max(CHUNK_BYTES // (max(N, 1) * itemsize) // 256 * 256, 256)
    return [slice(lo, min(lo + width, V)) for lo in range(0, V, width)]


@jit
def _product(
    x, w, row, column, N, V,
    H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr,
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
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        tile = tl.dot(a, b.T, tile, input_precision="ieee")
    return tile


@jit
def logprob_strips(
    hidden, weight, targets,  # (N, H) and (V, H), descriptors with TMA; (N,) int64
    chosen, lse, mean_z,  # out: (N,), (strips, N), and (strips, N) or None, fp32
    N, V, scale, STRIP: tl.constexpr,
    H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of one strip for a block of rows, the target's logit where it lies in the strip, and the
    mean of z under the strip's softmax."""
    program, down = tl.program_id(0), tl.cdiv(N, ROWS)
    row, strip = program % down * ROWS, program // down
    rows = row + tl.arange(0, ROWS)
    target = tl.load(targets + rows, mask=rows < N, other=-1)
    lo, hi = strip * STRIP, tl.minimum(strip * STRIP + STRIP, V)
    m, zero = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    s, e, z_target = zero, zero, zero
    for column in tl.range(lo, hi, COLUMNS, num_stages=1):  # the loop over H is the one to pipeline
        z = scale * _product(hidden, weight, row, column, N, V, H, ROWS, COLUMNS, DEPTH, TMA)
        columns = column + tl.arange(0, COLUMNS)
        # Columns past V leave before the maximum: their zeros would outweigh a row of negative logits.
        z = tl.where((columns < V)[None, :], z, NEVER)
        z_target += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
        new = tl.maximum(m, tl.max(z, 1))
        p, keep = tl.exp(z - new[:, None]), tl.exp(m - new)
        s = s * keep + tl.sum(p, 1)
        if mean_z is not None:
            e = e * keep + tl.sum(p * z, 1)
        m = new
    at = strip.to(tl.int64) * N + rows
    tl.store(lse + at, m + tl.log(s), mask=rows < N)
    tl.store(chosen + rows, z_target, mask=(rows < N) & (target >= lo) & (target < hi))
    if mean_z is not None:
        tl.store(mean_z + at, e / s, mask=rows < N)


@jit
def logprob_dlogits(
    hidden, weight, targets, lse, grad,  # as above; the last two (N,)
    dz,  # out: (N, width of the chunk), its rows `stride` apart
    N, V, first, width, stride, scale,
    H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of dL / d(logits before the temperature), for the chunk of the vocabulary at `first`."""
    program, down, across = tl.program_id(0), tl.cdiv(N, ROWS), tl.cdiv(width, COLUMNS)
    first_row, inside = program // (GROUP * across) * GROUP, program % (GROUP * across)
    height = tl.minimum(down - first_row, GROUP)  # GROUP row blocks share a tile of the weight at a time
    row, column = (first_row + inside % height) * ROWS, inside // height * COLUMNS
    z = scale * _product(hidden, weight, row, first + column, N, V, H, ROWS, COLUMNS, DEPTH, TMA)
    rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    target = tl.load(targets + rows, mask=rows < N, other=-1)
    total = tl.load(lse + rows, mask=rows < N, other=0.0)
    g = tl.load(grad + rows, mask=rows < N, other=0.0) * scale
    hit = tl.where((first + columns)[None, :] == target[:, None], 1.0, 0.0)
    d = (hit - tl.exp(z - total[:, None])) * g[:, None]
    at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(dz + at, d.to(dz.dtype.element_ty), mask=(rows < N)[:, None] & (columns < width)[None, :])


def capability(device: torch.device) -> int:
    """Major compute capability: 8 is A100, 9 H100, 10 B200. Elsewhere 9, whose code the interpreter runs."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def operands(hidden: Tensor, weight: Tensor) -> tuple[tuple, dict]:
    """hidden and weight as `_product` reads them, and the pinned options of a kernel that calls it: never
    chosen by N, so that a row's sums are added in the same order in every batch. fp32 is exact, without
    tensor cores."""
    major, H = capability(hidden.device), hidden.shape[1]
    tma = (
        major in (9, 10)
        and len(hidden) > 0
        and all(  # it reads rows that begin at multiples of 16 bytes
            x.stride(1) == 1 and x.stride(0) * x.itemsize % 16 == x.data_ptr() % 16 == 0 and x.stride(0) >= H
            for x in (hidden, weight)
        )
    )
    # The compiler unrolls a loop of one step over H (on sm_100, of three), and a full tile would then spill.
    short = H <= (192 if major == 10 else 64)
    rows, columns, depth, stages = 64 if short else 128, 256 if tma else 128, 64, 4 if tma else 3
    if hidden.dtype == torch.float32:
        rows, columns, depth, stages = 64, 64, 32, 2
    sizes = {"H": H, "ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "TMA": tma}
    if tma:
        describe = triton.tools.tensor_descriptor.TensorDescriptor.from_tensor
        pair = describe(hidden, [rows, depth]), describe(weight, [columns, depth])
    else:
        pair = hidden.contiguous(), weight.contiguous()
    return pair, sizes | {"num_warps": 8, "num_stages": stages}


def logprob_triton(hidden, weight, targets, temperature, entropy):
    """-> logp, lse, entropy or None, each (N,) fp32."""
    N, V, strips = len(hidden), len(weight), triton.cdiv(len(weight), STRIP)
    chosen = torch.full((N,), math.nan, device=hidden.device)  # stays NaN where no strip has the target
    lse = chosen.new_empty(strips, N)
    mean_z = torch.empty_like(lse) if entropy else None
    pair, tile = operands(hidden, weight)
    start(
        logprob_strips, triton.cdiv(N, tile["ROWS"]) * strips, *pair, targets, chosen, lse, mean_z,
        N, V, 1 / temperature, STRIP=STRIP, **tile,
    )  # fmt: skip
    return _merge(chosen, lse, mean_z)


def dlogits_triton(hidden, weight, targets, lse, grad, part, temperature):
    """dL / d(logits before the temperature) of one chunk of the vocabulary, (N, chunk) in hidden's dtype."""
    N, V, width = len(hidden), len(weight), part.stop - part.start
    dtype = torch.float32 if INTERPRETED else hidden.dtype  # the interpreter truncates what it stores as bf16
    dz = torch.empty(N, -(-width // 64) * 64, dtype=dtype, device=hidden.device)[:, :width]  # aligned rows
    pair, tile = operands(hidden, weight)
    start(
        logprob_dlogits, triton.cdiv(N, tile["ROWS"]) * triton.cdiv(width, tile["COLUMNS"]), *pair,
        targets, lse, grad.contiguous(), dz, N, V, part.start, width, dz.stride(0), 1 / temperature, **tile,
    )  # fmt: skip
    return dz


class _Logprob(torch.autograd.Function):
    """The chunks, the recomputation and the two gradient products are the same by Triton and by torch."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy, by_triton):
        forward = logprob_triton if by_triton else logprob_reference
        logp, lse, spread, *kept = forward(hidden, weight, targets, temperature, entropy)
        ctx.save_for_backward(hidden, weight, targets, lse, *kept)
        ctx.temperature, ctx.by_triton = temperature, by_triton
        if entropy:
            ctx.mark_non_differentiable(spread)
        return logp, spread

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        hidden, weight, targets, lse, *kept = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dlogits = dlogits_triton if ctx.by_triton else dlogits_reference
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

    hidden and weight are both bf16 or both fp32, in any layout; N may be 0. What does not fit raises
    ValueError or TypeError, but on CUDA, where looking would stall the stream, a target outside 0..V-1 has
    the log-prob NaN.
    """
    return linear_logprob_stats(hidden, weight, targets, temperature).logp


def linear_logprob_stats(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, entropy: bool = False
) -> TokenStats:
    """`linear_logprob` and, if wanted, the entropy from the same logits; only logp carries a gradient."""
    x, w, t = (f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in (hidden, weight, targets))
    matrices = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1] and weight.numel()
    if not matrices or targets.shape != hidden.shape[:1]:
        raise ValueError(f"hidden must be (N, H), weight (V, H), targets (N,); they are {x}, {w}, {t}")
    if not (hidden.device == weight.device == targets.device):
        raise ValueError(f"hidden, weight and targets are on different devices: {x}, {w}, {t}")
    integers = not (targets.is_floating_point() or targets.dtype == torch.bool)
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.bfloat16, torch.float32) or not integers:
        raise TypeError(f"hidden and weight must be bfloat16 or float32, targets integers; not {x}, {w}, {t}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; it must be positive and finite")
    targets, temperature = targets.long().contiguous(), float(temperature)
    if not targets.is_cuda and ((targets < 0) | (targets >= len(weight))).any():
        raise ValueError(f"a target is outside 0..{len(weight) - 1}")
    return TokenStats(*_Logprob.apply(hidden, weight, targets, temperature, entropy, use_triton(hidden)))
