"""Lognormal distributions: heavy tails with all moments, which products of many factors have."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from nbdyn.statistics.heavy_tail.alternatives import of_positive
from nbdyn.statistics.heavy_tail.assemble import assembled
from nbdyn.statistics.heavy_tail.family import bootstrap_errors, how, plain, positive
from nbdyn.statistics.heavy_tail.likelihood import LOGNORMAL
from nbdyn.statistics.heavy_tail.result import Estimate, TailFit
from nbdyn.statistics.heavy_tail.sample import clean

LEAST = 5
"""Values that a fit takes."""


def lognormal(values: ArrayLike, *, block: int | None = None, bootstrap: int = 199, seed: int = 0) -> TailFit:
    """A lognormal distribution: log x is N(mu, sigma^2).

    Intervals are exact where the law holds (Student t for mu, chi-squared for sigma), or from blocks.

    Args:
        values: positive, any shape; zeros and what is not finite are counted and set apart.
        block: values of a block, in order, for intervals that respect dependence; None takes values for independent.
        bootstrap: replicates of the goodness of fit, and of the intervals if there is a block; 0: neither.
        seed: of the random numbers.

    Returns:
        Estimates "sigma" and "mu", in log units; alternatives exponential, half-normal, gamma, Weibull, generalized
        Pareto, none nested.

    Raises:
        Incompatible: if values are negative, fewer than 5, or all equal.

    >>> lognormal(np.exp([0.0, 1.0, 2.0, 3.0, 4.0]), bootstrap=0)["mu"].value.__round__(9)
    2.0
    """
    sample = clean(values, LEAST, positive="lognormal")
    ordered = np.sort(sample.values)
    n = len(ordered)
    sigma, mu = (float(x) for x in LOGNORMAL.fit(ordered[None])[0])
    if block is None:
        low, high = (sigma * math.sqrt(n / float(stats.chi2.ppf(q, n - 1))) for q in (0.975, 0.025))
        half = float(stats.t.ppf(0.975, n - 1)) * sigma / math.sqrt(n - 1)
        estimates = {"sigma": Estimate(sigma, low, high, "exact"), "mu": Estimate(mu, mu - half, mu + half, "exact")}
    else:
        errors = bootstrap_errors(_log_sigma, sample.values, block, bootstrap, seed)
        interval = how(block, bootstrap)
        estimates = {"sigma": positive(sigma, errors[0], interval), "mu": plain(mu, errors[1], interval)}
    return assembled(
        LOGNORMAL, "maximum likelihood", sample, ordered, estimates, of_positive,
        block=block, bootstrap=bootstrap, seed=seed,
    )  # fmt: skip


def _log_sigma(ordered: np.ndarray) -> np.ndarray:
    found = LOGNORMAL.fit(ordered)
    return np.stack([np.log(found[:, 0]), found[:, 1]], axis=1)
