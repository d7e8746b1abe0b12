"""bf16 weights follow their masters on average, however small the steps, and deterministically."""

import math

import pytest
import torch

from teamtr_min.engine import rounding
from teamtr_min.engine.rounding import LOW, round_into, thresholds


def rounded(x: torch.Tensor) -> torch.Tensor:
    weight = torch.empty_like(x, dtype=torch.bfloat16)
    round_into(weight, x)
    return weight.float()


def gap(x: torch.Tensor) -> torch.Tensor:
    """To the next bf16 number, away from zero."""
    below = x.view(torch.int32) & ~LOW
    return (below + LOW + 1).view(torch.float32) - below.view(torch.float32)


def test_what_bf16_can_hold_stays_as_it_is_and_so_does_what_is_not_finite():
    every = (torch.arange(2**16, dtype=torch.int32) << 16).view(torch.float32)  # all 65,536 of them
    numbers = every[~every.isnan()]
    for start in (0, 1, 12345):
        assert torch.equal(rounded(numbers.roll(start)), numbers.roll(start))
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32)  # the first is what CUDA makes
    assert math.inf in numbers and rounded(nan.view(torch.float32).repeat(100)).isnan().all()


@pytest.mark.parametrize("part", [0.0, 0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_share_of_weights_that_jump_is_the_part_of_the_gap_that_they_moved(part, sign):
    torch.manual_seed(0)
    start = sign * (0.02 * torch.randn(101, 517)).abs().bfloat16().float()
    step = sign * gap(start.abs())
    got = rounded(start + part * step)
    jumped = got != start
    assert jumped.float().mean().item() == pytest.approx(part, abs=0.002)
    assert torch.equal(got[jumped], (start + step)[jumped])
    if part == 0.1:  # and of any few in a row
        assert all(4 <= n <= 17 for n in jumped.view(-1)[: 517 * 100].view(-1, 100).sum(1).tolist())
    further = rounded(start + (part + 0.05) * step)  # a weight that has jumped stays there
    assert torch.equal(further[jumped], got[jumped])


def test_long_tensors_go_by_pieces(monkeypatch):
    x = torch.randn(3 * 70001)
    got = rounded(x)
    table = thresholds(x.device)[: LOW + 1].repeat(4)[: len(x)]
    assert torch.equal(got, ((x.view(torch.int32) + table) & ~LOW).view(torch.float32))
    monkeypatch.setattr(rounding, "PIECE", 1 << 16)  # a multiple of the period
    assert torch.equal(rounded(x.view(3, -1)), got.view(3, -1))
