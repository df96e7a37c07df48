"""The test of a hypothesis: numbers of runs in, effect with interval and p-value out."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nbdyn.errors import Incompatible
from nbdyn.statistics.comparing import Alternative, sign_flips, two_samples
from nbdyn.statistics.testing import differences, one_sample

RELATIONS: dict[str, Alternative] = {">": "greater", "<": "less", "!=": "two-sided"}
METHODS = ("t", "wilcoxon", "permutation")
DRAWS = 99_999
"""Rearrangements of a permutation test, where there are more; up to it all are counted."""


class Decision(NamedTuple):
    """A test.

    Attributes:
        n: runs; pairs where runs are paired; of both groups where they are not.
        effect: mean less the value of the null, or the difference of the means, in the unit of the measure.
        low: lower end of its two-sided interval by Student's t (Welch's for two groups), whatever the test.
        high: upper end.
        d: the effect in standard deviations: Cohen's d, of two groups that are not paired Hedges' g.
        p: the p-value; NaN where runs do not differ at all, so that their spread is not known.
        least: the smallest p that the test can give with so many runs; 0 for t.
    """

    n: int
    effect: float
    low: float
    high: float
    d: float
    p: float
    least: float


def one_group(values: ArrayLike, value: float, relation: str, method: str, level: float) -> Decision:
    """Runs against a value.

    `t`: Student's. `wilcoxon`: signed ranks (symmetric distribution), exact up to 50 values without ties or zeros.
    `permutation`: the signs of the differences are flipped, p of their mean; all 2^n where n is at most 16, else
    p = (1 + k) / (1 + B).

    Args:
        values: one a run, (n,), n >= 2, finite.
        value: of the null.
        relation: a key of RELATIONS: what is claimed of the mean.
        method: one of METHODS.
        level: the interval covers 1 - level.

    Raises:
        Incompatible: for fewer than two values.

    >>> round(one_group([1.0, 2.0, 3.0, 4.0], 0.0, ">", "permutation", 0.05).p, 4)
    0.0625
    """
    x, alternative = _checked(values), RELATIONS[relation]
    found = one_sample(x, value, level, alternative)
    p = {"t": found.p, "wilcoxon": found.p_wilcoxon}.get(method)
    if p is None:
        p, _ = sign_flips(differences(x, value), alternative, DRAWS)
    least = _least(method, alternative, 2**found.n)
    return Decision(found.n, found.mean - value, found.low - value, found.high - value, found.effect, p, least)


def two_groups(a: ArrayLike, b: ArrayLike, relation: str, method: str, level: float) -> Decision:
    """Runs against other runs, not paired.

    `t`: Welch's. `wilcoxon`: the rank-sum test (Mann and Whitney), exact where a group has at most 8
    values and none are tied. `permutation`: runs change groups, p of the
    difference of means; all arrangements up to DRAWS, else p = (1 + k) / (1 + B).

    Args:
        a: one a run, (n,), n >= 2, finite.
        b: the same of the other group, (m,).
        relation: a key of RELATIONS: what is claimed of mean(a) against mean(b).
        method: one of METHODS.
        level: the interval covers 1 - level.

    Raises:
        Incompatible: for fewer than two values in a group.

    >>> round(two_groups([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], "<", "permutation", 0.05).p, 4)
    0.05
    """
    x, y, alternative = _checked(a), _checked(b), RELATIONS[relation]
    found = two_samples(x, y, level, alternative, DRAWS)
    n, p = found.n_a + found.n_b, {"t": found.p, "wilcoxon": found.p_rank, "permutation": found.p_permutation}[method]
    least = _least(method, alternative, math.comb(n, found.n_a))
    return Decision(n, found.difference, found.low, found.high, found.effect, p, least)


def _least(method: str, alternative: Alternative, arrangements: int) -> float:
    """The smallest p of a test that counts arrangements."""
    if method == "t":
        return 0.0
    sides = 2 if alternative == "two-sided" else 1
    drawn = method == "permutation" and arrangements > DRAWS
    return min(1.0, sides / (DRAWS + 1 if drawn else arrangements))


def _checked(values: ArrayLike) -> np.ndarray:
    x = np.asarray(values, np.float64).reshape(-1)
    if len(x) < 2:
        raise Incompatible(f"{len(x)} run tells nothing of others; a test over runs needs two at least.")
    if not np.isfinite(x).all():
        raise Incompatible("a value is NaN or infinite; leaving its run out would be a choice, so nothing is tested.")
    return x
