"""Every variant of the ablation does what its flag says: what is sampled when, and what bounds an update."""

import copy
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from toy_runs import parity, run

import train
from teamtr_min import rng, rollout, schedule
from teamtr_min.config import Config
from teamtr_min.learner import Learner, update_agent
from teamtr_min.objective import group_advantages
from teamtr_min.rollout import Rollouts, collect
from teamtr_min.run.run import size
from teamtr_min.sampler import Completion
from teamtr_min.studies import estimators
from teamtr_min.tasks import Relay
from teamtr_min.team import load_team, random_router, round_robin


@pytest.fixture(autouse=True)
def half_of_all_rollouts_are_right(monkeypatch):
    monkeypatch.setattr(Relay, "grade", parity)


# When is sampled


@pytest.mark.parametrize(
    "flags, new",
    [
        (["--occupancy", "fresh"], [12, 12, 12]),
        (["--occupancy", "every_k", "--every", "2"], [12, 0, 12]),
        (["--occupancy", "every_k", "--every", "7"], [12, 0, 0]),
        (["--occupancy", "stale"], [12, 0, 0]),
        (["--occupancy", "importance"], [12, 0, 0]),
        (["--occupancy", "joint"], [12]),
    ],
)
def test_rollouts_are_sampled_and_counted_when_the_flag_says(tmp_path, monkeypatch, flags, new):
    places, used = [], []
    play, advantages = train.collect, train.group_advantages
    monkeypatch.setattr(train, "collect", lambda *a: places.append(a[5]) or play(*a))
    monkeypatch.setattr(train, "group_advantages", lambda *a: used.append(a[0]) or advantages(*a))
    summary, updates, _ = run(tmp_path / "run", *flags)
    assert [u["rollouts"] for u in updates] == new * 2
    assert [p for p in places if p[0] == "train"] == [
        ("train", stage, i) for stage in range(2) for i, count in enumerate(new) if count
    ]
    latest = None
    for u, returns in zip(updates, used):  # and an update without new ones trains on the latest
        assert (returns.data_ptr() == latest) == (u["rollouts"] == 0)
        assert (u["tokens_sampled"] > 0) == (u["seconds_sampling"] > 0) == (u["rollouts"] > 0)
        latest = returns.data_ptr()
    assert summary["rollouts"] == 2 * sum(new) and summary["rollouts_evaluation"] == 2 * 8
    assert summary["rollouts_diagnostics"] == summary["tokens_sampled_diagnostics"] == 0
    assert summary["tokens_sampled"] == sum(u["tokens_sampled"] for u in updates)


# Which part is sampled again


@pytest.mark.parametrize("order, sampled", [("fixed", [3, 3, 2]), ("reversed", [3, 1, 2])])
def test_suffix_keeps_what_precedes_the_changed_agents_and_does_not_count_it_again(
    tmp_path, monkeypatch, order, sampled
):
    """0.89 of the messages in turn order, 0.67 in its reverse."""
    found, play = [], train.collect
    monkeypatch.setattr(train, "collect", lambda *a: found.append((a[5], play(*a))) or found[-1][1])
    summary, updates, _ = run(tmp_path / "run", "--resample", "suffix", "--order", order)
    rollouts = [r for place, r in found if place[0] == "train"]
    assert [u["rollouts"] for u in updates] == [12] * 6
    for i, (u, r) in enumerate(zip(updates, rollouts)):
        kept = 3 - sampled[i % 3]
        new = [message for messages in r.messages for message in messages[kept:]]
        assert u["tokens_sampled"] == sum(len(message.tokens) for message in new)
        if kept:
            assert all(a[:kept] == b[:kept] for a, b in zip(r.messages, rollouts[i - 1].messages))
    assert summary["tokens_sampled"] == sum(u["tokens_sampled"] for u in updates)


