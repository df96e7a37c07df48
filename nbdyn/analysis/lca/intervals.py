"""Confidence intervals of an allocation that was computed over a random subset of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats


def of_blocks(blocks: np.ndarray, names: Sequence[str], size: int, of: int, level: float = 0.95) -> pd.DataFrame:
    """What a subset says of the whole data set, from the spread between disjoint blocks of equal size.

    The subset is a random sample without replacement, its blocks are exchangeable, and the gradient of the subset is
    the mean of theirs: the mean over blocks estimates the whole; Student's t over blocks with the finite-population
    factor sqrt(1 - n/N) gives its interval (approximate: block means are taken for Gaussian, the trajectory as given).

    Args:
        blocks: allocation of each block's loss, (blocks, names).
        names: such as layers.
        size: samples in the subset.
        of: samples in the whole.
        level: of the intervals.

    Returns:
        One row a name: lca, low, high, standard_error, blocks, samples, of.

    >>> of_blocks(np.array([[1.0], [3.0]]), ["fc"], 50, 100)[["lca", "low", "high"]].round(3).to_numpy().tolist()
    [[2.0, -6.985, 10.985]]
    """
    count = len(blocks)
    mean = blocks.mean(0)
    error = blocks.std(0, ddof=1) / math.sqrt(count) * math.sqrt(max(0.0, 1 - size / of))
    reach = float(stats.t.ppf((1 + level) / 2, count - 1)) * error
    table = {"layer": list(names), "lca": mean, "low": mean - reach, "high": mean + reach, "standard_error": error}
    return pd.DataFrame(table).assign(blocks=count, samples=size, of=of)
