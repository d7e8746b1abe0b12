"""Prefix trees change what a training step costs, and nothing else."""

import copy
import itertools
import math

import pytest
import torch
from tiny import each_model, random_model, random_tokens
from toy_runs import prepared

import kernels
import train
from teamtr_min.engine import packing
from teamtr_min.engine.model import RMSNorm
from teamtr_min.engine.packing import PackedStep, batches_of, pack, trees_of
from teamtr_min.learner import Learner, evaluate
from teamtr_min.objective import teamtr_loss
from teamtr_min.rollout import AgentBatch

CPU = torch.device("cpu")


def random_sequences(seed: int, count: int = 40) -> list[list[int]]:
    """Of three different tokens, 1 to 9 long, so that they branch everywhere, and some stand twice."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (count,), generator=generator).tolist()
    return [torch.randint(3, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("seed", range(5))
def test_a_tree_holds_every_prefix_once_and_every_sequence_whole(seed):
    sequences = random_sequences(seed)
    trees = trees_of(enumerate(sequences), most=10**6, pairs_per_token=1e9)
    assert sum(map(len, trees)) == len({tuple(s[: t + 1]) for s in sequences for t in range(len(s))})
    assert len(trees) == 3, "one for each first token"
    for tree in trees:
        for number, path in tree.paths.items():
            assert [tree.tokens[k] for k in path] == sequences[number]
            assert [tree.positions[k] for k in path] == list(range(len(path)))
            for i in path:
                assert [k for k in range(i + 1) if tree.end[k] > i] == path[: path.index(i) + 1]
    assert sorted(number for tree in trees for number in tree.paths) == list(range(len(sequences)))


def test_what_shares_little_stays_apart():
    """Two sequences of 10 that share 4: together they are 16 tokens and 256 pairs, apart 20 and 200."""
    pair = list(enumerate([[0] * 4 + [1] * 6, [0] * 4 + [2] * 6]))
    assert [len(tree) for tree in trees_of(pair, 100, pairs_per_token=14.1)] == [16]
    assert [len(tree) for tree in trees_of(pair, 100, pairs_per_token=13.9)] == [10, 10]
    assert [len(tree) for tree in trees_of(pair, 15, pairs_per_token=1e9)] == [10, 10]
    assert [len(tree) for tree in trees_of([(0, [1, 2]), (1, [2, 2])], 100, 1e9)] == [2, 2]
    same = trees_of([(0, [1, 2]), (1, [1, 2])], 1, pairs_per_token=0.1)
    assert [len(tree) for tree in same] == [2] + [2] * (len(same) - 1)


@pytest.mark.parametrize("pairs_per_token", [0.5, 3.0, 20.0])
@pytest.mark.parametrize("most", [1, 12, 100])
@pytest.mark.parametrize("seed", range(4))
def test_no_other_trees_of_neighbours_would_cost_less(seed, most, pairs_per_token):
    """All ways to cut the sorted sequences, each by definition."""
    sequences = random_sequences(seed, 9)
    trees = trees_of(enumerate(sequences), most, pairs_per_token)
    found = sum(len(tree) * pairs_per_token + len(tree) ** 2 for tree in trees)
    assert all(len(tree) <= most or len({tuple(sequences[n]) for n in tree.paths}) == 1 for tree in trees)
    ordered, least = sorted(set(map(tuple, sequences))), math.inf
    for cuts in itertools.product([False, True], repeat=len(ordered) - 1):
        groups = [[ordered[0]]]
        for sequence, cut in zip(ordered[1:], cuts):
            groups.append([sequence]) if cut else groups[-1].append(sequence)
        sizes = [len({s[: t + 1] for s in group for t in range(len(s))}) for group in groups]
        if all(size <= most or len(group) == 1 for size, group in zip(sizes, groups)):
            least = min(least, sum(size * pairs_per_token + size**2 for size in sizes))
    assert found == pytest.approx(least)


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("most", [1, 30, 64, 10**6])
def test_batches_keep_within_their_bound_and_hold_every_tree_once(most, unit, monkeypatch):
    monkeypatch.setitem(packing.ROW_UNIT, "cpu", unit)
    trees = trees_of(enumerate(random_sequences(7, 200)), most, pairs_per_token=6.0)
    batches = list(batches_of(trees, most, 6.0, CPU))
    for rows in batches:
        packed = pack(rows, CPU)
        assert packed.tokens.numel() <= most or len(rows) == 1
        assert packed.tokens.shape[1] % unit == 0
    placed = [id(tree) for rows in batches for tree in rows]
    assert sorted(placed) == sorted(map(id, trees))
    assert list(batches_of([], most, 6.0, CPU)) == [] == trees_of([], most, 6.0)


@pytest.mark.parametrize("pairs_per_token, batch_cost", [(2.0, 1), (6.0, 5), (50.0, 40)])
@pytest.mark.parametrize("most", [1, 40, 10**6])
def test_no_other_batches_would_cost_less(most, pairs_per_token, batch_cost, monkeypatch):
    monkeypatch.setattr(packing, "BATCH_COST", batch_cost)
    trees = trees_of(enumerate(random_sequences(3, 12)), 10, pairs_per_token)

    def cost(batches) -> float:
        sizes = [(len(rows), max(map(len, rows))) for rows in batches]
        if any(count > 1 and count * width > most for count, width in sizes):
            return math.inf
        return sum(count * width * (1 + width / pairs_per_token) + batch_cost for count, width in sizes)

    ordered, least = sorted(trees, key=len), math.inf
    for cuts in itertools.product([False, True], repeat=len(trees) - 1):
        groups = [[ordered[0]]]
        for tree, cut in zip(ordered[1:], cuts):
            groups.append([tree]) if cut else groups[-1].append(tree)
        least = min(least, cost(groups))
    assert len(trees) > 5 and cost(batches_of(trees, most, pairs_per_token, CPU)) == pytest.approx(least)


@each_model
def test_packed_hidden_states_and_their_gradients_are_those_of_plain_rows(family, tied):
    model = random_model(family, tied).double()
    trunk = random_tokens(model, 9)
    sequences = [torch.cat((trunk[:n], random_tokens(model, 3 + n, seed=n))).tolist() for n in (2, 9, 5, 9)]
    sequences += [sequences[0], sequences[1][:7], random_tokens(model, 4, seed=50).tolist()]
    sequences.append(random_tokens(model, 30, seed=51).tolist())
    (rows,) = batches_of(trees_of(enumerate(sequences), 10**6, 1e9), 10**6, 1e9, CPU)
    width = max(map(len, rows))
    tokens, positions = torch.zeros(2, len(rows), width, dtype=torch.long)
    end, where = torch.arange(1, width + 1).repeat(len(rows), 1), {}
    for i, tree in enumerate(rows):
        tokens[i, : len(tree)], positions[i, : len(tree)] = map(torch.tensor, (tree.tokens, tree.positions))
        end[i, : len(tree)] = torch.tensor(tree.end)
        where |= {n: [i * width + t for t in path] for n, path in tree.paths.items()}
    assert sum(map(len, rows)) < sum(map(len, sequences)) and len(rows) > 1
    at = torch.tensor([t for n in range(len(sequences)) for t in where[n]])
    packed = model.hidden(tokens, packed=PackedStep(positions, end, at, model.dtype))
    plain = torch.cat([model.hidden(torch.tensor([s]))[0] for s in sequences])
    torch.testing.assert_close(packed, plain, rtol=1e-6, atol=1e-6)
    weight = torch.randn(plain.shape, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    names, parameters = zip(*model.model.named_parameters())
    found, wanted = (torch.autograd.grad((h * weight).sum(), parameters) for h in (packed, plain))
    for name, p, q in zip(names, found, wanted):
        assert (p - q).norm() <= 1e-6 * q.norm() > 0, name


def plainly(ready, agent: int, advantages: list[float], old):
    """Eq. 10 of one agent with a padded row for each rollout and nothing shared, from all logits.

    `old` is the model as it was. Returns the loss, its stats, and the log-probs of the tokens, whose messages
    stand in order of rollout and turn.
    """
    config, rollouts, model = ready.config, ready.rollouts, ready.rollouts.team.agents[agent].model
    seen = [
        rollouts.team.render(agent, p.text, m, False) for p, m in zip(rollouts.problems, rollouts.messages)
    ]
    width = max(len(s.ids) for s in seen)
    tokens = torch.tensor([s.ids + [0] * (width - len(s.ids)) for s in seen])
    spans = [(r, start, stop) for r, s in enumerate(seen) for start, stop in s.spans]
    row = torch.tensor([r for r, start, stop in spans for _ in range(start, stop)])
    at = torch.tensor([t for _, start, stop in spans for t in range(start, stop)])
    message = torch.tensor([m for m, (_, start, stop) in enumerate(spans) for _ in range(start, stop)])
    advantage = torch.tensor([advantages[r] for r, _, _ in spans])

    def logps(model):
        z = model.hidden(tokens)[row, at - 1] @ model.head.t() / config.temperature  # (N, V)
        return z.log_softmax(-1).gather(1, tokens[row, at][:, None])[:, 0]

    with torch.no_grad():
        old_logp = logps(old)
    logp, options = logps(model), {"ratio": config.ratio, "kl_unit": config.kl_unit, "clip": config.clip}
    loss, stats = teamtr_loss(logp, old_logp, message, advantage, beta=ready.learner.beta, **options)
    return loss, stats, logp.detach(), len(advantage)


def stats_in_float64(hidden, head, targets, temperature, *, entropy):
    """What kernels.linear_logprob_stats computes, which is for fp32 and bf16."""
    logp = (hidden @ head.t() / temperature).log_softmax(-1)  # (pairs, V)
    entropy = -(logp.exp() * logp).sum(-1) if entropy else None
    return kernels.TokenStats(logp.gather(1, targets[:, None])[:, 0], entropy)


def norm_in_float64(self, x):
    """What RMSNorm computes, which does it in fp32."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


