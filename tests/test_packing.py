"""Prefix trees change what a training step costs, and nothing else."""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from ready import Prepared

from teamtr_min.engine import cache, packing
from teamtr_min.engine.packing import batches_of, trees_of
from teamtr_min.objective import teamtr_loss


def least(things: list, cost) -> float:
    """Of all ways to cut a row of things into runs."""
    return min((cost(things[:n]) + least(things[n:], cost) for n in range(1, len(things) + 1)), default=0.0)


@pytest.mark.parametrize("pairs_per_token, batch_cost", [(0.5, 1), (3.0, 5), (20.0, 40)])
@pytest.mark.parametrize("seed, most", [*itertools.product(range(3), [1, 12, 100])])
def test_no_other_trees_and_batches_would_cost_less(seed, most, pairs_per_token, batch_cost, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_COST", batch_cost)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (11,), generator=generator).tolist()
    sequences = [torch.randint(3, (n,), generator=generator).tolist() for n in lengths]  # with branches
    trees = trees_of(enumerate(sequences), most, pairs_per_token)

    def of_tree(group) -> float:
        size = len({s[: t + 1] for s in group for t in range(len(s))})
        return math.inf if size > most and len(group) > 1 else size * pairs_per_token + size**2

    def of_batch(rows) -> float:
        count, width = len(rows), max(map(len, rows))
        tokens = count * width
        cost = tokens * (1 + width / pairs_per_token) + batch_cost
        return math.inf if count > 1 and tokens > most else cost

    found = sum(of_tree({tuple(sequences[n]) for n in tree.paths}) for tree in trees)
    assert found == pytest.approx(least(sorted(set(map(tuple, sequences))), of_tree))
    found = sum(map(of_batch, batches_of(trees, most, pairs_per_token, torch.device("cpu"))))
    assert found == pytest.approx(least(sorted(trees, key=len), of_batch))


def plainly(ready: Prepared, agent: int, old):
    """Eq. 10 and 11 of one agent, and its messages' weight: a padded row a rollout, nothing shared."""
    config, rollouts, model = ready.config, ready.rollouts, ready.team.agents[agent].model
    seen = [ready.team.render(agent, *pair, False) for pair in zip(rollouts.problems, rollouts.messages)]
    width = max(len(s.ids) for s in seen)
    tokens = torch.tensor([s.ids + [0] * (width - len(s.ids)) for s in seen])
    spans = [(r, start, stop) for r, s in enumerate(seen) for start, stop in s.spans]
    places = [(r, t, m) for m, (r, start, stop) in enumerate(spans) for t in range(start, stop)]
    row, at, message = torch.tensor(places).t()  # (N,) each
    advantage, weight = (x[[r for r, _, _ in spans]] for x in (ready.advantages, rollouts.weights))

    def logps(model):
        z = model.hidden(tokens)[row, at - 1] @ model.head.t() / config.temperature  # (N, V)
        return z.log_softmax(-1).gather(1, tokens[row, at][:, None])[:, 0]

    options = {name: getattr(config, name) for name in ("ratio", "kl_unit", "clip")}
    options |= {"beta": ready.learner.beta, "weight": weight}
    return *teamtr_loss(logps(model), logps(old).detach(), message, advantage, **options), weight.sum()


@pytest.mark.parametrize("agents, knobs", [
    ([1], {"rounds": 2, "agents": 3, "max_new_tokens": 3}),  # messages cut off, and seen again
    ([2], {"router": "random", "agents": 3, "batch_tokens": 90}),  # left out of some rollouts
    ([1], {"group": 5, "problems": 7, "batch_tokens": 3, "temperature": 0.7}),  # less than any row
    ([0], {"ratio": "token", "kl_unit": "token", "clip": 0.01}),
    ([0, 1], {"rounds": 2, "unit": 16}),  # two that step together; rows of a few lengths, as on CUDA
])  # fmt: skip
def test_loss_gradients_and_monitor_are_those_of_one_plain_row_per_rollout(agents, knobs, monkeypatch):
    monkeypatch.setitem(cache.UNIT, "cpu", knobs.pop("unit", 1))
    ready = Prepared(agents, **{"problems": 6} | knobs)
    ready.learner.beta = 0.3
    old = copy.deepcopy(ready.learner.models)
    noise = torch.randn(2, len(ready.advantages), generator=torch.Generator().manual_seed(0))
    ready.advantages = noise[0]
    ready.advantages[: ready.config.group] = 0  # the first problem's
    ready.rollouts = dataclasses.replace(ready.rollouts, log_weights=noise[1])
    batches = ready.batch(ready.rollouts)
    assert len({batch.pulls for batch in batches.own}) == 2
    for _ in range(2):
        found = ready.learner.backward(batches, ready.config).stats
        losses, stats, masses = zip(*(plainly(ready, j, o) for j, o in zip(agents, old)))
        share = torch.stack(masses) / sum(masses)
        loss = torch.stack(losses) @ share
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)
        for name in ("kl_k1", "kl_k3", "clip_fraction", "ratio_mean"):
            wanted = torch.cat([own[name] for own in stats]) @ share
            assert found[name] == pytest.approx(wanted.item(), rel=1e-4, abs=1e-6), name
        gradients = torch.autograd.grad(loss, ready.learner.parameters)
        for name, master, wanted in zip(ready.learner.names, ready.learner.masters, gradients):
            assert (master.grad - wanted).norm() <= 1e-4 * wanted.norm() > 0, name
        ready.learner.step(2e-3)
