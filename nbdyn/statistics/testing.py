"""One sample against a value, and many p-values at once."""

from __future__ import annotations

import math
import warnings
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from nbdyn.errors import Incompatible

EQUAL = 1e-12
"""Values whose spread is below this share of their size count as equal: what is left is rounding."""


def check_level(level: float) -> None:
    """Raise Incompatible unless 0 < level <= 0.5; whoever gives 0.95 would get an interval that covers 5 %."""
    if not 0 < level <= 0.5:
        raise Incompatible(f"level={level} is not in 0..0.5: an interval covers 1 - level; 0.05 gives one of 95 %.")


class OneSample(NamedTuple):
    """A sample against a value.

    Attributes:
        n: values, NaN left out.
        mean: their mean.
        std: their standard deviation (n - 1).
        low: lower end of the two-sided confidence interval of the mean, by Student's t.
        high: upper end.
        effect: Cohen's d, (mean - value) / std.
        t: Student's t.
        p: its p-value.
        p_wilcoxon: of the Wilcoxon signed-rank test, which asks only for a symmetric distribution.
    """

    n: int
    mean: float
    std: float
    low: float
    high: float
    effect: float
    t: float
    p: float
    p_wilcoxon: float


def one_sample(
    values: ArrayLike,
    value: float = 0.0,
    level: float = 0.05,
    alternative: Literal["two-sided", "greater", "less"] = "two-sided",
) -> OneSample:
    """Student's t-test and the Wilcoxon signed-rank test of independent values against `value`.

    Args:
        values: any shape, taken flat; NaN are left out.
        value: the mean (Wilcoxon: the centre of symmetry) under the null.
        level: the confidence interval covers 1 - level.
        alternative: of both tests.

    Returns:
        The tests. Where there are fewer than two values, or all are equal, their spread is not known and everything
        that needs it is NaN: it takes runs that differ.

    Raises:
        Incompatible: for a level out of range.

    >>> round(one_sample([1.0, 2.0, 3.0]).t, 4)
    3.4641
    """
    check_level(level)
    x = np.asarray(values, np.float64).reshape(-1)
    x = x[~np.isnan(x)]
    size = float(np.abs(x).max(initial=abs(value)))
    x = differences(x, value)
    n = len(x)
    mean = float(x.mean()) if n else math.nan
    std = float(x.std(ddof=1)) if n > 1 else math.nan
    if not std > EQUAL * size:
        nan = math.nan
        return OneSample(n, mean + value, std, nan, nan, nan, nan, nan, nan)
    student = stats.ttest_1samp(x, 0.0, alternative=alternative)
    half = float(stats.t.ppf(1 - level / 2, n - 1)) * std / math.sqrt(n)
    with warnings.catch_warnings():
        # Of few values, ties and zeros SciPy warns and goes on by the normal approximation.
        warnings.simplefilter("ignore")
        ranks = stats.wilcoxon(x, alternative=alternative)
    return OneSample(
        n, mean + value, std, mean + value - half, mean + value + half, mean / std,
        float(student.statistic), float(student.pvalue), float(ranks.pvalue),  # pyright: ignore[reportAttributeAccessIssue]
    )  # fmt: skip


def differences(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """Differences a - b, shape as they broadcast; 0 where it is rounding: at most 1e-12 of the larger one.

    >>> differences([0.1 + 0.2, 2.0], [0.3, 1.0]).tolist()
    [0.0, 1.0]
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    d = x - y
    return np.where(np.abs(d) <= EQUAL * np.maximum(np.abs(x), np.abs(y)), 0.0, d)


def holm(p: ArrayLike) -> np.ndarray:
    """P-values corrected by Holm's step-down rule: the chance of one or more false findings stays below the level.

    The i-th smallest of m becomes max over j <= i of min(1, (m - j) p_(j)), j from 0 (Holm 1979). It holds whatever
    the dependence between the tests.

    Args:
        p: p-values, (m,); NaN are tests that were not made: they stay NaN and do not count.

    Raises:
        Incompatible: if a value is not in 0..1.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p, made = _p_values(p)
    tried = p[made]
    order = np.argsort(tried, kind="stable")
    factors = np.arange(len(tried), 0, -1)
    corrected = np.empty_like(tried)
    corrected[order] = np.maximum.accumulate(np.minimum(1.0, factors * tried[order]))
    p[made] = corrected
    return p


def benjamini_hochberg(p: ArrayLike) -> np.ndarray:
    """P-values corrected so that the expected share of false findings stays below the level (tests independent).

    Args:
        p: p-values, (m,); NaN are tests that were not made: they stay NaN and do not count.

    Raises:
        Incompatible: if a value is not in 0..1.

    >>> benjamini_hochberg([0.01, 0.04, 0.03]).round(6).tolist()
    [0.03, 0.04, 0.04]
    """
    p, made = _p_values(p)
    if made.any():
        p[made] = stats.false_discovery_control(p[made])
    return p


def _p_values(p: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """A copy as (m,) float64, and which are p-values."""
    found = np.array(p, np.float64).reshape(-1)
    made = ~np.isnan(found)
    off = found[made & ~((found >= 0) & (found <= 1))]
    if len(off):
        raise Incompatible(f"{off[0]:g} is not a p-value; p-values are in 0..1 (NaN: test not made).")
    return found, made
