"""The sampled estimators against the truth, on teams small enough to enumerate.

`python -m teamtr_min.studies.estimators` is the same at length; docs/results.md has its figures.
"""

import pytest
import torch
from small_teams import by_transcript

from teamtr_min.studies import exact
from teamtr_min.studies.estimators import coverage, diagnoses, small_game, stage

BATCHES = 300


def z(values: torch.Tensor, truth: float) -> float:
    """Standard errors from the truth to the mean of these."""
    return ((values.mean() - truth) / values.std() * len(values) ** 0.5).item()


@pytest.mark.parametrize("router", [None, by_transcript(3)])
def test_surrogates_gap_and_kl_are_unbiased_and_the_rest_consistent(router):
    first, *_, base, new = teams = stage(small_game(router=router), 0, kl=0.02)
    found, stale = diagnoses(teams, BATCHES, seed=1), exact.surrogate(base, new, states=first).item()
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
    found = diagnoses(stage(small_game(), 0, kl=0.02), 40, seed=7)
    names = ("L^seq", "gap", "KL held out", "L corrected", "KL corrected")
    shares = {name: coverage(*found[name], intervals=40) for name in names}
    assert min(shares.values()) >= 0.82 and sum(shares.values()) / len(shares) < 0.99, shares
