"""The largest members of every target, or targets of every member, exactly."""

# pyright: standard
# numba and torch ship incomplete types.
from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from nbdyn.query.evaluate import Array
from nbdyn.query.reduce import linear
from nbdyn.query.reduce.linear import CHUNK, FEW
from nbdyn.query.reduce.matrix import Cells, measured, without
from nbdyn.query.reduce.members import Members
from nbdyn.query.reduce.targets import Targets
from nbdyn.query.tree import Measure

MATRIX_CELLS = 32_000_000
"""Numbers of a matrix that is held at once (256 MB)."""
MANY = 64
"""From so many members on, lists are found by the threshold algorithm instead of one product a member."""
ROWS_EACH = 64
"""Rows a member has on average at most for that: with more a product is cheaper."""
LONG = 100
"""Lists longer than this are selected, not kept sorted while they grow."""
RARE = 4096
"""Inputs that are other than zero in so few rows are looked up by those rows."""


@dataclass(frozen=True)
class Ranking:
    """Lists from largest to smallest.

    Attributes:
        values: (lists, k).
        numbers: (lists, k) which member (or target); -1 where the list is shorter.
    """

    values: Array
    numbers: Array


def top_members(cells: Cells, members: Members, targets: Targets, k: int) -> Ranking:
    """The k members of largest measure of every target; equal values in the order of members, zeros left out."""
    k = max(1, min(k, members.count))
    lists = _Lists(targets.count, k)
    if not members.count or not targets.count:
        return lists.ranking()
    rest = np.arange(targets.count)
    if targets.kind == "weight" and cells.pieces is None:
        rest = _by_threshold(cells, members, targets, k, lists)
        rest = _by_products(cells, members, targets, rest, lists)
    for some in _chunks(rest, max(1, MATRIX_CELLS // members.count)):
        part = targets if len(some) == targets.count else _subset(targets, some)
        lists.take(measured(cells, members, part), np.arange(members.count), some)
    return lists.ranking()


def top_targets(cells: Cells, members: Members, targets: Targets, k: int) -> Ranking:
    """The k targets of largest measure of every member; equal values in the order of targets, zeros left out."""
    k = max(1, min(k, targets.count))
    if k > LONG:
        return _long_lists(cells, members, targets, k)
    lists = _Lists(members.count, k)
    height = max(1, MATRIX_CELLS // max(1, targets.count))
    for some in _chunks(np.arange(members.count), height):
        found = measured(cells, members.only(int(some[0]), int(some[-1]) + 1), targets)
        lists.take(np.ascontiguousarray(found.T), np.arange(targets.count), some)
    return lists.ranking()


def ranking_of(values: Array, k: int) -> Ranking:
    """The k largest of every column of a matrix (numbers, lists); equal ones in order, zeros and NaN left out."""
    k = max(1, min(k, len(values)))
    lists = _Lists(values.shape[1], k)
    if k <= LONG:
        lists.take(np.ascontiguousarray(values), np.arange(len(values)), np.arange(values.shape[1]))
        return lists.ranking()
    for number, column in enumerate(values.T):
        order = largest(column, k)
        lists.values[number, : len(order)], lists.numbers[number, : len(order)] = column[order], order
    return lists.ranking()


def _long_lists(cells: Cells, members: Members, targets: Targets, k: int) -> Ranking:
    """Lists that are long, by selection instead of insertion."""
    values, numbers = np.zeros((members.count, k)), np.full((members.count, k), -1, np.int32)
    for member in range(members.count):
        row = measured(cells, members.only(member, member + 1), targets)[0]
        order = largest(row, k)
        values[member, : len(order)], numbers[member, : len(order)] = row[order], order
    return Ranking(values, numbers)


def largest(row: Array, k: int) -> Array:
    """The places of the k largest numbers, from largest to smallest, equal ones in their order; zeros and NaN left out.

    >>> largest(np.array([3.0, 0.0, 5.0, 3.0, np.nan]), 3).tolist()
    [2, 0, 3]
    """
    places = np.flatnonzero((row != 0) & ~np.isnan(row))
    if len(places) > k:
        cut = np.partition(row[places], len(places) - k)[len(places) - k]
        above, equal = places[row[places] > cut], places[row[places] == cut]
        places = np.sort(np.concatenate([above, equal[: k - len(above)]]))
    return places[np.argsort(-row[places], kind="stable")]


class _Lists:
    """The lists while they are filled."""

    def __init__(self, count: int, k: int) -> None:
        self.values = np.zeros((count, k))
        self.numbers = np.full((count, k), -1, np.int32)
        self.counts = np.zeros(count, np.int32)

    def take(self, tile: Array, numbers: Array, lists: Array) -> None:
        """Bring the rows of a tile (numbers, lists) in; later rows have larger numbers."""
        from nbdyn.query.reduce import kernels

        values, members, counts = self.values[lists], self.numbers[lists], self.counts[lists]
        numbers = numbers.astype(np.int32)
        spread(len(lists), lambda a, b: kernels.keep_largest(tile, numbers, values, members, counts, a, b))
        self.values[lists], self.numbers[lists], self.counts[lists] = values, members, counts

    def ranking(self) -> Ranking:
        return Ranking(self.values, self.numbers)


def spread(count: int, work: Callable[[int, int], None]) -> None:
    """Call work(first, stop) for the parts of 0..count on as many threads as there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cuts = np.unique(np.linspace(0, count, 8 * cores + 1).astype(int)).tolist()
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(work, cuts[:-1], cuts[1:]))


def _chunks(numbers: Array, size: int) -> list[Array]:
    return [numbers[first : first + size] for first in range(0, len(numbers), size)]


def _subset(targets: Targets, some: Array) -> Targets:
    """Some targets, numbered anew."""
    number = np.full(targets.count, -1, np.int64)
    number[some] = np.arange(len(some))
    keep = number[targets.code] >= 0
    return Targets(targets.kind, targets.indices[keep], number[targets.code[keep]], len(some), targets.tensors)


def _mode(measure: Measure) -> int | None:
    """The kernel's word for a measure, None where it has none."""
    from nbdyn.query.reduce import kernels

    match measure.aggregate, measure.magnitude, measure.absolute:
        case (("sum" | "path"), True, _):
            return kernels.SUM_ABS
        case "path", False, _:
            return kernels.SUM_ABS
        case "net", _, _:
            return kernels.ABS_SUM
        case "sum", False, absolute:
            return kernels.ABS_SUM if absolute else kernels.SUM
        case "max", True, _:
            return kernels.MAX_ABS
        case "max", False, False:
            return kernels.MAX
        case "norm", _, _:
            return kernels.SUM_SQ
        case _:
            return None


def _by_threshold(cells: Cells, members: Members, targets: Targets, k: int, lists: _Lists) -> Array:
    """Fill the lists of the weights for which the threshold algorithm pays; returns the places of the others."""
    mode = _mode(cells.measure)
    many = members.count >= MANY and len(members.key) <= ROWS_EACH * members.count
    rest = np.ones(targets.count, dtype=bool)
    if mode is None or not many or (len(targets.indices) <= FEW and not members.by_token):
        return np.flatnonzero(rest)
    start, stop = members.steps
    for part in linear.divided(cells.store, targets.indices, start, stop, tokens=bool(members.by_token))[0]:
        rows = linear.Rows(cells.store, part, members)
        if part.weight.size and rows.is_finite:
            values, numbers = _top_of_part(rows, part, mode, k)
            where = part.weight.reshape(-1)
            lists.values[where], lists.numbers[where] = values.reshape(-1, k), numbers.reshape(-1, k)
            rest[where] = False
    return np.flatnonzero(rest)


def _top_of_part(rows: linear.Rows, part: linear.Part, mode: int, k: int) -> tuple[Array, Array]:
    """The lists of a part's weights, (units, inputs, k) each."""
    from nbdyn.query.reduce import kernels

    values = np.zeros((*part.weight.shape, k), np.float32)
    numbers = np.full(values.shape, -1, np.int32)
    single = rows.unsorted()
    if single is not None:
        a, d, code = single
        d = np.ascontiguousarray(d.T)
        reach, rare = _extent(a)
        starts, met = _rare_lists(a, rare, np.arange(len(a), dtype=np.int32), code >= 0)
        signed = mode in (kernels.SUM, kernels.MAX)
        spread(len(d), lambda i, j: kernels.top_cells(
            a, d, code, reach, rare, starts, met, signed, values, numbers, i, j))  # fmt: skip
        return values, numbers
    a, d = rows.a(slice(0, len(rows))), np.ascontiguousarray(rows.d(slice(0, len(rows))).T)
    full = np.diff(rows.starts) > 0
    bound = np.zeros((len(d), len(full)), np.float32)
    # In float64: what rounding took from the sum of many rows would let the search stop too early.
    bound[:, full] = np.add.reduceat(np.abs(d), rows.starts[:-1][full], axis=1, dtype=np.float64)
    owner = np.repeat(np.arange(len(full), dtype=np.int32), np.diff(rows.starts))
    reach, rare = _extent(a)
    starts, met = _rare_lists(a, rare, owner, np.ones(len(a), dtype=bool))
    lines = rows.starts.astype(np.int64)
    spread(len(d), lambda i, j: kernels.top_products(
        a, d, lines, rows.row, bound, reach, rare, starts, met, mode, values, numbers, i, j))  # fmt: skip
    if mode == kernels.SUM_SQ:
        np.sqrt(values, out=values)
    return values, numbers


def _extent(a: Array) -> tuple[Array, Array]:
    """The largest |a| of each column, and whether a column is other than zero in few rows."""
    return np.maximum(a.max(0, initial=0), -a.min(0, initial=0)), np.count_nonzero(a, axis=0) <= RARE


def _rare_lists(a: Array, rare: Array, owner: Array, usable: Array) -> tuple[Array, Array]:
    """The groups in which each rare column is other than zero: offsets by column, and the groups, ascending.

    `owner` is the group of each row, `usable` whether a row counts.
    """
    columns = np.flatnonzero(rare)
    place, row = np.nonzero(np.ascontiguousarray(a[:, columns].T))
    place, row = place[usable[row]], row[usable[row]]
    group = owner[row]
    new = np.ones(len(row), dtype=bool)
    new[1:] = (np.diff(place) != 0) | (np.diff(group) != 0)
    counts = np.zeros(a.shape[1] + 1, np.int64)
    counts[columns + 1] = np.bincount(place[new], minlength=len(columns))
    return np.cumsum(counts), group[new].astype(np.int32)


def _by_products(cells: Cells, members: Members, targets: Targets, rest: Array, lists: _Lists) -> Array:
    """Fill lists of whole layers, a few members at a time, each one product; returns the places of the others."""
    if len(rest) <= FEW or members.by_token or len(members.key) < ROWS_EACH // 8 * members.count:
        return rest
    start, stop = members.steps
    parts, _ = linear.divided(cells.store, targets.indices[rest], start, stop, tokens=False)
    taken = [np.concatenate([part.weight.reshape(-1), part.bias]) for part in parts if part.weight.size]
    if not taken:
        return rest
    some = np.sort(rest[np.concatenate(taken)])
    part, height = _subset(targets, some), max(1, MATRIX_CELLS // len(some))
    # Where one product gives the whole of a member, float32 loses nothing.
    dtype = np.float32 if np.bincount(members.code).max() <= CHUNK else np.float64
    for numbers in _chunks(np.arange(members.count), height):
        few = members.only(int(numbers[0]), int(numbers[-1]) + 1)
        lists.take(measured(cells, few, part, dtype), numbers, some)
    return without(rest, some)
