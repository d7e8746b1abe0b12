"""What a layer computes beside attention and its products, both ways: RMSNorm, rotary embedding, SwiGLU.

    rms_norm(x)    = w x r,  r = 1 / sqrt(mean x^2 + eps)
    rotate(x)[d]   = x[d] cos - x[d + D/2] sin,  rotate(x)[d + D/2] = x[d + D/2] cos + x[d] sin
    swiglu(g, u)   = silu(g) u,  silu(g) = g / (1 + e^-g)

All are bound by memory: forward reads and writes every number once, with under 20 FLOPs for it. At
Qwen2.5-1.5B's shape in bf16, 16,384 tokens and 3 TB/s that takes 34, 39 and 293 microseconds. For the way
back only a norm's and SwiGLU's input are kept: a token leaves 55,344 bytes in each layer, not 103,480. By the
kernels a row has the same bits in every batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import jit, start, tl, triton, use_triton

NORM_ROWS = 32  # rows whose shares of the weight's gradient one program adds up
BLOCK = 1024  # numbers of one program of SwiGLU


def norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * _inverse(wide, eps)).to(x.dtype).mul_(weight)


def _inverse(x: Tensor, eps: float) -> Tensor:
    length = torch.linalg.vector_norm(x, 2, -1, True)
    return length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()


@jit
def rms_norm_forward(x, weight, out, H, eps, BLOCK: tl.constexpr):
    """A row of (N, H): the mean of squares in fp32, the weight after rounding, as Qwen and Llama do it."""
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    wide = tl.load(x + row * H + h, mask=h < H, other=0.0).to(tl.float32)
    unit = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)).to(out.dtype.element_ty).to(tl.float32)
    w = tl.load(weight + h, mask=h < H, other=0.0).to(tl.float32)
    tl.store(out + row * H + h, (w * unit).to(out.dtype.element_ty), mask=h < H)


@jit
def rms_norm_backward(x, weight, grad, dx, partial, N, H, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dx of ROWS rows, and in a row of `partial` their share of the weight's gradient, fp32."""
    program = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    w = tl.load(weight + h, mask=h < H, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, ROWS):
        row = program * ROWS + i
        here = (h < H) & (row < N)
        wide = tl.load(x + row * H + h, mask=here, other=0.0).to(tl.float32)
        g = tl.load(grad + row * H + h, mask=here, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)
        unit = wide * r
        dw += g * unit
        g *= w
        g = (g - unit * (tl.sum(g * unit, 0) / H)) * r
        tl.store(dx + row * H + h, g.to(dx.dtype.element_ty), mask=here)
    tl.store(partial + program * H + h, dw, mask=h < H)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, by_triton):
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.by_triton = eps, by_triton
        if not by_triton:
            return norm_reference(x, weight, eps)
        x, H = x.contiguous(), x.shape[-1]
        out = torch.empty_like(x)
        start(rms_norm_forward, x.numel() // H, x, weight, out, H, eps, BLOCK=triton.next_power_of_2(H))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x, weight), H = ctx.saved_tensors, grad.shape[-1]
        if not ctx.by_triton:
            wide, g = x.float(), grad.float()
            inverse = _inverse(wide, ctx.eps)
            unit = wide * inverse
            dw = (g * unit).flatten(0, -2).sum(0)
            g = g * weight
            share = (g * unit).sum(-1, keepdim=True).mul_(-1 / H)
            dx = torch.addcmul(g, unit, share).mul_(inverse)
            return dx.to(x.dtype), dw.to(weight.dtype), None, None
        x, grad = x.contiguous(), grad.contiguous()
        N, sizes = x.numel() // H, {"ROWS": NORM_ROWS, "BLOCK": triton.next_power_of_2(H)}
        dx, partial = torch.empty_like(x), x.new_empty(triton.cdiv(N, NORM_ROWS), H, dtype=torch.float32)
        start(rms_norm_backward, len(partial), x, weight, grad, dx, partial, N, H, ctx.eps, **sizes)
        return dx, partial.sum(0).to(weight.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., H), weight (H,) -> the same shape and dtype. bf16 or fp32, in between fp32."""
    return _RMSNorm.apply(x, weight, eps, use_triton(x))


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


@jit
def turned(x, g, count, cos, sin, weight, eps, D: tl.constexpr, WIDE: tl.constexpr):
    """Heads g < count at x, D numbers each, normed if there is a weight, then turned: (len(g), WIDE)."""
    d = tl.arange(0, WIDE)[None, :]
    here, other = (g[:, None] < count) & (d < D), (d + D // 2) % D  # the other of each pair
    a = tl.load(x + g[:, None] * D + d, mask=here, other=0.0).to(tl.float32)
    b = tl.load(x + g[:, None] * D + other, mask=here, other=0.0).to(tl.float32)
    dtype = x.dtype.element_ty
    if weight is not None:
        scale = tl.rsqrt(tl.sum(a * a, 1) / D + eps)[:, None]
        a = (a * scale).to(dtype).to(tl.float32) * tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
        b = (b * scale).to(dtype).to(tl.float32) * tl.load(weight + other).to(tl.float32)
    c = tl.load(cos + d, mask=d < D, other=0.0).to(tl.float32)
    s = tl.load(sin + d, mask=d < D, other=0.0).to(tl.float32)
    return (a * c + b * s).to(dtype)


@jit
def rotary(x, cos, sin, out, heads, stride, rows, D: tl.constexpr, HEADS: tl.constexpr, WIDE: tl.constexpr):
    """The heads of one token of x (N, heads, D), whose tokens lie `stride` apart."""
    token = tl.program_id(0).to(tl.int64)
    g, d, angle = tl.arange(0, HEADS), tl.arange(0, WIDE)[None, :], token % rows * D
    y = turned(x + token * stride, g, heads, cos + angle, sin + angle, None, 0.0, D, WIDE)
    tl.store(out + (token * heads + g[:, None]) * D + d, y, mask=(g[:, None] < heads) & (d < D))


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        (B, T, heads, D), rows = x.shape, cos.numel() // x.shape[-1]
        evenly_spaced = x.stride() == (T * x.stride(1), x.stride(1), D, 1)
        x = x if evenly_spaced else x.contiguous()
        out, cos, sin = x.new_empty(x.shape), cos.contiguous(), sin.contiguous()
        sizes = {"D": D, "HEADS": triton.next_power_of_2(heads), "WIDE": triton.next_power_of_2(D)}
        start(rotary, B * T, x, cos, sin, out, heads, x.stride(1), rows, **sizes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _Rotary.apply(grad, cos, -sin), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding. x (B, T, heads, D), which may be some heads of a wider tensor; cos and sin (B or 1,
    T, 1, D) hold each angle for both d and d + D/2, the first half of sin negative."""
    return _Rotary.apply(x, cos, sin) if use_triton(x) else rotate_reference(x, cos, sin)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


@jit
def swiglu_kernel(gate_up, h, grad, out, size, I, BLOCK: tl.constexpr):
    """gate_up (N, 2I) -> h = silu(gate) * up (N, I), `size` numbers, unless h is None. `grad` (N, I) -> the
    gradient `out` (N, 2I), unless `grad` is None."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = i // I * 2 * I + i % I
    g = tl.load(gate_up + gate, mask=i < size, other=0.0).to(tl.float32)
    u = tl.load(gate_up + gate + I, mask=i < size, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    if h is not None:
        tl.store(h + i, (g * s * u).to(h.dtype.element_ty), mask=i < size)
    if grad is not None:
        d = tl.load(grad + i, mask=i < size, other=0.0).to(tl.float32)
        tl.store(out + gate, (d * u * s * (1.0 + g * (1.0 - s))).to(out.dtype.element_ty), mask=i < size)
        tl.store(out + gate + I, (d * g * s).to(out.dtype.element_ty), mask=i < size)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, weight, by_triton):
        ctx.save_for_backward(gate_up, weight)
        ctx.by_triton = by_triton
        if by_triton:
            gate_up, I = gate_up.contiguous(), gate_up.shape[-1] // 2
            h = gate_up.new_empty(*gate_up.shape[:-1], I)
            programs, sizes = triton.cdiv(h.numel(), BLOCK), (h.numel(), I)
            start(swiglu_kernel, programs, gate_up, h, None, None, *sizes, BLOCK=BLOCK)
        else:
            h = swiglu_reference(gate_up)
        return h if weight is None else F.linear(h, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate_up, weight = ctx.saved_tensors
        gate_up, dh = gate_up.contiguous(), (grad if weight is None else grad @ weight).contiguous()
        out, h = torch.empty_like(gate_up), torch.empty_like(dh) if ctx.needs_input_grad[1] else None
        if ctx.by_triton:
            programs, sizes = triton.cdiv(dh.numel(), BLOCK), (dh.numel(), dh.shape[-1])
            start(swiglu_kernel, programs, gate_up, h, dh, out, *sizes, BLOCK=BLOCK)
        else:
            (gate, up), (dgate, dup) = gate_up.chunk(2, -1), out.chunk(2, -1)
            silu = F.silu(gate)
            torch.mul(silu, dh, out=dup)
            if h is not None:
                torch.mul(silu, up, out=h)
            torch.ops.aten.silu_backward.grad_input(torch.mul(dh, up, out=silu), gate, grad_input=dgate)
        dweight = None if h is None else grad.flatten(0, -2).t() @ h.flatten(0, -2)  # (H, I)
        return out, dweight, None


def swiglu(gate_up: Tensor, weight: Tensor | None = None) -> Tensor:
    """gate_up (..., 2I), gate first -> silu(gate) * up (..., I); with the down projection's weight (H, I)
    their product (..., H), for which nothing but gate_up is kept."""
    return _SwiGLU.apply(gate_up, weight, use_triton(gate_up))
