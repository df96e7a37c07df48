"""Arrangements of moments under a null: where they are, what is counted, and the result (see `synchronization`)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from nbdyn.errors import Incompatible

CHUNK = 4_000_000
"""Cells worked on at once."""


@dataclass(frozen=True, eq=False)
class Synchronization:
    """Synchronized moments against a null. The test is one-sided: more than chance.

    Attributes:
        statistic: steps at which at least `least` series have a moment, over all classes.
        null_mean: its mean under the null.
        null_low: 2.5 % quantile under the null.
        null_high: 97.5 % quantile.
        p: the chance of `statistic` or more under the null; of draws (1 + k) / (1 + B), k of B being as large.
        draws: draws B, or arrangements counted.
        exact: whether all arrangements were counted.
        null: name of the null.
        sentence: what the null is, in words.
        least: series that a synchronized step takes.
        shape: (classes, series, steps).
        observed: the statistic by class, (classes,).
        expected: its mean under the null by class, (classes,).
    """

    statistic: int
    null_mean: float
    null_low: float
    null_high: float
    p: float
    draws: int
    exact: bool
    null: str
    sentence: str
    least: int
    shape: tuple[int, int, int]
    observed: np.ndarray
    expected: np.ndarray

    @property
    def excess(self) -> float:
        """The effect: synchronized moments beyond the null's mean."""
        return self.statistic - self.null_mean

    def frame(self) -> pd.DataFrame:
        """One row: the test without its classes."""
        classes, series, steps = self.shape
        row = {
            "null": self.null, "statistic": self.statistic, "null_mean": self.null_mean, "null_low": self.null_low,
            "null_high": self.null_high, "excess": self.excess, "p": self.p, "draws": float(self.draws),
            "exact": self.exact, "least": self.least, "classes": classes, "series": series, "steps": steps,
            "sentence": self.sentence,
        }  # fmt: skip
        return pd.DataFrame([row])

    def __repr__(self) -> str:
        classes, series, steps = self.shape
        how = "exact" if self.exact else f"{self.draws:,} draws"
        return (
            f"<Synchronization of {series} series x {classes} classes x {steps:,} steps: {self.statistic} steps with "
            f"moments in at least {self.least}; null ({self.null}, {how}) mean {self.null_mean:.3g}, 95 % in "
            f"{self.null_low:g}..{self.null_high:g}; p {'=' if self.exact else '~'} {self.p:.3g}>"
        )


class Events(NamedTuple):
    """Class, series and step of each moment, (n,) each, and the shape that they lie in."""

    owner: np.ndarray
    series: np.ndarray
    step: np.ndarray
    shape: tuple[int, int, int]

    @classmethod
    def of(cls, moments: np.ndarray) -> Events:
        """The moments of a boolean array (classes, series, steps)."""
        return cls(*np.nonzero(moments), moments.shape)  # pyright: ignore[reportCallIssue, reportArgumentType]

    def shifted(self, shifts: np.ndarray) -> np.ndarray:
        """Steps after shifts (b, classes or 1, series), circularly: (b, n)."""
        owner = self.owner if shifts.shape[1] > 1 else np.zeros_like(self.owner)
        return (self.step + shifts[:, owner, self.series]) % self.shape[2]

    def counts(self, draws: int, least: int, place: Callable[[int], np.ndarray], cells: int = 0) -> np.ndarray:
        """The statistic by draw and class, (draws, classes).

        Args:
            draws: how many.
            least: series that a synchronized step takes.
            place: number b of draws -> steps of the moments in the next b, (b, n).
            cells: what a draw takes in memory, if more than its counts and moments.
        """
        classes, _, steps = self.shape
        rows = max(1, CHUNK // max(classes * steps, len(self.step), cells))
        found = np.empty((draws, classes), np.int64)
        for first in range(0, draws, rows):
            size = min(rows, draws - first)
            cell = (np.arange(size)[:, None] * classes + self.owner) * steps + place(size)
            together = np.bincount(cell.reshape(-1), minlength=size * classes * steps)
            found[first : first + size] = (together.reshape(size, classes, steps) >= least).sum(axis=-1)
        return found


def in_turn(events: Events, grid: np.ndarray) -> Callable[[int], np.ndarray]:
    """Places the moments by the rows of a grid of shifts (k, series), one after the other."""
    rows = iter(grid)
    return lambda size: events.shifted(np.array(list(itertools.islice(rows, size)))[:, None, :])


def by_class(moments: np.ndarray, least: int) -> np.ndarray:
    """The statistic of (..., classes, series, T): (..., classes)."""
    return (moments.sum(axis=-2) >= least).sum(axis=-1)


def from_all(
    moments: np.ndarray, least: int, counts: np.ndarray, together: bool, null: str, sentence: str
) -> Synchronization:
    """The result where counts (arrangements, classes) are of all arrangements, each as likely."""
    arrangements, classes = counts.shape
    if together:
        chance = np.bincount(counts.sum(axis=1)) / arrangements
    else:
        chance = functools.reduce(np.convolve, [np.bincount(column) / arrangements for column in counts.T])
    observed = by_class(moments, least)
    below = np.cumsum(chance)
    low, high = np.searchsorted(below, np.array([0.025, 0.975]) - 1e-12)  # 1e-12: rounding of the sums
    return _result(
        moments, least, null, sentence, counts, draws=arrangements if together else arrangements**classes,
        null_low=float(low), null_high=float(high), p=min(1.0, float(chance[observed.sum() :].sum())), exact=True,
    )  # fmt: skip


def from_draws(moments: np.ndarray, least: int, counts: np.ndarray, null: str, sentence: str) -> Synchronization:
    """The result where counts (draws, classes) are of random arrangements."""
    sums = counts.sum(axis=1)
    low, high = np.quantile(sums, [0.025, 0.975], method="inverted_cdf")
    as_large = int((sums >= by_class(moments, least).sum()).sum())
    return _result(
        moments, least, null, sentence, counts, draws=len(counts), null_low=float(low), null_high=float(high),
        p=(1 + as_large) / (1 + len(counts)), exact=False,
    )  # fmt: skip


def _result(
    moments: np.ndarray, least: int, null: str, sentence: str, counts: np.ndarray, **parts: Any
) -> Synchronization:
    """A result with what all have alike."""
    observed, expected = by_class(moments, least), counts.mean(axis=0)
    return Synchronization(
        statistic=int(observed.sum()), null_mean=float(expected.sum()), null=null, sentence=sentence, least=least,
        shape=moments.shape, observed=observed, expected=expected, **parts,
    )  # pyright: ignore[reportArgumentType]  # fmt: skip


def across(together: bool, classes: int) -> str:
    """The end of a null's sentence: how it goes across classes."""
    if classes == 1:
        return ""
    return ", alike in all classes" if together else ", independently in each class"


def checked(moments: ArrayLike) -> np.ndarray:
    """Moments as (classes, series, T)."""
    found = np.asarray(moments)
    found = found[None] if found.ndim == 2 else found
    if found.ndim != 3 or found.dtype != bool or found.shape[1] < 2 or not found.shape[2]:
        raise Incompatible(
            f"moments are {found.dtype} {np.shape(moments)}; give booleans (series, steps) or (classes, series, steps) "
            "of two or more series."
        )
    return found


def at_least(least: int | None, series: int) -> int:
    """The number of series that a synchronized step takes."""
    found = series if least is None else least
    if not 2 <= found <= series:
        raise Incompatible(f"least = {found} of {series} series: give 2..{series}.")
    return found
