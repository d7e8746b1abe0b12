"""Every variant of the ablation does what its flag says: what is sampled when, and what bounds an update."""

import contextlib
import copy
import dataclasses
import itertools
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from toy_runs import parity, prepared, run

import train
from teamtr_min import cli, rollout, schedule
from teamtr_min.config import Config
from teamtr_min.engine import rng
from teamtr_min.engine.distributed import ALONE
from teamtr_min.engine.sampler import Completion
from teamtr_min.files import UserError
from teamtr_min.learner import Learner
from teamtr_min.objective import group_advantages
from teamtr_min.occupancy import RolloutSource
from teamtr_min.rollout import Rollouts
from teamtr_min.run.memory import plan_training
from teamtr_min.studies import estimators
from teamtr_min.tasks import Relay
from teamtr_min.team import random_router, round_robin


@pytest.fixture(autouse=True)
def half_of_all_rollouts_are_right(monkeypatch):
    monkeypatch.setattr(Relay, "grade", parity)


@pytest.fixture
def collected(monkeypatch) -> list[tuple]:
    """(words of the rng path, rollouts) of every collection to train on."""
    found, collect = [], schedule.collect

    def spy(team, task, problems, group, path, prefixes=None):
        rollouts = collect(team, task, problems, group, path, prefixes)
        found.append((path.words, rollouts))
        return rollouts

    monkeypatch.setattr(schedule, "collect", spy)
    return found


# Spellings


@pytest.mark.parametrize(
    "short, long",
    [
        ("--kl none", "--kl fixed --beta 0"),
        ("--occupancy every_k", "--every 2"),
        ("--occupancy every_k --every 3", "--every 3"),
        ("--no-advantage-clip", "--advantage-clip inf"),
    ],
)
def test_a_shorthand_is_the_same_run_as_what_it_stands_for(short, long):
    assert cli.parse(short.split(), "") == cli.parse(long.split(), "")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--kl none --beta 0.1", "--kl none means --beta 0"),
        ("--no-advantage-clip --advantage-clip 1", "--no-advantage-clip means --advantage-clip inf"),
        ("--occupancy stale --every 2", "--occupancy stale it does nothing"),
        ("--kl adaptive --beta 0", "--kl adaptive needs a --beta above 0"),
        ("--occupancy stale --resample suffix", "nothing is sampled again"),
    ],
)
def test_flags_that_contradict_each_other_are_a_sentence(flags, message):
    with pytest.raises(UserError, match=message):
        cli.parse(flags.split(), "")


# When is sampled


@pytest.mark.parametrize(
    "flags, new",
    [
        (["--occupancy", "fresh"], [12, 12, 12]),
        (["--every", "2"], [12, 0, 12]),
        (["--every", "7"], [12, 0, 0]),
        (["--occupancy", "stale"], [12, 0, 0]),
        (["--occupancy", "importance"], [12, 0, 0]),
        (["--occupancy", "joint"], [12]),
    ],
)
def test_rollouts_are_sampled_and_counted_when_the_flag_says(tmp_path, monkeypatch, collected, flags, new):
    used, advantages = [], train.group_advantages
    monkeypatch.setattr(train, "group_advantages", lambda *a: used.append(a[0]) or advantages(*a))
    summary, updates, _ = run(tmp_path / "run", *flags)
    assert [u["rollouts"] for u in updates] == new * 2
    wanted = [("train", stage, i) for stage in range(2) for i, count in enumerate(new) if count]
    assert [words for words, _ in collected] == wanted
    latest = None
    for u, returns in zip(updates, used):  # and an update without new ones trains on the latest
        assert (returns.data_ptr() == latest) == (u["rollouts"] == 0)
        assert (u["tokens_sampled"] > 0) == (u["seconds_sampling"] > 0) == (u["rollouts"] > 0)
        latest = returns.data_ptr()
    assert summary["rollouts"] == 2 * sum(new) and summary["rollouts_evaluation"] == 2 * 8
    assert summary["rollouts_diagnostics"] == summary["tokens_sampled_diagnostics"] == 0
    assert summary["tokens_sampled"] == sum(u["tokens_sampled"] for u in updates)


def test_rollouts_and_batches_cannot_be_changed():
    ready = prepared()
    for thing, field in ((ready.rollouts, "returns"), (ready.batches[0], "advantage")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field, None)


# Which part is sampled again


