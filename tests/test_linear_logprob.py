"""linear_logprob against float64, by both paths: the kernels (in Triton's interpreter on a CPU) and torch."""

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
    """(logp, dX, dW, entropy) by the formula; in bf16 that is what a user would write without kernels."""
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    logits = hidden @ weight.t()
    logps = (logits.float() if dtype == torch.bfloat16 else logits).div(temperature).log_softmax(1)
    logp = logps.gather(1, targets[:, None])[:, 0]
    logp.backward(grad.to(logp.dtype))
    entropy = -(logps.exp() * logps).sum(1)
    return tuple(x.detach().double() for x in (logp, hidden.grad, weight.grad, entropy))


def ours(hidden, weight, targets, grad, temperature=1.0):
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    token = linear_logprob_stats(hidden, weight, targets, temperature, entropy=True)
    token.logp.backward(grad)
    return token.logp.detach(), hidden.grad, weight.grad, token.entropy


def error(got, want) -> float:
    return (got.double() - want).abs().max().item() if len(got) else 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_everything_equals_float64(shape, dtype, path):
    """bf16 rule: no farther from float64 than twice the same expression in bf16, where that errs at all."""
    hidden, weight, targets, grad = inputs(*shape, dtype)
    want = truth(hidden, weight, targets, grad, 0.8)
    got = ours(hidden, weight, targets, grad, 0.8)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    for value, exact in zip(got[:1] + got[3:], want[:1] + want[3:]):  # from fp32 accumulators in any dtype
        assert error(value, exact) < 3e-5
    plain = truth(hidden, weight, targets, grad, 0.8, dtype=dtype)
    for value, exact, naive in zip(got[1:3], want[1:3], plain[1:3]):
        assert error(value, exact) <= 2 * error(naive, exact) + 1e-5
    if path == "triton":
        assert {"logprob_strips", "logprob_dlogits"} == set(kernels.launch.launches)


def test_columns_past_the_vocabulary_do_not_count(path):
    """Where every logit is near -80, a padding column at 0 would be the whole softmax."""
    hidden, weight, targets, grad = inputs(3, 64, 203)
    hidden, weight = hidden.abs() + 0.5, -weight.abs() - 0.2
    hidden *= 80 / (hidden @ weight.t()).abs().max()
    got, want = ours(hidden, weight, targets, grad), truth(hidden, weight, targets, grad)
    assert all(error(a, b) < 1e-4 for a, b in zip(got[:4], want[:4]))


def test_large_logits_of_both_signs(path):
    hidden, weight, targets, grad = inputs(4, 64, 300)
    hidden *= 80 / (hidden @ weight.t()).abs().amax(1, keepdim=True)
    got, want = ours(hidden, weight, targets, grad), truth(hidden, weight, targets, grad)
    assert all(error(a, b) < 5e-4 for a, b in zip(got[:4], want[:4]))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature(temperature, path):
    hidden, weight, targets, grad = inputs(6, 64, 203)
    got = ours(hidden, weight, targets, grad, temperature)
    want = truth(hidden, weight, targets, grad, temperature)
    assert all(error(a, b) < 5e-5 for a, b in zip(got[:4], want[:4]))


def test_many_chunks_are_one(path, monkeypatch):
    """Memory decides the chunks of the vocabulary; nothing else may depend on them."""
    hidden, weight, targets, grad = inputs(40, 64, 1000)
    monkeypatch.setattr(module, "CHUNK_BYTES", 40 * 256 * 4)
    assert len(module._chunks(40, 1000, 4)) == 4
    got, want = ours(hidden, weight, targets, grad), truth(hidden, weight, targets, grad)
    assert all(error(a, b) < 3e-5 for a, b in zip(got, want))


def test_layouts(path):
    """Transposed, strided and misaligned inputs give what contiguous ones give."""
    hidden, weight, targets, grad = inputs(6, 50, 203)
    want = truth(hidden, weight, targets, grad)
    spread = torch.empty(12, 101, device=DEVICE)[::2, 1::2].copy_(hidden)
    strided = (spread, weight.t().contiguous().t(), torch.stack((targets, targets), 1)[:, 0], grad)
    assert not any(x.is_contiguous() for x in strided[:3])
    assert all(error(a, b) < 3e-5 for a, b in zip(ours(*strided)[:4], want[:4]))


def test_without_tma(launches, monkeypatch):
    """The way that an A100 reads its operands."""
    monkeypatch.setattr(module, "capability", lambda device: 8)
    hidden, weight, targets, grad = inputs(130, 72, 300, torch.bfloat16)
    got, want = ours(hidden, weight, targets, grad), truth(hidden, weight, targets, grad)
    plain = truth(hidden, weight, targets, grad, dtype=torch.bfloat16)
    assert all(error(got[i], want[i]) < 3e-5 for i in (0, 3))
    assert all(error(got[i], want[i]) <= 2 * error(plain[i], want[i]) + 1e-5 for i in (1, 2))


