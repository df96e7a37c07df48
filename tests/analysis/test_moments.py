"""Moments and peaks against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nbdyn.analysis.lca.moments import moments, peaks
from nbdyn.errors import Incompatible


def by_loops(a: np.ndarray, top: int) -> set[int]:
    found = [t for t in range(1, len(a) - 1) if a[t] < a[t - 1] and a[t] < a[t + 1] and a[t] < 0]
    return set(sorted(found, key=lambda t: (a[t], t))[:top])


@pytest.mark.parametrize("top", [1, 5, 20, 1_000])
def test_moments_by_loops(top: int) -> None:
    a = np.random.default_rng(0).normal(-0.2, 1.0, (3, 4, 100)).round(1)  # rounded: plateaus and ties
    found = moments(a, top)
    assert found.shape == a.shape and found.dtype == bool
    for place in np.ndindex(3, 4):
        assert set(np.flatnonzero(found[place])) == by_loops(a[place], top)


def test_peaks_are_moments_upside_down() -> None:
    a = np.random.default_rng(0).random((4, 60)) + 1.0
    assert np.array_equal(peaks(a, 7), moments(-a, 7)) and (peaks(a, 7).sum(axis=1) == 7).all()


def test_what_is_no_moment() -> None:
    assert not moments([-5.0, -1.0, -5.0]).any()  # ends
    assert not moments([0.0, -1.0, -1.0, 0.0]).any()  # a plateau
    assert not moments([3.0, 1.0, 3.0]).any()  # the loss rises
    assert not moments([0.0, 0.0, 0.0]).any()
    assert not moments([math.nan, -1.0, math.nan]).any() and not moments([0.0, math.nan, 0.0]).any()
    assert moments([0.0, -1.0, 0.0]).tolist() == [False, True, False]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_short_series_have_none(steps: int) -> None:
    assert moments(-np.ones((2, steps))).shape == (2, steps) and not peaks(np.ones((2, steps))).any()


def test_integers_do_not_wrap() -> None:
    assert peaks(np.array([0, 200, 1, 255, 3], np.uint8), top=1).nonzero()[0].tolist() == [3]


def test_wrong_arguments() -> None:
    with pytest.raises(Incompatible, match="top = 0"):
        moments([1.0, 2.0], top=0)
    with pytest.raises(Incompatible, match="axis of steps"):
        peaks(3.0)
