"""Series whose values depend on their neighbours: how far, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import fft, stats

from nbdyn.errors import Incompatible

WINDOW = 5.0
"""Sokal's c: the sum over lags ends at the first that is c autocorrelation times long."""
LAGS = 10
"""Of the Ljung-Box test."""
CELLS = 1 << 22
"""Values resampled at once."""


class AutocorrelationTime(NamedTuple):
    """How many steps one independent value is worth.

    Attributes:
        tau: 1 + 2 sum of the autocorrelations at lags 1..window; 1 for independent values.
        low: lower end of its 95 % confidence interval, approximate.
        high: upper end.
        window: the last lag of the sum.
        n: values.
    """

    tau: float
    low: float
    high: float
    window: int
    n: int


def autocorrelation_time(series: ArrayLike) -> AutocorrelationTime:
    """The integrated autocorrelation time with Sokal's window: n values in order are worth n / tau independent ones.

    tau(M) = 1 + 2 sum_{k=1..M} r_k with M the smallest lag of at least 5 tau(M) (Sokal 1997, "Monte Carlo Methods in
    Statistical Mechanics", section 3); its standard error is tau sqrt(2 (2 M + 1) / n) (Madras and Sokal 1988). Where
    the variance may be infinite, take ranks first (`scipy.stats.rankdata`). Time: that of a Fourier transform.

    Args:
        series: (n,), in order.

    Raises:
        Incompatible: if there are fewer than 10 values, or some are not finite, or all are equal.

    >>> autocorrelation_time(np.random.default_rng(0).normal(size=10_000)).tau.__round__(1)
    1.0
    """
    x = np.asarray(series, np.float64).reshape(-1)
    n = len(x)
    if n < 10 or not np.isfinite(x).all() or np.ptp(x) == 0:
        raise Incompatible(f"{n} values; an autocorrelation time takes 10 finite ones that differ.")
    sums = 1 + 2 * np.cumsum(autocorrelations(x)[1:])
    ends = np.flatnonzero(np.arange(1, n) >= WINDOW * sums)
    window = int(ends[0]) + 1 if len(ends) else n - 1
    tau = max(float(sums[window - 1]), 1 / n)
    error = 1.96 * tau * math.sqrt(2 * (2 * window + 1) / n)
    return AutocorrelationTime(tau, max(tau - error, 0.0), tau + error, window, n)


def autocorrelations(x: np.ndarray) -> np.ndarray:
    """The sample's autocorrelation at lags 0..n-1, by Fourier transform."""
    n = len(x)
    size = fft.next_fast_len(2 * n, real=True)
    power = np.square(np.abs(np.fft.rfft(x - x.mean(), size)))
    found = np.fft.irfft(power, size)[:n]
    return found / found[0]


def thin(values: ArrayLike, every: int | None = None) -> np.ndarray:
    """Every k-th value of a series, so that what is left is nearly independent.

    By default k is the autocorrelation time, rounded, of the ranks of the values or of their magnitudes, whichever is
    longer: ranks have one even where a variance has not, and magnitudes may go together where signs do not.

    Args:
        values: (n,), in order; what is not finite is left out first.
        every: k, 1 or more.

    Raises:
        Incompatible: as `autocorrelation_time`; if `every` is below 1.

    >>> thin([1.0, 2.0, 3.0, 4.0, 5.0], every=2).tolist()
    [1.0, 3.0, 5.0]
    """
    x = np.asarray(values, np.float64).reshape(-1)
    x = x[np.isfinite(x)]
    if every is None:
        every = max(math.ceil(autocorrelation_time(ranks).tau - 0.5) for ranks in _ranks(x))
        every = max(every, 1)
    if every < 1:
        raise Incompatible(f"every = {every}: give 1 or more.")
    return x[::every]


def depends(values: np.ndarray) -> float:
    """The p-value of independence: Ljung and Box (1978) at lags 1..10 of the ranks of values and of magnitudes.

    The smaller of the two p-values, doubled. Ranks make the null that of any independent series, heavy-tailed or not.
    Values that come sorted have no order of their own: 1.
    """
    n = len(values)
    steps = np.diff(values)
    if n < 5 * LAGS or (steps >= 0).all() or (steps <= 0).all():
        return 1.0
    found = []
    lags = np.arange(1, LAGS + 1)
    for ranks in _ranks(values):
        if np.ptp(ranks) > 0:
            y = ranks - ranks.mean()
            # A few lags: sums of products are faster than Fourier transforms.
            r = np.array([y[:-k] @ y[k:] for k in lags]) / (y @ y)
            q = n * (n + 2) * float((r**2 / (n - lags)).sum())
            found.append(float(stats.chi2.sf(q, LAGS)))
    return min(1.0, 2 * min(found, default=1.0))


def _ranks(x: np.ndarray) -> list[np.ndarray]:
    """Ranks of values and of magnitudes; once where all have one sign, as the two have the same autocorrelations."""
    both = x.min(initial=0.0) < 0 < x.max(initial=0.0)
    return [average_ranks(one) for one in ((x, np.abs(x)) if both else (x,))]


def average_ranks(x: np.ndarray) -> np.ndarray:
    """As `scipy.stats.rankdata`, which takes three times as long for a million values: its sort is a stable one."""
    order = np.argsort(x)
    ordered = x[order]
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] > ordered[:-1]]))
    ends = np.append(begins[1:], len(x))
    found = np.empty(len(x))
    found[order] = np.repeat((begins + ends + 1) / 2, ends - begins)
    return found


def resampled(values: np.ndarray, block: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Series of random blocks of the given one, as `nbdyn.statistics.bootstrap.block_means` draws them, in pieces.

    Blocks are circular, so that the mean over draws is the series'. Those of `nbdyn.statistics.resampling` are not.

    Yields:
        (rows, n); rows add up to `draws`.

    Raises:
        Incompatible: if the block does not fit.
    """
    n = len(values)
    if not 1 <= block <= n:
        raise Incompatible(f"blocks of {block} do not fit a series of {n}; give block = 1..{n}.")
    rng = np.random.default_rng(seed)
    blocks, rows = -(-n // block), max(1, CELLS // n)
    within = np.arange(block)
    for first in range(0, draws, rows):
        starts = rng.integers(n, size=(min(rows, draws - first), blocks, 1))
        yield values[((starts + within) % n).reshape(len(starts), -1)[:, :n]]
