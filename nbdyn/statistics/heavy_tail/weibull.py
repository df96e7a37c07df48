"""Weibull and double Weibull distributions: tails lighter and heavier than exponential in one family."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from nbdyn.statistics.heavy_tail.alternatives import of_positive, of_signed
from nbdyn.statistics.heavy_tail.assemble import assembled
from nbdyn.statistics.heavy_tail.family import Family, bootstrap_errors, how, positive
from nbdyn.statistics.heavy_tail.likelihood import DOUBLE_WEIBULL, WEIBULL
from nbdyn.statistics.heavy_tail.result import TailFit
from nbdyn.statistics.heavy_tail.sample import clean

LEAST = 5
"""Values that a fit takes."""
SHAPE_ERROR, SCALE_ERROR = np.sqrt(6) / np.pi, np.sqrt(1 + 6 / np.pi**2 * (1 - np.euler_gamma) ** 2)
"""sqrt(n) times the asymptotic standard errors of log shape, 0.780, and of shape x log scale, 1.053."""
METHOD = "maximum likelihood (Johnson, Kotz and Balakrishnan 1994, chapter 21)"
STRETCHED = "shape below 1: the tail is heavier than exponential (a stretched exponential), yet all moments are finite."


def weibull(values: ArrayLike, *, block: int | None = None, bootstrap: int = 199, seed: int = 0) -> TailFit:
    """A Weibull distribution by maximum likelihood, P(X > x) = exp(-(x / scale)^shape).

    Intervals are asymptotic, on the scale of logarithms (Johnson, Kotz and Balakrishnan 1994, section 21.3), or from
    blocks. Time: a second for 1e6 values, most of it for the alternatives.

    Args:
        values: positive, any shape; zeros and what is not finite are counted and set apart.
        block: values of a block, in order, for intervals that respect dependence; None takes values for independent.
        bootstrap: replicates of the goodness of fit, and of the intervals if there is a block; 0: neither.
        seed: of the random numbers.

    Returns:
        Estimates "shape" (below 1 heavier than exponential) and "scale"; alternatives exponential (nested), lognormal,
        gamma, half-normal, generalized Pareto.

    Raises:
        Incompatible: if values are negative, fewer than 5, or all equal.

    >>> x = np.random.default_rng(0).weibull(0.5, 5_000)
    >>> weibull(x, bootstrap=0)["shape"].value.__round__(1)
    0.5
    """
    return _fitted(values, WEIBULL, block, bootstrap, seed)


def double_weibull(values: ArrayLike, *, block: int | None = None, bootstrap: int = 199, seed: int = 0) -> TailFit:
    """A double Weibull distribution about 0 by maximum likelihood: either sign as likely, magnitudes Weibull.

    Args:
        values: of either sign, any shape; zeros and what is not finite are counted and set apart.
        block: as in `weibull`.
        bootstrap: as in `weibull`.
        seed: of the random numbers.

    Returns:
        As `weibull`; alternatives Laplace about 0 (nested), normal, Student t, stable.

    Raises:
        Incompatible: if values are fewer than 5, or all equal.

    >>> x = np.random.default_rng(0).laplace(size=5_000)
    >>> double_weibull(x, bootstrap=0)["shape"].value.__round__(1)
    1.0
    """
    return _fitted(values, DOUBLE_WEIBULL, block, bootstrap, seed)


def _fitted(values: ArrayLike, kind: Family, block: int | None, bootstrap: int, seed: int) -> TailFit:
    sample = clean(values, LEAST, positive=kind.name if kind is WEIBULL else "")
    ordered = np.sort(sample.values)
    shape, scale = kind.fit(ordered[None])[0]
    errors = np.array([SHAPE_ERROR, SCALE_ERROR / shape]) / np.sqrt(len(ordered))
    if block is not None:
        errors = bootstrap_errors(lambda x: np.log(kind.fit(x)), sample.values, block, bootstrap, seed)
    interval = how(block, bootstrap)
    estimates = {"shape": positive(shape, errors[0], interval), "scale": positive(scale, errors[1], interval)}
    notes = [STRETCHED] if estimates["shape"].high < 1 else []
    others = of_positive if kind is WEIBULL else of_signed
    return assembled(
        kind, METHOD, sample, ordered, estimates, others, notes, block=block, bootstrap=bootstrap, seed=seed
    )
