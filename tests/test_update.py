"""The trust region holds, and what is undone is undone completely."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from ready import Prepared

from teamtr_min import learner as learning
from teamtr_min.engine import packing
from teamtr_min.engine.rounding import round_into
from teamtr_min.learner import Diverged
from teamtr_min.team import Team


def kl_by_loop(old, new, team: Team, rollouts, agent: int, config) -> dict[str, float]:
    """Eq. 11 from nothing but the two models and the transcripts: one rollout at a time, in float64."""
    old, new = copy.deepcopy(old).double(), copy.deepcopy(new).double()
    k1, k3 = [], []
    for problem, messages in zip(rollouts.problems, rollouts.messages):
        seen = team.render(agent, problem, messages, add_generation_prompt=False)
        tokens = torch.tensor([seen.ids])
        with torch.no_grad():
            logp = [(m(tokens)[0].double() / config.temperature).log_softmax(-1) for m in (old, new)]
        for start, stop in seen.spans:
            unit = stop - start if config.kl_unit == "token" else 1
            terms = [[p[t - 1, seen.ids[t]].item() for p in logp] for t in range(start, stop)]
            k1.append(sum(o - n for o, n in terms) / unit)
            k3.append(sum(math.expm1(n - o) - (n - o) for o, n in terms) / unit)
    return {"k1": sum(k1) / len(k1), "k3": sum(k3) / len(k3)}


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 5e-3},
        {"lr": 5e-3, "kl_estimator": "k1"},
        {"lr": 5e-3, "agents": 1, "rounds": 2},
        {"lr": 5e-3, "kl_unit": "token", "delta": 0.004},
        {"lr": 5e-3, "ratio": "token", "temperature": 0.7},
        {"lr": 5e-3, "ratio": "mean", "batch_tokens": 100},
        {"lr": 2e-4},
        {"lr": 5e-3, "delta": math.inf},
    ],
)
def test_the_radius_holds_by_an_independent_recomputation(changes):
    ready = Prepared(**changes)
    config, old = ready.config, copy.deepcopy(ready.model)
    update = ready.update()
    measured = kl_by_loop(old, ready.model, ready.team, ready.rollouts, 0, config)
    for name in ("k1", "k3"):
        assert update.kept[f"kl_{name}"] == pytest.approx(measured[name], rel=1e-3, abs=2e-6), name
    assert measured[config.kl_estimator] <= config.delta + 2e-6
    if config.lr == 5e-3:
        assert update.attempted["kl"] > 0.02 and (update.halvings > 0) == math.isfinite(config.delta)
    assert update.steps <= config.inner_steps and (measured["k3"] > 0 or update.halvings == 11)


def test_backtracking_restores_the_optimizer_with_the_weights():
    """After an update that left its radius, Adam's state is that of the last accepted weights."""
    ready = Prepared(lr=3e-4, inner_steps=6, delta=0.02)
    learner, taken, outside = ready.learner, [], []
    snapshot, restore = learner.snapshot, learner.restore
    learner.snapshot = lambda into=None: taken.append(copy.deepcopy(snapshot())) or snapshot(into)
    learner.restore = lambda base, toward=None, fraction=0.0: (
        outside.append(toward) or restore(base, toward, fraction)
    )
    update = ready.update()
    assert 0 < update.halvings < 10 and update.steps >= 2, "the case under test: a later step overshoots"
    accepted, outside, fraction = taken[-1], outside[-1], 0.5**update.halvings
    for i, p in enumerate(learner.masters):
        state = learner.optimizer.state[p]
        assert state["step"] == accepted.state[i]["step"] == update.steps - 1
        assert torch.equal(state["exp_avg"], accepted.state[i]["exp_avg"])
        assert torch.equal(state["exp_avg_sq"], accepted.state[i]["exp_avg_sq"])
        wanted = accepted.masters[i] + fraction * (outside[i] - accepted.masters[i])
        assert torch.allclose(p, wanted, atol=1e-7)
        assert p.grad is None


