"""Totals of a population of steps from a random sample of them: stratified over time, with 95 % intervals.

What is drawn are clusters: a few consecutive steps, read whole with all their visits, as one reading of several steps
costs hardly more than that of one. Training is not stationary, so that the clusters are stratified by blocks of
consecutive ones, and in each stratum two or more are drawn at random without replacement. With y the total of a
cluster, N_h clusters in stratum h and n_h of them drawn (Cochran, Sampling Techniques, 3rd ed. 1977):

    total     sum_h N_h mean_h(y)                                  (5.1; chapter 9: a cluster enters by its total)
    variance  sum_h N_h (N_h - n_h) / n_h s_h^2                    (5.7 and 5.13)
    interval  total +- t(0.975, df) sqrt(variance)                 (5.14)
    df        (sum_h v_h)^2 / sum_h v_h^2 / (n_h + 1) - 2          (5.16, with v_h the terms of the variance)

The last is Satterthwaite's number of degrees of freedom with Welch's correction (Biometrika 34, 1947) for variances
that are themselves estimated from few clusters: without it, two a stratum give intervals that are too wide.
"""

# pyright: standard
# scipy ships incomplete types.
from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from nbdyn.query.evaluate import Array

LEVEL = 0.95
"""Share of samples whose interval holds the exact total."""
STRATA, LEAST_STRATA = 32, 8
"""Strata of a long population, and of a short one."""
FIRST = 64
"""Clusters of the first sample, about, but at most half of all."""
LONGEST, CLUSTERS = 32, 512
"""Steps of a cluster, at most, and how many clusters a population of few steps is cut into, at least."""


@dataclass(frozen=True)
class Design:
    """Which clusters ("units") belong to which stratum, and in which order they are drawn.

    Attributes:
        starts: (units + 1,) first step of each unit, a place in the population, and the end.
        strata: of each stratum its units in random order: the first n are a simple random sample of n without
            replacement, so that a sample is made larger by reading on.
        each: units of a stratum in the first sample.
    """

    starts: Array
    strata: tuple[Array, ...]
    each: int

    def drawn(self, doublings: int) -> list[Array]:
        """Of each stratum the units of the sample after so many doublings."""
        return [units[: self.each << doublings] for units in self.strata]

    def size(self, doublings: int) -> int:
        """How many units that are."""
        return sum(min(len(units), self.each << doublings) for units in self.strata)

    def steps(self, doublings: int) -> int:
        """How many steps these units have."""
        return int(np.diff(self.starts)[np.concatenate(self.drawn(doublings))].sum())


def design(groups: Array, seed: int, most: int = STRATA) -> Design:
    """Clusters and strata of a population of steps in the order of time, and random orders in which they are drawn.

    Args:
        groups: (N,) ascending, what must not share a stratum, such as the epoch of each step; zeros for nothing.
        seed: the same seed gives the same samples.
        most: strata, about, at most; a group has at least one.

    >>> [sorted(stratum.tolist()) for stratum in design(np.repeat([0, 1], 4), seed=1, most=2).strata]
    [[0, 1, 2, 3], [4, 5, 6, 7]]
    """
    generator = np.random.default_rng(seed)
    length = max(1, min(LONGEST, len(groups) // CLUSTERS))
    parts = np.split(np.arange(len(groups)), np.flatnonzero(np.diff(groups)) + 1)
    clusters = [np.array_split(part, math.ceil(len(part) / length)) for part in parts]
    total = sum(map(len, clusters))
    starts = np.array([cluster[0] for some in clusters for cluster in some] + [len(groups)])
    count, first, strata = min(most, max(LEAST_STRATA, total // 4)), 0, list[Array]()
    for some in clusters:
        units, share = np.arange(first, first + len(some)), round(count * len(some) / total)
        blocks = np.array_split(units, max(1, min(share, len(some) // 2)))
        strata += [generator.permutation(block) for block in blocks]
        first += len(some)
    return Design(starts, tuple(strata), max(2, min(FIRST, total // 2) // len(strata)))


@dataclass
class Stratum:
    """What the units read of one stratum add up to.

    Attributes:
        members: (m,) the rows of the result that have something in the stratum.
        size: its units.
        read: units read so far.
        sums, squares: (m, targets) sum of the units' totals, and of their squares.
    """

    members: Array
    size: int
    read: int
    sums: Array
    squares: Array

    @classmethod
    def empty(cls, members: Array, size: int, targets: int) -> Stratum:
        """A stratum of which nothing was read."""
        return cls(members, size, 0, np.zeros((len(members), targets)), np.zeros((len(members), targets)))

    def add(self, members: Array, values: Array) -> None:
        """Take one unit: the totals (k, targets) of the members that it has, which are among the stratum's."""
        at = np.searchsorted(self.members, members)
        self.read += 1
        self.sums[at] += values
        self.squares[at] += np.square(values)

    def variance(self) -> Array:
        """Its term of the variance, (m, targets): N (N - n) / n s^2; 0 where it was read whole."""
        if self.read == self.size:
            return np.zeros_like(self.sums)
        squares = np.maximum(self.squares - np.square(self.sums) / self.read, 0.0)
        return squares * (self.size * (self.size - self.read) / (self.read * (self.read - 1)))


def totals(strata: list[Stratum], members: int) -> tuple[Array, Array]:
    """The estimated totals and half the widths of their intervals, (members, targets) each.

    Cost: a few passes over (members, targets) a stratum. A total that is not finite has a half width of NaN.

    >>> stratum = Stratum.empty(np.array([0]), 100, 1)
    >>> for value in (1.0, 3.0, 2.0):
    ...     stratum.add(np.array([0]), np.array([[value]]))
    >>> [x.round(1).item() for x in totals([stratum], 1)]
    [200.0, 244.7]
    """
    targets = strata[0].sums.shape[1] if strata else 0
    total, variance, fourth = (np.zeros((members, targets)) for _ in range(3))
    free = np.zeros((members, 1))
    with np.errstate(all="ignore"):
        for stratum in strata:
            total[stratum.members] += stratum.sums * (stratum.size / stratum.read)
            if stratum.read < stratum.size:
                term = stratum.variance()
                variance[stratum.members] += term
                fourth[stratum.members] += np.square(term) / (stratum.read + 1)
                free[stratum.members] += stratum.read - 1
        freedom = np.square(variance, out=np.empty_like(variance)) / fourth - 2
        # No variance at all: any number of degrees of freedom gives an interval of width 0.
        freedom = np.clip(np.nan_to_num(freedom, nan=1.0), 1.0, np.maximum(free, 1.0)).astype(np.int64)
        return total, _student(int(free.max(initial=1)))[freedom] * np.sqrt(variance)


@cache
def _student(largest: int) -> Array:
    """The quantile of Student's t that an interval of LEVEL needs, for 0 (not used), 1 ... degrees of freedom."""
    from scipy.special import stdtrit

    return np.concatenate([[np.nan], stdtrit(np.arange(1, largest + 2), (1 + LEVEL) / 2)])
