"""What a layer does beside attention and its products, both ways: RMSNorm, rotary embedding, SwiGLU.

    rms_norm(x)    = w x r,  r = 1 / sqrt(mean x^2 + eps)
    rotate(x)[d]   = x[d] cos - x[d + D/2] sin,  rotate(x)[d + D/2] = x[d + D/2] cos + x[d] sin
    swiglu(g, u)   = silu(g) u,  silu(g) = g / (1 + e^-g)

Each is one kernel forward and one backward where autograd's own operations would be two to eight, and each
keeps as little as the way back needs: a norm its input and r, a rotation nothing, SwiGLU its two inputs.
`swiglu_product` does not keep what the down projection reads, which is as wide as either, but makes it again.
At Qwen2.5-1.5B's shape a token leaves 55,352 bytes in each layer in bf16, where torch's operations by
themselves would leave 103,480.

Triton or the torch reference beside it, as `use_triton` says. Sums are added up in an order that depends on
the number of rows alone: results repeat to the bit. A row's outputs by kernels do not depend on its batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import jit, power_of_two, start, tl, use_triton, warps

NORM_ROWS = 32  # rows whose shares of the weight's gradient one program adds up
BLOCK = 1024  # numbers of one program of SwiGLU


@jit
def rms_norm_forward(x, weight, out, inverse, H, eps, BLOCK: tl.constexpr):
    """A row of (N, H): the mean of squares in fp32, the weight after rounding, as Qwen and Llama do it."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    wide = tl.load(x + row * H + h, mask=h < H, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)
    unit = (wide * r).to(out.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + h, mask=h < H, other=0.0).to(tl.float32)
    tl.store(out + row * H + h, (w * unit).to(out.dtype.element_ty), mask=h < H)
    if inverse is not None:
        tl.store(inverse + row, r)


