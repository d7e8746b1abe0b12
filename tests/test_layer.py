"""Norm, rotation and SwiGLU are their formulas, both ways, and keep little for the way back."""

import pytest
import torch
import torch.nn.functional as F

from kernels import layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def norm(x, weight):
    return weight * (x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt())


def turned(x, cos, sin):
    a, b = x.chunk(2, -1)
    c, s = cos.chunk(2, -1)[0], sin.chunk(2, -1)[1]
    return torch.cat([a * c - b * s, b * c + a * s], -1)


def table(rows: int, T: int, D: int):
    angle = torch.randn(rows, T, 1, D // 2, generator=torch.Generator().manual_seed(9))
    return torch.cat([angle.cos()] * 2, -1).to(DEVICE), torch.cat([-angle.sin(), angle.sin()], -1).to(DEVICE)


def silu(x, w=None):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up if w is None else F.silu(gate) * up @ w.t()


CASES = [  # ours, the formula, shapes of its inputs, what else ours takes
    *((layer.rms_norm, norm, [s, s[-1:]], [1e-5]) for s in [(1, 64), (33, 30), (2, 5, 896), (3, 4, 3, 14)]),
    *((layer.swiglu, silu, [s], []) for s in [(1, 10), (3, 82), (2, 3, 1400)]),
    *((layer.swiglu, silu, [s, w], []) for s, w in [((1, 6), (2, 3)), ((2, 7, 600), (24, 300))]),
]


def both_ways(f, inputs, *more) -> list:
    """f's result, then the gradient of each input for a fixed one of the result."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = f(*inputs, *more)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def no_worse_than_torch(got, plain, exact, dtype):
    """Against float64, at most twice the error of the same formula by torch's operations in this dtype."""
    for g, p, e in zip(got, plain, exact, strict=True):
        assert g.dtype == dtype and g.shape == e.shape
        error, allowed = ((x.double() - e).abs().max() for x in (g, p))
        assert error <= 2 * allowed + 2 * torch.finfo(dtype).eps * e.abs().max()


@each_dtype
@pytest.mark.parametrize("f, formula, shapes, more", CASES, ids=[f"{c[1].__name__}-{c[2]}" for c in CASES])
def test_results_and_gradients_are_the_formulas(path, dtype, f, formula, shapes, more):
    generator = torch.Generator().manual_seed(0)
    inputs = [(2 * torch.randn(shape, generator=generator)).to(DEVICE, dtype) for shape in shapes]
    exact = both_ways(formula, [x.double() for x in inputs])
    no_worse_than_torch(both_ways(f, inputs, *more), both_ways(formula, inputs), exact, dtype)


@each_dtype
@pytest.mark.parametrize("rows_of_table", [1, None], ids=["one-table", "table-a-row"])
@pytest.mark.parametrize("B, T, heads, D", [(1, 1, 1, 2), (2, 5, 3, 10), (3, 2, 4, 80)])
def test_heads_are_turned_and_gradients_turned_back(path, dtype, rows_of_table, B, T, heads, D):
    x = torch.randn(B, T, heads, D, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    cos, sin = (t.to(dtype) for t in table(rows_of_table or B, T, D))
    got, plain = both_ways(layer.rotate, [x], cos, sin), both_ways(turned, [x], cos, sin)
    no_worse_than_torch(got, plain, both_ways(turned, [x.double()], cos.double(), sin.double()), dtype)


def test_extreme_inputs_stay_finite_and_nan_shows(path):
    gate, ones = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=DEVICE), torch.ones(30, device=DEVICE)
    x = torch.tensor([[0.0], [1e15], [1e-15]], device=DEVICE).expand(3, 30).clone()
    found = both_ways(layer.swiglu, [torch.cat([gate, torch.ones_like(gate)], 1)])
    assert all(y.isfinite().all() for y in [*found, *both_ways(layer.rms_norm, [x, ones], 1e-5)])
    x[1, 7] = torch.nan
    for y in both_ways(layer.rms_norm, [x, ones], 1e-5)[:2]:
        assert y.isnan().all(1).tolist() == [False, True, False] and y[[0, 2]].isfinite().all()


def test_a_row_has_the_same_bits_in_every_batch(path):
    x = torch.randn(70, 2, 48, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight, (cos, sin) = torch.ones(48, device=DEVICE), table(70, 1, 48)
    whole, again = (both_ways(layer.rms_norm, [x[:, 0], weight], 1e-6) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(whole, again))
    for rows in (slice(3, 4), slice(31, 66)):
        turned_rows = layer.rotate(x[rows, None], cos[rows], sin[rows])
        assert torch.equal(layer.rms_norm(x[rows, 0], weight, 1e-6), whole[0][rows])
        assert torch.equal(turned_rows, layer.rotate(x[:, None], cos, sin)[rows])
        assert torch.equal(layer.swiglu(x[rows, 0]), layer.swiglu(x[:, 0])[rows])
