"""The mean of a series whose values depend on their neighbours: circular block bootstrap."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from nbdyn.errors import Incompatible

CHUNK = 4_000_000
"""Blocks drawn at once."""


def block_length(series: ArrayLike) -> int:
    """A length of blocks that suits the series' correlation in time. Approximate.

    The length that is best for the variance of a mean, (2 G^2 / D)^(1/3) T^(1/3) (Politis and White 2004, eq. 9, for
    the circular bootstrap), with G and D as they are for a first-order autoregression of the lag-one correlation r:
    (6 r^2 / (1 - r^2)^2)^(1/3) T^(1/3); at most min(3 sqrt(T), T / 3), as there.

    Args:
        series: (T,), finite. Of heavy-tailed values give logarithms or ranks, whose correlation is not that of a few.

    Raises:
        Incompatible: if values are not finite.

    >>> block_length([1.0, 1.0, 1.0, 1.0])
    1
    """
    x = np.asarray(series, np.float64)
    if not np.isfinite(x).all():
        raise Incompatible(f"{(~np.isfinite(x)).sum()} of {len(x)} values are not finite; leave them out.")
    if len(x) < 3 or np.ptp(x) == 0:
        return 1
    x = (x - x.mean()) / np.ptp(x)
    square = float(x @ x)
    r = float(x[:-1] @ x[1:]) / square
    best = (6 * r**2 / (1 - r**2) ** 2 * len(x)) ** (1 / 3)
    return max(1, math.ceil(min(best, 3 * math.sqrt(len(x)), len(x) / 3)))


def block_means(series: ArrayLike, block: int, draws: int = 10_000, seed: int = 0) -> np.ndarray:
    """Means of series put together from random blocks of the given one, (draws,).

    Blocks begin anywhere, go on at the start beyond the end (circular, Politis and Romano 1992), and the last is cut
    so that each drawn series has T values. The mean over draws is that of the series.

    Args:
        series: (T,), without NaN.
        block: steps a block, 1..T; 1 is the plain bootstrap.
        draws: how many.
        seed: of the random numbers.

    Raises:
        Incompatible: if the series is empty, has NaN, or the block does not fit.
    """
    x = np.asarray(series, np.float64)
    if np.isnan(x).any():
        raise Incompatible(f"{np.isnan(x).sum()} of {len(x)} values are NaN; leave them out.")
    if not 1 <= block <= len(x):
        raise Incompatible(f"blocks of {block} do not fit a series of {len(x)}; give block = 1..{len(x)}.")
    rng = np.random.default_rng(seed)
    before = np.concatenate([[0.0], np.cumsum(np.concatenate([x, x]))])
    whole, rest = divmod(len(x), block)
    starts = np.arange(len(x))
    full, cut = before[starts + block] - before[starts], before[starts + rest] - before[starts]
    found = np.empty(draws)
    rows = max(1, CHUNK // whole)
    for first in range(0, draws, rows):
        size = min(rows, draws - first)
        sums = full[rng.integers(len(x), size=(size, whole))].sum(axis=1)
        found[first : first + size] = (sums + cut[rng.integers(len(x), size=size)]) / len(x)
    return found
