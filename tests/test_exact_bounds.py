"""The paper's statements on teams small enough to enumerate, each also shown able to fail; float64."""

import itertools
import math

import pytest
import torch
from small_teams import ROUND_OFF, by_transcript, orders, pairs, random_game, random_stages, stage

from teamtr_min.theory import exact
from teamtr_min.theory.exact import Game, Team, discounted_kl, message_kl, stale_gap, surrogate


def c(teams: list[Team]) -> torch.Tensor:
    """c = sqrt(2) gamma A_max / (1-gamma)^2 [paper], A_max over the advantages that the stage uses."""
    gamma, largest = teams[0].game.gamma, max(team.A.abs().max() for team in teams[:-1])
    return math.sqrt(2) * gamma * largest / (1 - gamma) ** 2


def seqs(teams):
    """L_i^seq of a stage, i = 1..n."""
    return [surrogate(old, new) for old, new in pairs(teams)]


def stales(teams):
    """L_i^stale of a stage, i = 1..n."""
    return [surrogate(old, new, states=teams[0]) for old, new in pairs(teams)]


def deltas(teams):
    """delta_i of a stage, each under its own d^{team^{i-1}}."""
    return [discounted_kl(old, new) for old, new in pairs(teams)]


def stale_deltas(teams):
    """The same updates' KL under d^{team^0}: what a stale run can measure."""
    first = teams[0]
    return [first.occupancy @ message_kl(old, new) for old, new in pairs(teams)]


def root(delta):
    return delta.clamp(min=0).sqrt()


# The statements, as (what is lost, what the statement allows to be lost): loss <= allowance.


def prop_33(teams):
    return stales(teams)[-1] - seqs(teams)[-1], c(teams) * sum(map(root, deltas(teams)[:-1]))


def thm_34(teams):
    return seqs(teams)[0] - (teams[1].J - teams[0].J), c(teams) * root(deltas(teams)[0])


def thm_36(teams):
    return sum(seqs(teams)) - (teams[-1].J - teams[0].J), c(teams) * sum(map(root, deltas(teams)))


def thm_37(teams):
    n = len(teams) - 1
    return sum(stales(teams)) - (teams[-1].J - teams[0].J), c(teams) * n * sum(map(root, deltas(teams)))


def stale_ours(teams):
    """Thm 3.7 with every KL under d^{team^0} and roots of sums [ours]; see the test below for the proof."""
    total = torch.stack(stale_deltas(teams)).cumsum(0)
    return sum(stales(teams)) - (teams[-1].J - teams[0].J), c(teams) * root(total).sum()


def finite_horizon(teams):
    old, new = teams[:2]
    return (new.J - old.J).abs(), root(old.messages_per_rollout(0) * exact.mean_message_kl(old, new, 0) / 2)


# Lemmas


def test_lemma_31_the_team_s_kl_is_the_active_agent_s():
    """The joint policy: all agents write at once, the silent ones an empty message for certain."""
    for seed in range(3):
        game = random_game(seed, 3, 3, router=by_transcript(3))
        teams = stage(game, (0, 1, 2), seed)
        kl, n, M = message_kl(teams[0], teams[-1]), 3, game.messages
        for s, active in enumerate(game.actor.tolist()):
            joint = []
            for team in (teams[0], teams[-1]):
                p = torch.ones((), dtype=torch.float64)
                for j in range(n):
                    own = torch.zeros(M + 1, dtype=torch.float64)  # the last entry: nothing written
                    own[:M] = team.pi[s] * (j == active)
                    own[M] = j != active
                    p = p[..., None] * own
                joint.append(p.flatten())
            terms = torch.where(joint[0] > 0, joint[0] * (joint[0] / joint[1]).log(), 0.0)
            assert terms.sum().item() == pytest.approx(kl[s].item(), abs=ROUND_OFF)
            updated = [message_kl(old, new)[s] for old, new in pairs(teams)]  # agent i changed alone
            assert all((v > 0) == (j == active) for j, v in enumerate(updated))
            assert updated[active].item() == pytest.approx(kl[s].item(), abs=ROUND_OFF)


def test_lemma_32_a_message_s_kl_is_the_sum_of_its_tokens_kls_met_on_the_way():
    for seed in range(4):
        old, new, _ = stage(random_game(seed, 2, 2, length=2, vocabulary=3), (0, 1), seed)
        whole = (old.pi * (old.logp - new.logp)).sum(-1)  # over the M messages
        torch.testing.assert_close(message_kl(old, new), whole, rtol=0, atol=ROUND_OFF)
        unweighted = exact.token_kl(old, new).sum(-1)
        assert (unweighted - whole).abs().max() > 1e-3  # prefixes must be weighed: the check can fail


