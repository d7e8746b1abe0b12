"""Sampled and reweighted rollouts: on enumerable teams their expectations are the truth, and the weights of
training are those that a loop over messages finds. `python -m teamtr_min.studies.estimators` is the sampled
part at length; docs/results.md has its figures.
"""

from itertools import pairwise

import pytest
import torch
from ready import Prepared
from small_teams import assert_equal, by_transcript, random_stages
from toy_runs import run

import train
from teamtr_min import occupancy
from teamtr_min.config import Config
from teamtr_min.extras.diagnostics import message_logps, swapped, weights_of
from teamtr_min.objective import group_advantages
from teamtr_min.occupancy import RolloutSource
from teamtr_min.rollout import Rollouts
from teamtr_min.studies import exact
from teamtr_min.studies.estimators import after_a_fit, coverage, diagnoses, share, small_game
from teamtr_min.studies.estimators import stage as climbed
from teamtr_min.studies.exact import Team, log_ratio
from teamtr_min.tasks import Problem


def log_rho(teams: list[Team], order) -> torch.Tensor:
    """(X,) log density ratio of teams[-1] to teams[0], of all rollouts: what each update changed."""
    x = exact.rollouts(teams[0])
    total = torch.zeros(len(x.number), dtype=torch.float64)
    for k, (old, new) in zip(order, pairwise(teams)):
        total += (log_ratio(x, new, old) * (x.agent == k)).sum(1)
    return total


def test_law_surrogate_kl_and_eq_9_of_weighted_rollouts_are_the_intermediate_teams():
    for teams, order in random_stages(1.0)[::3]:
        x = exact.rollouts(teams[0])
        for i, j in enumerate(order):
            base, new = teams[i], teams[i + 1]
            weight = teams[0].rollout_law * log_rho(teams[: i + 1], order).exp()  # (X,)
            assert_equal(weight, base.rollout_law)
            own, log_w = x.agent == j, log_ratio(x, new, base)
            gains = (log_w.expm1() * base.advantage[x.state, x.message] * own).sum(1)
            assert_equal(weight @ gains, exact.surrogate(base, new))
            kl = ((log_w.expm1() - log_w) * own).sum(1)
            assert_equal(weight @ kl, base.messages_per_rollout(j) * exact.mean_message_kl(base, new, j))
            # Eq. 9 of a group that holds all rollouts of a problem: mean and variance are the team's own.
            count = len(x.number) // len(base.game.start)
            law, returns = base.rollout_law[:count] / base.rollout_law[:count].sum(), x.returns[:count]
            centred = returns - law @ returns
            wanted = centred / (law @ centred.square() + 1e-6).sqrt() * (returns.max() > returns.min())
            assert_equal(group_advantages(returns[None], weight=weight[None, :count])[0], wanted)


def test_rollouts_that_an_update_was_fitted_to_overstate_its_gain_and_others_do_not():
    """The identity above is about teams that do not depend on the rollouts."""
    first = Team(small_game(), small_game().theta(torch.Generator().manual_seed(0)))
    found = [after_a_fit(first, 6, 0.02, seed) for seed in range(12)]
    errors = torch.tensor([[fit[by] - fit["gain"] for by in ("reweighted", "others")] for fit in found])
    sd, mean = torch.std_mean(errors, 0)
    own, others = mean / sd * len(found) ** 0.5  # in standard errors
    assert own > 4 and abs(others) < 3


@pytest.mark.parametrize("floor, collections", [(0.0, 1), (0.6, 2), (0.999, 4), (1.0, 4)])
def test_rollouts_are_collected_again_when_their_share_falls_below_the_floor(monkeypatch, floor, collections):
    """A stage of enumerable teams, each sampled by 512 rollouts when the RolloutSource asks for them."""
    teams, sampled, now = climbed(small_game(), 0, kl=0.05), [], 0

    def collect(*_) -> Rollouts:
        nonlocal drawn
        sampled.append(now)
        g, none = torch.Generator().manual_seed(now), torch.zeros(512, dtype=torch.long)
        drawn = exact.sample_rollouts(teams[now], none, g)
        return Rollouts([Problem("", "", "")] * 512, [], drawn.returns, 8)

    monkeypatch.setattr(occupancy, "collect", collect)
    source, drawn = RolloutSource(Config(min_ess=floor), None, [], 0), None
    for i, (old, new) in enumerate(pairwise(teams)):
        source.of_update(i)
        now = i + 1
        source.updated(log_ratio(drawn, new, old).sum(1))
    rollouts, first = source.of_update(now), teams[sampled[-1]]
    assert len(sampled) == collections and rollouts.ess >= floor
    assert rollouts.ess == pytest.approx(share(first.rollout_law, teams[-1].rollout_law).item(), rel=0.1)
    rho = log_ratio(drawn, teams[-1], first).sum(1).exp()
    assert rollouts.ess == pytest.approx((rho.sum() ** 2 / (512 * rho.square().sum())).item(), rel=1e-4)


