"""On a GPU, if there is one, an update is that of a CPU, and runs keep within their radius and their plan."""

import pytest
import torch
from ready import Prepared
from toy_runs import results, run


@pytest.mark.cuda
def test_an_update_is_that_of_a_cpu():
    each = [Prepared(device=where, dtype="fp32", inner_steps=2, lr=3e-4) for where in ("cpu", "cuda")]
    one, other = (ready.update() for ready in each)
    assert one.steps == other.steps == 2 and other.kept["kl"] == pytest.approx(one.kept["kl"], rel=1e-2)
    masters = zip(*(ready.learner.masters for ready in each))
    off = torch.cat([(b.cpu() - a).abs().flatten() for a, b in masters])
    assert (off > 2e-5).float().mean() < 1e-3  # Adam divides by gradients near 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_goes_through_and_no_kept_update_leaves_the_radius(device, dtype, tmp_path):
    flags = ["--device", device, "--dtype", dtype, "--lr", "1e-3", "--delta", "0.02", "--lora-rank"]
    for rank, warm in (("0", "2"), ("2", "0")):
        out = tmp_path / rank
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run(out, *flags, rank, "--warm-start", warm)
        summary, updates, _ = results(out)
        if device == "cuda":  # on a CPU its libraries decide
            assert summary["memory_peak"] <= summary["memory_planned"]
        assert all(u["kl_after"] <= 0.02 for u in updates)
        assert max(u["sampler_mismatch"] for u in updates) < (1e-4 if dtype == "fp32" else 0.1)