def test_an_update_that_fits_nowhere_leaves_the_agent_as_it_was():
    ready = Prepared(lr=0.5, delta=1e-9)
    before = ready.learner.clone_masters()
    update = ready.update()
    assert update.halvings == 11 and update.kept["kl"] == 0 and update.attempted["kl"] > 1e-9
    assert all(torch.equal(a, b) for a, b in zip(before, ready.learner.masters))
    assert all(not ready.learner.optimizer.state[p] for p in ready.learner.masters)


def test_the_first_pass_makes_the_old_log_probs_that_later_ones_are_measured_against():
    ready = Prepared(batch_tokens=150)
    learner, batches, config, old = ready.learner, ready.batches, ready.config, copy.deepcopy(ready.model)
    first = learner.backward(batches, config).stats
    assert first["ratio_mean"] == pytest.approx(1, abs=1e-6) and first["ratio_max"] == 1
    assert first["kl"] == first["kl_k1"] == first["kl_k3"] == first["clip_fraction"] == 0
    assert 0 <= first["sampler_mismatch"] < 1e-6 and first["entropy"] > 0
    learner.step(2e-3)
    for _ in range(2):  # a pass measures; it does not move what is measured against
        later = learner.measure(batches, config).stats
    truth = kl_by_loop(old, ready.model, ready.team, ready.rollouts, 0, config)
    assert later["kl"] == pytest.approx(truth["k3"], rel=1e-3) and later["kl"] > 1e-3
    assert later["kl_k1"] == pytest.approx(truth["k1"], rel=1e-3, abs=1e-5)
    assert "entropy" not in later and "sampler_mismatch" not in later


def test_small_batches_give_the_whole_batchs_loss_and_gradient(monkeypatch):
    results = []
    monkeypatch.setattr(packing, "BATCH_COST", 10**6)  # as few as may be
    for batch_tokens in (10**6, 130):
        ready = Prepared([1], rounds=2, batch_tokens=batch_tokens, beta=0.5)
        ready.learner.measure(ready.batches, ready.config)
        with torch.no_grad():
            for p in ready.learner.masters:
                p.mul_(1.01)
        values = ready.learner.backward(ready.batches, ready.config).stats
        results.append((len(ready.batches.own), values, [p.grad for p in ready.learner.masters]))
    (whole, values, gradients), (parts, others, other_gradients) = results
    assert whole == 2 and parts > 5
    assert others == pytest.approx(values, rel=1e-4, abs=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-3) for a, b in zip(gradients, other_gradients))


def test_the_end_of_message_has_gradient_and_contexts_have_none():
    """Gradient with respect to the hidden states that predict something, and these are all there are."""
    ready, kept = Prepared(max_new_tokens=3, batch_tokens=10**6, agents=1, rounds=2), []
    pulling = [batch for batch in ready.batches.own if batch.pulls]  # the others need no gradient
    batches, hidden = dataclasses.replace(ready.batches, own=pulling), type(ready.model).hidden

    def keep(self, *given, **named):
        kept.append(hidden(self, *given, **named))
        kept[-1].retain_grad()
        return kept[-1]

    ready.model.hidden = keep.__get__(ready.model)
    ready.learner.backward(batches, ready.config)
    ends = 0
    for batch, states in zip(pulling, kept):
        touched = states.grad.abs().sum(-1) > 0  # (pairs,)
        pull = torch.zeros(len(states)).index_add(0, batch.pair, batch.advantage[batch.message])
        assert torch.equal(touched, pull.abs() > 1e-6), "where rollouts pull both ways alike, nothing is left"
        ends += (touched & (batch.targets == ready.team.agents[0].chat.end_of_message)).sum()
    assert ends > 0
    assert any(not m.stopped for m in ready.rollouts.by([0])), "some messages hit the length limit"


