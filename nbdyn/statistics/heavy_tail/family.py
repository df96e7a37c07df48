"""What the fits have in common: many samples fitted at once, goodness of fit, and the errors of estimates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from nbdyn.errors import Incompatible
from nbdyn.statistics.heavy_tail.dependence import resampled
from nbdyn.statistics.heavy_tail.result import Estimate

NORMAL = float(stats.norm.ppf(0.975))
ENOUGH = 2_000
"""Values of a simulated sample, at most: sqrt(n) times the distance has nearly reached its limit there."""
CELLS = 1 << 19
"""Simulated values worked on at once."""
LEAST_DRAWS = 20
"""Replicates that an interval takes."""


@dataclass(frozen=True)
class Family:
    """A parametric family, vectorised over samples.

    Attributes:
        name: such as "Weibull".
        fit: (B, n), each row sorted upwards -> parameters (B, p).
        cdf: (B, n) and (B, p) -> P(X <= x), (B, n).
        draw: parameters (p,), shape, generator -> random numbers.
        law: parameters (p,) -> `Distribution` (Any, for SciPy's types say that it might be discrete).
    """

    name: str
    fit: Callable[[np.ndarray], np.ndarray]
    cdf: Callable[[np.ndarray, np.ndarray], np.ndarray]
    draw: Callable[[np.ndarray, tuple[int, int], np.random.Generator], np.ndarray]
    law: Callable[[np.ndarray], Any]


def distances(ordered: np.ndarray, family: Family, parameters: np.ndarray) -> np.ndarray:
    """The Kolmogorov-Smirnov distance of each row, (B, n) sorted upwards, from its distribution: (B,)."""
    n = ordered.shape[1]
    heights = family.cdf(ordered, parameters)
    above = np.arange(1, n + 1) / n - heights
    return np.maximum(above.max(axis=1), (1 / n - above).max(axis=1))


def goodness(
    family: Family, parameters: np.ndarray, ks: float, n: int, replicates: int, seed: int
) -> tuple[float, str]:
    """The parametric bootstrap of the Kolmogorov-Smirnov distance: its p-value, and the null in words.

    Samples are drawn from the fit and fitted anew, for a fit that chose its parameters lies closer than a given law.
    p = (1 + k) / (1 + B), k of B distances being as large. Above 2,000 values samples of 2,000 are drawn and distances
    compared times sqrt(n): that is the rate of their limit (Durbin 1973), whose error there is a few percent of p.

    Raises:
        Incompatible: if there are fewer than 0 replicates.
    """
    if replicates < 0:
        raise Incompatible(f"bootstrap = {replicates}: give 0 replicates or more.")
    if not replicates:
        return math.nan, "not asked for; give bootstrap=199"
    size = min(n, ENOUGH)
    rng = np.random.default_rng(seed)
    rows, larger, failed = max(1, CELLS // size), 0, 0
    for first in range(0, replicates, rows):
        drawn = np.sort(family.draw(parameters, (min(rows, replicates - first), size), rng), axis=1)
        found = distances(drawn, family, family.fit(drawn))
        larger += int((found * math.sqrt(size) >= ks * math.sqrt(n)).sum())
        failed += int(np.isnan(found).sum())
    if failed:
        return math.nan, f"none: {failed:,} of {replicates:,} samples drawn from the fit have no fit of their own"
    scaled = "" if size == n else ", distances compared times the root of n"
    null = f"{replicates:,} samples of {size:,} independent values drawn from the fit and fitted anew{scaled}"
    return (1 + larger) / (1 + replicates), null


def bootstrap_errors(
    estimate: Callable[[np.ndarray], np.ndarray], values: np.ndarray, block: int, draws: int, seed: int
) -> np.ndarray:
    """The standard errors of estimates, by circular blocks of the series: (p,).

    Args:
        estimate: (B, n), rows sorted upwards -> (B, p).
        values: (n,), in order.
        block: values a block.
        draws: how many.
        seed: of the random numbers.

    Raises:
        Incompatible: if there are fewer than 20 draws, or the block does not fit.
    """
    check_draws(draws)
    found = [estimate(np.sort(rows, axis=1)) for rows in resampled(values, block, draws, seed)]
    return np.nanstd(np.concatenate(found), axis=0, ddof=1)


def check_draws(draws: int) -> None:
    """Raise `Incompatible` if they are too few for an interval by blocks."""
    if draws < LEAST_DRAWS:
        raise Incompatible(
            f"bootstrap = {draws}: an interval by blocks takes {LEAST_DRAWS} replicates or more, better 199."
        )


def how(block: int | None, draws: int) -> str:
    """How intervals were got."""
    if block is None:
        return "asymptotic"
    return (
        f"block bootstrap, {draws:,} replicates, blocks of {block}" if block > 1 else f"bootstrap, {draws:,} replicates"
    )


def plain(value: float, error: float, interval: str) -> Estimate:
    """An estimate with the interval value +- 1.96 errors."""
    return Estimate(float(value), float(value - NORMAL * error), float(value + NORMAL * error), interval)


def positive(value: float, log_error: float, interval: str) -> Estimate:
    """An estimate with the interval value exp(+- 1.96 errors of its logarithm)."""
    reach = math.exp(min(NORMAL * log_error, 700.0))
    return Estimate(float(value), float(value / reach), float(value * reach), interval)
