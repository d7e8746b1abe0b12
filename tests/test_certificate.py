"""The sampled estimators against the truth, on teams small enough to enumerate.

`python -m teamtr_min.studies.estimators` is the same at length; docs/results/estimators.md is what it found.
"""

import math

import pytest
import torch

from teamtr_min.extras import certificate, exact
from teamtr_min.studies import estimators
from teamtr_min.studies.estimators import LAST, by_transcript, coverage, diagnoses, fitted, small_game, stage

BATCHES = 300


def z(values: torch.Tensor, truth: float) -> float:
    """How many standard errors the mean of these is away from the truth."""
    return ((values.mean() - truth) / values.std() * len(values) ** 0.5).item()


@pytest.mark.parametrize("router", [None, by_transcript])
def test_surrogates_gap_and_held_out_kl_are_unbiased_and_the_rest_consistent(router):
    found = diagnoses(stage(small_game(router=router), 0, kl=0.02), BATCHES, seed=1)
    estimates = {name: torch.vmap(statistic)(*tables) for name, (_, statistic, *tables) in found.items()}
    truth = {name: case[0] for name, case in found.items()}
    for name in ("L^seq", "gap", "L^stale", "KL held out"):
        assert abs(z(estimates[name], truth[name])) < 4, name
    for name in ("D_occ", "ESS/B"):  # functions of means: biased by O(1 / batch)
        assert estimates[name].mean().item() == pytest.approx(truth[name], rel=0.01), name
    assert abs(z(estimates["L^seq"], truth["L^stale"])) > 5, "enough batches to tell seq from stale"
    assert abs(z(estimates["gap"], 0)) > 20 and truth["D_occ"] > 0.05 and truth["ESS/B"] < 0.95


def test_intervals_cover_the_truth_after_mild_updates():
    """95% in name; below, the band that 50 intervals allow. docs/results/estimators.md has the figures."""
    found = diagnoses(stage(small_game(), 0, kl=0.02), 50, seed=7)
    shares = {name: coverage(*case, intervals=50) for name, case in found.items()}
    assert min(shares.values()) >= 0.84 and sum(shares.values()) / len(shares) < 0.99, shares


def test_intervals_of_what_1_over_rho_weighs_fail_after_large_updates():
    """KL 4 per update: the few rollouts that carry the weight 1/rho are in hardly any batch, and a bootstrap
    cannot know what its batch has never seen: too narrow, though the mean over batches is right. ESS/B is
    read too high for the same reason. What has no weight of other agents' messages stays covered."""
    found = diagnoses(stage(small_game(), 0, kl=4.0), 50, seed=7)
    shares = {name: coverage(*found[name], intervals=50) for name in ("L^seq", "gap", "L^stale", "ESS/B")}
    assert max(shares["gap"], shares["L^stale"], shares["ESS/B"]) < 0.7 and shares["L^seq"] >= 0.84, shares
    truth, statistic, *tables = found["ESS/B"]
    assert truth < 0.02 and torch.vmap(statistic)(*tables).mean() > 2 * truth


def test_occupancy_shift_is_normalised_within_each_turn_as_the_truth_is():
    teams = stage(small_game(router=by_transcript), 0, kl=0.3)
    first, base = teams[0], teams[-2]
    x = estimators.sample_batches(first, 1, seed=3, problems=8000)
    drift, spoken = certificate.before_turn(estimators.log_ratio(x, base, first)), x.agent == LAST
    truth = exact.occupancy_shift(first, base, LAST).item()
    assert certificate.occupancy_shift(drift, spoken).item() == pytest.approx(truth, abs=0.005)
    plain = ((drift.exp() - 1).abs() * spoken).sum() / (2 * spoken.sum())
    assert abs(plain.item() - truth) > 0.015, "the router moves how often the agent acts: normalising matters"


