"""Eq. 9, 10 and 11 against loops written from the paper's formulas, in float64."""

import math

import pytest
import torch

from teamtr_min.objective import group_advantages, teamtr_loss

each_ratio = pytest.mark.parametrize("ratio", ["message", "mean", "token"])


def example(seed: int = 0, messages: int = 7, agents: int = 3, scale: float = 0.15) -> dict:
    """Messages of 1 to 6 tokens, agents in any order, ratios on both sides of the clip, slots to ignore."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (messages,), generator=g)
    message = torch.arange(messages).repeat_interleave(lengths)
    old = -2 * torch.rand(len(message), generator=g, dtype=torch.float64)
    new = old + scale * torch.randn(len(message), generator=g, dtype=torch.float64)
    ignored = torch.rand(len(message), generator=g) < 0.1
    ignored[message == 0] = False
    return {
        "logp": new.masked_fill(ignored, math.nan).requires_grad_(),
        "old_logp": old.masked_fill(ignored, -math.inf),
        "message": message.masked_fill(ignored, -1),
        "advantage": torch.randn(messages, generator=g, dtype=torch.float64),
        "weight": torch.rand(messages, generator=g, dtype=torch.float64),
        "agent": torch.randint(0, agents, (messages,), generator=g),
        "n_agents": agents + 1,  # the last one wrote nothing
    }


def by_loop(x: dict, clip: float, beta, ratio: str, kl_unit: str) -> tuple[float, dict]:
    """The same numbers, one message and one token at a time."""
    M, A = len(x["advantage"]), x["n_agents"]
    means = ("kl_k1", "kl_k3", "clip_fraction", "ratio_mean")
    total, stats = 0.0, {name: [0.0] * A for name in (*means, "ratio_max")}
    count, weights = [0] * A, [0.0] * A
    for m in range(M):
        tokens = [t for t in range(len(x["message"])) if x["message"][t] == m]
        logs = [(x["logp"][t] - x["old_logp"][t]).item() for t in tokens]
        advantage, agent, length = x["advantage"][m].item(), x["agent"][m].item(), max(len(logs), 1)
        weight = x["weight"][m].item()
        if ratio == "token":
            ratios = [math.exp(v) for v in logs]
        else:
            ratios = [math.exp(sum(logs) / (length if ratio == "mean" else 1))]
        terms = [min(w * advantage, min(max(w, 1 - clip), 1 + clip) * advantage) for w in ratios]
        unit = length if kl_unit == "token" else 1
        k3 = sum(math.exp(v) - 1 - v for v in logs) / unit
        cut = [w > 1 + clip if advantage > 0 else w < 1 - clip for w in ratios]
        total += weight * (sum(terms) / max(len(terms), 1) - beta[agent] * k3)
        count[agent] += 1
        weights[agent] += weight
        stats["kl_k1"][agent] += weight * -sum(logs) / unit
        stats["kl_k3"][agent] += weight * k3
        stats["clip_fraction"][agent] += weight * sum(cut) / max(len(ratios), 1)
        stats["ratio_mean"][agent] += weight * sum(ratios) / max(len(ratios), 1)
        stats["ratio_max"][agent] = max([stats["ratio_max"][agent], *ratios])
    for name in means:
        stats[name] = [v / (w or 1) for v, w in zip(stats[name], weights)]
    return -total / sum(weights), {**stats, "messages": [float(c) for c in count]}


@pytest.mark.parametrize("kl_unit", ["message", "token"])
@each_ratio
def test_loss_and_every_statistic_equal_a_loop_over_messages(ratio, kl_unit):
    for seed in range(5):
        x, beta = example(seed), torch.tensor([0.0, 0.3, 1.0, 0.5], dtype=torch.float64)
        loss, stats = teamtr_loss(**x, clip=0.2, beta=beta, ratio=ratio, kl_unit=kl_unit)
        wanted, wanted_stats = by_loop(x, 0.2, beta.tolist(), ratio, kl_unit)
        assert loss.item() == pytest.approx(wanted, abs=1e-12)
        for name, values in wanted_stats.items():
            assert stats[name].tolist() == pytest.approx(values, abs=1e-12), name
        (gradient,) = torch.autograd.grad(loss, x["logp"])
        assert gradient.isfinite().all() and (gradient[x["message"] < 0] == 0).all()


@each_ratio
def test_gradient_equals_finite_differences(ratio):
    x = example(3, scale=0.3)
    valid = x["message"] >= 0
    logp = x.pop("logp").detach()[valid].requires_grad_()
    x["old_logp"], x["message"] = x["old_logp"][valid], x["message"][valid]
    assert 0 < teamtr_loss(logp, **x, ratio=ratio)[1]["clip_fraction"].max() < 1
    assert torch.autograd.gradcheck(lambda v: teamtr_loss(v, **x, clip=0.2, beta=0.3, ratio=ratio)[0], logp)


def test_nothing_to_train_on_is_zero_loss():
    empty, none = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert teamtr_loss(empty, empty, none, empty)[0].item() == 0
    loss, stats = teamtr_loss(torch.zeros(2), torch.zeros(2), torch.full((2,), -1), torch.tensor([2.0]))
    assert loss.item() == -2 and stats["kl_k3"].item() == 0  # an empty product is 1
    loss, stats = teamtr_loss(**example() | {"weight": torch.zeros(7)}, beta=0.3)
    assert loss == 0 and (stats["kl_k3"] == 0).all() and stats["messages"].sum() == 7


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 0.7])
def test_a_zero_variance_group_has_advantages_of_exactly_zero(value):
    for G in (2, 3, 7, 8):
        assert (group_advantages(torch.full((5, G), value), clip=2.0, eps_norm=1e-6) == 0).all()
        returns, weight = torch.full((2, G), value), torch.linspace(0.3, 1.7, G).repeat(2, 1)
        returns[:, -1], weight[:, -1] = 0.4, torch.tensor([0.0, 1e-9])  # the one that differs weighs nothing
        assert (group_advantages(returns, weight=weight)[:, :-1] == 0).all()


def test_advantages_equal_a_loop_with_the_population_deviation():
    returns = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    returns[2] = 0.3
    advantages = group_advantages(returns, clip=1.2, eps_norm=1e-4)
    for p in range(6):
        mean = sum(returns[p].tolist()) / 5
        sigma = math.sqrt(sum((r - mean) ** 2 for r in returns[p].tolist()) / 5 + 1e-4)
        for g in range(5):
            wanted = 0.0 if p == 2 else min(max((returns[p, g].item() - mean) / sigma, -1.2), 1.2)
            assert advantages[p, g].item() == pytest.approx(wanted, abs=1e-12)
    one_hit = torch.eye(8)[:1]
    assert group_advantages(one_hit, eps_norm=0.0).max().item() == pytest.approx(math.sqrt(8 - 1))
