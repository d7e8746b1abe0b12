"""The figures that a run shows: intervals; and when it gives advice."""

import functools
import math

import pytest
import torch

from teamtr_min.config import Config
from teamtr_min.run import log


@pytest.mark.parametrize("right, n", [(0, 16), (16, 16), (1, 16), (7, 9), (300, 2048)])
def test_an_accuracys_interval_is_wilsons(right, n):
    """Its ends are the roots of |p - right / n| = 1.96 sqrt(p (1 - p) / n)."""
    mean, (low, high) = log.mean_interval(torch.tensor([1.0] * right + [0.0] * (n - right)))
    assert mean == pytest.approx(right / n) and low <= mean <= high and high - low > 0.01
    for p in (low, high):
        assert abs(p - mean) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), abs=1e-9)


def test_a_mean_returns_interval_covers_the_mean_as_often_as_it_says():
    """Grades in [0, 1] of several laws, and means over 4 rollouts of problems that differ."""
    uniform = functools.partial(torch.rand, generator=torch.Generator().manual_seed(0))
    laws = {
        "mostly half": (lambda n: 0.4 + 0.2 * uniform(n), 0.5),
        "skewed": (lambda n: uniform(n) ** 4, 0.2),
        "some of 4": (lambda n: (uniform(n, 4) < uniform(n, 1)).double().mean(1), 0.5),
    }
    for name, (draw, truth) in laws.items():
        for problems in (10, 100):
            found = [log.mean_interval(draw(problems))[1] for _ in range(1000)]
            covered = sum(low <= truth <= high for low, high in found) / 1000
            assert 0.93 < covered < 0.985, (name, problems, covered)


def test_a_run_that_cannot_learn_gets_advice_and_one_that_can_gets_none():
    idle, moves = ({"zero_variance_groups": share, "return_mean": 0.0} for share in (1.0, 0.5))
    assert log.advice(Config(), [idle, idle]) and not log.advice(Config(), [idle, moves])