def test_an_update_s_gain_is_its_advantages_where_the_new_team_goes():
    """The performance difference lemma, with the terminal reward and the absorbing state; also gamma = 1."""
    for gamma, (agents, seed) in itertools.product((0.3, 0.9, 1.0), ((2, 0), (3, 1), (3, 2))):
        game = random_game(seed, agents, 4, gamma, problems=2, router=by_transcript(agents))
        for old, new in pairs(stage(game, range(agents), seed)):
            assert (new.J - old.J).item() == pytest.approx(
                surrogate(old, new, states=new).item(), abs=ROUND_OFF
            )
        if gamma < 1:
            assert old.occupancy.sum().item() == pytest.approx(1 - gamma**4, abs=ROUND_OFF)


# Bounds


def test_prop_33_the_stale_surrogate_overstates_by_at_most_the_radii_before():
    for teams, _ in random_stages():
        for i in range(2, len(teams)):
            gap, allowed = prop_33(teams[: i + 1])
            assert gap <= allowed + ROUND_OFF
            assert gap.item() == pytest.approx(
                -stale_gap(teams[0], teams[i - 1], teams[i]).item(), abs=ROUND_OFF
            )


def test_thm_34_one_update_gains_its_surrogate_less_the_penalty():
    for teams, _ in random_stages():
        for pair in pairs(teams):
            lost, allowed = thm_34(pair)
            assert lost <= allowed + ROUND_OFF


def test_thm_36_a_stage_of_fresh_updates_pays_each_radius_once():
    for teams, _ in random_stages():
        lost, allowed = thm_36(teams)
        assert lost <= allowed + ROUND_OFF


def test_thm_37_a_stale_stage_pays_at_most_n_times_as_much():
    for teams, _ in random_stages():
        lost, allowed = thm_37(teams)
        assert lost <= allowed + ROUND_OFF


def test_a_stale_run_is_bounded_by_the_radii_it_can_measure():
    """[ours] Under d^{team^0}, and with roots of sums for sums of roots: n^1.5 where Thm 3.7 has n^2.

    Proof: go from team^0 to team^i in one step, TV(d^i, d^0) <= gamma/(1-gamma) sqrt(E_{d^0} KL / 2). That
    KL(team^0 || team^i) is the sum of delta_k over k <= i, each under d^{team^0}: one agent acts in a state
    (Lemma 3.1), and each is updated once in a stage.
    """
    for teams, _ in random_stages():
        lost, allowed = stale_ours(teams)
        assert lost <= allowed + ROUND_OFF
        gap, before = prop_33(teams)[0], sum(stale_deltas(teams)[:-1])
        assert gap.abs() <= c(teams) * root(before) + ROUND_OFF


