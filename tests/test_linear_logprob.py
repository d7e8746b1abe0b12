"""linear_logprob against float64, by both paths: the kernels (in Triton's interpreter on a CPU) and torch."""

import contextlib
import sys

import pytest
import torch

import kernels
from kernels import linear_logprob, linear_logprob_stats

module = sys.modules["kernels.linear_logprob"]  # the package's name for it is the function
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 64, 203), (127, 100, 1000), (129, 72, 4099), (5, 128, 384)]  # (N, H, V); no V divides 256


def inputs(N, H, V, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g).to(DEVICE, dtype)
    weight = (0.3 * torch.randn(V, H, generator=g)).to(DEVICE, dtype)
    targets = torch.randint(0, V, (N,), generator=g).to(DEVICE)
    targets[:1], targets[-1:] = 0, V - 1
    return hidden, weight, targets, torch.randn(N, generator=g).to(DEVICE)


def truth(hidden, weight, targets, grad, temperature=1.0, dtype=torch.float64):
    """(logp, entropy, dX, dW) by the formula; in bf16 that is what a user would write without kernels."""
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight.t()
    logps = (logits.float() if dtype == torch.bfloat16 else logits).div(temperature).log_softmax(1)
    logp = logps.gather(1, targets[:, None])[:, 0]
    logp.backward(grad.to(logp.dtype))
    entropy = -(logps.exp() * logps).sum(1)
    return tuple(x.detach().double() for x in (logp, entropy, hidden.grad, weight.grad))


def ours(hidden, weight, targets, grad, temperature=1.0):
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    logp, entropy = linear_logprob_stats(hidden, weight, targets, temperature, entropy=True)
    logp.backward(grad)
    return logp.detach(), entropy, hidden.grad, weight.grad


def check(arguments, bound=3e-5, temperature=1.0):
    """Within `bound` of float64, log-probs and entropy in bf16 too, since logits are fp32 sums. Gradients in
    bf16 are at most twice as far off as those of the same expression in bf16."""
    got, want = ours(*arguments, temperature), truth(*arguments, temperature)
    plain = truth(*arguments, temperature, dtype=torch.bfloat16)
    for i, (value, exact, naive) in enumerate(zip(got, want, plain)):
        rounded = 2 * (naive - exact).abs().max() if i >= 2 and arguments[0].dtype == torch.bfloat16 else 0.0
        assert value.dtype == (torch.float32 if i < 2 else arguments[0].dtype)
        assert (value.double() - exact).abs().max() <= bound + rounded, "logp entropy dX dW".split()[i]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_everything_equals_float64(shape, dtype, path):
    check(inputs(*shape, dtype), temperature=0.8)
    if path == "triton":
        assert {"logprob_strips", "logprob_dlogits"} == set(kernels.launch.launches)


@pytest.mark.parametrize("temperature", [0.3, 2.5])
def test_large_logits_and_columns_past_the_vocabulary(path, temperature):
    """Where every logit is near -80, a padding column at 0 would be the whole softmax; then of both signs."""
    hidden, weight, targets, grad = inputs(4, 64, 203)
    for h, w in ((hidden.abs() + 0.5, -weight.abs() - 0.2), (hidden, weight)):
        h *= 80 * temperature / (h @ w.t()).abs().amax(1, keepdim=True)
        check((h, w, targets, grad), bound=5e-4, temperature=temperature)


