"""Token sequences -> rows, each a prefix tree: what sequences have in common is computed once.

    sequences  a b c d      one row   a b c d e f
               a b c e      position  0 1 2 3 3 2
               a b f        end       6 6 5 4 5 6

A tree lies in its row depth first, so whatever follows a token up to its `end` descends from it: token i sees
token k exactly when k <= i < end[k]. A row of one sequence is the ordinary causal case.

A row of T tokens costs T * pairs_per_token + T^2: attention looks at every pair, and `pairs_per_token` pairs
cost as much as what else is computed for one token. First trees of neighbours, then batches of trees of like
length are chosen so that this sum is least.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NEVER = 2**31  # tokens of a tree that may not be
LONGEST_TREE = 4096  # tokens; a row's mask has the square of it
# Rows are a multiple of this long: on CUDA each new shape costs plans of kernels, and memory cut anew.
ROW_UNIT = {"cuda": 64}
BATCH_COST = 256  # tokens that cost as much as one more batch: measured on a CPU, and flat


@dataclass
class Tree:
    """Sequences in lexicographic order, each with those tokens that its neighbour before it does not have."""

    tokens: list[int]
    positions: list[int]  # of each token in its sequences
    end: list[int]
    paths: dict[int, list[int]]  # number of a sequence -> where its tokens stand

    def __len__(self) -> int:
        return len(self.tokens)


class Branch(NamedTuple):
    sequence: list[int]
    numbers: list[int]  # of all that are this sequence
    shared: int  # tokens that it has in common with its neighbour before it


def trees_of(sequences: Iterable[tuple[int, list[int]]], most: int, pairs_per_token: float) -> list[Tree]:
    """Numbered sequences as prefix trees of at most `most` tokens, or of one sequence."""
    branches = _branches(sequences)
    most = min(most, LONGEST_TREE)
    upto = np.cumsum([len(b.sequence) - b.shared for b in branches])
    extra = np.array([len(b.sequence) for b in branches]) - upto  # branches i to j: extra[i] + upto[j] tokens

    def cost(low: int, j: int) -> np.ndarray:
        size = extra[low : j + 1] + upto[j]
        size[:-1][size[:-1] > most] = NEVER
        return size * (pairs_per_token + size)

    return [
        _tree(branches[run]) for run in _runs(len(branches), cost, lambda i, j: upto[j] - upto[i] <= most)
    ]


def batches_of(
    trees: list[Tree], most: int, pairs_per_token: float, device: torch.device
) -> Iterator[list[Tree]]:
    """Trees as batches of rows: at most `most` tokens when padded, or one tree. The longest come first, so
    that memory peaks at once or never."""
    trees = sorted(trees, key=len, reverse=True)
    width = np.array([padded(len(tree), device) for tree in trees])

    def cost(low: int, j: int) -> np.ndarray:
        rows = np.arange(j + 1 - low, 0, -1)
        each = width[low : j + 1]
        return (rows * each + BATCH_COST) * pairs_per_token + rows * each * each

    for run in _runs(len(trees), cost, lambda i, j: (j + 1 - i) * width[i] <= most):
        yield sorted(trees[run], key=lambda tree: min(tree.paths))


def _runs(
    count: int, cost: Callable[[int, int], np.ndarray], possible: Callable[[int, int], bool]
) -> list[slice]:
    """Neighbours of `count` in a row as runs that together cost the least.

    cost(low, j): of the runs from low, ..., j up to j. `possible(i, j)` is false where i is too far from j.
    The cheapest runs up to j are one that ends with j and the cheapest up to where it begins.
    """
    best, begin, low = np.zeros(count + 1), [0], 0
    for j in range(count):
        while low < j and not possible(low, j):
            low += 1
        total = best[low : j + 1] + cost(low, j)
        first = int(total.argmin())
        best[j + 1] = total[first]
        begin.append(low + first)  # of the run that ends with j
    runs, stop = [], count
    while stop:
        runs.append(slice(begin[stop], stop))
        stop = begin[stop]
    return runs[::-1]


def _branches(sequences: Iterable[tuple[int, list[int]]]) -> list[Branch]:
    branches, before = [], []
    for number, sequence in sorted(sequences, key=lambda numbered: numbered[1]):
        if branches and sequence == before:
            branches[-1].numbers.append(number)
            continue
        shorter = min(len(before), len(sequence))
        shared = bisect.bisect_left(range(1, shorter + 1), True, key=lambda n: before[:n] != sequence[:n])
        branches.append(Branch(sequence, [number], shared))
        before = sequence
    return branches


def _tree(branches: list[Branch]) -> Tree:
    tree, path = Tree([], [], [], {}), []
    for sequence, numbers, shared in branches:
        shared = min(shared, len(path))  # the first one's neighbour is in another tree
        for t in path[shared:]:
            tree.end[t] = len(tree)
        path = path[:shared] + list(range(len(tree), len(tree) + len(sequence) - shared))
        tree.tokens += sequence[shared:]
        tree.positions += range(shared, len(sequence))
        tree.end += [0] * (len(sequence) - shared)
        tree.paths |= dict.fromkeys(numbers, path)
    for t in path:
        tree.end[t] = len(tree)
    return tree


def padded(width: int, device: torch.device) -> int:
    return width + -width % ROW_UNIT.get(device.type, 1)


class Packed(NamedTuple):
    """Trees as tensors, a row each, padded on the right."""

    tokens: Tensor  # (B, T) int64
    positions: Tensor  # (B, T) int64, of each token in its sequences
    end: Tensor | None  # (B, T) int64: where what descends from a token ends; None if no row branches
    paths: dict[int, list[int]]  # number of a sequence -> where its tokens stand in the flattened (B * T)


def pack(trees: list[Tree], device: torch.device) -> Packed:
    width = padded(max(map(len, trees)), device)  # T
    tokens, positions, end, paths = [], [], [], {}
    for tree in trees:
        base, padding = len(tokens), width - len(tree)
        tokens += tree.tokens + [0] * padding
        positions += tree.positions + [0] * padding
        end += tree.end + list(range(len(tree) + 1, width + 1))  # padding sees itself only
        paths |= {number: [base + t for t in tree.paths[number]] for number in sorted(tree.paths)}
    branched = any(min(tree.end) < len(tree) for tree in trees)
    tokens, positions, end = (
        torch.tensor(x, device=device).view(-1, width) for x in (tokens, positions, end)
    )
    return Packed(tokens, positions, end if branched else None, paths)
