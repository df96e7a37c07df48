"""Two samples, or pairs: does one differ from the other? Student's t beside permutations, which ask for less."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from nbdyn.errors import Incompatible
from nbdyn.statistics.testing import EQUAL, OneSample, check_level, differences, one_sample

Alternative = Literal["two-sided", "greater", "less"]


class TwoSamples(NamedTuple):
    """Sample a against sample b.

    Attributes:
        n_a: values of a, NaN left out.
        n_b: those of b.
        difference: mean of a less mean of b.
        low: lower end of the two-sided confidence interval of the difference (Welch).
        high: upper end.
        effect: Hedges' g, the difference in pooled standard deviations, its bias for small n taken away.
        t: Welch's t; variances need not be equal.
        p: its p-value.
        p_permutation: of the permutation test of the difference of means, under exchangeability.
        p_rank: of the Mann-Whitney test.
        exact: whether all permutations were counted.
    """

    n_a: int
    n_b: int
    difference: float
    low: float
    high: float
    effect: float
    t: float
    p: float
    p_permutation: float
    p_rank: float
    exact: bool


def two_samples(
    a: ArrayLike,
    b: ArrayLike,
    level: float = 0.05,
    alternative: Alternative = "two-sided",
    draws: int = 9_999,
    seed: int = 0,
) -> TwoSamples:
    """Welch's t-test, the permutation test and the Mann-Whitney test of independent values, such as of runs.

    All permutations are counted where there are at most `draws` of them; else they are drawn, and p is
    (1 + k) / (1 + draws), k being those as extreme.

    Args:
        a: any shape, taken flat; NaN are left out.
        b: the other sample.
        level: the confidence interval covers 1 - level.
        alternative: "greater": a is larger than b.
        draws: permutations.
        seed: of the permutations.

    Returns:
        The tests; NaN where a sample has fewer than two values or nothing differs.

    Raises:
        Incompatible: for infinite values, or a level out of range.

    >>> found = two_samples([3.0, 4.0, 5.0], [1.0, 2.0, 3.0])
    >>> found.difference, round(found.p, 4), round(found.p_permutation, 2)
    (2.0, 0.0705, 0.2)
    """
    check_level(level)
    x, y = _values(a), _values(b)
    n, m = len(x), len(y)
    difference = float(x.mean() - y.mean()) if n and m else math.nan
    size = max(np.abs(x).max(initial=0), np.abs(y).max(initial=0))
    if min(n, m) < 2 or max(x.std(), y.std()) <= EQUAL * size:
        return TwoSamples(n, m, difference, *[math.nan] * 7, exact=False)
    welch = stats.ttest_ind(x, y, equal_var=False, alternative=alternative)
    variance_x, variance_y = x.var(ddof=1), y.var(ddof=1)
    half = float(stats.t.ppf(1 - level / 2, welch.df)) * math.sqrt(variance_x / n + variance_y / m)  # pyright: ignore
    pooled = math.sqrt(((n - 1) * variance_x + (m - 1) * variance_y) / (n + m - 2))
    p, exact = _permuted((x, y), "independent", math.comb(n + m, n), alternative, draws, seed)
    ranks = stats.mannwhitneyu(x, y, alternative=alternative)
    return TwoSamples(
        n, m, difference, difference - half, difference + half, difference / pooled * (1 - 3 / (4 * (n + m) - 9)),
        float(welch.statistic), float(welch.pvalue), p, float(ranks.pvalue), exact,  # pyright: ignore
    )  # fmt: skip


class Pairs(NamedTuple):
    """Pairs (a, b), such as two treatments of the same seed.

    Attributes:
        test: of the differences a - b against 0; see `OneSample`.
        p_signs: of the sign-flip test of the mean difference: each difference is as likely with the other sign.
        exact: whether all signs were counted.
    """

    test: OneSample
    p_signs: float
    exact: bool


def pairs(
    a: ArrayLike,
    b: ArrayLike,
    level: float = 0.05,
    alternative: Alternative = "two-sided",
    draws: int = 9_999,
    seed: int = 0,
) -> Pairs:
    """Student's t, Wilcoxon and the sign-flip test of paired values.

    Args:
        a: (n,); pairs with NaN are left out.
        b: (n,).
        level: the confidence interval covers 1 - level.
        alternative: "greater": a is larger than b.
        draws: sign patterns, where not all 2^n are counted.
        seed: of the patterns.

    Differences that are rounding (below 1e-12 of the values) count as 0.

    Raises:
        Incompatible: if there is not one b for each a, for infinite values, or a level out of range.

    >>> pairs([2.0, 3.0, 4.0, 6.0], [1.0, 1.0, 1.0, 2.0]).p_signs
    0.125
    """
    x, y = np.asarray(a, np.float64).reshape(-1), np.asarray(b, np.float64).reshape(-1)
    if len(x) != len(y):
        raise Incompatible(f"{len(x)} and {len(y)} values are no pairs; two_samples compares groups of unequal size.")
    _values([x, y])
    d = differences(x, y)
    return Pairs(one_sample(d, level=level, alternative=alternative), *sign_flips(d, alternative, draws, seed))


def sign_flips(
    differences: ArrayLike, alternative: Alternative = "two-sided", draws: int = 9_999, seed: int = 0
) -> tuple[float, bool]:
    """P-value of the mean of values that are as likely with the other sign, and whether all signs were counted.

    Args:
        differences: (n,); NaN are left out.
        alternative: of the mean.
        draws: sign patterns, where not all 2^n are counted.
        seed: of the patterns.

    Raises:
        Incompatible: for infinite values.

    >>> sign_flips([1.0, 2.0, 3.0], "greater")
    (0.125, True)
    """
    d = _values(differences)
    if len(d) < 2 or not d.any():
        return math.nan, False
    return _permuted((d,), "samples", 2 ** len(d), alternative, draws, seed)


def _permuted(
    data: tuple[np.ndarray, ...], kind: str, arrangements: int, alternative: Alternative, draws: int, seed: int
) -> tuple[float, bool]:
    """The p-value of scipy's permutation test, and whether it counted all arrangements."""
    exact = arrangements <= draws

    def statistic(*samples: np.ndarray, axis: int) -> np.ndarray:
        means = [sample.mean(axis=axis) for sample in samples]
        return means[0] - means[1] if len(means) > 1 else means[0]

    found = stats.permutation_test(
        data, statistic, permutation_type=kind, vectorized=True, alternative=alternative, batch=1_000,
        n_resamples=np.inf if exact else draws, random_state=np.random.default_rng(seed),  # pyright: ignore
    )  # fmt: skip
    return min(1.0, float(found.pvalue)), exact


def _values(values: ArrayLike) -> np.ndarray:
    """Flat, without NaN; infinite values are refused: means that are NaN would be less extreme than any."""
    x = np.asarray(values, np.float64).reshape(-1)
    if np.isinf(x).any():
        raise Incompatible(f"{np.isinf(x).sum()} of {len(x)} values are infinite and have no mean; leave them out.")
    return x[~np.isnan(x)]