@pytest.mark.parametrize(
    "agents, knobs",
    [
        ([0], {}),
        ([1], {"rounds": 2, "agents": 3}),  # each message in a context of its own
        ([0], {"rounds": 2, "max_new_tokens": 3}),  # messages cut off, and seen again
        ([2], {"router": "random", "agents": 3, "batch_tokens": 90}),  # left out of some rollouts
        ([1], {"group": 5, "problems": 7, "batch_tokens": 61, "beta": 0.0}),
        ([0], {"batch_tokens": 3}),  # less than any row
        ([1], {"temperature": 0.7}),
        ([0], {"ratio": "token", "kl_unit": "token"}),
        ([0, 1], {"rounds": 2}),  # two that step together
        ([1], {"rounds": 2, "unit": 16}),  # rows of a few lengths only, as on CUDA
    ],
)
def test_loss_and_gradients_are_those_of_one_plain_row_per_rollout(agents, knobs, monkeypatch):
    """At pi_old, and after a step. In float64, where rounding hides nothing."""
    monkeypatch.setitem(packing.ROW_UNIT, "cpu", knobs.pop("unit", 1))
    monkeypatch.setattr(kernels, "linear_logprob_stats", stats_in_float64)
    monkeypatch.setattr(RMSNorm, "forward", norm_in_float64)
    ready = prepared(agents, **{"problems": 6, "beta": 0.3} | knobs)
    team, config = ready.rollouts.team, ready.config
    for agent in team.agents:
        agent.model.double()
    learner, old = Learner(team, agents, config.beta), copy.deepcopy(ready.learner.models)
    advantages = torch.randn(len(ready.rollouts.messages), generator=torch.Generator().manual_seed(0))
    advantages[: config.group] = 0  # the first problem's
    batches = ready.rollouts.batches(agents, advantages, config.batch_tokens)
    assert 0 < sum(not batch.advantage.any() for batch in batches) < len(batches)
    old_logps = None
    for _ in range(2):
        found, made = evaluate(learner, batches, config, old_logps, grad=True)
        parts = [plainly(ready, j, advantages.tolist(), o) for j, o in zip(agents, old)]
        messages = sum(part[-1] for part in parts)
        loss = sum(part[0] * part[-1] for part in parts) / messages
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-6, abs=1e-9)
        for name in ("kl_k1", "kl_k3", "clip_fraction", "ratio_mean"):
            wanted = sum(part[1][name].item() * part[-1] for part in parts) / messages
            assert found[name] == pytest.approx(wanted, rel=1e-6, abs=1e-9), name
        for name, master, wanted in zip(
            learner.names, learner.masters, torch.autograd.grad(loss, learner.parameters)
        ):
            assert (master.grad - wanted).norm() <= 1e-6 * wanted.norm() > 0, name
        if old_logps is None:
            tokens = torch.cat(in_order(ready, agents, batches, made))
            torch.testing.assert_close(tokens, torch.cat([part[2] for part in parts]), rtol=1e-6, atol=1e-9)
            old_logps = made
            learner.step(2e-3)


