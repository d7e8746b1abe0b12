"""Token sequences -> rows that hold prefix trees: what sequences have in common is computed once.

    sequences  a b c d      one row   a b c d e f
               a b c e      position  0 1 2 3 3 2
               a b f        end       6 6 5 4 5 6

A tree lies in its row depth first, so whatever follows a token up to its `end` descends from it: token i sees
token k exactly when k <= i < end[k]. A row of one sequence is the ordinary causal case.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LONGEST_TREE = 4096  # tokens; a row's mask has the square of it
# Rows are a multiple of this long: on CUDA each new shape costs plans of kernels, and memory cut anew.
ROW_UNIT = {"cuda": 64}


class Tree:
    """What was added to it, in lexicographic order: otherwise what sequences share is not found."""

    def __init__(self):
        self.tokens: list[int] = []
        self.positions: list[int] = []  # of each token in its sequences
        self.end: list[int] = []
        self.paths: dict[int, list[int]] = {}  # number of a sequence -> where its tokens stand
        self._last: list[int] = []  # the sequence added last,
        self._path: list[int] = []  # and its path

    def __len__(self) -> int:
        return len(self.tokens)

    def common(self, sequence: list[int]) -> int:
        """How many tokens at the start of `sequence` stand here already."""
        shorter = min(len(self._last), len(sequence))
        return next((t for t in range(shorter) if self._last[t] != sequence[t]), shorter)

    def add(self, number: int, sequence: list[int]) -> None:
        shared = self.common(sequence)
        path = self._path[:shared] + list(range(len(self), len(self) + len(sequence) - shared))
        self.tokens += sequence[shared:]
        self.positions += range(shared, len(sequence))
        self.end += [0] * (len(sequence) - shared)
        for t in path:
            self.end[t] = len(self)
        self.paths[number] = self._path = path
        self._last = sequence


def trees_of(sequences: Iterable[tuple[int, list[int]]], most: int, pairs_per_token: float) -> list[Tree]:
    """Numbered sequences as prefix trees of at most `most` tokens, or of one sequence.

    Attention looks at every pair of tokens in a tree, so long sequences that share little stay apart: one
    joins a tree only if the tokens that it finds there cost more to compute than the pairs that it adds.
    `pairs_per_token` is how many pairs cost as much as one token.
    """
    most = min(most, LONGEST_TREE)
    trees: list[Tree] = []
    for number, sequence in sorted(sequences, key=lambda numbered: numbered[1]):
        if trees:
            tree, shared = trees[-1], trees[-1].common(sequence)
            joined = len(tree) + len(sequence) - shared
            more_pairs = joined**2 - len(tree) ** 2 - len(sequence) ** 2
            if joined <= most and more_pairs < shared * pairs_per_token:
                tree.add(number, sequence)
                continue
        trees.append(Tree())
        trees[-1].add(number, sequence)
    return trees


def padded(width: int, device: torch.device) -> int:
    return width + -width % ROW_UNIT.get(device.type, 1)


def rows_of(trees: list[Tree], most: int, device: torch.device) -> Iterator[list[list[Tree]]]:
    """Trees as batches of rows, each row with one or more: at most `most` tokens when padded, or one tree.

    The longest trees come first, and shorter ones go where padding would stand.
    """
    rest = sorted(trees, key=len, reverse=True)
    while rest:
        width, rows, free, later = padded(len(rest[0]), device), [], [], []
        for tree in rest:
            row = next((row for row, room in enumerate(free) if len(tree) <= room), len(rows))
            if row == len(rows):
                if rows and (len(rows) + 1) * width > most:
                    later.append(tree)
                    continue
                rows.append([])
                free.append(width)
            rows[row].append(tree)
            free[row] -= len(tree)
        yield sorted(rows, key=lambda row: min(row[0].paths))
        rest = later


class Packed(NamedTuple):
    """Rows of trees as tensors, padded on the right."""

    tokens: Tensor  # (B, T) int64
    positions: Tensor  # (B, T) int64, of each token in its sequences
    end: Tensor | None  # (B, T) int64: where what descends from a token ends; None if no row branches
    paths: dict[int, list[int]]  # number of a sequence -> where its tokens stand in the flattened (B * T)


def pack(rows: list[list[Tree]], device: torch.device) -> Packed:
    width = padded(max(sum(map(len, trees)) for trees in rows), device)  # T
    tokens, positions, end, paths = [], [], [], {}
    for row, trees in enumerate(rows):
        for tree in trees:
            base = len(tokens)
            tokens += tree.tokens
            positions += tree.positions
            end += [base - row * width + t for t in tree.end]
            paths |= {number: [base + t for t in tree.paths[number]] for number in sorted(tree.paths)}
        padding = (row + 1) * width - len(tokens)
        tokens += [0] * padding
        positions += [0] * padding
        end += range(width - padding + 1, width + 1)  # which sees itself only
    branched = any(len(trees) > 1 or min(trees[0].end) < len(trees[0]) for trees in rows)
    tokens, positions, end = (
        torch.tensor(x, device=device).view(-1, width) for x in (tokens, positions, end)
    )
    return Packed(tokens, positions, end if branched else None, paths)


@dataclass
class PackedStep:
    """A forward pass over rows of trees: the same for every layer."""

    positions: Tensor  # (B, T) int64, of each token in its sequences
    end: Tensor | None  # (B, T) int64: where what descends from a token ends; None if each row is a sequence
    where: Tensor  # (pairs,) int64: positions in the flattened (B * T) whose final hidden states are wanted
    dtype: torch.dtype  # the model's: a mask of its dtype is not converted, and kept, once a layer

    @functools.cached_property
    def mask(self) -> Tensor | None:
        """(B, 1, T, T), added to the scores: 0 where a token sees another, else -inf."""
        if self.end is None:
            return None
        index = torch.arange(self.end.shape[1], device=self.end.device)
        seen = (index <= index[:, None]) & (index[:, None] < self.end[:, None, None])
        return torch.zeros_like(seen, dtype=self.dtype).masked_fill_(~seen, -math.inf)

    def write_then_read(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v
