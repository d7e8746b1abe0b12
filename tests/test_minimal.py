"""docs/minimal.py and train.py compute the same update."""

import importlib
from pathlib import Path

import pytest
import torch
from ready import Prepared

from teamtr_min.engine import rng

PAGE = Path(__file__).resolve().parent.parent / "docs" / "minimal.py"


@pytest.mark.parametrize("delta", [0.02, 1.2e-6])
def test_the_first_update_is_the_same(delta, monkeypatch):
    monkeypatch.syspath_prepend(PAGE.parent)
    minimal = importlib.import_module("minimal")
    ready = Prepared(agents=2, rounds=2, problems=6, group=4, lr=5e-6, delta=delta, temperature=0.8)
    team = minimal.Minimal(ready.config)
    problems = [p for p in ready.rollouts.problems[:: ready.config.group]]
    rollouts, returns = team.collect(problems, rng.RngPath(0, "train", 0, 0))
    for own, row in zip(rollouts, ready.rollouts.messages, strict=True):
        assert [(m.tokens, m.text, m.stopped) for m in own] == [(m.tokens, m.text, m.stopped) for m in row]
    assert torch.equal(returns, ready.rollouts.returns)
    advantages = minimal.group_advantages(returns.view(-1, ready.config.group)).flatten()
    assert torch.allclose(advantages, ready.advantages, atol=1e-6)
    before = [p.clone() for p in team.models[0].parameters()]
    outcome, update = team.update(0, problems, rollouts, advantages), ready.update()
    assert (outcome["steps"], outcome["halvings"]) == (update.steps, update.halvings)
    assert (update.halvings > 0) == (delta < 1e-5)
    assert outcome["kl"] == pytest.approx(update.kept["kl"], rel=1e-2)
    ours, theirs = (torch.cat([p.flatten() for p in m.parameters()]) for m in (team.models[0], ready.model))
    moved = (theirs - torch.cat([p.flatten() for p in before])).norm()
    assert (ours - theirs).abs().max() < 1e-5 and (ours - theirs).norm() < 5e-3 * moved
    assert team.betas[0] == ready.learner.beta
    assert len(PAGE.read_text().splitlines()) <= 200