def test_layouts_and_a_vocabulary_in_chunks(path, monkeypatch):
    """Transposed, strided and misaligned inputs; memory decides the chunks of the vocabulary."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 40 * 256 * 4)
    assert len(module._chunks(40, 1000, 4)) == 4
    hidden, weight, targets, grad = inputs(40, 50, 1000)
    spread = torch.empty(80, 101, device=DEVICE)[::2, 1::2].copy_(hidden)
    strided = (spread, weight.t().contiguous().t(), torch.stack((targets, targets), 1)[:, 0])
    assert not any(x.is_contiguous() for x in strided)
    check((*strided, grad))


def test_without_tma(launches):
    """Rows of 74 bf16 numbers do not begin at multiples of 16 bytes: they are read as on an A100."""
    arguments = inputs(130, 74, 300, torch.bfloat16)
    assert not module.operands(*arguments[:2])[1]["TMA"]
    check(arguments)


def test_offsets_past_32_bits(launches):
    """Row 128 of this hidden lies 2^31 elements in; only the pages that are touched exist (4 GB reserved)."""
    hidden, weight, targets, _ = inputs(129, 32, 203, torch.bfloat16)
    far = torch.empty(0, dtype=torch.bfloat16, device=DEVICE).new_empty(129, 2**24)[:, :32].copy_(hidden)
    assert 128 * far.stride(0) == 2**31
    assert torch.equal(linear_logprob(far, weight, targets), linear_logprob(hidden, weight, targets))


def test_the_same_bits_alone_shuffled_and_padded(launches):
    """Products of multiples of 1/8 are exact: the interpreter's BLAS rounds by place, a GPU does not."""
    hidden, weight, targets, _ = inputs(130, 64, 2500, torch.bfloat16)
    hidden, weight = (hidden * 8).round() / 8, (weight * 8).round() / 8
    logp = linear_logprob(hidden, weight, targets)
    alone = linear_logprob(hidden[129:], weight, targets[129:])
    order = torch.randperm(130, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    padded = linear_logprob(torch.cat((hidden[:3], hidden)), weight, torch.cat((targets[:3], targets)))
    assert torch.equal(alone, logp[129:])
    assert torch.equal(linear_logprob(hidden[order], weight, targets[order]), logp[order])
    assert torch.equal(padded[3:], logp)


def test_results_repeat_to_the_bit_and_only_what_needs_a_gradient_gets_one(path):
    hidden, weight, targets, grad = arguments = inputs(33, 64, 700)
    first, again = ours(*arguments), ours(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    logp = linear_logprob(hidden.requires_grad_(), weight, targets)  # which does not look at the entropy
    logp.backward(grad)
    assert torch.equal(logp, first[0]) and torch.equal(hidden.grad, first[2]) and weight.grad is None
    assert not linear_logprob_stats(hidden, weight, targets, entropy=True)[1].requires_grad
    logp, entropy, dx, dw = ours(*inputs(0, 64, 203))  # no tokens
    assert logp.shape == entropy.shape == (0,) and dx.shape == (0, 64) and not dw.any()


def test_nan_stays_in_its_row_and_a_target_outside_the_vocabulary_is_nan(path):
    h, w, t, _ = inputs(4, 64, 203)
    broken = h.clone()
    broken[1, 3] = float("nan")
    assert linear_logprob(broken, w, t).isnan().tolist() == [False, True, False, False]
    for target in (-1, 203):
        t[2] = target
        assert linear_logprob(h, w, t).isnan().tolist() == [False, False, True, False]


def test_bad_input_is_refused():
    h, w, t, _ = inputs(4, 64, 203)
    wrong = [(h[0], w, t), (h[:, :60], w, t), (h.bfloat16(), w, t), (h.half(), w.half(), t), (h, w[:0], t)]
    for arguments in [*wrong, *((h, w, ids) for ids in (t[:3], t.float(), t > 3, t.to("meta")))]:
        with pytest.raises(ValueError, match=r"takes hidden \(N, H\) and weight \(V, H\)"):
            linear_logprob(*arguments)
    for temperature in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"at temperature {temperature}"):
            linear_logprob(h, w, t, temperature)
    assert torch.equal(linear_logprob(h, w, t.int()), linear_logprob(h, w, t))


@pytest.mark.parametrize("mode, able, answer", [
    ("torch", True, False), ("auto", True, True), ("triton", True, True), ("auto", False, False),
    ("cuda", True, "TEAMTR_KERNELS is 'cuda'"), ("triton", False, "TRITON_INTERPRET=1"),
])  # fmt: skip
def test_the_switch(monkeypatch, mode, able, answer):
    pytest.importorskip("triton")
    monkeypatch.setenv("TEAMTR_KERNELS", mode)
    monkeypatch.setattr(kernels.launch, "INTERPRETED", able)
    refused = pytest.raises(ValueError, match=answer) if isinstance(answer, str) else contextlib.nullcontext()
    with refused:
        assert kernels.use_triton(torch.ones(1)) == answer