FAULTS = {
    "gradient is not finite": Diverged,
    "loss is nan": Diverged,
    "kl_k1 is nan|loss is nan": Diverged,
    "out of memory": RuntimeError,
    "^$": KeyboardInterrupt,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_stops_an_update_leaves_the_last_accepted_weights(fault, monkeypatch):
    """NaN in the gradient, an advantage or a weight, an error or Ctrl-C within the second step."""
    ready = Prepared(delta=math.inf)
    learner, accepted, step = ready.learner, [], ready.learner.step

    def spoil(lr):
        accepted.append((learner.clone_masters(), copy.deepcopy(learner.snapshot().state)))
        second = len(accepted) == 2
        if second and "gradient" in fault:
            learner.masters[0].grad[0] = math.nan
        if second and fault == "loss is nan":
            ready.batches.own[0].advantage[0] = math.nan
        norm = step(lr)
        if second and "kl_k1" in fault:
            learner.masters[0].data[0] = math.inf
        if second and not issubclass(FAULTS[fault], Diverged):
            raise FAULTS[fault](fault.strip("^$"))
        return norm

    monkeypatch.setattr(learner, "step", spoil)
    with pytest.raises(FAULTS[fault], match=fault):
        ready.update()
    weights, state = accepted[1]
    assert all(torch.equal(a, b) and b.isfinite().all() for a, b in zip(weights, learner.masters))
    assert all(p.grad is None for p in learner.masters)
    for p, wanted in zip(learner.masters, state):
        assert all(torch.equal(learner.optimizer.state[p][name], value) for name, value in wanted.items())


def test_an_error_within_the_line_search_leaves_the_last_accepted_weights(monkeypatch):
    ready = Prepared(lr=5e-3)
    before, calls, restore = ready.learner.clone_masters(), [], ready.learner.restore

    def fail_once(base, toward=None, fraction=0.0):
        restore(base, toward, fraction)
        calls.append(fraction)
        if len(calls) == 1:
            raise RuntimeError("out of memory")

    monkeypatch.setattr(ready.learner, "restore", fail_once)
    with pytest.raises(RuntimeError, match="out of memory"):
        ready.update()
    assert calls == [0.5, 0.0] and all(torch.equal(a, b) for a, b in zip(before, ready.learner.masters))


def test_in_bf16_the_monitor_sees_what_the_sampler_will_use():
    """fp32 masters move; the model holds their rounding; the reported KL is that of the rounded weights."""
    ready = Prepared(dtype="bf16", lr=3e-3)
    learner, model, old = ready.learner, ready.team.agents[0].model, copy.deepcopy(ready.model)
    update = ready.update()
    assert model is ready.model and all(p.dtype == torch.bfloat16 for p in model.parameters())
    for master, p in zip(learner.masters, model.parameters()):
        assert master.dtype == torch.float32
        round_into(rounded := torch.empty_like(p), master)
        assert torch.equal(rounded, p)
    assert any((master != p).any() for master, p in zip(learner.masters, model.parameters()))
    assert update.kept["kl"] <= ready.config.delta < update.attempted["kl"]
    # Independently: the same bf16 weights, the same bf16 arithmetic, one rollout at a time.
    total = 0.0
    for problem, messages in zip(ready.rollouts.problems, ready.rollouts.messages):
        seen = ready.team.render(0, problem, messages, add_generation_prompt=False)
        (start, stop), tokens = seen.spans[0], torch.tensor([seen.ids])
        with torch.no_grad():
            o, n = (m(tokens)[0].log_softmax(-1) for m in (old, model))
        logs = torch.stack([n[t - 1, seen.ids[t]] - o[t - 1, seen.ids[t]] for t in range(start, stop)])
        total += (logs.expm1() - logs).sum().item() / len(ready.rollouts.messages)
    assert update.kept["kl"] == pytest.approx(total, rel=0.1)


def test_masters_keep_steps_that_bf16_alone_would_lose():
    ready = Prepared(dtype="bf16", lr=1e-6)
    before = ready.learner.clone_masters()
    ready.update()
    moved = sum((a != b).sum().item() for a, b in zip(before, ready.learner.masters))
    assert moved > 0.45 * sum(m.numel() for m in before)
    rounded = sum((a.bfloat16() != p).sum().item() for a, p in zip(before, ready.learner.parameters))
    assert rounded < 0.1 * moved


@pytest.mark.parametrize(
    "beta, attempted, delta, adapted",
    [
        (0.01, 0.031, 0.02, 0.015),
        (0.01, 0.029, 0.02, 0.01),
        (0.015, 0.013, 0.02, 0.01),
        (0.9, 9.0, 0.02, 1.0),
        (1.2e-4, 0.0, 0.02, 1e-4),
        (0.0, 9.0, 0.02, 0.0),
        (0.01, 0.0, math.inf, 0.01),
    ],
)
def test_beta_follows_the_attempted_overshoot_within_its_bounds(beta, attempted, delta, adapted):
    learner = Prepared().learner
    learner.beta = beta
    learner.adapt_beta(attempted, delta)
    assert learner.beta == pytest.approx(adapted)


def test_beta_is_adapted_on_the_attempt_not_on_what_was_kept():
    ready = Prepared(lr=5e-3, beta=0.01)
    update = ready.update()
    assert update.attempted["kl"] > 1.5 * ready.config.delta > update.kept["kl"]
    assert update.beta == 0.01 and ready.learner.beta == pytest.approx(0.015)


def test_the_learning_rate_that_is_logged_is_the_one_that_is_used():
    ready = Prepared(inner_steps=1, delta=math.inf, beta=0.0)
    before = ready.learner.clone_masters()
    update = ready.update(1e-4)
    step = max((a - b).abs().max().item() for a, b in zip(before, ready.learner.masters))
    assert update.lr == 1e-4 and step == pytest.approx(1e-4, rel=1e-2)  # Adam's first step is lr itself


def test_every_knob_of_the_objective_reaches_it(monkeypatch):
    ready = Prepared(clip=0.3, ratio="mean", kl_unit="token", beta=0.07, inner_steps=1)
    seen, original = [], learning.trust_region_loss
    monkeypatch.setattr(learning, "trust_region_loss", lambda *a, **k: seen.append(k) or original(*a, **k))
    ready.update()
    wanted = {"clip": 0.3, "ratio": "mean", "kl_unit": "token", "beta": 0.07}
    assert seen and all(wanted == {name: k[name] for name in wanted} for k in seen)


def test_the_optimizer_is_the_one_specified():
    """Gradient norm clipped at 1, and Adam's moments with betas 0.9 and 0.99: read off after one step."""
    ready = Prepared(inner_steps=1, delta=math.inf)
    for batch in ready.batches.own:
        batch.advantage.mul_(1e4)
    assert ready.update().grad_norm > 10
    state = [ready.learner.optimizer.state[p] for p in ready.learner.masters]
    first = torch.cat([s["exp_avg"].flatten() for s in state])
    second = torch.cat([s["exp_avg_sq"].flatten() for s in state])
    assert first.norm().item() == pytest.approx(0.1, rel=1e-4)
    assert torch.allclose(second, 0.01 * (first / 0.1) ** 2, rtol=1e-3, atol=1e-12)
    assert ready.learner.optimizer.param_groups[0]["weight_decay"] == 0


def test_without_any_advantage_nothing_moves_not_even_by_momentum():
    ready = Prepared(delta=math.inf)
    ready.update()
    before, beta = ready.learner.clone_masters(), ready.learner.beta
    ready.batches = ready.batch(ready.rollouts, torch.zeros_like(ready.advantages))
    update = ready.update()
    assert update.steps == 0 and update.kept["kl"] == 0 and update.first["entropy"] > 0
    assert update.grad_norm is None and ready.learner.beta == beta
    assert all(torch.equal(a, b) for a, b in zip(before, ready.learner.masters))


def test_an_agent_that_took_no_turn_is_left_alone():
    ready = Prepared()
    silent = [[m for m in messages if m.agent != 0] for messages in ready.rollouts.messages]
    ready.batches = ready.batch(dataclasses.replace(ready.rollouts, messages=silent))
    update = ready.update()
    assert update.steps == 0 and not update.kept and update.log_ratio == 0.0


@pytest.mark.parametrize("fails_at", [3, 30])
def test_an_error_inside_a_snapshot_leaves_accepted_weights(fails_at, monkeypatch):
    """A second buffer takes the new snapshot: it may be half written, and is not used then."""
    ready = Prepared(delta=math.inf)
    learner, accepted, original, calls = ready.learner, [], torch.Tensor.copy_, itertools.count()
    step, snapshot = learner.step, learner.snapshot

    def failing(self, *given):
        if next(calls) == fails_at:
            raise RuntimeError("out of memory")
        return original(self, *given)

    def in_trouble(into=None):
        if accepted:
            monkeypatch.setattr(torch.Tensor, "copy_", failing)
        try:
            return snapshot(into)
        finally:
            monkeypatch.setattr(torch.Tensor, "copy_", original)

    monkeypatch.setattr(learner, "step", lambda lr: accepted.append(learner.clone_masters()) or step(lr))
    monkeypatch.setattr(learner, "snapshot", in_trouble)
    with pytest.raises(RuntimeError, match="out of memory"):
        ready.update()
    assert all(torch.equal(a, b) for a, b in zip(accepted[-1], learner.masters))


def test_a_joint_update_reports_each_agents_kl_and_the_mean_over_all_messages():
    ready = Prepared([0, 1], router="random", rounds=2, inner_steps=2, delta=math.inf, lr=2e-3)
    old = [copy.deepcopy(model) for model in ready.learner.models]
    kept = ready.update().kept
    counts = [len(ready.rollouts.by([j])) for j in (0, 1)]
    own = [
        kl_by_loop(old[j], ready.learner.models[j], ready.team, ready.rollouts, j, ready.config)["k3"]
        for j in (0, 1)
    ]
    assert counts[0] != counts[1]
    assert [kept["kl_agent_0"], kept["kl_agent_1"]] == pytest.approx(own, rel=1e-3)
    mean = (counts[0] * own[0] + counts[1] * own[1]) / sum(counts)
    assert kept["kl"] == pytest.approx(mean, rel=1e-3) and mean > 1e-3


def test_weights_of_rollouts_reach_loss_gradient_and_monitor():
    """Weights 0 and 2 on halves of the problems are the update on one half alone."""
    ready = Prepared(batch_tokens=10**6, beta=0.5)
    half = len(ready.rollouts.returns) // 2
    log_weights = torch.full((2 * half,), -math.inf)
    log_weights[:half] = 0.0
    whole = ready.batch(dataclasses.replace(ready.rollouts, log_weights=log_weights))
    part = dataclasses.replace(
        ready.rollouts,
        problems=ready.rollouts.problems[:half],
        messages=ready.rollouts.messages[:half],
        returns=ready.rollouts.returns[:half],
    )
    results = []
    for batches in (whole, ready.batch(part, ready.advantages[:half])):
        ready.learner.measure(batches, ready.config)
        before = ready.learner.snapshot()
        with torch.no_grad():
            for p in ready.learner.masters:
                p.mul_(1.01)
        stats = ready.learner.backward(batches, ready.config).stats
        results.append((stats, [p.grad.clone() for p in ready.learner.masters]))
        ready.learner.restore(before)
    (weighted, gradient), (alone, wanted) = results
    for name in ("loss", "kl_k1", "kl_k3", "clip_fraction", "ratio_mean"):
        assert weighted[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-6), name
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-3) for a, b in zip(gradient, wanted))
