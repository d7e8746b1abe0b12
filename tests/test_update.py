"""The trust region holds, and what is undone is undone completely."""

import copy
import dataclasses
import math

import pytest
import torch

from teamtr_min import objective, rng
from teamtr_min.config import Config
from teamtr_min.learner import Diverged, Learner, adapt_beta, evaluate, update_agent
from teamtr_min.objective import group_advantages
from teamtr_min.rollout import collect
from teamtr_min.tasks import Relay
from teamtr_min.team import load_team

BASE = Config(agents=2, problems=12, group=6, inner_steps=4, device="cpu")


def prepared(agent: int = 0, **changes):
    """(learner, batches, config, rollouts, team) ready for an update of `agent`."""
    config = dataclasses.replace(BASE, **changes)
    task = Relay(config)
    team = load_team(config, task.roles(config.agents))
    problems = task.sample_problems(config.problems, rng.generator(config.seed, "problems"))
    rollouts = collect(team, problems, config.group, task.grade, config, ("train", 0, 0))
    advantage = group_advantages(rollouts.grouped_returns, config.advantage_clip, config.eps_norm).flatten()
    learner = Learner([team.agents[agent].model], config.beta)
    return learner, rollouts.view(agent, advantage, config.batch_tokens), config, rollouts, team


def kl_by_loop(old, new, rollouts, team, agent: int, config: Config) -> dict[str, float]:
    """Eq. 11 from nothing but the two models and the transcripts: one rollout at a time, in float64."""
    old, new = copy.deepcopy(old).double(), copy.deepcopy(new).double()
    k1, k3, exact = [], [], []
    for problem, messages in zip(rollouts.problems, rollouts.messages):
        view = team.view(agent, problem.text, messages, speak=False)
        tokens = torch.tensor([view.ids])
        with torch.no_grad():
            logp = [(m(tokens)[0].double() / config.temperature).log_softmax(-1) for m in (old, new)]
        for start, stop in view.spans:
            unit = stop - start if config.kl_unit == "token" else 1
            terms = [[p[t - 1, view.ids[t]].item() for p in logp] for t in range(start, stop)]
            k1.append(sum(o - n for o, n in terms) / unit)
            k3.append(sum(math.expm1(n - o) - (n - o) for o, n in terms) / unit)
            rows = slice(start - 1, stop - 1)
            exact.append((logp[0][rows].exp() * (logp[0][rows] - logp[1][rows])).sum().item() / unit)
    return {"k1": sum(k1) / len(k1), "k3": sum(k3) / len(k3), "exact": sum(exact) / len(exact)}


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 5e-3},
        {"lr": 5e-3, "kl_estimator": "k1"},
        {"lr": 5e-3, "kl_estimator": "exact", "agents": 1, "rounds": 2},
        {"lr": 5e-3, "kl_unit": "token", "delta": 0.004},
        {"lr": 5e-3, "ratio": "token", "temperature": 0.7},
        {"lr": 5e-3, "ratio": "mean", "batch_tokens": 100},
        {"lr": 2e-4},
        {"lr": 5e-3, "delta": math.inf},
    ],
)
def test_the_radius_holds_by_an_independent_recomputation(changes):
    learner, batches, config, rollouts, team = prepared(**changes)
    old = copy.deepcopy(learner.models[0])
    report = update_agent(learner, batches, config, config.lr)
    measured = kl_by_loop(old, learner.models[0], rollouts, team, 0, config)
    for name in ("k1", "k3", "exact"):
        if report[f"kl_{name}_after"] is not None:
            assert report[f"kl_{name}_after"] == pytest.approx(measured[name], rel=1e-3, abs=2e-6), name
    assert measured[config.kl_estimator] <= config.delta + 2e-6
    if config.lr == 5e-3:
        assert (report["kl_before"] > 0.02) and (report["halvings"] > 0) == math.isfinite(config.delta)
    assert report["steps"] <= config.inner_steps and (measured["k3"] > 0 or report["halvings"] == 11)