@pytest.mark.parametrize("order, sampled", [("fixed", [3, 3, 2]), ("reversed", [3, 1, 2])])
def test_suffix_keeps_what_precedes_the_changed_agents_and_does_not_count_it_again(
    tmp_path, collected, order, sampled
):
    """0.89 of the messages in turn order, 0.67 in its reverse."""
    summary, updates, _ = run(tmp_path / "run", "--resample", "suffix", "--order", order)
    rollouts = [one for _, one in collected]
    assert [u["rollouts"] for u in updates] == [12] * 6
    for i, (u, r) in enumerate(zip(updates, rollouts)):
        reused = 3 - sampled[i % 3]
        new = [message for messages in r.messages for message in messages[reused:]]
        assert u["tokens_sampled"] == sum(len(message.tokens) for message in new)
        if reused:
            assert all(a[:reused] == b[:reused] for a, b in zip(r.messages, rollouts[i - 1].messages))
    assert summary["tokens_sampled"] == sum(u["tokens_sampled"] for u in updates)


class CoinTeam:
    """Agents who write 0 or 1: agent j a 1 with the chance coins[j], or its half after a message of 1."""

    def __init__(self, coins: list[float], router):
        chat, tokenizer = SimpleNamespace(end_of_message=9), SimpleNamespace(decode_batch=lambda ids: ids)
        models = [SimpleNamespace(j=j, in_step=contextlib.nullcontext) for j in range(len(coins))]
        self.agents = [SimpleNamespace(model=model, chat=chat, tokenizer=tokenizer) for model in models]
        self.coins, self.router, self.turns, self.batch_rows = coins, router, len(coins), 10**6
        self.caches_stay = True
        self.temperature, self.max_new_tokens, self.ranks = 1.0, 1, ALONE

    def chance(self, j: int, last: int) -> float:
        return self.coins[j] * (0.5 if last else 1)

    def route(self, turn, messages, uniform):
        return self.router(turn, messages, len(self.agents), uniform)

    def render(self, j, problem, messages, add_generation_prompt):
        return SimpleNamespace(ids=[messages[-1].tokens[0] if messages else 0])

    def writes_last(self, j, turn):
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
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_suffix_resampling_has_the_law_of_full_resampling(monkeypatch, router, order, every):
    """In any order, with any router: after every update the transcripts are those of the team as it is."""
    team = CoinTeam([0.3, 0.5, 0.4], router)

    class CoinSampler:
        def __init__(self, model, rows, slots):
            self.j = model.j

        def generate(self, rows, prompts, keys, *rest):
            uniforms = rng.uniforms(keys, 1)[:, 0].tolist()
            chances = [team.chance(self.j, ids[-1]) for ids in prompts]
            return [Completion([int(u < p)], [0.0], False) for u, p in zip(uniforms, chances)]

    monkeypatch.setattr(rollout, "Sampler", CoinSampler)
    config = Config(resample="suffix", every=every, group=3000)
    task, problem = SimpleNamespace(grade=lambda *_: 0.0), SimpleNamespace(text="")
    source = RolloutSource(config, task, team, [problem], 0)
    law = None
    for i, j in enumerate([*order, None]):  # with --every 1 also once after the last update
        if i % every == 0:
            prefixes = source.rollouts.prefixes_before(source.updated_since) if i else []
            before, law = law, team.law()
            rollouts = source.of_update(i)
            assert abs(excess(rollouts, law)) < 4 and (not i or excess(rollouts, before) > 10)
        if j is not None:
            team.coins[j] += 0.4
            source.updated([j])
    if router is random_router:
        assert any(p.messages for p in prefixes) and any(p.next_agent is None for p in prefixes)
        asked_again = [prefix._replace(next_agent=None) for prefix in prefixes]
        path = rng.RngPath(0, "train", 0, 9)
        wrong = rollout.collect(team, task, [problem], 3000, path, asked_again)
        assert excess(wrong, law) > 10, "an agent's first turn must not be drawn again where it had it"


# Importance weights


def test_importance_weighs_by_the_other_updated_agents_messages_before_and_after(
    tmp_path, monkeypatch, collected
):
    """Before every update, against copies of the models from when the rollouts were sampled."""
    done, start, update = [], [], train.update

    def spy(learner, batches, config, lr):
        rollouts = collected[-1][1]
        models = [agent.model for agent in rollouts.team.agents]
        if len(done) % 3 == 0:
            start[:] = copy.deepcopy(models)
            done.clear()
        log_weight = torch.zeros(12)
        for k in done:
            log_weight += rollouts.message_logps(k, models[k], 300).sum(1)
            log_weight -= rollouts.message_logps(k, start[k], 300).sum(1)
        weights = log_weight.exp() / log_weight.exp().mean()
        assert not done or weights.std() > 0.01
        advantage = group_advantages(rollouts.grouped_returns, 2.0).flatten() * weights
        for batch in batches:
            assert torch.allclose(batch.advantage, advantage[batch.rollout], rtol=1e-3)
        done.extend(learner.agents)
        return update(learner, batches, config, lr)

    monkeypatch.setattr(train, "update", spy)
    run(tmp_path / "run", "--occupancy", "importance", "--order", "random")
    assert sorted(done) == [0, 1, 2]


