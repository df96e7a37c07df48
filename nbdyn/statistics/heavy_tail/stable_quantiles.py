"""Quantile estimates of symmetric stable laws (McCulloch 1986), and the errors of both estimators of the index."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from nbdyn.statistics.heavy_tail.ecf import LINE, POINTS, STABLE
from nbdyn.statistics.heavy_tail.family import Family
from nbdyn.statistics.heavy_tail.stable_law import LEAST_ALPHA, quantiles


class Errors(NamedTuple):
    """sqrt(n) times asymptotic standard errors, at each alpha of `quantiles`: (alphas,) each."""

    alpha: np.ndarray
    log_scale: np.ndarray


def raw(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Alpha and sigma of each row, (B,) each: alpha from the ratio of the 5-95 % to the interquartile range.

    A ratio below a Gaussian's goes on along the tangent, to an alpha above 2.
    """
    low, first, third, high = np.quantile(ordered, (0.05, 0.25, 0.75, 0.95), axis=1, method="hazen")
    inner = (third - first) / 2
    known, heights, slope = quantiles(), *_ratios()
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.log((high - low) / 2 / inner)
    alpha = np.interp(-found, -heights, known.alpha) + np.maximum(heights[-1] - found, 0) / -slope[-1]
    return alpha, inner / np.interp(alpha, known.alpha, known.q75)


def _fit(ordered: np.ndarray) -> np.ndarray:
    """As `STABLE.fit`, by quantiles."""
    alpha, scale = raw(ordered)
    return np.stack([np.clip(alpha, LEAST_ALPHA, 2.0), np.median(ordered, axis=1), scale], axis=1)


QUANTILES = Family("stable", _fit, STABLE.cdf, STABLE.draw, STABLE.law)


def _ratios() -> tuple[np.ndarray, np.ndarray]:
    """The logarithm of the ratio of the ranges at each alpha, which falls, and its slope."""
    known = quantiles()
    heights = np.log(known.q95 / known.q75)
    return heights, np.gradient(heights, known.alpha)


@functools.lru_cache(maxsize=1)
def quantile_errors() -> Errors:
    """Of `raw`: n Cov(x_p, x_q) = p (1 - q) / (f_p f_q), p <= q, carried on by the delta method."""
    known, (_, slope) = quantiles(), _ratios()
    inner, outer = 1 / (known.f75 * known.q75), 1 / (known.f95 * known.q95)
    # n times the covariance of the logarithms of half ranges (x_(1-p) - x_p) / 2: p (1 - 2 p') / 2, p <= p'.
    ii, io, oo = 0.25 * 0.5 / 2 * inner**2, 0.05 * 0.5 / 2 * inner * outer, 0.05 * 0.9 / 2 * outer**2
    alpha = np.sqrt(ii + oo - 2 * io) / -slope
    # d log sigma = d log inner - (d log q75 / d alpha) d alpha, and d alpha = (d log outer - d log inner) / slope.
    share = np.gradient(np.log(known.q75), known.alpha) / slope
    return Errors(alpha, np.sqrt((1 + share) ** 2 * ii - 2 * (1 + share) * share * io + share**2 * oo))


@functools.lru_cache(maxsize=1)
def regression_errors() -> Errors:
    """Of `ecf.lines`, from the covariance of the empirical characteristic function.

    n Cov(Re phi(s), Re phi(t)) = (phi(s + t) + phi(s - t) - 2 phi(s) phi(t)) / 2 of a symmetric law (Koutrouvelis 1980,
    equation 3.2), carried on to log(-log |phi|^2) and through least squares by the delta method.
    """
    known = quantiles()
    a = known.alpha[:, None]
    t = POINTS / known.q75[:, None]  # in units of sigma
    one = np.exp(-(t**a))
    together, apart = (np.abs(t[:, :, None] + sign * t[:, None]) ** a[..., None] for sign in (1, -1))
    covariance = (np.exp(-together) + np.exp(-apart)) / 2 - one[:, :, None] * one[:, None]
    slope = 1 / (one * t**a)
    covariance *= slope[:, :, None] * slope[:, None]
    # The intercept is log 2 + alpha log(sigma / unit), sigma / unit = 1 / q75.
    scale = (LINE[1] + np.log(known.q75)[:, None] * LINE[0]) / a
    return Errors(np.sqrt(LINE[0] @ covariance @ LINE[0]), np.sqrt(np.einsum("ai,aij,aj->a", scale, covariance, scale)))


def skewness(ordered: np.ndarray, alpha: float) -> float:
    """The p-value of x_95 + x_05 = 2 x_50, which symmetric laws keep; normal, two-sided, errors of the law of alpha."""
    known = quantiles()
    f95, f0 = (float(np.interp(alpha, known.alpha, f)) for f in (known.f95, known.f0))
    low, first, middle, third, high = np.quantile(ordered, (0.05, 0.25, 0.5, 0.75, 0.95))
    unit = (third - first) / 2 / float(np.interp(alpha, known.alpha, known.q75))
    variance = 0.1 / f95**2 - 0.2 / (f95 * f0) + 1 / f0**2
    return float(2 * stats.norm.sf(abs(high + low - 2 * middle) / unit * math.sqrt(len(ordered) / variance)))