def test_going_back_restores_the_optimizer_with_the_weights():
    """After an update that broke out of its radius, Adam's state is that of the last accepted weights."""
    learner, batches, config, *_ = prepared(lr=3e-4, inner_steps=6, delta=0.02)
    points, outside = [], []
    take, go = learner.point, learner.go
    learner.point = lambda into=None: points.append(copy.deepcopy(take())) or take(into)
    learner.go = lambda base, toward=None, fraction=0.0: outside.append(toward) or go(base, toward, fraction)
    report = update_agent(learner, batches, config, config.lr)
    assert 0 < report["halvings"] < 10 and report["steps"] >= 2, (
        "the case under test: a later step overshoots"
    )
    accepted, outside = points[-1], outside[-1]
    fraction = 0.5 ** report["halvings"]
    for i, p in enumerate(learner.masters):
        state = learner.optimizer.state[p]
        assert state["step"] == accepted.state[i]["step"] == report["steps"] - 1
        assert torch.equal(state["exp_avg"], accepted.state[i]["exp_avg"])
        assert torch.equal(state["exp_avg_sq"], accepted.state[i]["exp_avg_sq"])
        wanted = accepted.masters[i] + fraction * (outside[i] - accepted.masters[i])
        assert torch.allclose(p, wanted, atol=1e-7)
        assert p.grad is None


def test_an_update_that_fits_nowhere_leaves_the_agent_as_it_was():
    learner, batches, config, *_ = prepared(lr=0.5, delta=1e-9)
    before = [p.detach().clone() for p in learner.masters]
    report = update_agent(learner, batches, config, config.lr)
    assert report["halvings"] == 11 and report["kl_after"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, learner.masters))
    assert all(not learner.optimizer.state[p] for p in learner.masters)


def test_the_first_ratio_is_exactly_one():
    learner, batches, config, *_ = prepared(batch_tokens=150)
    first = evaluate(learner, batches, config, None, grad=True)
    assert first["ratio_mean"] == pytest.approx(1, abs=1e-6) and first["ratio_max"] == 1
    assert first["kl_k1"] == first["kl_k3"] == first["clip_fraction"] == 0
    assert 0 <= first["sampler_mismatch"] < 1e-6


def test_small_batches_give_the_whole_batchs_loss_and_gradient():
    results = []
    for batch_tokens in (10**6, 130):
        learner, batches, config, *_ = prepared(agent=1, rounds=2, batch_tokens=batch_tokens, beta=0.5)
        evaluate(learner, batches, config, None, grad=False)
        with torch.no_grad():
            for p in learner.masters:
                p.mul_(1.01)
        values = evaluate(learner, batches, config, None, grad=True)
        results.append((len(batches), values, [p.grad for p in learner.masters]))
    assert results[0][0] == 1 and results[1][0] > 5
    for name, value in results[0][1].items():
        assert results[1][1][name] == (
            value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)
        ), name
    for a, b in zip(results[0][2], results[1][2]):
        assert torch.allclose(a, b, atol=1e-6, rtol=1e-3)


def test_the_end_of_message_has_gradient_and_contexts_have_none():
    """Gradient with respect to each position's hidden state, through the real loss."""
    learner, batches, config, rollouts, team = prepared(
        max_new_tokens=3, batch_tokens=10**6, agents=1, rounds=2
    )
    (batch,) = batches
    model, kept = learner.models[0], {}
    hidden = type(model).hidden

    def keep(self, tokens, *rest):
        kept["hidden"] = hidden(self, tokens, *rest)
        kept["hidden"].retain_grad()
        return kept["hidden"]

    model.hidden = keep.__get__(model)
    evaluate(learner, batches, config, None, grad=True)
    touched = kept["hidden"].grad.abs().sum(-1).flatten() > 0  # (R * T)
    wanted = torch.zeros_like(touched)
    wanted[batch.where] = batch.advantage[batch.message] != 0
    assert torch.equal(touched, wanted)
    ends = batch.targets == team.agents[0].chat.end_of_message
    assert ends.any() and touched[batch.where[ends]].any()
    cut_off = [m for messages in rollouts.messages for m in messages if m.agent == 0 and not m.stopped]
    assert cut_off, "the case under test: some messages hit the length limit"