class CoinTeam:
    """Agents who write 0 or 1: agent j a 1 with the chance coins[j], or its half after a message of 1."""

    def __init__(self, coins: list[float], router):
        chat, tokenizer = SimpleNamespace(end_of_message=9), SimpleNamespace(decode_batch=lambda ids: ids)
        self.agents = [SimpleNamespace(model=j, chat=chat, tokenizer=tokenizer) for j in range(len(coins))]
        self.coins, self.router, self.turns = coins, router, len(coins)

    def chance(self, j: int, last: int) -> float:
        return self.coins[j] * (0.5 if last else 1)

    def route(self, turn, messages, uniform):
        return self.router(turn, messages, len(self.agents), uniform)

    def view(self, j, problem, messages, speak):
        return SimpleNamespace(ids=[messages[-1].tokens[0] if messages else 0])

    def speaks_last(self, j, turn):
        return False

    def law(self) -> dict:
        """Of whole transcripts: ((agent, message), ...) -> probability."""
        n, law = len(self.agents), {(): 1.0}
        for turn in range(n):
            longer = {}
            for before, p in law.items():
                named = [(turn, 1.0)] if self.router is round_robin else [(j, 1 / n) for j in range(n)]
                for (j, share), m in itertools.product(named, (0, 1)):
                    one = self.chance(j, before[-1][1] if before else 0)
                    longer[*before, (j, m)] = p * share * (one if m else 1 - one)
            law = longer
        return law


def excess(rollouts: Rollouts, law: dict) -> float:
    """Pearson's chi-square of the transcripts against their law, in standard deviations from its mean."""
    seen, n = (
        Counter(tuple((m.agent, *m.tokens) for m in r) for r in rollouts.messages),
        len(rollouts.returns),
    )
    chi2 = sum((seen[x] - n * p) ** 2 / (n * p) for x, p in law.items())
    return (chi2 - (len(law) - 1)) / math.sqrt(2 * (len(law) - 1))


