"""The trust region holds, and what is undone is undone completely."""

import copy
import dataclasses
import math

import pytest
import torch
from audit_radius import audit, kl_by_loop
from ready import Prepared
from toy_runs import TOY, interrupt_at, results

from teamtr_min.engine.rounding import round_into
from teamtr_min.learner import Diverged


def same(tensors, others) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


@pytest.mark.parametrize("changes", [
    {}, {"kl_estimator": "k1"}, {"agents": 1, "rounds": 2}, {"kl_unit": "token", "delta": 0.004},
    {"ratio": "token", "temperature": 0.7}, {"ratio": "mean", "batch_tokens": 100}, {"lr": 2e-4},
    {"delta": math.inf}, {"lora_rank": 3, "lr": 0.3, "delta": 0.01},
])  # fmt: skip
def test_the_radius_holds_by_an_independent_recomputation(changes):
    ready = Prepared(**{"lr": 5e-3} | changes)
    config, old = ready.config, copy.deepcopy(ready.model)
    update = ready.update()
    measured = kl_by_loop(old, ready.model, ready.team, ready.rollouts, 0, config)
    for name in ("k1", "k3"):
        assert update.kept[f"kl_{name}"] == pytest.approx(measured[name], rel=1e-3, abs=2e-6), name
    assert measured[config.kl_estimator] <= config.delta + 2e-6
    if config.lr == 5e-3:
        assert update.attempted["kl"] > 0.02 and (update.halvings > 0) == math.isfinite(config.delta)
    assert update.steps <= config.inner_steps and (measured["k3"] > 0 or update.halvings == 11)


def test_every_update_of_a_run_reports_the_kl_of_an_independent_recomputation(tmp_path):
    code, found = audit([*TOY, "--lr", "5e-3", "--delta", "0.05", "--out", str(tmp_path / "run")])
    kls = [u["kl_after"] for u in results(tmp_path / "run")[1]]
    assert code == 0 and kls == pytest.approx(found, rel=1e-3, abs=2e-6) and 0.01 < max(found) <= 0.05


def test_backtracking_restores_the_optimizer_with_the_weights():
    ready = Prepared(lr=3e-4, inner_steps=6, delta=0.02)
    learner, calls, restore = ready.learner, [], ready.learner.restore
    learner.restore = lambda *a, **k: calls.append((*a, *k.values())) or restore(*a, **k)
    update = ready.update()
    assert 0 < update.halvings < 10 and update.steps >= 2, "the case under test: a later step overshoots"
    accepted, outside, fraction = calls[-1]
    assert fraction == 0.5**update.halvings
    for i, p in enumerate(learner.masters):
        state = learner.optimizer.state[p]
        assert state["step"] == update.steps - 1 and same(state.values(), accepted.state[i].values())
        assert torch.allclose(p, accepted.masters[i].lerp(outside[i], fraction), atol=1e-7)
        assert p.grad is None