@pytest.mark.parametrize("where", ["weights", "loss", "gradient"])
def test_what_is_not_a_number_stops_the_update_at_the_last_good_state(where, monkeypatch):
    learner, batches, config, *_ = prepared(delta=math.inf)
    states, step = [], learner.step

    def spoil(lr):
        states.append([p.detach().clone() for p in learner.masters])
        if len(states) == 2:  # the second step goes wrong
            if where == "gradient":
                learner.masters[0].grad[0] = math.nan
            if where == "loss":
                batches[0].advantage[0] = math.nan
        norm = step(lr)
        if len(states) == 2 and where == "weights":
            learner.masters[0].data[0] = math.inf
        return norm

    monkeypatch.setattr(learner, "step", spoil)
    with pytest.raises(Diverged, match="gradient is not finite" if where == "gradient" else "is nan"):
        update_agent(learner, batches, config, config.lr)
    assert all(torch.equal(a, b) for a, b in zip(states[1], learner.masters))
    assert all(torch.isfinite(p).all() for p in learner.masters)


def test_in_bf16_the_monitor_sees_what_the_sampler_will_use():
    """fp32 masters move; the model holds their rounding; the reported KL is that of the rounded weights."""
    learner, batches, config, rollouts, team = prepared(dtype="bf16", lr=3e-3)
    old = copy.deepcopy(learner.models[0])
    report = update_agent(learner, batches, config, config.lr)
    model = team.agents[0].model
    assert model is learner.models[0] and all(p.dtype == torch.bfloat16 for p in model.parameters())
    for master, p in zip(learner.masters, model.parameters()):
        assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), p)
    assert any((master != p).any() for master, p in zip(learner.masters, model.parameters()))
    assert report["kl_after"] <= config.delta < report["kl_before"]
    # Independently: the same bf16 weights, the same bf16 arithmetic, one rollout at a time.
    total, count = 0.0, 0
    for problem, messages in zip(rollouts.problems, rollouts.messages):
        view = team.view(0, problem.text, messages, speak=False)
        (start, stop), tokens = view.spans[0], torch.tensor([view.ids])
        with torch.no_grad():
            o, n = (m(tokens)[0].log_softmax(-1) for m in (old, model))
        logs = torch.stack([n[t - 1, view.ids[t]] - o[t - 1, view.ids[t]] for t in range(start, stop)])
        total, count = total + (logs.expm1() - logs).sum().item(), count + 1
    assert report["kl_after"] == pytest.approx(total / count, rel=0.1)


def test_masters_keep_steps_that_bf16_alone_would_lose():
    learner, batches, config, *_ = prepared(dtype="bf16", lr=1e-6)
    before = [m.clone() for m in learner.masters]
    update_agent(learner, batches, config, config.lr)
    moved = sum((a != b).sum().item() for a, b in zip(before, learner.masters))
    assert moved > 0.9 * sum(m.numel() for m in before) * 0.5
    rounded = sum((a.bfloat16() != p).sum().item() for a, p in zip(before, learner.parameters))
    assert rounded < 0.1 * moved


def test_beta_follows_the_attempted_overshoot_within_its_bounds():
    assert adapt_beta(0.01, attempted=0.031, delta=0.02) == pytest.approx(0.015)
    assert adapt_beta(0.01, attempted=0.029, delta=0.02) == 0.01
    assert adapt_beta(0.015, attempted=0.013, delta=0.02) == pytest.approx(0.01)
    assert adapt_beta(0.9, attempted=9.0, delta=0.02) == 1.0
    assert adapt_beta(1.2e-4, attempted=0.0, delta=0.02) == 1e-4
    assert adapt_beta(0.0, attempted=9.0, delta=0.02) == 0.0


