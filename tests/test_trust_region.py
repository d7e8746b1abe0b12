"""The fused trust-region loss against its definition, teamtr_min.objective.teamtr_loss, in float64."""

import math

import pytest
import torch
from toy_runs import timeless

pytest.importorskip("triton")

import kernels
import train
from kernels import trust_region
from teamtr_min.files import read_jsonl
from teamtr_min.objective import teamtr_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
each_ratio = pytest.mark.parametrize("ratio", trust_region.RATIOS)


def batch(lengths, scale=0.05, ignored=0.0, agents=3, seed=0):
    """Messages of these lengths, and ignored slots anywhere among them that hold NaN and -inf."""
    g = torch.Generator().manual_seed(seed)
    message = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    message[torch.rand(len(message), generator=g) < ignored] = -1
    logp = -3 * torch.rand(len(message), generator=g)
    old_logp = logp + scale * torch.randn(len(message), generator=g)
    logp[message < 0], old_logp[message < 0] = math.nan, -math.inf
    advantage, weight = torch.randn(len(lengths), generator=g), torch.rand(len(lengths), generator=g)
    agent = torch.randint(0, agents, (len(lengths),), generator=g)
    options = {"agent": agent.to(DEVICE), "n_agents": agents, "weight": 3 * weight.to(DEVICE)}
    return [x.to(DEVICE) for x in (logp, old_logp, message, advantage)], options


def run(loss_function, arguments, options, dtype=torch.float32):
    """-> loss, dL/dlogp, stats; with an upstream gradient that is not 1."""
    logp, old_logp, message, advantage = arguments
    logp = logp.detach().to(dtype).requires_grad_()
    loss, stats = loss_function(logp, old_logp.to(dtype), message, advantage.to(dtype), **options)
    (1.7 * loss).backward()
    return {"loss": loss.detach(), "gradient": logp.grad, **stats}


def check(arguments, options, tolerance=2e-6):
    got = run(kernels.trust_region_loss, arguments, options)
    want = run(teamtr_loss, arguments, options, torch.float64)
    assert got.keys() == want.keys()
    for name, exact in want.items():
        assert got[name].shape == exact.shape and not got[name].isnan().any(), name
        size = exact.abs().max().clamp(min=1e-6) if exact.numel() else 1.0
        worst = ((got[name].double() - exact).abs() / size).max().item() if exact.numel() else 0.0
        assert worst < tolerance, f"{name} is off by {worst:.1e}"
    return got


@each_ratio
@pytest.mark.parametrize("kl_unit", trust_region.KL_UNITS)
@pytest.mark.parametrize("scale", [0.02, 200.0])
def test_equals_the_definition(ratio, kl_unit, scale, launches):
    """Lengths of 1, of none, past the block; ignored slots; an agent without messages; beta per agent."""
    arguments, options = batch([1, 40, 0, 270, 7, 3], scale, ignored=0.2)
    options |= {"n_agents": 4, "beta": torch.tensor([0.5, 0.0, 0.1, 2.0]).to(DEVICE), "clip": 0.1}
    got = check(arguments, options | {"ratio": ratio, "kl_unit": kl_unit}, tolerance=1e-5)
    assert got["messages"].sum() == 6 and got["messages"][3] == got["ratio_max"][3] == 0
    assert (got["gradient"][arguments[2] < 0] == 0).all()
    assert set(launches) == {"trust_messages", "trust_agents"}


@each_ratio
@pytest.mark.parametrize("lengths", [[], [0, 0], [4], [1, 9, 4, 5, 1, 1, 2, 8, 3]], ids=len)
def test_no_valid_token_and_more_tokens_and_messages_than_a_block(lengths, ratio, launches, monkeypatch):
    monkeypatch.setattr(trust_region, "BLOCK", 4)
    arguments, options = batch(lengths, scale=0.3, ignored=0.1 if len(lengths) > 2 else 1.1)
    check(arguments, options | {"beta": 0.3, "ratio": ratio})