def moved(team, rollouts, agents: list[int], old: dict[int, list]) -> torch.Tensor:
    """(R, turns): what the agents' updates since `old` changed in the log-prob of each message."""
    table = torch.zeros(len(rollouts.messages), team.turns)
    for k in agents:
        table += message_logps(team, rollouts, k, 300)
        with swapped(team.agents[k].model, old[k]):
            table -= message_logps(team, rollouts, k, 300)
    return table


@pytest.mark.parametrize("updated, knobs", [
    ([1], {"rounds": 2}), ([0, 1], {"occupancy": "joint"}), ([0], {"lr": 0.5, "inner_steps": 1}),
    ([0], {"router": "random", "rounds": 2, "lr": 2e-2}),
])  # fmt: skip
def test_an_updates_log_ratio_is_that_of_a_loop_over_the_agents_messages(updated, knobs):
    ready = Prepared(updated, **{"agents": 3, "lr": 5e-3, "batch_tokens": 300} | knobs)
    old = {k: weights_of(ready.team.agents[k].model) for k in updated}
    outcome = ready.update()
    wanted = moved(ready.team, ready.rollouts, updated, old).sum(1)
    torch.testing.assert_close(outcome.log_ratio, wanted, rtol=1e-3, atol=2e-5)
    assert (wanted.std() > 1e-3) == (outcome.halvings <= train.HALVINGS)


def test_a_run_trains_on_weighted_advantages_of_the_team_as_it_now_is(half_right, tmp_path, monkeypatch):
    """Weights multiply over agents in any order, and over all messages of each, before and after."""
    done, start, seen, update, of_update = [], {}, [], train.update, RolloutSource.of_update

    def collected(source, i):
        rollouts = of_update(source, i)
        if not rollouts.reused:
            done.clear()
            start.update({k: weights_of(agent.model) for k, agent in enumerate(source.team.agents)})
        table = moved(source.team, rollouts, done, start)  # (R, turns)
        assert len(done) < 2 or (table.std(0) > 1e-3).all(), "each turn counts"
        rho = table.sum(1).exp()
        weight = (rho / rho.mean()).view(-1, 4)
        seen[:] = [group_advantages(rollouts.grouped_returns, 2.0, weight=weight).flatten(), weight.flatten()]
        return rollouts

    def spy(learner, batches, config, lr):
        for batch in batches.own:
            torch.testing.assert_close(batch.advantage, seen[0][batch.rollout], rtol=1e-3, atol=1e-4)
            own = batch.weight
            torch.testing.assert_close(own, seen[1][batch.rollout], rtol=1e-3, atol=1e-4)
            assert batch.total_weight == pytest.approx(own.sum().item(), rel=1e-6)
        assert not done or seen[1].std() > 0.01
        done.extend(learner.agents)
        return update(learner, batches, config, lr)

    monkeypatch.setattr(RolloutSource, "of_update", collected)
    monkeypatch.setattr(train, "update", spy)
    run(tmp_path / "run", *"--min-ess 0 --order random --rounds 2 --router random".split())
    assert sorted(done) == [0, 1, 2]


def z(values: torch.Tensor, truth: float) -> float:
    """Standard errors from the truth to the mean of these."""
    return ((values.mean() - truth) / values.std() * len(values) ** 0.5).item()


@pytest.mark.parametrize("router", [None, by_transcript(3)])
def test_surrogates_gap_and_kl_are_unbiased_and_the_rest_consistent(router):
    first, *_, base, new = teams = climbed(small_game(router=router), 0, kl=0.02)
    found, stale = diagnoses(teams, 300, seed=1), exact.surrogate(base, new, states=first).item()
    estimates = {name: torch.vmap(statistic)(*tables) for name, (_, statistic, *tables) in found.items()}
    truth = {name: case[0] for name, case in found.items()}
    for name in ("L^seq", "gap", "KL held out", "L corrected", "KL corrected"):
        assert abs(z(estimates[name], truth[name])) < 4, name
    for name in ("D_occ", "ESS/B", "ESS"):  # functions of means: biased by O(1 / batch)
        assert estimates[name].mean().item() == pytest.approx(truth[name], rel=0.01), name
    for name in ("L^seq", "L corrected"):
        assert abs(z(estimates[name], stale)) > 4, "enough batches to tell seq from stale"
    assert abs(z(estimates["gap"], 0)) > 20 and truth["D_occ"] > 0.05 and truth["ESS/B"] < 0.95


def test_intervals_cover_the_truth_after_mild_updates():
    """95% in name; below, the band that 40 intervals allow."""
    found = diagnoses(climbed(small_game(), 0, kl=0.02), 40, seed=7)
    names = ("L^seq", "gap", "KL held out", "L corrected", "KL corrected")
    shares = {name: coverage(*found[name], intervals=40) for name in names}
    assert min(shares.values()) >= 0.82 and sum(shares.values()) / len(shares) < 0.99, shares