def test_offsets_past_32_bits(launches):
    """Row 128 of this hidden lies 2^31 elements in; only the pages that are touched exist (4 GB reserved)."""
    hidden, weight, targets, grad = inputs(129, 32, 203, torch.bfloat16)
    far = torch.empty(0, dtype=torch.bfloat16, device=DEVICE).new_empty(129, 2**24)[:, :32].copy_(hidden)
    assert 128 * far.stride(0) == 2**31
    assert torch.equal(linear_logprob(far, weight, targets), linear_logprob(hidden, weight, targets))


def test_the_same_bits_alone_shuffled_and_padded(launches):
    """The operands are multiples of 1/8, whose products are exact: on a CPU the interpreter leaves tl.dot to
    a BLAS that rounds a row by its place; the GPU's instruction does not, nor does anything after it."""
    hidden, weight, targets, grad = inputs(130, 64, 2500, torch.bfloat16)
    hidden, weight = (hidden * 8).round() / 8, (weight * 8).round() / 8
    logp = linear_logprob(hidden, weight, targets)
    assert torch.equal(logp, linear_logprob(hidden, weight, targets))
    alone = linear_logprob(hidden[129:], weight, targets[129:])
    order = torch.randperm(130, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    padded = linear_logprob(
        torch.cat((hidden[:3] * 0, hidden)), weight, torch.cat((targets[:3] * 0, targets))
    )
    assert torch.equal(alone, logp[129:])
    assert torch.equal(linear_logprob(hidden[order], weight, targets[order]), logp[order])
    assert torch.equal(padded[3:], logp)


def test_gradients_repeat(path):
    arguments = inputs(33, 64, 700)
    for a, b in zip(ours(*arguments)[:3], ours(*arguments)[:3]):
        assert torch.equal(a, b)


def test_no_tokens(monkeypatch):
    for mode in ("torch", "auto"):
        monkeypatch.setenv("TEAMTR_KERNELS", mode)
        hidden, weight, targets, grad = inputs(0, 64, 203)
        logp, dx, dw, entropy = ours(hidden, weight, targets, grad)
        assert logp.shape == entropy.shape == (0,) and dx.shape == (0, 64)
        assert dw.shape == weight.shape and (dw == 0).all()


def test_only_what_needs_a_gradient_gets_one(path):
    hidden, weight, targets, grad = inputs(5, 64, 203)
    frozen = weight.clone()
    linear_logprob(hidden.requires_grad_(), frozen, targets).backward(grad)
    assert frozen.grad is None and hidden.grad.shape == hidden.shape
    token = linear_logprob_stats(hidden, weight, targets, entropy=True)
    assert token.logp.requires_grad and not token.entropy.requires_grad


def test_bad_input_is_refused():
    h, w, t, _ = inputs(4, 64, 203)
    for error_type, says, arguments in [
        (ValueError, r"hidden must be \(N, H\)", (h[0], w, t)),
        (ValueError, r"hidden must be \(N, H\)", (h[:, :60], w, t)),
        (ValueError, r"targets \(N,\)", (h, w, t[:3])),
        (TypeError, "must be bfloat16 or float32", (h.bfloat16(), w, t)),
        (TypeError, "must be bfloat16 or float32", (h.half(), w.half(), t)),
        (TypeError, "targets integers", (h, w, t.float())),
        (TypeError, "targets integers", (h, w, t > 3)),
        (ValueError, "temperature is 0", (h, w, t, 0.0)),
        (ValueError, "temperature is nan", (h, w, t, float("nan"))),
        (ValueError, "different devices", (h, w, t.to("meta"))),
    ]:
        with pytest.raises(error_type, match=says):
            linear_logprob(*arguments)
    assert torch.equal(linear_logprob(h, w, t.int()), linear_logprob(h, w, t))


@pytest.mark.parametrize("target", [-1, 203])
def test_target_outside_the_vocabulary(target, path):
    """A sentence on a CPU; on CUDA, where looking would stall, NaN: shown here below the check."""
    h, w, t, _ = inputs(4, 64, 203)
    t[2] = target
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="a target is outside 0..202"):
            linear_logprob(h, w, t)
    forward = module.logprob_triton if path == "triton" else module.logprob_reference
    assert forward(h, w, t, 1.0, False)[0].isnan().tolist() == [False, False, True, False]


def test_nan_in_a_row_stays_in_that_row(path):
    hidden, weight, targets, _ = inputs(4, 64, 203)
    hidden[1, 3] = float("nan")
    assert linear_logprob(hidden, weight, targets).isnan().tolist() == [False, True, False, False]


def test_the_switch(monkeypatch):
    pytest.importorskip("triton")
    tensor = torch.ones(1, device=DEVICE)
    for mode, answer in (("torch", False), ("auto", True), ("triton", True), ("", True)):
        monkeypatch.setenv("TEAMTR_KERNELS", mode)
        assert kernels.use_triton(tensor) == answer
    monkeypatch.setenv("TEAMTR_KERNELS", "cuda")
    with pytest.raises(ValueError, match="TEAMTR_KERNELS is 'cuda'; it must be auto, triton or torch"):
        kernels.use_triton(tensor)
    monkeypatch.setenv("TEAMTR_KERNELS", "triton")
    monkeypatch.setattr(kernels.launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        kernels.use_triton(torch.ones(1))
    monkeypatch.setenv("TEAMTR_KERNELS", "auto")
    assert not kernels.use_triton(torch.ones(1))