@jit
def rms_norm_backward(x, weight, inverse, grad, dx, partial, N, H, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dx of ROWS rows, and in a row of `partial` their share of the weight's gradient, fp32."""
    program = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    w = tl.load(weight + h, mask=h < H, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, ROWS):
        row = program * ROWS + i
        here = (h < H) & (row < N)
        r = tl.load(inverse + row, mask=row < N, other=0.0)
        unit = tl.load(x + row * H + h, mask=here, other=0.0).to(tl.float32) * r
        g = tl.load(grad + row * H + h, mask=here, other=0.0).to(tl.float32)
        dw += g * unit
        g *= w
        g = (g - unit * (tl.sum(g * unit, 0) / H)) * r
        tl.store(dx + row * H + h, g.to(dx.dtype.element_ty), mask=here)
    tl.store(partial + program * H + h, dw, mask=h < H)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., H), weight (H,) -> the same shape and dtype. bf16 or fp32, in between fp32."""
    return _RMSNorm.apply(x, weight, eps, use_triton(x))


def norm_forward(x: Tensor, weight: Tensor, eps: float, inverse: Tensor | None = None) -> Tensor:
    """The forward kernel alone, x (..., H); it also writes each row's r to `inverse`, fp32, if given."""
    x = x.contiguous()
    out, H = torch.empty_like(x), x.shape[-1]
    sizes = {"BLOCK": power_of_two(H), "num_warps": warps(power_of_two(H))}
    start(rms_norm_forward, x.numel() // H, x, weight, out, inverse, H, eps, **sizes)
    return out


def norm_reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and r (..., 1) in fp32."""
    wide = x.float()
    length = torch.linalg.vector_norm(wide, 2, -1, True)
    inverse = length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return (wide * inverse).to(x.dtype).mul_(weight), inverse


def _norm_backward(x, weight, inverse, grad) -> tuple[Tensor, Tensor]:
    """-> dx, dL/dweight."""
    x, grad, H = x.contiguous(), grad.contiguous(), x.shape[-1]
    N, block = x.numel() // H, power_of_two(H)
    dx, programs = torch.empty_like(x), -(-N // NORM_ROWS)
    partial = x.new_empty(programs, H, dtype=torch.float32)
    sizes = {"ROWS": NORM_ROWS, "BLOCK": block, "num_warps": warps(block // 2)}  # of 8 for 2,048 sm_80 spills
    start(rms_norm_backward, programs, x, weight, inverse, grad, dx, partial, N, H, **sizes)
    return dx, partial.sum(0).to(weight.dtype)


def _norm_backward_reference(x, weight, inverse, grad) -> tuple[Tensor, Tensor]:
    unit, g = x.float() * inverse, grad.float()
    dw = (g * unit).flatten(0, -2).sum(0)
    g = g * weight
    share = (g * unit).sum(-1, keepdim=True).mul_(-1 / x.shape[-1])
    return torch.addcmul(g, unit, share).mul_(inverse).to(x.dtype), dw.to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, triton):
        if triton:
            inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
            out = norm_forward(x, weight, eps, inverse)
        else:
            out, inverse = norm_reference(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        ctx.triton = triton
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        backward = _norm_backward if ctx.triton else _norm_backward_reference
        return *backward(*ctx.saved_tensors, grad), None, None


@jit
def rotary(x, cos, sin, out, heads, rows, sign, D: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """The heads of one token, of x (N, heads, D), turned by the angle of its row of the table, or back."""
    token = tl.program_id(0).to(tl.int64)
    head, d = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    here = (head < heads) & (d < D // 2)
    first = (token * heads + head) * D + d
    angle = token % rows * D + D // 2 + d  # in the second half of the table sin is positive
    a = tl.load(x + first, mask=here, other=0.0).to(tl.float32)
    b = tl.load(x + first + D // 2, mask=here, other=0.0).to(tl.float32)
    c = tl.load(cos + angle, mask=d < D // 2, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=d < D // 2, other=0.0).to(tl.float32) * sign
    tl.store(out + first, (a * c - b * s).to(out.dtype.element_ty), mask=here)
    tl.store(out + first + D // 2, (b * c + a * s).to(out.dtype.element_ty), mask=here)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding. x (B, T, heads, D), cos and sin (B or 1, T, 1, D): those of the angle, for both of a
    pair d and d + D/2, the first sin negative."""
    return _Rotary.apply(x, cos, sin) if use_triton(x) else rotate_reference(x, cos, sin)


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _turn(grad, *ctx.saved_tensors, -1.0), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    x, (cos, sin) = x.contiguous(), (t.contiguous() for t in (cos, sin))
    out, (heads, D) = torch.empty_like(x), x.shape[-2:]
    sizes = {"D": D, "HEADS": power_of_two(heads), "HALF": power_of_two(D // 2)}
    wanted = warps(sizes["HEADS"] * sizes["HALF"])
    tokens = x.numel() // (heads * D)
    start(rotary, tokens, x, cos, sin, out, heads, cos.numel() // D, sign, **sizes, num_warps=wanted)
    return out


@jit
def swiglu_forward(gate, up, out, size, I, stride, BLOCK: tl.constexpr):
    """silu(gate) * up of (N, I), whose rows lie `stride` apart."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = i // I * stride + i % I
    g = tl.load(gate + at, mask=i < size, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=i < size, other=0.0).to(tl.float32)
    tl.store(out + i, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=i < size)


@jit
def swiglu_backward(gate, up, grad, dgate, dup, again, size, BLOCK: tl.constexpr):
    """Both gradients, all (N, I); and forward's result again, where there is room for it."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < size, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < size, other=0.0).to(tl.float32)
    d = tl.load(grad + i, mask=i < size, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dgate + i, (d * u * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), mask=i < size)
    tl.store(dup + i, (d * g * s).to(dup.dtype.element_ty), mask=i < size)
    if again is not None:
        tl.store(again + i, (g * s * u).to(again.dtype.element_ty), mask=i < size)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up (..., I) -> silu(gate) * up."""
    return _SwiGLU.apply(gate, up, use_triton(gate))


def swiglu_product(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """swiglu(gate, up) @ weight^T, weight (H, I) -> (..., H); keeps gate and up alone."""
    return _SwiGLUProduct.apply(gate, up, weight, use_triton(gate))


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """The forward kernel alone; gate and up (N, I) may be two halves of one (N, 2I)."""
    if gate.dim() > 2 or gate.stride() != up.stride() or gate.stride(-1) != 1:
        gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    I, size = gate.shape[-1], out.numel()
    stride = I if gate.is_contiguous() else gate.stride(-2)
    start(swiglu_forward, -(-size // BLOCK), gate, up, out, size, I, stride, BLOCK=BLOCK, num_warps=4)
    return out


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


def _swiglu_backward(gate, up, grad, again: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> dgate, dup, and `again` the forward result."""
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    dgate, dup, size = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    h = torch.empty_like(gate) if again else None
    start(swiglu_backward, -(-size // BLOCK), gate, up, grad, dgate, dup, h, size, BLOCK=BLOCK, num_warps=4)
    return dgate, dup, h


def _swiglu_backward_reference(gate, up, grad, again: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    silu = F.silu(gate)
    h = silu * up if again else None
    return torch.ops.aten.silu_backward(grad * up, gate), silu.mul_(grad), h


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, triton):
        ctx.save_for_backward(gate, up)
        ctx.triton = triton
        return (silu_mul if triton else silu_mul_reference)(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        backward = _swiglu_backward if ctx.triton else _swiglu_backward_reference
        return *backward(*ctx.saved_tensors, grad, False)[:2], None


class _SwiGLUProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, weight, triton):
        ctx.save_for_backward(gate, up, weight)
        ctx.triton = triton
        return F.linear((silu_mul if triton else silu_mul_reference)(gate, up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up, weight = ctx.saved_tensors
        backward = _swiglu_backward if ctx.triton else _swiglu_backward_reference
        dgate, dup, h = backward(gate, up, grad @ weight, ctx.needs_input_grad[2])
        dweight = None if h is None else grad.flatten(0, -2).t() @ h.flatten(0, -2)  # (H, I)
        return dgate, dup, dweight, None
