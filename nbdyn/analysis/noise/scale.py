"""The simple noise scale tr(Sigma) / |G|^2: unbiased parts, and an interval that says when it is not resolved."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from nbdyn.errors import Incompatible


class NoiseScale(NamedTuple):
    """B_simple of McCandlish et al. 2018 (arXiv 1812.06162): batches larger than about that gain little.

    Attributes:
        n: samples.
        trace: tr(Sigma), the variance of a sample's gradient summed over coordinates; unbiased.
        signal: |G|^2 of the gradient's mean; unbiased, so it may be below 0.
        signal_low: lower end of its 95 % interval.
        signal_high: upper end.
        scale: trace / signal, in samples.
        low: lower end of its 95 % interval (Fieller).
        high: upper end.
        resolved: whether the interval of the signal excludes 0 from below; otherwise scale, low and high are NaN.
        of_these: tr(S) / |g|^2 of exactly these samples, nothing estimated: the noise scale of training on them. It is
            biased low for the distribution that they come from.
    """

    n: int
    trace: float
    signal: float
    signal_low: float
    signal_high: float
    scale: float
    low: float
    high: float
    resolved: bool
    of_these: float


def noise_scale(squares: ArrayLike, along: ArrayLike, mean_square: float) -> NoiseScale:
    """The noise scale from norms and inner products of single samples' gradients g_s, without the gradients.

    With G the mean of n samples: trace = (sum |g_s|^2 - n |G|^2) / (n - 1), signal = |G|^2 - trace / n, the pair of
    McCandlish et al. (appendix A.1) with batches of 1 and n. Both are recomputed without each sample in turn, from the
    same sums; that jackknife gives their covariance, and Fieller's theorem the interval of the ratio.

    Args:
        squares: |g_s|^2, (n,).
        along: g_s . G, (n,).
        mean_square: |G|^2.

    Raises:
        Incompatible: if there are fewer than three samples, or the lengths differ.

    >>> g = np.random.default_rng(0).normal(0, 0.5, (4000, 100)) + np.eye(100)[0]
    >>> found = noise_scale((g**2).sum(1), g @ g.mean(0), (g.mean(0) ** 2).sum())
    >>> bool(found.low < 25 < found.high)
    True
    """
    squares, along = np.asarray(squares, np.float64), np.asarray(along, np.float64)
    n = len(squares)
    if n < 3 or along.shape != squares.shape:
        raise Incompatible(f"{squares.shape} squares and {along.shape} inner products; a noise scale needs 3 of each.")
    trace, signal = _parts(squares.sum(), mean_square, n)
    rest = (n * n * mean_square - 2 * n * along + squares) / (n - 1) ** 2
    without = np.stack(_parts(squares.sum() - squares, rest, n - 1))
    covariance = np.cov(without) * (n - 1) ** 2 / n  # the jackknife's
    student = float(stats.t.ppf(0.975, n - 1))
    reach = student * math.sqrt(covariance[1, 1])
    of_these = trace * (n - 1) / n / mean_square if mean_square > 0 else math.nan
    resolved = signal - reach > 0
    scale, low, high = (trace / signal, *_fieller(trace, signal, covariance, student)) if resolved else [math.nan] * 3
    return NoiseScale(
        n, float(trace), float(signal), float(signal - reach), float(signal + reach), float(scale), float(low),
        float(high), bool(resolved), float(of_these),
    )  # fmt: skip


def _parts(total: np.ndarray | float, mean_square: np.ndarray | float, n: int) -> tuple:
    """tr(Sigma) and |G|^2, both unbiased, from the sum of squares and the square of the mean of n samples."""
    trace = (total - n * mean_square) / (n - 1)
    return trace, mean_square - trace / n


def _fieller(trace: float, signal: float, covariance: np.ndarray, student: float) -> tuple[float, float]:
    """All ratios r for which trace - r signal is not further than `student` errors from 0; signal is far from 0."""
    q = student**2
    a = signal**2 - q * covariance[1, 1]
    b = trace * signal - q * covariance[0, 1]
    c = trace**2 - q * covariance[0, 0]
    root = math.sqrt(max(0.0, b * b - a * c))
    return max(0.0, (b - root) / a), (b + root) / a
