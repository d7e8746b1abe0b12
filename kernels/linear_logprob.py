"""Hidden states x output head -> log-prob of the sampled tokens, without [tokens, vocabulary] in memory.

    z = hidden @ weight^T / temperature                          (N, V), in fp32, only ever a piece at a time
    logp[t] = z[t, target[t]] - lse[t],  lse[t] = log sum_v exp z[t, v]
    entropy[t] = lse[t] - sum_v z[t, v] exp(z[t, v] - lse[t])
    dL/dz[t, v] = g[t] (1[v = target[t]] - exp(z[t, v] - lse[t])),  g = dL/dlogp

z comes from fp32 accumulators: bf16 logits are off by 2e-2, over 256 tokens more than a trust region.
F = 2 N H V FLOPs forward; backward makes z again, and from it dX = dZ W and dW = dZ^T X: 4F both ways. At
N 16,384, H 1,536, V 151,936 and 790 TFLOP/s of dense bf16 the floor is 9.7 ms forward and 38.7 ms both ways.

Forward: one program walks a block of rows through one strip of the vocabulary; strips are merged in order.
Backward: a kernel writes dZ by chunks of the vocabulary; the vendor's products turn it into dW and dX.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import INTERPRETED, UPCAST, jit, start, tl, triton, use_triton

CHUNK_BYTES = 112 * 2**20  # most of dZ, and of the reference's logits, at one time
STRIP = 2048  # vocabulary per forward program: 75 partial results a row at V = 151,936
GROUP = tl.constexpr(16)  # row blocks that share a tile of the weight while it is in L2
NEVER = tl.constexpr(-1e30)  # the logit of a column past V; finite, so that 0 probability times it is 0


def strips_reference(hidden, weight, targets, temperature, entropy, chosen):
    """-> log-sum-exp and, for the entropy, mean logit of each part of the vocabulary, (parts, N) fp32; then
    the logits, if one part held them all. The targets' logits go to `chosen` (N,)."""
    parts, lse, mean_z = _chunks(len(hidden), len(weight), 4), [], []
    for part in parts:
        z = (hidden.float() / temperature) @ weight[part].float().t()  # (N, chunk)
        rows = (targets >= part.start) & (targets < part.stop)  # whose target the chunk has
        chosen[rows] = z[rows, targets[rows] - part.start]
        most = z.amax(1)
        p = (z - most[:, None]).exp_()
        mass = p.sum(1)
        lse.append(most + mass.log())
        mean_z.append(torch.linalg.vecdot(p, z) / mass if entropy else most)
    return torch.stack(lse), torch.stack(mean_z), *([z] if len(parts) == 1 else [])


def dlogits_reference(hidden, weight, targets, lse, grad, part, temperature, z=None):
    """dL / d(logits before the temperature) of one chunk of the vocabulary, (N, chunk) fp32."""
    z = (hidden.float() / temperature) @ weight[part].float().t() if z is None else z
    scale, rows = grad / temperature, (targets >= part.start) & (targets < part.stop)  # (N,)
    dz = (z - lse[:, None]).exp_().mul_(-scale[:, None])
    dz[rows, targets[rows] - part.start] += scale[rows]
    return dz


def _chunks(N: int, V: int, itemsize: int) -> list[slice]:
    """Equal parts of the vocabulary, of which (N, part) stays within CHUNK_BYTES."""
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