def test_k1_k3_and_exact_are_unbiased_for_a_fixed_update_and_k1_is_by_far_the_noisiest():
    *_, base, new = stage(small_game(), 0, kl=0.02)
    truth = exact.mean_message_kl(base, new, LAST).item()
    found = estimators.monitors(estimators.sample_batches(base, BATCHES, seed=1), base, new)
    batches = {name: values.view(BATCHES, -1).mean(1) for name, values in found.items()}
    assert all(abs(z(values, truth)) < 4 for values in batches.values())
    assert batches["k1"].std() > 5 * batches["k3"].std() > 5 * batches["exact"].std()


def test_a_part_of_the_messages_decides_as_all_do_unless_the_kl_is_near_the_radius():
    rates = estimators.flip_rates(0.02, batches=20, seed=0)
    near, far = slice(2, 4), (0, 5)  # 0.9 to 1.1 of the radius; 0.5 to 0.8 and 1.25 to 2
    assert estimators.BINS[near.start] == 0.9 and estimators.BINS[near.stop] == 1.1
    for share in (0.25, 0.5):
        k1, k3 = rates["k1", share], rates["k3", share]
        assert 0.1 < sum(k3[near]) < sum(k1[near]) and all(k3[i] < 0.01 for i in far)
        assert all(k1[i] > 0.03 for i in far), "k1 on a part misjudges even a KL far from its radius"
    assert sum(rates["k3", 0.5][near]) < sum(rates["k3", 0.25][near])


def test_in_sample_k3_stops_an_update_near_its_radius_and_k1_does_not():
    """A free row for every context is fitted hardest. Where most rollouts fail, k1 overstates the KL tenfold;
    where most succeed it goes negative while the true KL exceeds three times the radius."""
    for needed, k1_band in ((3, (0.0, 0.2)), (1, (3.0, math.inf))):
        game = small_game(tied=False, needed=needed)
        for seed in (0, 10):
            assert k1_band[0] < fitted(game, "k1", 0.02, seed)[0] < k1_band[1]
            for estimator in ("k3", "exact"):
                ratio, reached = fitted(game, estimator, 0.02, seed)
                assert reached and 0.6 < ratio < 1.0


def test_the_interval_is_over_problems_not_over_rollouts():
    """Equal rollouts of a problem are one observation."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).repeat_interleave(8)
    point, (low, high) = certificate.bootstrap(torch.mean, values, group=8, seed=0)
    assert point == pytest.approx(values.mean().item())
    assert high - low == pytest.approx(2 * 1.96 * values.std().item() / 20, rel=0.15)
    again = certificate.bootstrap(torch.mean, values, group=8, seed=0)[1]
    assert again == [low, high] != certificate.bootstrap(torch.mean, values, group=8, seed=1)[1]


def test_an_agent_that_took_no_turn_or_drifted_without_bound_gives_numbers():
    drift = torch.tensor([[0.0, 300.0], [0.0, -300.0]] * 3).double()
    never, always = torch.zeros(6, 2, dtype=torch.bool), torch.ones(6, 2, dtype=torch.bool)
    share, shift = certificate.effective_sample_share, certificate.occupancy_shift
    assert share(drift, never) == shift(drift, never) == certificate.message_kl(drift, never) == 0
    assert share(drift, always).item() == pytest.approx(3 / 12) and share(0 * drift, always) == 1
    assert 0 < shift(drift, always) <= 1


def test_a_stage_s_certificate_is_the_sum_of_its_updates():
    updates = [
        {"update": i, "surrogate": 0.1, "gap": g,
         "certificate": -0.3 * i, "penalty": 0.4 * i, "bound": 0.01 * i}
        for i, g in enumerate((9.0, -0.2, 0.1))
    ]  # fmt: skip
    took_no_turn = [{"update": 3}, {"update": 4, "surrogate": None}]
    found = certificate.stage_certificate(updates + took_no_turn)
    assert found == pytest.approx({"certificate": -0.9, "vacuous": True, "bound": 0.03, "delta_stale": 0.15})
    assert not certificate.stage_certificate(updates[:2])["vacuous"]
    assert certificate.stage_certificate(updates[:1])["delta_stale"] is None
    assert certificate.penalty_constant() == pytest.approx(14001, abs=1)
