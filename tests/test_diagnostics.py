"""--diagnostics watches without touching, and variants stopped inside a stage go on to the same bits."""

import copy
import math

import pytest
import torch
from toy_runs import TOY, parity, prepared, results, run, same, timeless, weights

import train
from teamtr_min.extras import certificate
from teamtr_min.extras.diagnostics import Diagnostics
from teamtr_min.tasks import Relay

ESTIMATES = {"surrogate", "gap", "occupancy_shift", "ess", "kl_held_out", "certificate", "penalty", "bound"}


@pytest.fixture(autouse=True)
def half_of_all_rollouts_are_right(monkeypatch):
    monkeypatch.setattr(Relay, "grade", parity)


# Diagnostics


def test_diagnostics_change_nothing_of_the_training_and_are_counted_apart(tmp_path, capsys):
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
        assert u["penalty"] == pytest.approx(
            certificate.penalty_constant() * math.sqrt(u["kl_held_out"]) + half
        )
        assert u["bound"] == u["surrogate_ci"][0], "who takes one turn gains exactly the surrogate"
        still = u["update"] == 0
        assert (u["gap"] == 0) == (u["occupancy_shift"] == 0) == (u["ess"] == 1) == still
    assert [s["vacuous"] for s in stages] == [True, True] and capsys.readouterr().out.count("(vacuous)") == 2
    for s in stages:
        own = [u for u in updates if u["stage"] == s["stage"]]
        assert s["certificate"] == pytest.approx(sum(u["surrogate"] - u["penalty"] for u in own))
        assert s["delta_stale"] == pytest.approx(sum(abs(u["gap"]) for u in own[1:]) / 2)


def test_in_reverse_turn_order_no_update_sees_a_shift(tmp_path):
    _, updates, _ = run(tmp_path / "run", "--diagnostics", "--order", "reversed", "--stages", "1")
    assert all(u["gap"] == u["occupancy_shift"] == 0 and u["ess"] == 1 for u in updates)
    assert all(u["kl_held_out"] > 0 for u in updates)


@pytest.mark.parametrize("flags, messages", [(["--rounds", "2"], 2), (["--occupancy", "joint"], 3)])
def test_who_takes_several_turns_is_bounded_by_the_kl_of_whole_rollouts(tmp_path, flags, messages):
    """Finite horizon: no worse than -sqrt(H KL / 2); the agents of a joint update count as one."""
    _, updates, stages = run(tmp_path / "run", "--diagnostics", "--stages", "1", *flags)
    for u in updates:
        assert u["bound"] == pytest.approx(-math.sqrt(messages * u["kl_held_out_ci"][1] / 2))
    assert stages[0]["bound"] == pytest.approx(sum(u["bound"] for u in updates))


def test_of_an_agent_who_takes_no_turn_nothing_is_measured(tmp_path, capsys):
    """Absent keys, not zeros that read like a catastrophe."""
    (tmp_path / "first.py").write_text("def router(turn, messages, agents, uniform):\n    return 0\n")
    flags = ("--diagnostics", "--stages", "1", "--router", str(tmp_path / "first.py"))
    _, updates, stages = run(tmp_path / "run", *flags)
    assert updates[0]["ess"] == 1 and updates[0]["kl_held_out"] > 0
    assert not any(ESTIMATES & u.keys() for u in updates[1:]) and "delta_stale" not in stages[0]
    assert stages[0]["certificate"] == updates[0]["certificate"] and "ESS/B 1.00" in capsys.readouterr().out


def test_a_diagnosis_compares_the_models_of_before_and_after():
    """By hand, for the second update of a stage: agent 1 has moved, then agent 2 moves."""
    ready = prepared(agents=3, group=4, problems=5)
    team = ready.rollouts.team
    diagnostics = Diagnostics(ready.config, Relay(ready.config), team, 0)
    g, models, rollouts = torch.Generator().manual_seed(0), [], []
    for i, j in enumerate((1, 2)):
        diagnostics.before(i, [j])
        rollouts.append(diagnostics.rollouts)
        models.append(copy.deepcopy(team.agents[j].model))
        with torch.no_grad():
            for p in team.agents[j].model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=g))
        report = diagnostics.after()

    def change(r, i: int, j: int) -> torch.Tensor:
        new, old = team.agents[j].model, models[i]
        return (r.message_logps(j, new, 300) - r.message_logps(j, old, 300))[:, j].double()

    first, present = rollouts
    w, rho = change(present, 1, 2).exp(), change(present, 0, 1).exp()
    left_out = [[(group.sum() - r) / 3 for r in group] for group in present.grouped_returns]
    advantage = present.returns - torch.tensor(left_out).flatten()
    rho_first = change(first, 0, 1).exp()
    wanted = {
        "surrogate": ((w - 1) * advantage).mean(),
        "gap": ((1 - 1 / rho) * (w - 1) * advantage).mean(),
        "occupancy_shift": (rho_first / rho_first.mean() - 1).abs().mean() / 2,
        "ess": rho_first.sum() ** 2 / (20 * rho_first.square().sum()),
        "kl_held_out": (w - 1 - w.log()).mean(),
    }
    assert {name: report[name] for name in wanted} == pytest.approx(
        {name: value.item() for name, value in wanted.items()}, rel=1e-4
    )
    assert report["kl_held_out"] > 0.01 and report["occupancy_shift"] > 0.01 and report["ess"] < 0.99
    for name in ("surrogate", "gap"):
        low, high = report[f"{name}_ci"]
        assert abs(report[name]) > 1e-3 and low < report[name] < high


# Resume


@pytest.mark.parametrize(
    "stop", [1, 2, 5]
)  # in the first stage, before and in its second update; in the second
@pytest.mark.parametrize(
    "flags",
    [
        ["--diagnostics"],
        ["--occupancy", "importance", "--order", "random"],
        ["--every", "2", "--resample", "suffix", "--router", "random"],
        ["--occupancy", "joint", "--stages", "5"],
    ],
)
def test_stopped_inside_a_stage_a_variant_resumes_to_the_same_bits(tmp_path, monkeypatch, flags, stop):
    expected = run(tmp_path / "undisturbed", *flags)
    calls, update = [], train.update

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(train, "update", interrupted)
    out = tmp_path / "stopped"
    assert train.main([*TOY, "--out", str(out), *flags]) == 130
    assert train.main(["--resume", str(out)]) == 0
    found = results(out)
    for a, b in zip(expected[1:], found[1:]):
        assert timeless(a) == timeless(b)
    assert timeless([expected[0]]) == timeless([found[0]])
    assert same(weights(tmp_path / "undisturbed"), weights(out))
