"""Tail indices from the largest values: Hill's estimator and the moment estimator, and how they change with k."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from nbdyn.errors import Incompatible
from nbdyn.statistics.heavy_tail.alternatives import of_positive, ranking
from nbdyn.statistics.heavy_tail.extremes import inverse, shifted
from nbdyn.statistics.heavy_tail.family import NORMAL, Family, bootstrap_errors, distances, goodness, how, plain
from nbdyn.statistics.heavy_tail.likelihood import PARETO
from nbdyn.statistics.heavy_tail.result import Estimate, TailFit
from nbdyn.statistics.heavy_tail.sample import clean, remarks
from nbdyn.statistics.heavy_tail.tail_alternatives import compare
from nbdyn.statistics.heavy_tail.tail_distributions import PowerLaw

LEAST = 10
"""Values of a tail, at least."""
POINTS = 200
"""Of a stability plot."""
LIMIT = "none: the estimator is of the limit of far tails and fits no law at a finite threshold"


def hill(
    values: ArrayLike, k: int | None = None, *, block: int | None = None, bootstrap: int = 199, seed: int = 0
) -> TailFit:
    """Hill's estimator of the tail index: 1 / mean log(x_(i) / x_(k+1)) over the k largest (Hill 1975).

    For a tail P(X > x) = (x / xmin)^-index the interval is exact (k index / estimate is gamma distributed; about
    +- 1.96 index / sqrt(k)). For any other tail the estimate is biased, the more the larger k is (of 10,000 values |t|
    with 2.5 degrees of freedom the interval of the default k holds 2.5 in 66 % of samples, not 95): look at `.plot()`,
    and trust it only where it is flat. Near a stable law of alpha 2 it is useless (it reads 2.7 of alpha = 1.8).

    Args:
        values: positive, any shape (np.abs(values) for both tails); zeros and what is not finite are set apart.
        k: values in the tail; by default n^(2/3), a convention.
        block: values of a block, in order, for intervals that respect dependence; None takes values for independent.
        bootstrap: replicates of the goodness of fit, and of the intervals if there is a block; 0: neither.
        seed: of the random numbers.

    Returns:
        Estimates "tail index" and "alpha of the density" (index + 1); `xmin` is x_(k+1); alternatives those of
        `power_law`, on the k largest.

    Raises:
        Incompatible: if values are negative, or k is not in 10..n - 1, or the k largest are equal to the next.

    >>> x = np.random.default_rng(0).pareto(1.5, 20_000) + 1
    >>> fit = hill(x, bootstrap=0)
    >>> fit["tail index"].low < 1.5 < fit["tail index"].high
    True
    """
    sample = clean(values, LEAST + 1, positive="tail of this kind")
    ordered = np.sort(sample.values)
    k, logs = _tail(ordered, k)
    found = EXPONENTIAL.fit(logs[None])
    index = float(1 / found[0, 0])
    if block is None:
        low, high = (index * float(q) / (2 * k) for q in stats.chi2.ppf([0.025, 0.975], 2 * k))
        interval = "exact for a Pareto tail"
    else:
        error = bootstrap_errors(lambda x: -np.log(_of_rows(x, k, _mean)), sample.values, block, bootstrap, seed)
        reach, interval = math.exp(NORMAL * float(error[0])), how(block, bootstrap)
        low, high = index / reach, index * reach
    ks = float(distances(logs[None], EXPONENTIAL, found)[0])
    p, null = goodness(EXPONENTIAL, found[0], ks, k, bootstrap, seed)
    law = PowerLaw(float(ordered[-k - 1]), alpha=1 + index)
    compared = compare(logs, law)
    return TailFit(
        family="Pareto", method="Hill's estimator (Hill 1975)",
        estimates={
            "tail index": Estimate(index, low, high, interval),
            "alpha of the density": Estimate(index + 1, low + 1, high + 1, interval),
        },
        distribution=law, values=ordered, xmin=law.xmin, n_tail=k, zeros=sample.zeros, missing=sample.missing, ks=ks,
        p=p, null=null, alternatives=compared.table,
        warnings=(*remarks(sample, block), *_unstable(hill_path, ordered, k), *compared.warnings), others=compared.fits,
    )  # fmt: skip


def moment_estimator(
    values: ArrayLike, k: int | None = None, *, block: int | None = None, bootstrap: int = 199, seed: int = 0
) -> TailFit:
    """The moment estimator of the extreme value index (Dekkers, Einmahl and de Haan 1989), for tails of any kind.

    gamma = M1 + 1 - 1 / (2 (1 - M1^2 / M2)), M_j the mean of log(x_(i) / x_(k+1))^j over the k largest. Above 0 it is
    the inverse of the tail index; 0 is a tail lighter than any power law, below 0 the tail ends. The interval is
    +- 1.96 sd / sqrt(k), sd^2 = 1 + gamma^2 above 0 (below: their theorem 3.1); it leaves out the bias of large k.

    Args:
        values: positive, any shape; as in `hill`.
        k: values in the tail; by default n^(2/3), a convention.
        block: as in `hill`.
        bootstrap: replicates of the intervals if there is a block. There is no goodness of fit: the estimator is of the
            limit of far tails, and no law at a finite threshold has it for its fit.
        seed: of the random numbers.

    Returns:
        Estimates "gamma" and "tail index" (infinite if gamma is not above 0); the distribution is generalized Pareto
        beyond `xmin` = x_(k+1); alternatives for the excesses, none nested, as it does not maximize a likelihood.

    Raises:
        Incompatible: as `hill`.

    >>> x = np.random.default_rng(0).exponential(size=20_000)
    >>> fit = moment_estimator(x, bootstrap=0)
    >>> abs(fit["gamma"].value) < 0.2
    True
    """
    sample = clean(values, LEAST + 1, positive="tail of this kind")
    ordered = np.sort(sample.values)
    k, logs = _tail(ordered, k)
    u = float(ordered[-k - 1])
    gamma, scale = (float(x) for x in _moments(logs[None])[0])
    if block is None:
        error = math.sqrt(_variance(gamma) / k)
    else:
        error = float(bootstrap_errors(lambda x: _of_rows(x, k, _moments), sample.values, block, bootstrap, seed)[0])
    estimate = plain(gamma, error, how(block, bootstrap))
    with np.errstate(over="ignore"):  # P(X <= x) is 1 there
        ks = float(distances(np.expm1(logs)[None], PARETO, np.array([[gamma, scale]]))[0])
    law: Any = stats.genpareto(gamma, scale=scale * u)
    excess = ordered[-k:] - u
    excess = excess[excess > 0]
    table, laws = ranking(excess, law, 2, of_positive(excess, ""))
    return TailFit(
        family="generalized Pareto", method="moment estimator (Dekkers, Einmahl and de Haan 1989)",
        estimates={"gamma": estimate, "tail index": inverse(estimate)}, distribution=shifted(law, u), values=ordered,
        xmin=u, n_tail=k, zeros=sample.zeros, missing=sample.missing, ks=ks, p=math.nan,
        null=LIMIT, alternatives=table,
        warnings=(*remarks(sample, block), *_unstable(moment_path, ordered, k)),
        others={name: shifted(other, u) for name, other in laws.items()},
    )  # fmt: skip


# Over k -----------------------------------------------------------------------------------------------------------


def hill_path(values: ArrayLike) -> pd.DataFrame:
    """Hill's estimate over k, for a stability plot: k, index, low, high at up to 200 values of k, log-spaced.

    Args:
        values: positive; zeros and what is not finite are left out.

    Raises:
        Incompatible: if values are negative or too few.
    """
    k, first, _ = _sums(values)
    index = 1 / first
    low, high = (index * stats.chi2.ppf(q, 2 * k) / (2 * k) for q in (0.025, 0.975))
    return pd.DataFrame({"k": k, "index": index, "low": low, "high": high})


def moment_path(values: ArrayLike) -> pd.DataFrame:
    """The moment estimate over k: k, index (that is gamma), low, high; as `hill_path`."""
    k, first, second = _sums(values)
    gamma = _gamma(first, second)[0]
    reach = NORMAL * np.sqrt(np.array([_variance(float(g)) for g in gamma]) / k)
    return pd.DataFrame({"k": k, "index": gamma, "low": gamma - reach, "high": gamma + reach})


def _sums(values: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """At up to 200 k: the first and second moment of log(x_(i) / x_(k+1)) over the k largest, where not 0."""
    x = np.sort(clean(values, LEAST + 1, positive="tail of this kind").values)[::-1]
    logs = np.log(x) - np.log(x[-1])  # the ratio may overflow
    k = np.unique(np.geomspace(LEAST, len(x) - 1, POINTS).astype(np.int64))
    one, two, next_one = np.cumsum(logs)[k - 1] / k, np.cumsum(logs**2)[k - 1] / k, logs[k]
    first = one - next_one
    kept = first > 1e-12 * np.maximum(one, 1.0)
    return k[kept], first[kept], (two - 2 * next_one * one + next_one**2)[kept]


def _unstable(path: Callable[[ArrayLike], pd.DataFrame], ordered: np.ndarray, k: int) -> list[str]:
    """A warning if the estimate moves beyond its interval between k / 2 and 2 k."""
    table = path(ordered)
    less, here, more = (table.iloc[int(np.argmin(np.abs(table["k"].to_numpy() - j)))] for j in (k // 2, k, 2 * k))
    ends = less["index"], more["index"]
    if all(here["low"] <= end <= here["high"] for end in ends):
        return []
    return [
        f"from k = {less['k']:.0f} to {more['k']:.0f} the estimate goes from {ends[0]:.3g} to {ends[1]:.3g}, "
        "beyond its interval: it depends on where the tail is said to begin."
    ]


# Many samples at once ---------------------------------------------------------------------------------------------


def _tail(ordered: np.ndarray, k: int | None) -> tuple[int, np.ndarray]:
    """How many, and log(x_(i) / x_(k+1)) of the k largest, upwards."""
    n = len(ordered)
    k = max(LEAST, min(round(n ** (2 / 3)), n - 1)) if k is None else k
    if not LEAST <= k < n:
        raise Incompatible(f"k = {k} of {n} values; give k = {LEAST}..{n - 1}.")
    logs = np.log(ordered[-k:]) - np.log(ordered[-k - 1])
    if logs[-1] == logs[0]:
        raise Incompatible(f"the {k} largest values are all {ordered[-1]:g}: they are no tail.")
    return k, logs


def _of_rows(ordered: np.ndarray, k: int, fit: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """An estimate from log(x_(i) / x_(k+1)) of the k largest of each row."""
    return fit(np.log(ordered[:, -k:]) - np.log(ordered[:, -k - 1 : -k]))


def _mean(logs: np.ndarray) -> np.ndarray:
    return logs.mean(axis=1, keepdims=True)


def _gamma(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gamma, and its part that is below 0, from the moments."""
    part = 1 - 0.5 / np.maximum(1 - first**2 / second, 1e-12)
    return first + part, np.minimum(part, 0.0)


def _moments(logs: np.ndarray) -> np.ndarray:
    """Gamma, and the scale of the excesses divided by the threshold, M1 (1 - part below 0), of each row: (B, 2)."""
    first = logs.mean(axis=1)
    gamma, part = _gamma(first, np.square(logs).mean(axis=1))
    return np.stack([gamma, first * (1 - part)], axis=1)


def _variance(gamma: float) -> float:
    """The asymptotic variance of gamma, times k (Dekkers, Einmahl and de Haan 1989, theorem 3.1)."""
    g = gamma
    if g >= 0:
        return 1 + g**2
    inner = 4 - 8 * (1 - 2 * g) / (1 - 3 * g) + (5 - 11 * g) * (1 - 2 * g) / ((1 - 3 * g) * (1 - 4 * g))
    return (1 - g) ** 2 * (1 - 2 * g) * inner


EXPONENTIAL = Family(
    "exponential",
    _mean,
    lambda x, p: -np.expm1(-x / p),
    lambda p, size, rng: p[0] * rng.standard_exponential(size),
    lambda p: stats.expon(scale=p[0]),
)
