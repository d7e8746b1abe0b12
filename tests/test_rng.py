"""Counter-based randomness: a pure function of the rng path."""

import itertools

import numpy as np

from teamtr_min.engine import rng


def philox(counter: int, key: int) -> int:
    """Philox-2x32-10 as its authors write it, on Python integers; returns the first output word."""
    left, right, k = counter & 0xFFFFFFFF, counter >> 32, key
    for _ in range(10):
        product = left * 0xD256D193
        left, right = (product >> 32) ^ k ^ right, product & 0xFFFFFFFF
        k = (k + 0x9E3779B9) & 0xFFFFFFFF
    return left


def test_uniforms_equal_philox_on_python_integers():
    """Which has the known answers that come with the Random123 library, for the first word."""
    assert (philox(0, 0), philox(2**64 - 1, 2**32 - 1)) == (0xFF1DAE59, 0x2C3F628B)
    keys = [0, 1, 2**63 + 12345, 2**64 - 1, rng.key(7, "rollout", 3)]
    words = [[philox(i | (key >> 32) << 32, key & 0xFFFFFFFF) for i in range(5)] for key in keys]
    assert rng.uniforms(keys, 5).tolist() == [[(word >> 8) * 2.0**-24 for word in row] for row in words]


def test_paths_do_not_collide():
    keys = {rng.key(*path) for path in itertools.product(range(3), "ab", range(20), range(20))}
    assert len(keys) == 3 * 2 * 20 * 20
    assert rng.key(0, "a", 12) != rng.key(0, "a", 1, 2)
    assert rng.key(np.int64(7), "a", np.int32(2)) == rng.key(7, "a", 2)
    path = rng.RngPath(0, "train", 1)
    assert len({path.key(kind, r, t) for kind in ("route", "rollout") for r in (0, 1) for t in (0, 1)}) == 8