def test_the_learning_rate_that_is_logged_is_the_one_that_is_used():
    learner, batches, config, *_ = prepared(inner_steps=1, delta=math.inf, beta=0.0)
    before = [p.detach().clone() for p in learner.masters]
    report = update_agent(learner, batches, config, 1e-4)
    step = max((a - b).abs().max().item() for a, b in zip(before, learner.masters))
    assert report["lr"] == 1e-4 and step == pytest.approx(1e-4, rel=1e-2)  # Adam's first step is lr itself


def test_every_knob_of_the_objective_reaches_it(monkeypatch):
    learner, batches, config, *_ = prepared(clip=0.3, ratio="mean", kl_unit="token", beta=0.07, inner_steps=1)
    seen, original = [], objective.trust_region_loss
    monkeypatch.setattr(objective, "trust_region_loss", lambda *a, **k: seen.append(k) or original(*a, **k))
    update_agent(learner, batches, config, config.lr)
    assert seen and all(k == {"clip": 0.3, "ratio": "mean", "kl_unit": "token", "beta": 0.07} for k in seen)


def test_beta_is_adapted_on_the_attempt_not_on_what_was_kept():
    learner, batches, config, *_ = prepared(lr=5e-3, beta=0.01)
    report = update_agent(learner, batches, config, config.lr)
    assert report["kl_before"] > 1.5 * config.delta > report["kl_after"]
    assert report["beta"] == 0.01 and learner.beta == pytest.approx(0.015)


def test_the_optimizer_is_the_one_specified():
    """Gradient norm clipped at 1, and Adam's moments with betas 0.9 and 0.99: read off after one step."""
    learner, batches, config, *_ = prepared(inner_steps=1, delta=math.inf)
    for batch in batches:
        batch.advantage *= 1e4
    report = update_agent(learner, batches, config, config.lr)
    assert report["grad_norm"] > 10
    state = [learner.optimizer.state[p] for p in learner.masters]
    first = torch.cat([s["exp_avg"].flatten() for s in state])
    second = torch.cat([s["exp_avg_sq"].flatten() for s in state])
    assert first.norm().item() == pytest.approx(0.1, rel=1e-4)
    assert torch.allclose(second, 0.01 * (first / 0.1) ** 2, rtol=1e-3, atol=1e-12)
    assert learner.optimizer.param_groups[0]["weight_decay"] == 0


def test_ctrl_c_inside_an_update_undoes_the_step_under_way(monkeypatch):
    learner, batches, config, *_ = prepared(delta=math.inf)
    before, step = [p.detach().clone() for p in learner.masters], learner.step

    def interrupted(lr):
        step(lr)
        raise KeyboardInterrupt

    monkeypatch.setattr(learner, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        update_agent(learner, batches, config, config.lr)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.masters))


def test_without_any_advantage_nothing_moves_not_even_by_momentum():
    learner, batches, config, *_ = prepared(delta=math.inf)
    update_agent(learner, batches, config, config.lr)
    learner, before, beta = learner, [p.detach().clone() for p in learner.masters], learner.beta
    for batch in batches:
        batch.advantage.zero_()
        batch.old_logp = None
    report = update_agent(learner, batches, config, config.lr)
    assert report["steps"] == 0 and report["kl_after"] == 0 and report["entropy"] > 0 and learner.beta == beta
    assert all(torch.equal(a, b) for a, b in zip(before, learner.masters))


def test_an_agent_that_never_spoke_is_left_alone():
    learner, _, config, *_ = prepared()
    report = update_agent(learner, [], config, config.lr)
    assert report["steps"] == 0 and report["kl_after"] is None
