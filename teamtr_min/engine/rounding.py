"""fp32 masters -> bf16 weights, each rounded at its own threshold. [ours]

A step of 1e-6 moves most bf16 weights by less than half of their last bit. Rounded to the nearest, a policy
would hardly change then, while its masters drift away unseen (docs/results.md). So weight i is rounded up, in
magnitude, where what bf16 cuts off exceeds threshold i, and thresholds are spread evenly: of many weights
that all move by a tenth of the gap between bf16 numbers, a tenth jumps. What bf16 can hold stays.
"""

import functools

import torch
from torch import Tensor

LOW = 0xFFFF  # the bits that bf16 lacks
PIECE = 1 << 22  # weights at a time
GOLDEN = 40503  # 2^16 / golden ratio, odd: its multiples, modulo 2^16, are spread evenly


@functools.lru_cache
@torch.inference_mode(False)
def thresholds(device: torch.device) -> Tensor:
    """Of weights 0, 1, ..., int32, to be added to bits before they are cut off. They repeat after 2^16."""
    return (torch.arange(PIECE, device=device) * GOLDEN % (LOW + 1)).to(torch.int32)


@torch.no_grad()
def round_into(weight: Tensor, master: Tensor) -> None:
    """Overwrite `weight`, bf16 or fp32 that stands for it, by `master`, fp32 of the same shape, rounded. Both
    are contiguous. Several processes count the weights of their own parts of a tensor."""
    for to, x in zip(weight.view(-1).split(PIECE), master.view(-1).split(PIECE)):
        bits = x.view(torch.int32) + thresholds(x.device)[: len(x)]
        rounded = bits.bitwise_and_(~LOW).view(torch.float32)
        to.copy_(torch.where(x.isnan(), x, rounded))  # the sum of a NaN's bits may be a number's