def operands(hidden: Tensor, weight: Tensor) -> tuple[tuple, dict]:
    """hidden and weight as `_product` reads them, and the options of a kernel that calls it: never chosen by
    N, so that a row's sums have the same order in every batch. fp32 is exact, without tensor cores."""
    major = 9 if hidden.device.type == "cpu" else torch.cuda.get_device_capability(hidden.device)[0]
    dense = all(x.stride(1) == 1 and x.stride(0) >= x.shape[1] for x in (hidden, weight))
    aligned = all(x.stride(0) * x.itemsize % 16 == x.data_ptr() % 16 == 0 for x in (hidden, weight))
    tma = major in (9, 10) and dense and aligned  # TMA reads rows that begin at multiples of 16 bytes
    # The compiler unrolls a loop of one step over H (on sm_100, of three), and a full tile would then spill.
    short = hidden.shape[1] <= (192 if major == 10 else 64)
    rows, columns, depth, stages = 64 if short else 128, 256 if tma else 128, 64, 4 if tma else 3
    if hidden.dtype == torch.float32:
        rows, columns, depth, stages = 64, 64, 32, 2
    options = {"H": hidden.shape[1], "ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "TMA": tma}
    options |= {"num_warps": 8, "num_stages": stages}
    if not tma:
        return (hidden.contiguous(), weight.contiguous()), options
    describe = triton.tools.tensor_descriptor.TensorDescriptor.from_tensor
    return (describe(hidden, [rows, depth]), describe(weight, [columns, depth])), options


def strips_triton(hidden, weight, targets, temperature, entropy, chosen):
    (N, V), strips = (len(hidden), len(weight)), triton.cdiv(len(weight), STRIP)
    lse, (pair, tile) = chosen.new_empty(strips, N), operands(hidden, weight)
    mean_z = torch.empty_like(lse) if entropy else None
    arrays, programs = (*pair, targets, chosen, lse, mean_z), triton.cdiv(N, tile["ROWS"]) * strips
    start(logprob_strips, programs, *arrays, N, V, 1 / temperature, STRIP=STRIP, **tile)
    return lse, mean_z


def dlogits_triton(hidden, weight, targets, lse, grad, part, temperature):
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
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, entropy, by_triton):
        chosen = torch.full(targets.shape, math.nan, device=hidden.device)  # stays NaN where no part has it
        strips = strips_triton if by_triton else strips_reference
        lse, mean_z, *kept = strips(hidden, weight, targets, temperature, entropy, chosen)
        most = lse.amax(0)
        share = lse.sub_(most).exp_()
        mass = share.cumsum(0)[-1]  # from part to part, in the same order for any N > 1
        total = most + mass.log()
        ctx.save_for_backward(hidden, weight, targets, total, *kept)
        ctx.temperature, ctx.by_triton = temperature, by_triton
        spread = total - mean_z.mul_(share).cumsum(0)[-1] / mass if entropy else None
        ctx.mark_non_differentiable(*([spread] if entropy else []))
        return chosen - total, spread

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        hidden, weight, targets, lse, *kept = ctx.saved_tensors
        dlogits = dlogits_triton if ctx.by_triton else dlogits_reference
        dx = torch.zeros(hidden.shape, device=hidden.device)  # fp32 for all chunks
        dw = weight.new_empty(weight.shape) if ctx.needs_input_grad[1] else None
        for part in _chunks(len(hidden), len(weight), hidden.itemsize if ctx.by_triton else 4):
            dz = dlogits(hidden, weight, targets, lse, grad, part, ctx.temperature, *kept)  # (N, chunk)
            if dw is not None:
                dw[part] = dz.t() @ hidden.to(dz.dtype)
            if dz.dtype == torch.bfloat16:
                torch.addmm(dx, dz, weight[part], out_dtype=torch.float32, out=dx)
            else:
                dx.addmm_(dz, weight[part].to(dz.dtype))
            del dz  # before the next chunk is made
        return dx.to(hidden.dtype), dw, *[None] * 4


def linear_logprob(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """hidden (N, H), weight (V, H), targets (N,) integers -> log-probs (N,) fp32 at `temperature`.

    hidden and weight are both bf16 or both fp32. What does not fit raises ValueError, but a target outside
    0..V-1 has log-prob NaN: looking would stall the stream."""
    return linear_logprob_stats(hidden, weight, targets, temperature)[0]


def linear_logprob_stats(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`linear_logprob` and, if wanted, the entropy (N,) fp32 in nats, which carries no gradient."""
    matrices = hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1] and weight.numel()
    floats = hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float32)
    integers = not (targets.is_floating_point() or targets.dtype == torch.bool)
    together = hidden.device == weight.device == targets.device and targets.shape == hidden.shape[:1]
    if not (matrices and floats and integers and together and 0 < temperature < math.inf):
        given = ", ".join(f"{tuple(x.shape)} {x.dtype} on {x.device}" for x in (hidden, weight, targets))
        wanted = "hidden (N, H) and weight (V, H), bfloat16 or float32, and targets (N,), integers"
        raise ValueError(f"it takes {wanted}, on one device, not {given} at temperature {temperature}")
    targets, by_triton = targets.long().contiguous(), len(hidden) > 0 and use_triton(hidden)
    return _Logprob.apply(hidden, weight, targets, float(temperature), entropy, by_triton)