def in_order(ready, agents, batches, made):
    """The log-probs of each message of each agent, in order of rollout and turn."""
    pieces = {}
    for batch, old in zip(batches, made):
        agent = next(j for j in agents if ready.rollouts.team.agents[j].model is batch.model)
        lengths = torch.bincount(batch.message).tolist()
        keys = zip(batch.rollout.tolist(), batch.turn.tolist())
        pieces |= {(agent, *key): piece for key, piece in zip(keys, old.token.split(lengths))}
    return [pieces[key] for key in sorted(pieces)]


def test_the_same_bits_whether_a_gradient_was_taken_at_once_or_after_all(monkeypatch):
    """Nothing depends on the guess whether a step leaves the radius, nor on its being wrong."""
    outcomes, calls = [], []
    monkeypatch.setattr(train, "evaluate", lambda *a, **k: calls[-1].append(k["grad"]) or evaluate(*a, **k))
    for kl_rate in (0.0, 1e9):  # it never leaves; it always does, and most steps prove it wrong
        ready = prepared(lr=4e-4, inner_steps=5)
        ready.learner.kl_rate = kl_rate
        calls.append([])
        outcomes.append((ready.update(), ready.learner.clone_masters(), calls[-1]))
    (one, masters, sure), (other, others, unsure) = outcomes
    assert one == other and all(map(torch.equal, masters, others))
    assert one.steps > 1 and one.halvings > 0 and len(sure) + 1 == len(unsure), "the guess was wrong once"


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_no_backward_pass_where_the_gradient_is_zero(beta, monkeypatch):
    """At pi_old the penalty has none; later it has one, but for a beta of 0."""
    ready, graphs, hidden = prepared(beta=beta), [], AgentBatch.hidden
    monkeypatch.setattr(AgentBatch, "hidden", lambda b, m: graphs.append(hidden(b, m)) or graphs[-1])
    _, old_logps = evaluate(ready.learner, ready.batches, ready.config, grad=True)
    ready.learner.step(1e-3)
    evaluate(ready.learner, ready.batches, ready.config, old_logps, grad=True)
    pulls = [bool(batch.advantage.any()) for batch in ready.batches]
    assert True in pulls and False in pulls
    assert [h.requires_grad for h in graphs] == pulls + [p or beta > 0 for p in pulls]


def test_an_agent_without_advantages_gets_the_zeros_that_let_its_momentum_decay():
    """Where several step together, one may have had no turn in any rollout that was better or worse."""
    ready = prepared([0, 1])
    for batch in ready.batches:
        if batch.model is ready.learner.models[1]:
            batch.advantage.zero_()
    evaluate(ready.learner, ready.batches, ready.config, grad=True)
    gradients = {name: p.grad for name, p in zip(ready.learner.names, ready.learner.masters)}
    assert all(g.any() == name.startswith("0.") for name, g in gradients.items())
