"""--diagnostics watches without touching, and its estimates are those of a calculation by hand."""

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from ready import Prepared
from toy_runs import run, same, timeless, weights

from teamtr_min.extras.diagnostics import Diagnostics, bootstrap, message_logps, swapped
from teamtr_min.tasks import Role
from teamtr_min.team import Agent

pytestmark = pytest.mark.usefixtures("half_right")
ESTIMATES = {"surrogate", "gap", "occupancy_shift", "ess", "kl_held_out", "certificate", "penalty", "bound"}


def test_diagnostics_change_nothing_of_the_training_and_are_counted_apart(tmp_path):
    plain, plain_updates, _ = run(tmp_path / "plain")
    watched, updates, stages = run(tmp_path / "watched", "--diagnostics")
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "watched"))
    for a, b in zip(timeless(plain_updates), timeless(updates)):
        assert a == {key: b[key] for key in a} and ESTIMATES <= b.keys() - a.keys()
    assert watched["rollouts_diagnostics"] == 6 * 12 and watched["tokens_sampled_diagnostics"] > 0
    kept = ("rollouts", "tokens_sampled", "tokens_trained", "accuracy_final")
    assert all(plain[name] == watched[name] for name in kept)
    for u in updates:
        half = (u["surrogate_ci"][1] - u["surrogate_ci"][0]) / 2
        assert u["zeta"] / 0.01 == pytest.approx(half)
        assert u["penalty"] == pytest.approx(14001 * math.sqrt(u["kl_held_out"]) + half, rel=1e-4)
        assert u["bound"] == u["surrogate_ci"][0], "an agent that takes one turn gains exactly the surrogate"
        still = u["update"] == 0
        assert (u["gap"] == 0) == (u["occupancy_shift"] == 0) == (u["ess"] == 1) == still
    assert [s["vacuous"] for s in stages] == [True, True]
    for s in stages:
        own = [u for u in updates if u["stage"] == s["stage"]]
        assert s["certificate"] == pytest.approx(sum(u["surrogate"] - u["penalty"] for u in own))
        assert s["delta_stale"] == pytest.approx(sum(abs(u["gap"]) for u in own[1:]) / 2)


@pytest.mark.parametrize("flags, messages", [
    ("--rounds 2", 2), ("--occupancy joint", 3), ("--order reversed", 1), ("--router first.py", 3)
])  # fmt: skip
def test_bounds_and_shifts_of_other_orders_turns_and_routers(tmp_path, monkeypatch, flags, messages):
    """Several turns: no worse than -sqrt(H KL / 2). In reverse turn order no update sees a shift."""
    monkeypatch.chdir(tmp_path)
    Path("first.py").write_text("def router(turn, messages, agents, uniform):\n    return 0\n")
    _, updates, (stage,) = run(tmp_path / "run", "--diagnostics", "--stages", "1", *flags.split())
    diagnosed = [u for u in updates if ESTIMATES <= u.keys()]
    for u in diagnosed:
        several = -math.sqrt(messages * u["kl_held_out_ci"][1] / 2)
        wanted = several if messages > 1 else u["surrogate_ci"][0]
        assert u["kl_held_out"] > 0 and u["bound"] == pytest.approx(wanted)
        if "reversed" in flags or u["update"] == 0:
            assert u["gap"] == u["occupancy_shift"] == 0 and u["ess"] == 1
    assert stage["bound"] == pytest.approx(sum(u["bound"] for u in diagnosed))
    if "router" in flags:
        assert len(diagnosed) == 1 and not any(ESTIMATES & u.keys() for u in updates[1:])
        assert stage["certificate"] == updates[0]["certificate"] and "delta_stale" not in stage


@pytest.mark.parametrize("tools", [0, 1])
def test_a_diagnosis_compares_the_weights_of_before_and_after(tools):
    """By hand, for the second update of a stage: agent 0 has moved, then agent 2 moves."""
    ready = Prepared(agents=3, group=4, problems=5)
    tool = Role("Tool", "", lambda problem, messages: "ok" * (messages[-1].text[:1] in "13579"))
    team = dataclasses.replace(ready.team, agents=[*ready.team.agents, *[Agent(tool)] * tools], tools=tools)
    config = dataclasses.replace(ready.config, diagnostics=True)
    watch, rollouts = Diagnostics(config, team, 0), []
    start = [[p.detach().clone() for p in agent.model.parameters()] for agent in team.agents[:3]]
    g = torch.Generator().manual_seed(0)
    for i, j in enumerate((0, 2)):
        watch.before(i, [j])
        rollouts.append(watch.rollouts)
        with torch.no_grad():
            for p in team.agents[j].model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=g))
        before = copy.deepcopy(team.agents[j].model.state_dict())
        report = watch.after()
        assert all(torch.equal(p, before[name]) for name, p in team.agents[j].model.state_dict().items())

    def change(r, j: int) -> torch.Tensor:
        new = message_logps(team, r, j, 300)
        with swapped(team.agents[j].model, start[j]):
            return (new - message_logps(team, r, j, 300))[:, j].double()

    first, present = rollouts
    w, rho = change(present, 2).exp(), change(present, 0).exp()
    left_out = [[(group.sum() - r) / 3 for r in group] for group in present.grouped_returns]
    advantage = present.returns - torch.tensor(left_out).flatten()
    rho_first = change(first, 0).exp()
    wanted = {
        "surrogate": ((w - 1) * advantage).mean(),
        "gap": ((1 - 1 / rho) * (w - 1) * advantage).mean(),
        "occupancy_shift": (rho_first / rho_first.mean() - 1).abs().mean() / 2,
        "ess": rho_first.sum() ** 2 / (20 * rho_first.square().sum()),
        "kl_held_out": (w - 1 - w.log()).mean(),
    }
    for name, value in wanted.items():
        assert report[name] == pytest.approx(value.item(), rel=1e-4), name
    assert report["kl_held_out"] > 0.01 and report["occupancy_shift"] > 0.01 and report["ess"] < 0.99
    for name in ("surrogate", "gap"):
        low, high = report[f"{name}_ci"]
        assert abs(report[name]) > 1e-3 and low < report[name] < high


def test_the_interval_is_over_problems_not_over_rollouts():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).repeat_interleave(8)
    point, (low, high) = bootstrap(torch.mean, values, group=8, seed=0)
    assert point == pytest.approx(values.mean().item())
    assert high - low == pytest.approx(2 * 1.96 * values.std().item() / 20, rel=0.15)
