"""The compiled loops behind `top ... per weight`, on small arrays with ties, zeros, ragged and long groups."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdyn.query.ranked import bins
from nbdyn.query.reduce import kernels
from nbdyn.query.reduce.ranking import _rare_lists, largest  # pyright: ignore[reportPrivateUsage]

MODES = ("SUM_ABS", "ABS_SUM", "SUM", "SUM_SQ", "MAX_ABS", "MAX")


def brute(a: np.ndarray, d: np.ndarray, group: np.ndarray, visit: np.ndarray, mode: str) -> np.ndarray:
    """The value of every group, unit and column, (groups, units, columns); NaN where a group has no rows."""
    cells = d.T[:, :, None].astype(float) * a[:, None, :]
    out = np.full((group.max(initial=-1) + 1, d.shape[0], a.shape[1]), np.nan)
    for g in np.unique(group):
        whole = np.stack([cells[(group == g) & (visit == v)].sum(0) for v in np.unique(visit[group == g])])
        out[g] = {
            "SUM_ABS": lambda x: np.abs(x).sum(0), "ABS_SUM": lambda x: np.abs(x.sum(0)), "SUM": lambda x: x.sum(0),
            "SUM_SQ": lambda x: (x**2).sum(0), "MAX_ABS": lambda x: np.abs(x).max(0), "MAX": lambda x: x.max(0),
        }[mode](whole)  # fmt: skip
    return out


def expected(values: np.ndarray, k: int) -> tuple[list[float], list[int]]:
    """The k largest that are neither 0 nor NaN, equal ones in their order."""
    found = sorted((-x, n) for n, x in enumerate(values.tolist()) if x != 0 and x == x)[:k]
    return [-x for x, _ in found], [n for _, n in found]


@st.composite
def factors(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows sorted by group and visit: a (rows, columns), d (units, rows), group, visit; small whole numbers, so that
    sums are exact and many are equal."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups, columns, units = draw(st.integers(1, 90)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    sizes = rng.integers(0, draw(st.sampled_from([2, 3, 6])), groups)  # some groups have no rows
    group = np.repeat(np.arange(groups), sizes)
    visit = np.cumsum(np.concatenate([[0], (np.diff(group) != 0) | (rng.random(max(0, len(group) - 1)) < 0.6)]))
    visit = visit[: len(group)].astype(np.int64)
    top = draw(st.sampled_from([1, 2, 50]))
    zeros = draw(st.sampled_from([0.0, 0.5, 0.95]))
    a = (rng.integers(-top, top + 1, (len(group), columns)) * (rng.random((len(group), columns)) >= zeros)).astype("f4")
    d = (rng.integers(-top, top + 1, (units, len(group))) * (rng.random((units, len(group))) >= zeros)).astype("f4")
    return a, d, group, visit


@settings(max_examples=150, deadline=None)
@given(factors(), st.sampled_from(MODES), st.integers(1, 100), st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 4096]))
def test_the_threshold_algorithm(case, mode: str, k: int, seed: int, band: int):
    a, d, group, visit = case
    groups = int(group.max(initial=0)) + 1
    starts = np.searchsorted(group, np.arange(groups + 1)).astype(np.int64)
    bound = np.zeros((len(d), groups), np.float32)
    np.add.at(bound.T, group, np.abs(d).T)
    reach = np.abs(a).max(0, initial=0)
    rare = np.random.default_rng(seed).random(a.shape[1]) < 0.5
    lists, owners = _rare_lists(a, rare, group.astype(np.int32), np.ones(len(a), bool))
    k = min(k, groups)
    values, members = np.zeros((len(d), a.shape[1], k), np.float32), np.full((len(d), a.shape[1], k), -1, np.int32)
    kernels.top_products(a, d, starts, visit, bound, reach, rare, lists, owners, getattr(kernels, mode), values,
                         members, 0, len(d))  # fmt: skip
    every = brute(a, d, group, visit, mode)
    for unit, column in np.ndindex(values.shape[:2]):
        best, numbers = expected(every[:, unit, column] if len(every) else np.empty(0), k)
        assert values[unit, column, : len(best)].tolist() == best
        assert members[unit, column].tolist() == numbers + [-1] * (k - len(numbers))
    if len(group) == groups and (np.bincount(group) == 1).all():
        signed = mode in ("SUM", "MAX")
        values[:], members[:] = 0, -1
        rows = np.random.default_rng(seed).permutation(groups)  # in no order of the groups, as training has them
        lists, owners = _rare_lists(a[rows], rare, np.arange(groups, dtype=np.int32), np.ones(groups, bool))
        kernels.top_cells(np.ascontiguousarray(a[rows]), np.ascontiguousarray(d[:, rows]),
                          group[rows].astype(np.int32), reach, rare, lists, owners, signed, values, members,
                          0, len(d))  # fmt: skip
        for unit, column in np.ndindex(values.shape[:2]):
            cells = d[unit] * a[:, column]
            best, numbers = expected(cells if signed else np.abs(cells), k)
            assert members[unit, column].tolist() == numbers + [-1] * (k - len(numbers))
            assert values[unit, column, : len(best)].tolist() == best


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("k", [1, 5, 400])
def test_single_cells_in_bands(signed: bool, k: int):
    """More groups than two bands, so that most of them are never looked at."""
    rng = np.random.default_rng(k)
    rows = 9000
    a, d = rng.integers(-9, 10, (rows, 3)).astype(np.float32), rng.standard_normal((2, rows)).astype(np.float32)
    a[:, 1] *= rng.random(rows) < 0.01
    rare = np.zeros(3, bool)
    lists, owners = _rare_lists(a, rare, np.arange(rows, dtype=np.int32), np.ones(rows, bool))
    values, members = np.zeros((2, 3, k), np.float32), np.full((2, 3, k), -1, np.int32)
    numbers = np.arange(rows, dtype=np.int32)
    kernels.top_cells(a, d, numbers, np.abs(a).max(0), rare, lists, owners, signed, values, members, 0, 2)
    for unit, column in np.ndindex(2, 3):
        cells = d[unit] * a[:, column]
        best, numbers = expected(cells if signed else np.abs(cells), k)
        assert members[unit, column, : len(best)].tolist() == numbers
        assert values[unit, column, : len(best)].tolist() == best


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, -1.0, 2.5, -3.0, np.nan, np.inf]), max_size=30), st.integers(1, 40))
def test_lists_leave_out_zeros_and_nan(values: list[float], k: int):
    row = np.array(values)
    assert largest(row, k).tolist() == expected(row, k)[1]
    tile = np.stack([row, -row], axis=1).astype(np.float32)
    kept, numbers, counts = np.zeros((2, k)), np.full((2, k), -1, np.int32), np.zeros(2, np.int32)
    kernels.keep_largest(tile, np.arange(len(row), dtype=np.int32), kept, numbers, counts, 0, 2)
    for column in range(2):
        assert numbers[column, : counts[column]].tolist() == expected(tile[:, column], k)[1]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=40), st.integers(2, 12))
def test_bins_divide_the_logarithm_evenly(values: list[float], into: int):
    x = np.array(values)
    found = bins(x, into)
    size = np.abs(x)
    usual = np.isfinite(size) & (size > 0)
    assert (found["group"][x == 0] == 0).all() and (found["group"][~np.isfinite(x)] == -1).all()
    assert (np.sign(found["group"][usual]) == np.sign(x[usual])).all()
    if usual.any():
        number, low, high = np.abs(found["group"][usual]), found["low"][usual], found["high"][usual]
        assert ((number >= 1) & (number <= into)).all()
        assert (low <= size[usual] * (1 + 1e-12)).all() and (size[usual] <= high * (1 + 1e-12)).all()
        assert ((size[usual] < high) | (number == into)).all()
        assert number[np.argmax(size[usual])] == into or size[usual].min() == size[usual].max()