@pytest.mark.parametrize("router", [round_robin, random_router])
@pytest.mark.parametrize("occupancy", ["fresh", "every_k"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_suffix_resampling_has_the_law_of_full_resampling(monkeypatch, router, order, occupancy):
    """In any order, with any router: after every update the transcripts are those of the team as it is."""
    team = CoinTeam([0.3, 0.5, 0.4], router)

    class CoinSampler:
        def __init__(self, model, rows):
            self.j = model

        def speak(self, rows, sequences, keys, *rest):
            uniforms = rng.uniforms(keys, 1)[:, 0].tolist()
            chances = [team.chance(self.j, ids[-1]) for ids in sequences]
            return [Completion([int(u < p)], [0.0], False) for u, p in zip(uniforms, chances)]

    monkeypatch.setattr(rollout, "Sampler", CoinSampler)
    config = Config(resample="suffix", occupancy=occupancy)

    def play(i: int, heads) -> Rollouts:
        problem = SimpleNamespace(text="")
        return collect(team, [problem], 3000, lambda *_: 0.0, config, ("train", 0, i), heads)

    rollouts, law = play(0, None), team.law()
    for i, j in enumerate([*order, None]):  # with fresh occupancy also once after the last update
        if i and schedule.samples_again(config, i):
            before, heads = law, schedule.unchanged_heads(config, rollouts, list(order[:i]))
            rollouts, law = play(i, heads), team.law()
            assert abs(excess(rollouts, law)) < 4 and excess(rollouts, before) > 10
        if j is not None:
            team.coins[j] += 0.4
    if router is random_router:
        assert any(head.messages for head in heads) and any(head.speaker is None for head in heads)
        wrong = play(9, [head._replace(speaker=None) for head in heads])
        assert excess(wrong, law) > 10, "an agent's first turn must not be drawn again where it had it"


# Importance weights


def test_importance_weighs_by_the_other_updated_agents_messages_before_and_after(tmp_path, monkeypatch):
    """Before every update, against copies of the models from when the rollouts were sampled."""
    state, update = {}, train.update_agent

    def play(*arguments):
        rollouts = collect(*arguments)
        if arguments[5][0] == "train":
            models = [agent.model for agent in rollouts.team.agents]
            state.update(rollouts=rollouts, models=models, start=copy.deepcopy(models), done=[])
        return rollouts

    def spy(learner, batches, config, lr):
        rollouts, done, mover = state["rollouts"], state["done"], state["models"].index(learner.models[0])
        log_weight = torch.zeros(12)
        for k in done:
            log_weight += rollouts.message_logp(k, state["models"][k], config).sum(1)
            log_weight -= rollouts.message_logp(k, state["start"][k], config).sum(1)
        assert mover not in done and torch.allclose(rollouts.log_weight, log_weight, atol=1e-4)
        weights = log_weight.exp() / log_weight.exp().mean()
        assert torch.allclose(rollouts.weights, weights, rtol=1e-3)
        assert not done or weights.std() > 0.01
        advantage = group_advantages(rollouts.grouped_returns, 2.0).flatten() * weights
        for batch in batches:
            assert torch.allclose(batch.advantage, advantage[batch.place[0]], rtol=1e-3)
        state["done"].append(mover)
        return update(learner, batches, config, lr)

    monkeypatch.setattr(train, "update_agent", spy)
    monkeypatch.setattr(train, "collect", play)
    run(tmp_path / "run", "--occupancy", "importance", "--order", "random")
    assert sorted(state["done"]) == [0, 1, 2]


def test_the_weighted_mean_return_is_that_of_the_present_team():
    """On an enumerable team, rollouts of team^0 weighted to team^2; self-normalised: up to O(1 / batch)."""
    teams = estimators.stage(estimators.small_game(), 0, kl=0.05)
    x = estimators.sample_batches(teams[0], 400, seed=5)
    log_weight = estimators.log_ratio(x, teams[2], teams[0]).sum(1).float()
    batches = zip(x.returns.float().split(512), log_weight.split(512))
    means = torch.tensor([
        (r * Rollouts(None, [], [], r, 8, 0.0, [], w).weights).mean() for r, w in batches
    ]).double()  # fmt: skip
    error = means.std() / len(means) ** 0.5
    assert abs(means.mean() - teams[2].J) < 4 * error + 0.002
    assert teams[2].J - x.returns.mean() > 0.02, "unweighted it is the old team's"


# Joint


def prepared(delta: float, lr: float):
    """(team, config, rollouts, batches(j)) for one update; returns that differ within each group."""
    config = Config(agents=2, problems=6, group=6, inner_steps=4, device="cpu", delta=delta, lr=lr)
    task = Relay(config)
    team = load_team(config, task.roles(2))
    rollouts = collect(
        team, task.sample_problems(6, rng.generator(0, "problems")), 6, task.grade, config, ("train", 0, 0)
    )
    advantage = group_advantages(rollouts.grouped_returns, 2.0).flatten()
    return team, config, rollouts, lambda j: rollouts.view(j, advantage, 300)


def test_joint_moves_all_agents_at_once_inside_one_radius_of_all_their_messages():
    team, config, rollouts, batches = prepared(delta=0.02, lr=5e-3)
    models = [agent.model for agent in team.agents]
    old = copy.deepcopy(models)
    report = update_agent(Learner(models, config.beta), batches(0) + batches(1), config, config.lr)
    assert report["kl_before"] > 0.02 >= report["kl_after"] > 0 and report["halvings"] > 0
    ratio = [rollouts.message_logp(j, m, config) - rollouts.message_logp(j, o, config)
             for j, (m, o) in enumerate(zip(models, old))]  # fmt: skip
    assert all(r.abs().max() > 1e-3 for r in ratio), "both agents moved"
    assert report["kl_k1_after"] == pytest.approx(-sum(ratio).sum().item() / (2 * 36), abs=1e-5)
    assert report["tokens_trained"] == report["steps"] * sum(len(m.tokens) for m in rollouts.by([0, 1]))


def test_stale_updates_of_several_agents_do_not_depend_on_their_order_and_joint_is_none_of_them():
    """Stale agents share rollouts and nothing else. Joint is not the same in fewer words: its agents share
    one radius for the mean over all their messages, so that one agent's haste stops the others too, one
    clipped gradient norm, and one beta."""
    ends = []
    for order in ((0, 1), (1, 0), None):
        team, config, _, batches = prepared(delta=0.02, lr=5e-3)
        models = [agent.model for agent in team.agents]
        for j in order or ():
            update_agent(Learner([models[j]], config.beta), batches(j), config, config.lr)
        if order is None:
            update_agent(Learner(models, config.beta), batches(0) + batches(1), config, config.lr)
        ends.append([p.detach() for model in models for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(ends[0], ends[1]))
    assert not all(torch.equal(a, b) for a, b in zip(ends[0], ends[2]))


def test_joint_runs_log_one_update_and_the_memory_of_all_agents_in_it(tmp_path, capsys):
    _, updates, stages = run(tmp_path / "run", "--occupancy", "joint", "--delta", "0.02")
    assert [(u["update"], u["agent"]) for u in updates] == [(0, None)] * 2
    assert all(u["messages"] == 36 and u["kl_after"] <= 0.02 for u in updates)
    said, bytes_each = (
        capsys.readouterr().out,
        91264 * (4 + 8 + 12 + 4),
    )  # gradient, Adam, two points to go back to
    assert all(len(s["kl"]) == 1 for s in stages) and "KL team " in said
    assert f"an update {size(3 * bytes_each)} " in said


# The trust region


@pytest.mark.parametrize("kl", ["hard", "adaptive", "fixed", "none"])
def test_the_kl_flag_says_what_holds_an_update_back(tmp_path, capsys, kl):
    beta = () if kl == "none" else ("--beta", "0.1")
    summary, updates, _ = run(tmp_path / "run", "--kl", kl, "--delta", "0.002", *beta)
    moved = [u for u in updates if u["steps"]]
    assert len(moved) == 6
    assert all(u["kl_after"] <= 0.002 for u in updates) == (kl == "hard")
    assert any(u["halvings"] for u in updates) == (kl == "hard")
    assert all(u["steps"] == 2 for u in moved) or kl == "hard"
    assert all(u["delta"] == 0.002 for u in updates) and summary["violation_rate_before"] > 0.5
    assert (summary["violation_rate_after"] == 0) == (kl == "hard")
    betas = {u["beta"] for u in updates if u["stage"] == 1}
    assert (betas != {0.0 if kl == "none" else 0.1}) == (kl in ("hard", "adaptive"))
    said = capsys.readouterr().out
    assert ("brought back" in said) == (kl == "hard") == ("radius 0.002 (k3 per message)" in said)


def test_the_penalty_alone_holds_back_when_beta_is_large(tmp_path):
    kls = [
        max(u["kl_after"] for u in run(tmp_path / str(beta), "--kl", "fixed", "--beta", beta)[1])
        for beta in ("1e-4", "1")
    ]
    assert kls[1] < kls[0]


@pytest.mark.parametrize(
    "flags, bound",
    [(["--no-group-norm"], 2), (["--advantage-clip", "0.5"], 0.5), (["--no-advantage-clip"], math.inf)],
)
def test_normalisation_and_clip_of_the_advantage_reach_the_messages(tmp_path, monkeypatch, flags, bound):
    """Eq. 9 by hand, for a group of 7 with one right: normalised it is sqrt(6), past the clip of 2."""
    returns, seen, update = torch.tensor([1.0] + [0.0] * 6), [], train.update_agent

    def play(*arguments):
        rollouts = collect(*arguments)
        if arguments[5][0] == "train":
            rollouts.returns = returns.repeat(3)
        return rollouts

    monkeypatch.setattr(train, "collect", play)
    monkeypatch.setattr(train, "update_agent", lambda l, b, *a: seen.append(b) or update(l, b, *a))
    run(tmp_path / "run", "--stages", "1", "--group", "7", *flags)
    centred = returns - returns.mean()
    wanted = centred if flags == ["--no-group-norm"] else (centred / (centred.square().mean() + 1e-6).sqrt())
    wanted = wanted.clamp(-bound, bound)
    assert len(seen) == 3
    for batch in itertools.chain(*seen):
        assert torch.allclose(batch.advantage, wanted.repeat(3)[batch.place[0]], atol=1e-5)