@each_ratio
@pytest.mark.parametrize("weight", [None, [1.0] * 4, [0.5, 0.0, 0.0, 2.0], [0.0] * 4])
def test_an_agent_without_weight_counts_for_nothing(ratio, weight, launches):
    arguments, options = batch([3, 1, 40, 2], scale=0.5)
    options |= {"agent": torch.tensor([0, 1, 1, 2], device=DEVICE), "beta": 0.3, "ratio": ratio}
    check(arguments, options | {"weight": weight and torch.tensor(weight, device=DEVICE)})


def test_layouts_small_ids_and_a_message_of_ignored_slots(launches):
    (*logps, message, advantage), options = batch([3, 4, 60], ignored=0.1)
    message[0] = message[3:7] = message[-1] = -1  # the whole of message 1
    logps = [torch.stack((x, x), 1)[:, 0] for x in logps]
    logps[0][message < 0] = math.nan
    assert not logps[0].is_contiguous()
    options |= {"agent": options["agent"].int(), "beta": 0.3}
    check([*logps, message.int(), advantage], options)


@each_ratio
def test_extreme_log_ratios(ratio, launches):
    """At 0 the ratio is exactly 1, without KL. +-20 still moves; beyond it is flat. NaN shows."""
    logp, options = torch.tensor([20.0, -20.0, 20.1, -20.1], device=DEVICE), {"ratio": ratio, "beta": 0.5}
    arguments = [logp, 0 * logp, torch.arange(4, device=DEVICE), -torch.ones(4, device=DEVICE)]
    first, again = check(arguments, options), run(kernels.trust_region_loss, arguments, options)
    assert all(torch.equal(first[name], again[name]) for name in first)
    (logp, _, *others), _ = batch([5, 300, 1])
    _, stats = kernels.trust_region_loss(logp, logp, *others, ratio=ratio)
    assert [stats[name] for name in trust_region.STATS] == [0, 0, 0, 1, 1, 3]
    logp[7] = math.nan
    loss, stats = kernels.trust_region_loss(logp, 0 * logp, *others, ratio=ratio)
    assert loss.isnan() and stats["kl_k3"].isnan() and stats["ratio_max"].isnan()


def test_small_kl_is_not_rounding(launches):
    """Log-ratios of 1e-4: e^x - 1 - x in fp32 would be noise, even negative."""
    (logp, *_, message, advantage), _ = batch([50, 20])
    arguments = [1e-4 * (logp + 1.5), 0 * logp, message, advantage]
    got, want = run(kernels.trust_region_loss, arguments, {}), run(teamtr_loss, arguments, {}, torch.float64)
    assert got["kl_k3"].item() == pytest.approx(want["kl_k3"].item(), rel=1e-5)


def test_training_is_the_same_by_both_paths(launches, monkeypatch, tmp_path):
    """To 3e-5: Adam's first steps are nearly signs, so a rounding of a small gradient moves a weight far."""
    flags = "--stages 1 --agents 2 --problems 1 --group 4 --inner-steps 1 --eval-problems 1 --beta 0.01"
    flags += f" --lr 2e-4 --seed 1 --dtype fp32 --device {DEVICE} --out "
    found = []
    for mode in ("torch", "triton"):
        monkeypatch.setenv("TEAMTR_KERNELS", mode)
        launches.clear()
        assert train.main([*flags.split(), str(tmp_path / mode)]) == 0
        assert len(launches) == (4 + 4 + 3 if mode == "triton" else 0)  # of the loss, layers, decode steps
        found.append(timeless([row for _, row in read_jsonl(tmp_path / mode / "metrics.jsonl")]))
    assert sum(row.get("tokens_trained", 0) > 0 for row in found[0]) == 2
    for by_torch, by_kernels in zip(*found, strict=True):
        assert by_torch.keys() == by_kernels.keys()
        for key, value in by_torch.items():
            near = isinstance(value, float)
            assert by_kernels[key] == (pytest.approx(value, rel=3e-5, abs=3e-5) if near else value), key
