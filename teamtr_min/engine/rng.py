"""Randomness as a pure function of where it is used, so that no draw depends on what else was drawn.

Each draw has an rng path: the seed of the run and words such as "train", stage, update, rollout, turn. `key`
turns it into 64 bits. Sampling tokens takes `uniforms`: Philox-2x32-10 (Salmon et al. 2011) with that key and
the position as counter, so a message is the same alone, in any batch, on any device.
"""

import hashlib
import operator

import numpy as np
import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def key(seed: int, *words: int | str) -> int:
    """64 bits that name this rng path."""
    words = [word if isinstance(word, str) else operator.index(word) for word in (seed, *words)]
    name = repr(tuple(words)).encode()  # of Python's own integers: NumPy's are spelled otherwise
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def generator(seed: int, *words: int | str) -> np.random.Generator:
    """NumPy's generator for draws on the host: problems, orders, routes, bootstraps."""
    return np.random.Generator(np.random.Philox(key=key(seed, *words)))


class RngPath:  # that all draws of one collection of rollouts share
    def __init__(self, seed: int, *words: int | str):
        self.seed, self.words = seed, words

    def key(self, kind: str, rollout: int, turn: int) -> int:
        return key(self.seed, kind, *self.words, rollout, turn)


def uniforms(keys: list[int], count: int, device: torch.device | str = "cpu") -> Tensor:
    """(R, count) fp32 in [0, 1): row r holds draws 0..count-1 of keys[r]. Philox-2x32-10 on int64 lanes."""
    counter = torch.arange(count, device=device)[None]  # (1, count)
    low_key = torch.tensor([k & _LOW for k in keys], device=device)[:, None]  # (R, 1)
    left = counter.expand(len(keys), count)
    right = torch.tensor([k >> 32 for k in keys], device=device)[:, None].expand(len(keys), count)
    for _ in range(10):
        product = left * 0xD256D193  # wraps like unsigned: only the bits are read below
        left, right = ((product >> 32) & _LOW) ^ low_key ^ right, product & _LOW
        low_key = (low_key + 0x9E3779B9) & _LOW
    return (left >> 8).float() * 2.0**-24  # 24 bits are exactly what fp32 holds below 1