def test_where_the_terms_of_the_gradient_cancel_the_agent_stays():
    """All rollouts of a problem are the same, their advantages are not. Adam would step on the rounding."""
    ready = Prepared()
    same = [ready.rollouts.messages[r - r % ready.config.group] for r in range(len(ready.rollouts.messages))]
    advantages = torch.tensor([1.0, -0.7, -0.3] * (len(same) // 3))
    ready.batches = ready.batch(dataclasses.replace(ready.rollouts, messages=same), advantages)
    before, update = ready.learner.clone_masters(), ready.update()
    assert ready.batches.pulls and 0 <= update.grad_norm < 1e-6 and update.kept["kl"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, ready.learner.masters))


FAULTS = {"gradient": "gradient is not finite", "advantage": "loss is nan", "weight": "kl_k1|loss is nan"}
PLACES = ["after a step", "in the line search", "early in a snapshot", "late in a snapshot"]  # of a Ctrl-C


@pytest.mark.parametrize("fault", [*FAULTS, *PLACES])
def test_whatever_stops_an_update_leaves_the_last_accepted_weights(fault, monkeypatch):
    """With Adam's state. A snapshot that is half written, in a second buffer, is not used."""
    ready = Prepared(lr=5e-3, delta=0.02 if "search" in fault else math.inf)
    learner, accepted, step, snapshot = ready.learner, [], ready.learner.step, ready.learner.snapshot

    def spoiled_step(lr):
        accepted.append((learner.clone_masters(), copy.deepcopy(snapshot().state)))
        second = len(accepted) == 2
        if second and fault == "gradient":
            learner.masters[0].grad[0] = math.nan
        if second and fault == "advantage":
            ready.batches.own[0].advantage[0] = math.nan
        norm = step(lr)
        if second and fault == "weight":
            learner.masters[0].data[0] = math.inf
        if second and "after" in fault:
            raise KeyboardInterrupt
        return norm

    def spoiled_snapshot(into=None):
        with monkeypatch.context() as patch:
            if accepted and "snapshot" in fault:
                interrupt_at(4 if "early" in fault else 31, patch, torch.Tensor, "copy_")
            return snapshot(into)

    monkeypatch.setattr(learner, "step", spoiled_step)
    monkeypatch.setattr(learner, "snapshot", spoiled_snapshot)
    if "search" in fault:
        interrupt_at(1, monkeypatch, learner, "restore")
    with pytest.raises(Diverged if fault in FAULTS else KeyboardInterrupt, match=FAULTS.get(fault)):
        ready.update()
    weights, state = accepted[-1]
    assert same(weights, learner.masters) and all(p.isfinite().all() for p in weights)
    assert all(p.grad is None for p in learner.masters)
    for p, wanted in zip(learner.masters, state):
        assert same(learner.optimizer.state[p].values(), wanted.values())


def test_in_bf16_the_monitor_sees_what_the_sampler_will_use():
    """fp32 masters move; the model holds their rounding; the reported KL is that of the rounded weights."""
    ready = Prepared(dtype="bf16", lr=3e-3)
    model, old, update = ready.team.agents[0].model, copy.deepcopy(ready.model), ready.update()
    for master, p in zip(ready.learner.masters, model.parameters(), strict=True):
        assert master.dtype == torch.float32 and p.dtype == torch.bfloat16
        round_into(rounded := torch.empty_like(p), master)
        assert torch.equal(rounded, p)
    assert update.kept["kl"] <= ready.config.delta < update.attempted["kl"]
    measured = kl_by_loop(old, model, ready.team, ready.rollouts, 0, ready.config, torch.bfloat16)
    assert update.kept["kl"] == pytest.approx(measured["k3"], rel=0.1)
    gradients = []
    for tokens in (150, 4096):  # the masters' gradient is the sum over many batches, or a few
        ready = Prepared(dtype="bf16", batch_tokens=tokens)
        ready.learner.backward(ready.batches, ready.config)
        gradients.append(torch.cat([p.grad.flatten() for p in ready.learner.masters]))
    assert (gradients[0] - gradients[1]).norm() < 0.05 * gradients[1].norm()


def test_beta_follows_the_attempted_overshoot_within_its_bounds():
    ready = Prepared(lr=5e-3, beta=0.01)
    update, learner = ready.update(), ready.learner
    assert update.attempted["kl"] > 1.5 * ready.config.delta > update.kept["kl"]
    assert update.beta == 0.01 and learner.beta == pytest.approx(0.015)
    for beta, attempted, adapted in (
        *((0.01, 0.031, 0.015), (0.01, 0.029, 0.01), (0.01, 0.014, 0.01), (0.015, 0.013, 0.01)),
        *((0.9, 9.0, 1.0), (1.2e-4, 0.0, 1e-4), (0.0, 9.0, 0.0)),  # the bounds
    ):
        learner.beta = beta
        learner.adapt_beta(attempted, math.inf)
        assert learner.beta == beta, "no radius to follow"
        learner.adapt_beta(attempted, 0.02)
        assert learner.beta == pytest.approx(adapted)


def test_the_optimizer_is_the_one_specified():
    ready = Prepared(inner_steps=1, delta=math.inf)
    before = ready.learner.clone_masters()
    for batch in ready.batches.own:
        batch.advantage.mul_(1e4)
    update = ready.update(1e-4)
    state = [ready.learner.optimizer.state[p] for p in ready.learner.masters]
    first = torch.cat([s["exp_avg"].flatten() for s in state])
    second = torch.cat([s["exp_avg_sq"].flatten() for s in state])
    assert update.grad_norm > 10 and first.norm().item() == pytest.approx(0.1, rel=1e-4)
    assert torch.allclose(second, 0.01 * (first / 0.1) ** 2, rtol=1e-3, atol=1e-12)
    assert ready.learner.optimizer.param_groups[0]["weight_decay"] == 0
    step = max((a - b).abs().max().item() for a, b in zip(before, ready.learner.masters))
    assert update.lr == 1e-4 and step == pytest.approx(1e-4, rel=1e-2)  # Adam's first step is lr itself


def test_without_any_advantage_or_turn_nothing_moves_not_even_by_momentum():
    ready = Prepared(delta=math.inf)
    ready.update()
    before, beta = ready.learner.clone_masters(), ready.learner.beta
    ready.batches = ready.batch(ready.rollouts, torch.zeros_like(ready.advantages))
    update = ready.update()
    assert update.steps == 0 and update.kept["kl"] == 0 and update.first["entropy"] > 0
    assert update.grad_norm is None and ready.learner.beta == beta
    silent = [[m for m in messages if m.agent != 0] for messages in ready.rollouts.messages]
    only = [*silent[:1], *ready.rollouts.messages[1:]], torch.tensor([0.0] + [-1e4] * 71)  # where weight is
    for messages, log_weights in (silent, None), only:
        rollouts = dataclasses.replace(ready.rollouts, messages=messages, log_weights=log_weights)
        ready.batches = ready.batch(rollouts)
        update = ready.update()
        assert update.steps == 0 and not update.kept and update.log_ratio == 0.0
        assert same(before, ready.learner.masters)
    heavy = dataclasses.replace(ready.rollouts, log_weights=only[1])  # advantages where no weight is
    ready.batches = ready.batch(heavy, torch.tensor([0.0] + [1.0] * 71))
    assert ready.update().steps == 0 and same(before, ready.learner.masters)


def test_a_joint_update_has_one_radius_for_the_mean_over_all_messages_and_reports_each_agents_kl():
    ready = Prepared([0, 1], router="random", rounds=2, delta=0.02, lr=5e-3)
    team, rollouts, models = ready.team, ready.rollouts, ready.learner.models
    old, update = copy.deepcopy(models), ready.update()
    assert update.attempted["kl"] > 0.02 >= update.kept["kl"] > 0 and update.halvings > 0
    counts = torch.tensor([float(len(rollouts.by([j]))) for j in (0, 1)])
    own = [kl_by_loop(old[j], models[j], team, rollouts, j, ready.config)["k3"] for j in (0, 1)]
    assert counts[0] != counts[1] and min(own) > 1e-4, "both agents moved"
    assert [update.kept["kl_agent_0"], update.kept["kl_agent_1"]] == pytest.approx(own, rel=1e-3)
    mean = counts @ torch.tensor(own) / counts.sum()
    assert update.kept["kl"] == pytest.approx(mean.item(), rel=1e-3)
    assert update.tokens == update.steps * sum(len(m.tokens) for m in rollouts.by([0, 1]))


def test_a_step_that_stays_inside_against_expectation_is_followed_by_one_with_its_gradient():
    """The third step's start, just within the radius, was expected outside: its gradient is computed late."""
    free = Prepared(lr=1e-3, inner_steps=3, delta=math.inf, beta=0.0)
    course, steps = [free.learner.backward(free.batches, free.config).kl], []
    for _ in range(3):
        free.learner.step(1e-3)
        steps.append(free.learner.clone_masters())
        course.append(free.learner.backward(free.batches, free.config).kl)
    radius = course[2] * 1.01
    assert 4 * course[1] > radius and course[3] > radius, "the case under test"
    ready = Prepared(lr=1e-3, inner_steps=3, delta=radius, beta=0.0)
    seen, clone = [], ready.learner.clone_masters
    ready.learner.clone_masters = lambda: seen.append(clone()) or clone()
    update = ready.update()
    assert update.steps == 3 and update.attempted["kl"] == pytest.approx(course[3], rel=1e-4)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(seen[-1], steps[2]))