def test_the_weighted_mean_return_is_that_of_the_present_team():
    """On an enumerable team, rollouts of team^0 weighted to team^2; self-normalised: up to O(1 / batch)."""
    teams = estimators.stage(estimators.small_game(), 0, kl=0.05)
    x = estimators.sample_batches(teams[0], 400, seed=5)
    log_weight = estimators.log_ratio(x, teams[2], teams[0]).sum(1).float()
    batches = zip(x.returns.float().split(512), log_weight.split(512))
    source = RolloutSource(Config(occupancy="importance"), None, None, [], 0)
    means = []
    for r, source.log_weights in batches:
        means.append((r * source.weights).mean())
    means = torch.stack(means).double()
    error = means.std() / len(means) ** 0.5
    assert abs(means.mean() - teams[2].J) < 4 * error + 0.002
    assert teams[2].J - x.returns.mean() > 0.02, "unweighted it is the old team's"


# Joint


def test_joint_moves_all_agents_at_once_inside_one_radius_of_all_their_messages():
    ready = prepared([0, 1], problems=6, delta=0.02, lr=5e-3)
    rollouts, models, old = ready.rollouts, ready.learner.models, copy.deepcopy(ready.learner.models)
    update = ready.update()
    assert update.attempted["kl"] > 0.02 >= update.kept["kl"] > 0 and update.halvings > 0
    ratio = [rollouts.message_logps(j, m, 300) - rollouts.message_logps(j, o, 300)
             for j, (m, o) in enumerate(zip(models, old))]  # fmt: skip
    assert all(r.abs().max() > 1e-3 for r in ratio), "both agents moved"
    assert update.kept["kl_k1"] == pytest.approx(-sum(ratio).sum().item() / (2 * 36), abs=1e-5)
    assert update.tokens == update.steps * sum(len(m.tokens) for m in rollouts.by([0, 1]))


def test_stale_updates_of_several_agents_do_not_depend_on_their_order_and_joint_is_none_of_them():
    """Stale agents share rollouts and nothing else. Joint is not the same in fewer words: its agents share
    one radius for the mean over all their messages, so that one agent's haste stops the others too, one
    clipped gradient norm, and one beta."""
    ends = []
    for order in ([[0], [1]], [[1], [0]], [[0, 1]]):
        ready = prepared(problems=6, delta=0.02, lr=5e-3)
        config, rollouts = ready.config, ready.rollouts
        advantage = group_advantages(rollouts.grouped_returns, 2.0).flatten()
        for agents in order:
            learner = Learner(rollouts.team, agents, config.beta)
            train.update(learner, rollouts.batches(agents, advantage, 300), config, config.lr)
        ends.append([p.detach() for agent in rollouts.team.agents for p in agent.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(ends[0], ends[1]))
    assert not all(torch.equal(a, b) for a, b in zip(ends[0], ends[2]))


def test_joint_runs_log_one_update_and_the_memory_of_all_agents_in_it(tmp_path, capsys):
    _, updates, stages = run(tmp_path / "run", "--occupancy", "joint", "--delta", "0.02")
    assert [(u["update"], "agent" in u) for u in updates] == [(0, False)] * 2
    assert all(u["messages"] == 36 and u["kl_after"] <= 0.02 for u in updates)
    said = capsys.readouterr().out
    assert all(len(s["kl"]) == 1 for s in stages) and "KL team " in said
    needs = [Config(agents=3, device="cpu", occupancy=occupancy) for occupancy in ("joint", "fresh")]
    joint, single = (plan_training(config, Relay(config))[1].update for config in needs)
    points = 91264 * (4 + 12 + 4)  # gradient, and two points to go back to, one with Adam's moments
    assert joint - single == pytest.approx(2 * points, rel=0.01)


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
    assert ("were backtracked" in said) == (kl == "hard") == ("radius 0.002 (k3 per message)" in said)


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
    returns, seen, update = torch.tensor([1.0] + [0.0] * 6), [], train.update
    right = itertools.cycle(returns.tolist())
    monkeypatch.setattr(Relay, "grade", lambda *_: next(right))
    monkeypatch.setattr(train, "update", lambda l, b, *a: seen.append(b) or update(l, b, *a))
    run(tmp_path / "run", "--stages", "1", "--group", "7", "--eval-problems", "7", *flags)
    centred = returns - returns.mean()
    wanted = centred if flags == ["--no-group-norm"] else (centred / (centred.square().mean() + 1e-6).sqrt())
    wanted = wanted.clamp(-bound, bound)
    assert len(seen) == 3
    for batch in itertools.chain(*seen):
        assert torch.allclose(batch.advantage, wanted.repeat(3)[batch.rollout], atol=1e-5)
