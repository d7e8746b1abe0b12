"""The figures that a run shows: intervals, partial credit, advice, the curve."""

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
        found = [log.mean_interval(draw(100))[1] for _ in range(1000)]
        covered = sum(low <= truth <= high for low, high in found) / 1000
        assert 0.93 < covered < 0.97, (name, covered)


def update(agent: int, kl: float, **more) -> dict:
    line = {"agent": agent, "kl_after": kl, "steps": 6, "halvings": 0, "lr": 1e-6}
    return line | {"zero_variance_groups": 0.5, "return_mean": 0.2, **more}


def test_a_run_that_cannot_learn_says_why_and_what_helps():
    config, idle = Config(), {"zero_variance_groups": 1.0}
    assert not log.advice(config, [update(0, 0.01, **idle), update(1, 0.01)])
    wrong, right = (log.advice(config, [update(0, 0.01, **idle, return_mean=r)]) for r in (0.0, 1.0))
    assert "on average 0.00" in wrong and "--warm-start STEPS" in wrong and "--group larger than 8" in wrong
    assert "harder problems" in right
