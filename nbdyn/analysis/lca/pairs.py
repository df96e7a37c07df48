"""Pairs of weights of a kernel, by what they share, and blocks and permutations for their tests."""

from __future__ import annotations

import math

import numpy as np

KINDS = ("same output", "same input", "neither")
"""What a pair shares. Pairs that share both (positions of a convolution's kernel, if told so) are of no kind."""
ROWS = 30
"""Output neurons of a block, at most."""
BLOCK = 900
"""Weights of a block, at most: beyond, permutations would take minutes."""


def pair_counts(rows: np.ndarray, columns: np.ndarray) -> dict[str, int]:
    """How many pairs there are of each kind.

    >>> pair_counts(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1]))
    {'same output': 2, 'same input': 2, 'neither': 2}
    """
    both = _within(rows * (int(columns.max()) + 1) + columns)
    output, input_ = _within(rows) - both, _within(columns) - both
    return {"same output": output, "same input": input_, "neither": math.comb(len(rows), 2) - output - input_ - both}


def _within(labels: np.ndarray) -> int:
    """Pairs with the same label."""
    sizes = np.unique(labels, return_counts=True)[1]
    return int((sizes * (sizes - 1) // 2).sum())


def distinct_pairs(
    kind: str, rows: np.ndarray, columns: np.ndarray, number: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Random pairs of a kind, each as likely, none twice: all of them if there are no more than `number`.

    Drawn with replacement, and again until there are enough: about n log n draws where all n are wanted.

    Args:
        kind: of `KINDS`.
        rows: output neuron of each weight, numbers from 0, (n,).
        columns: input of each weight, numbers from 0, (n,).
        number: how many, at most.
        rng: of the draws.

    Returns:
        First and second weight of each pair, (m,) each, first < second.
    """
    wanted = min(number, pair_counts(rows, columns)[kind])
    labels = {"same output": rows, "same input": columns}.get(kind, np.zeros_like(rows))
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    starts = np.cumsum(sizes) - sizes
    chance = np.where(sizes > 1, sizes, 0.0)[labels]  # times 1 / size of the second: pairs are alike
    codes = np.empty(0, np.int64)
    while len(codes) < wanted:
        first = rng.choice(len(rows), size=2 * wanted + 16, p=chance / chance.sum())
        group = labels[first]
        second = order[starts[group] + rng.integers(sizes[group])]
        same_row, same_column = rows[first] == rows[second], columns[first] == columns[second]
        good = {"same output": same_row & ~same_column, "same input": same_column & ~same_row}.get(
            kind, ~same_row & ~same_column
        )
        low, high = np.minimum(first, second)[good], np.maximum(first, second)[good]
        codes = np.union1d(codes, low * len(rows) + high)
    codes = rng.permutation(codes)[:wanted]
    return codes // len(rows), codes % len(rows)


def grid_of(rows: np.ndarray, columns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The weights of random rows and columns: about `BLOCK` of a dense kernel, fewer where some are missing.

    Args:
        rows: output neuron of each weight, numbers from 0, (n,).
        columns: input of each weight, numbers from 0, (n,).
        rng: of the choice.
    """
    height, width = int(rows.max()) + 1, int(columns.max()) + 1
    high = min(height, max(ROWS, BLOCK // width))
    chosen_rows = rng.permutation(height)[:high]
    chosen_columns = rng.permutation(width)[: max(2, BLOCK // high)]
    found = np.flatnonzero(np.isin(rows, chosen_rows) & np.isin(columns, chosen_columns))
    return found if len(found) <= BLOCK else np.sort(rng.permutation(found)[:BLOCK])


def regrouped(labels: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels permuted at random within each group; groups must be sorted."""
    return labels[np.lexsort((rng.random(len(labels)), groups))]
