"""Token sequences -> rows, each a prefix tree: what sequences have in common is computed once.

    sequences  a b c d      one row   a b c d e f
               a b c e      position  0 1 2 3 3 2
               a b f        end       6 6 5 4 5 6

A tree lies in its row depth first, so whatever follows a token up to its `end` descends from it: token i sees
token k exactly when k <= i < end[k]. A row of T tokens costs T * pairs_per_token + T^2, since attention looks
at every pair. Trees are runs of the sorted sequences, batches runs of trees of like length, both such that
the sum of costs is least: 0.82 of the time of a greedy choice.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from os.path import commonprefix  # of any two sequences
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from teamtr_min.engine.cache import aligned

LONGEST_TREE = 4096  # tokens; a row's mask has the square of it
BATCH_COST = 256  # tokens that cost as much as one more batch: measured on a CPU, and flat


@dataclass
class Tree:  # sequences in lexicographic order, each with those tokens that the one before it lacks
    tokens: list[int]
    positions: list[int]  # of each token in its sequences
    end: list[int]
    paths: dict[int, list[int]]  # number of a sequence -> where its tokens stand in the row

    def __len__(self) -> int:
        return len(self.tokens)


class Packed(NamedTuple):  # trees as tensors, a row each, padded on the right
    tokens: Tensor  # (B, T) int64
    positions: Tensor  # (B, T) int64, of each token in its sequences
    end: Tensor | None  # (B, T) int64: where what descends from a token ends; None if no row branches
    paths: dict[int, list[int]]  # number of a sequence -> where its tokens stand in the flattened (B * T)


def trees_of(sequences: Iterable[tuple[int, list[int]]], most: int, pairs_per_token: float) -> list[Tree]:
    """Numbered sequences as prefix trees of at most `most` tokens, or of one sequence."""
    numbers: dict[tuple[int, ...], list[int]] = {}  # equal sequences are one
    for number, sequence in sequences:
        numbers.setdefault(tuple(sequence), []).append(number)
    ordered, most = sorted(numbers), min(most, LONGEST_TREE)
    shared = [len(commonprefix(pair)) for pair in zip([(), *ordered], ordered)]  # with the neighbour before
    length = np.array([len(sequence) for sequence in ordered], dtype=float)
    upto = np.cumsum(length - shared)
    extra = length - upto  # a tree of i to j has extra[i] + upto[j] tokens

    def cost(low: int, j: int) -> np.ndarray:
        size = extra[low : j + 1] + upto[j]
        size[:-1][size[:-1] > most] = math.inf
        return size * (pairs_per_token + size)

    return [_tree(ordered[run], shared[run], numbers) for run in _cheapest_runs(len(ordered), cost)]


def batches_of(trees: list[Tree], most: int, pairs_per_token: float, device) -> list[list[Tree]]:
    """Batches of at most `most` padded tokens, or of one tree; the longest first, so memory peaks at once."""
    trees = sorted(trees, key=len, reverse=True)
    width = np.array([aligned(len(tree), device) for tree in trees], dtype=float)

    def cost(low: int, j: int) -> np.ndarray:
        each = width[low : j + 1]
        tokens = np.arange(j + 1 - low, 0, -1) * each
        tokens[:-1][tokens[:-1] > most] = math.inf
        return (tokens + BATCH_COST) * pairs_per_token + tokens * each

    runs = _cheapest_runs(len(trees), cost)
    return [sorted(trees[run], key=lambda tree: min(tree.paths)) for run in runs]


def _cheapest_runs(count: int, cost: Callable[[int, int], np.ndarray]) -> list[slice]:
    """`count` things in a row, cut into runs that together cost the least, by dynamic programming. cost(low,
    j): of the runs from low, ..., j up to j; infinite for those that are too large."""
    best, begin, low = np.zeros(count + 1), [0] * (count + 1), 0
    for j in range(count):
        total = best[low : j + 1] + cost(low, j)
        first = int(total.argmin())
        best[j + 1], begin[j + 1] = total[first], low + first  # of the run that ends with j
        low += math.isinf(total[0])  # what is too large up to j is too large up to all later ones
    runs, stop = [], count
    while stop:
        runs.append(slice(begin[stop], stop))
        stop = begin[stop]
    return runs[::-1]


def _tree(ordered: list[tuple], shared: list[int], numbers: dict[tuple, list[int]]) -> Tree:
    tree, path = Tree([], [], [], {}), []
    for sequence, n in zip(ordered, [0, *shared[1:]]):  # the neighbour of the first is in another tree
        for t in path[n:]:
            tree.end[t] = len(tree)
        path = path[:n] + list(range(len(tree), len(tree) + len(sequence) - n))
        tree.tokens += sequence[n:]
        tree.positions += range(n, len(sequence))
        tree.end += [0] * (len(sequence) - n)
        tree.paths |= dict.fromkeys(numbers[sequence], path)
    tree.end = [end or len(tree) for end in tree.end]
    return tree


def pack(trees: list[Tree], device: torch.device) -> Packed:
    width = aligned(max(map(len, trees)), device)  # T
    tokens, positions, end, paths = [], [], [], {}
    for b, tree in enumerate(trees):
        nothing = [0] * (width - len(tree))
        tokens.append(tree.tokens + nothing)
        positions.append(tree.positions + nothing)
        end.append(tree.end + list(range(len(tree) + 1, width + 1)))  # padding sees itself only
        paths |= {number: [b * width + t for t in tree.paths[number]] for number in sorted(tree.paths)}
    branched = any(min(tree.end) < len(tree) for tree in trees)
    tokens, positions, end = (torch.tensor(x, device=device) for x in (tokens, positions, end))
    return Packed(tokens, positions, end if branched else None, paths)
