"""On a GPU, if there is one, what holds on a CPU: the same logits, messages and updates, by the kernels.

Without one the same tests compare the CPU with itself, so that they are known to run.
"""

import pytest
import torch
from ready import Prepared
from tiny import FAMILIES, random_model, random_tokens
from toy_runs import results, run

from teamtr_min.engine.sampler import generate

HERE = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]
on_each = pytest.mark.parametrize("device", HERE)
each_dtype = pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])


@on_each
@each_dtype
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_are_those_of_a_cpu(device, dtype, bound, family):
    model = random_model(family).to(dtype)
    tokens = random_tokens(model, 3, 33)
    expected = model(tokens)
    got = model.to(device)(tokens.to(device))
    assert got.dtype == torch.float32
    assert (got.cpu() - expected).abs().mean() < bound * expected.std()


@on_each
def test_messages_are_those_of_a_cpu_and_do_not_depend_on_the_batch(device):
    model = random_model("qwen2")
    prompts = [random_tokens(model, n, seed=n).tolist() for n in (3, 17, 16, 5, 40)]
    expected = generate(model, prompts, 12, seed=1)
    model = model.to(device)
    together = generate(model, prompts, 12, seed=1)
    assert [c.tokens for c in together] == [c.tokens for c in expected]
    for prompt, c in zip(prompts, together):
        (alone,) = generate(model, [prompt], 12, seed=1)
        assert alone.tokens == c.tokens
        assert alone.logprobs == pytest.approx(c.logprobs, abs=1e-4)


@on_each
def test_an_update_is_that_of_a_cpu(device):
    """Two steps and the radius; returns are a function of what was said, so both have the same."""
    each = [Prepared(device=where, dtype="fp32", inner_steps=2, lr=3e-4) for where in ("cpu", device)]
    one, other = (ready.update() for ready in each)
    assert one.steps == other.steps == 2 and other.kept["kl"] == pytest.approx(one.kept["kl"], rel=1e-2)
    masters = zip(*(ready.learner.masters for ready in each))
    off = torch.cat([(b.cpu() - a).abs().flatten() for a, b in masters])
    assert (off > 2e-5).float().mean() < 1e-3  # Adam divides by gradients near 0


@on_each
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_goes_through_and_no_kept_update_leaves_the_radius(device, dtype, tmp_path):
    flags = ["--device", device, "--dtype", dtype, "--lr", "1e-3", "--delta", "0.02", "--lora-rank"]
    for rank, warm in (("0", "2"), ("2", "0")):
        out = tmp_path / rank
        run(out, *flags, rank, "--warm-start", warm)
        summary, updates, _ = results(out)
        if device == "cuda":  # on a CPU its libraries decide
            assert summary["memory_peak"] <= summary["memory_planned"]
        assert all(u["kl_after"] <= 0.02 for u in updates)
        assert max(u["sampler_mismatch"] for u in updates) < (1e-4 if dtype == "fp32" else 0.1)
