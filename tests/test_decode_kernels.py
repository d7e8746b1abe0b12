"""The kernels of a decode step against loops in float64: attention over the cache, and the draw."""

import math

import pytest
import torch

from kernels.decode import attend_cached, draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUND = {torch.float32: 2e-5, torch.bfloat16: 4e-2}  # of what is of order 1
each_dtype = pytest.mark.parametrize("dtype", list(BOUND), ids=["fp32", "bf16"])


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def step_by_loop(qkv, angle, at, keys, values, norms):
    """-> (B, Q * D) and the cache afterwards, in float64: heads are normed, turned, stored, attended to."""
    keys, values = keys.double(), values.double()
    K, D = keys.shape[1], keys.shape[3]
    rows = []
    for b, position in enumerate(at.tolist()):
        heads = qkv[b].double().view(-1, D)
        Q = len(heads) - 2 * K
        turned = []
        for i, x in enumerate(heads[: Q + K]):
            if norms:
                x = norms[i >= Q].double() * x * (x.square().mean() + 1e-6).rsqrt()
            a, c = x.chunk(2)
            cos, sin = angle[position].cos(), angle[position].sin()
            turned.append(torch.cat([a * cos - c * sin, c * cos + a * sin]))
        keys[b, :, position], values[b, :, position] = torch.stack(turned[Q:]), heads[Q + K :]
        for i, q in enumerate(turned[:Q]):
            k, v = (x[b, i // (Q // K), : position + 1] for x in (keys, values))
            rows.append((k @ q / math.sqrt(D)).softmax(0) @ v)
    return torch.stack(rows).view(len(at), -1), keys, values


@each_dtype
@pytest.mark.parametrize("B, Q, K, D, capacity, normed", [
    (1, 2, 2, 16, 1, False), (3, 6, 2, 10, 64, True), (5, 3, 1, 16, 300, True), (2, 4, 2, 80, 257, False)
])  # fmt: skip
def test_a_new_token_is_stored_and_sees_its_row_alone(launches, dtype, B, Q, K, D, capacity, normed):
    """Rows that end just before, at and after the bounds of splits and tiles; what lies behind is NaN."""
    qkv, angle = random(B, (Q + 2 * K) * D, dtype=dtype), random(capacity + 2, D // 2).double()
    cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([-angle.sin(), angle.sin()], 1)
    cos, sin = cos[:, None].to(dtype), sin[:, None].to(dtype)  # (positions, 1, D)
    norms = (random(D, seed=3, dtype=dtype), random(D, seed=4, dtype=dtype)) if normed else ()
    keys, values = random(2, B + 2, K, capacity, D, seed=1, dtype=dtype)
    ends = [capacity - 1, 127, 128, 0, 64] if capacity > 128 else [capacity - 1, 0, 63 % capacity]
    at = torch.tensor(ends[:B], device=DEVICE)
    want = step_by_loop(qkv, angle, at, keys, values, norms)
    for b in range(B):
        keys[b, :, at[b] + 1 :] = values[b, :, at[b] + 1 :] = math.nan
    before = [keys.clone(), values.clone()]
    got = attend_cached(qkv, cos, sin, at, keys, values, norms, 1e-6)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want[0], atol=BOUND[dtype], rtol=BOUND[dtype])
    rows = torch.arange(B, device=DEVICE)
    for cache, old, exact in zip((keys, values), before, want[1:]):
        new = cache[rows, :, at].double()
        torch.testing.assert_close(new, exact[rows, :, at], atol=3 * BOUND[dtype], rtol=BOUND[dtype])
        old[rows, :, at] = cache[rows, :, at]
        assert torch.equal(cache.nan_to_num(), old.nan_to_num()), "an old entry was written"
    for b in range(B):
        one = slice(b, b + 1)
        alone = attend_cached(qkv[one], cos, sin, at[one], keys[one], values[one], norms, 1e-6)
        assert torch.equal(alone[0], got[b]), "a row's bits depend on its batch"


def draw_by_loop(logits, uniform, temperature):
    tokens, logprobs = [], []
    for row, u in zip(logits.double(), uniform.double()):
        logp = (row / (temperature or 1.0)).log_softmax(0)  # (V,)
        token = int(row.argmax())
        if temperature != 0:
            token = next(v for v in range(len(row)) if u < logp[: v + 1].exp().sum() or v + 1 == len(row))
        tokens.append(token)
        logprobs.append(logp[token])
    return tokens, torch.stack(logprobs).float()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("B, V", [(1, 3), (5, 203), (3, 4096), (4, 9001)])
def test_a_draw_inverts_the_cumulative_distribution_and_at_0_is_the_argmax(path, temperature, B, V):
    logits = 4 * random(B, V)
    logits[:, 1::3] = -math.inf
    logits[-1, : V // 2] = -math.inf  # a whole strip without any probability, where there are two
    uniform = torch.rand(B, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    uniform[0] = 0.0
    for t in (temperature, 0):
        token, logprob = draw(logits, uniform, t)
        want, want_logprob = draw_by_loop(logits.cpu(), uniform.cpu(), t)
        assert token.tolist() == want and token.dtype == torch.int64
        torch.testing.assert_close(logprob.cpu(), want_logprob, atol=1e-5, rtol=0)


def test_a_draw_near_one_has_a_token_that_can_be_and_nan_shows(launches):
    logits = random(4, 9000)
    logits[:, 4000:] = -math.inf
    logits[2, 7], logits[3, 4500] = math.nan, math.inf
    token, logprob = draw(logits, torch.full((4,), 1 - 2**-24, device=DEVICE), 1.0)
    assert max(token[:2].tolist()) < 4000 and logprob[:2].isfinite().all()
    assert logprob[2:].isnan().all() and max(token.tolist()) < 9000