def test_zeta_covers_an_imperfect_surrogate_and_is_needed():
    """zeta_i = (1-gamma) |Lhat_i - L_i|, for Thm 3.4, 3.6 and, with L^stale, 3.7."""
    needed = 0
    for k, (teams, _) in enumerate(random_stages()):
        gamma = teams[0].game.gamma
        error = torch.randn(len(teams) - 1, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        zeta = (1 - gamma) * error.abs()
        for theorem, errors, zetas in (
            (thm_34, error[0], zeta[0]), (thm_36, error.sum(), zeta.sum()), (thm_37, error.sum(), zeta.sum()),
        ):  # fmt: skip
            lost, allowed = theorem(teams)
            assert lost + errors <= allowed + zetas / (1 - gamma) + ROUND_OFF
            needed += bool(lost + errors > allowed)
    assert needed > 0


def once_each(context):
    """A router over three turns and agents: the first message decides who comes second."""
    return (0, 1, 2)[len(context) - 1] if context[1:2] != (1,) else (0, 2, 1)[len(context) - 1]


def test_agents_who_speak_once_gain_exactly_their_surrogate():
    """An agent's own update does not move the states it acts in, so J' - J = L^seq, in any order, discounted
    or not. Thm 3.4 and 3.6 hold with c = 0 there: no smaller constant has a counterexample."""
    for agents, seed, gamma in itertools.product((2, 3, 4), range(3), (0.1, 0.9, 1.0)):
        for router in (None, once_each) if agents == 3 else (None,):
            game = random_game(seed, agents, agents, gamma, router=router)
            for order in orders(agents, seed):
                for old, new in pairs(stage(game, order, seed, step=2.0)):
                    assert (new.J - old.J - surrogate(old, new)).abs() <= ROUND_OFF
    twice = stage(random_game(0, 2, 4, gamma=0.9), (0, 1), seed=0, step=2.0)
    assert thm_36(twice)[0].abs() > 1e-3


def test_the_monitor_dominates_delta_while_few_messages_are_written_per_discount_horizon():
    """delta_j <= (1-gamma) H_j dhat_j, hence <= dhat_j while (1-gamma) H_j <= 1; past that it need not be."""
    exceeded = 0
    for teams, order in random_stages():
        for j, (old, new) in zip(order, pairs(teams)):
            monitor, spread = (
                exact.mean_message_kl(old, new, j),
                (1 - old.game.gamma) * old.messages_per_rollout(j),
            )
            assert discounted_kl(old, new) <= spread * monitor + ROUND_OFF
            exceeded += bool(discounted_kl(old, new) > monitor)
            assert discounted_kl(old, new) <= monitor + ROUND_OFF or spread > 1
    assert exceeded > 0


def test_finite_horizon_a_gain_is_at_most_the_root_of_the_rollout_s_kl():
    """|J' - J| <= sqrt(H_j dhat_j / 2) [ours]: H_j dhat_j is the KL between the laws of whole rollouts."""
    for teams, order in random_stages(gamma=1.0):
        for j, (old, new) in zip(order, pairs(teams)):
            kl = old.messages_per_rollout(j) * exact.mean_message_kl(old, new, j)
            whole = (old.rollout_law * (old.rollout_law / new.rollout_law).log()).sum()
            assert kl.item() == pytest.approx(whole.item(), abs=1e-10)
            assert (new.J - old.J).abs() <= root(kl / 2) + ROUND_OFF


def test_occupancy_does_not_shift_in_reverse_turn_order():
    """One round, reverse turn order: D_occ = 0. In turn order, or with a second round, it shifts, and the gap
    is at most 2 A_max H_i D_occ for gamma = 1 and round-robin [ours]."""
    for agents, seed, rounds in itertools.product((2, 3, 4), range(3), (1, 2)):
        for order in (tuple(range(agents)), tuple(range(agents))[::-1]):
            teams = stage(random_game(seed, agents, agents * rounds, gamma=1.0), order, seed, step=2.0)
            for i, (j, (old, new)) in enumerate(zip(order, pairs(teams))):
                shift, gap = exact.occupancy_shift(teams[0], old, j), stale_gap(teams[0], old, new).abs()
                assert gap <= 2 * old.A.abs().max() * old.messages_per_rollout(j) * shift + ROUND_OFF
                if i == 0 or (rounds == 1 and order[0] != 0):
                    assert shift <= 1e-12 and gap <= 1e-12
                else:
                    assert shift > 1e-3


@pytest.mark.parametrize("router", [None, by_transcript(3)])
def test_occupancy_shift_is_what_likelihood_ratios_estimate(router):
    """E_{team^0} |rho - 1| / 2 over the agent's messages: rho is the ratio new/old of the messages before the
    turn, over its mean where the agent acts, which is 1 unless the router reads the transcript."""
    for seed, j in itertools.product(range(4), range(3)):
        teams = stage(random_game(seed, 3, 5, gamma=1.0, router=router), (0, 1, 2), seed)
        first, base = exact.rollouts(teams[0]), exact.rollouts(teams[2])
        rho = ((base.logp - first.logp).cumsum(1) - (base.logp - first.logp)).exp()  # (X, T)
        weight = teams[0].rollout_law[:, None] * (first.agent == j)
        mean = (weight * rho).sum(0) / weight.sum(0)  # (T,), nan at turns that the agent never has
        assert router or (mean.nan_to_num(1.0) - 1).abs().max() <= ROUND_OFF
        wanted = (weight * (rho / mean - 1).abs() / 2).nansum() / weight.sum()
        assert exact.occupancy_shift(teams[0], teams[2], j).item() == pytest.approx(
            wanted.item(), abs=ROUND_OFF
        )


# Tightness


def by_last_word(context):
    return context[-1] % 2 if len(context) > 1 else 0


def largest_ratio(statement, order, turns, gamma, router=None, vocabulary=2, steps=400) -> float:
    """The closest call found: gradient ascent on lost / allowed, over the teams and the reward."""
    g = torch.Generator().manual_seed(0)
    game = Game(max(order) + 1, vocabulary, turns, torch.zeros(vocabulary**turns), gamma=gamma, router=router)
    theta = game.theta(g).requires_grad_()
    move = game.theta(g, 0.3).requires_grad_()
    verdict = (3 * torch.randn(len(game.reward), generator=g, dtype=torch.float64)).requires_grad_()
    optimizer, best = torch.optim.Adam([theta, move, verdict], lr=0.05), 0.0
    for _ in range(steps):
        game.reward = verdict.sigmoid()
        teams = [Team(game, theta)]
        for j in order:
            teams.append(teams[-1].replace(j, theta[j] + move[j]))
        lost, allowed = statement(teams)
        ratio = lost / allowed
        best = max(best, ratio.item())
        optimizer.zero_grad()
        (-ratio).backward()
        optimizer.step()
    return best


# statement, order, turns, gamma, router, vocabulary, and a factor on the penalty that is refuted; beside it,
# the largest ratio found. The factor n of Thm 3.7 is not met; the bound with roots of sums has none, and is.
CLOSEST = {
    "prop 3.3, gamma 0.01": (prop_33, (0, 1), 2, 0.01, None, 2, 0.9),  # 0.960
    "prop 3.3, gamma 0.5": (prop_33, (0, 1), 2, 0.5, None, 2, 0.3),  # 0.345
    "thm 3.4, gamma 0.01": (thm_34, (0,), 2, 0.01, None, 2, 0.9),  # 0.932
    "thm 3.4, gamma 0.5": (thm_34, (0,), 3, 0.5, None, 2, 0.3),  # 0.362
    "thm 3.6, gamma 0.01": (thm_36, (0, 1), 2, 0.01, by_last_word, 3, 0.85),  # 0.907
    "thm 3.6, gamma 0.5": (thm_36, (0, 1), 2, 0.5, by_last_word, 3, 0.2),  # 0.244
    "thm 3.7, gamma 0.01": (thm_37, (0, 1), 2, 0.01, by_last_word, 3, 0.35),  # 0.404
    "thm 3.7, gamma 0.5": (thm_37, (0, 1), 3, 0.5, by_last_word, 2, 0.08),  # 0.094
    "stale, ours, gamma 0.01": (stale_ours, (1, 0), 2, 0.01, by_last_word, 3, 0.85),  # 0.925
    "stale, ours, gamma 0.5": (stale_ours, (1, 0), 2, 0.5, by_last_word, 3, 0.2),  # 0.267
    "finite horizon": (finite_horizon, (0,), 2, 1.0, None, 2, 0.98),  # 0.9985
}


@pytest.mark.parametrize("name", CLOSEST)
def test_a_smaller_constant_has_a_counterexample(name):
    *search, refuted = CLOSEST[name]
    ratio = largest_ratio(*search)
    print(f"{name}: {ratio:.4f} of the penalty is reached")
    assert refuted < ratio <= 1 + ROUND_OFF


@pytest.mark.parametrize("gamma, turns", [(0.01, 2), (0.9, 10)])
def test_by_hand_c_is_nearly_met_and_one_power_less_of_the_horizon_is_false(gamma, turns):
    """Prop. 3.3's loss reaches (T-1) gamma^(T-2) (1-gamma)^1.5 of its penalty: 0.985 at gamma 0.01, T = 2; at
    gamma 0.9, T = 10 it is more than c (1-gamma) would allow.

    Agent 0 writes a fair coin, then agent 1 speaks T - 1 times and in the old team nearly always writes 0.
    After coin 0 a deviation wins, after coin 1 it loses, so the new agent 1, who always deviates, is credited
    with +-gamma^(T-1) at every turn. Moving the coin by TV shifts that sum by 2 TV (T-1) gamma^(T-1), and
    sqrt(delta_1) is TV sqrt(2 (1-gamma)).
    """
    game = Game(
        2, 2, turns, lambda context: float((1 in context[2:]) == (context[1] == 0)), gamma=gamma,
        router=lambda context: min(len(context) - 1, 1), features=lambda agent, context, prefix: 0,
    )  # fmt: skip
    theta = torch.tensor([[[0.0, 0.0]], [[18.0, 0.0]]], dtype=torch.float64)  # (agents, 1 row, V)
    teams = [Team(game, theta)]
    for agent, update in enumerate(([[0.0, 0.01]], [[0.0, 18.0]])):
        teams.append(teams[-1].replace(agent, torch.tensor(update, dtype=torch.float64)))
    lost, allowed = prop_33(teams)
    reached = (turns - 1) * gamma ** (turns - 2) * (1 - gamma) ** 1.5
    assert (lost / allowed).item() == pytest.approx(reached, rel=1e-4)
    assert lost > (0.98 if turns == 2 else 1.2 * (1 - gamma)) * allowed
