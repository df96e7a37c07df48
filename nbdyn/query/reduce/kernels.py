"""Compiled loops for what no matrix product gives: the groups of largest value of every parameter.

numba compiles them on first use and keeps the result on disk. They release Python's lock and run on threads of our
own: numba's and torch's pools would get into each other's way.
"""

# pyright: standard
# numba ships no types.
from __future__ import annotations

import numpy as np
from numba import njit

BAND = 4096
"""Groups taken at a time in the order of their largest possible value: most columns are settled within the first."""
CHECK = 32
"""Groups after which settled columns are dropped."""

SUM_ABS, ABS_SUM, SUM, SUM_SQ, MAX_ABS, MAX = range(6)
"""How the cells of a group become one value: sum |x|, |sum x|, sum x, sum x^2, max |x|, max x."""

_compiled = njit(nogil=True, cache=True, error_model="numpy")


@_compiled
def _insert(values, members, count, x, member):
    """Put a value into a list sorted from largest to smallest, equal values by their member; returns the new count."""
    k = len(values)
    if count == k:
        if x < values[k - 1] or (x == values[k - 1] and member > members[k - 1]):
            return count
        place = k - 1
    else:
        place = count
        count += 1
    while place > 0 and (values[place - 1] < x or (values[place - 1] == x and members[place - 1] > member)):
        values[place] = values[place - 1]
        members[place] = members[place - 1]
        place -= 1
    values[place] = x
    members[place] = member
    return count


@_compiled
def _folded(total, cell, mode):
    """A group's value so far and one more cell of it, which is rounded to float32 as cells are."""
    x = np.float64(np.float32(cell))
    if mode == SUM_ABS:
        return total + abs(x)
    if mode == SUM_SQ:
        return total + x * x
    if mode == MAX_ABS:
        return max(total, abs(x))
    if mode == MAX:
        return max(total, x)
    return total + x


@_compiled
def _next_band(limits, left):
    """The groups of largest limit among some, in falling order, and the rest."""
    if len(left) > 2 * BAND:
        size = limits[left]
        cut = np.partition(size, len(size) - BAND)[len(size) - BAND]
        band, left = left[size >= cut], left[size < cut]
    else:
        band, left = left, left[:0]
    return band[np.argsort(-limits[band], kind="mergesort")], left


@_compiled
def _still_open(active, n_active, limit, reach, counts, tau, k, mode):
    """Drop the columns in which no group of this limit, or a lower one, can be among the k; returns how many stay."""
    kept = 0
    for q in range(n_active):
        j = active[q]
        highest = np.float64(limit) * np.float64(reach[j]) * 1.000001  # what rounding may add to a sum
        if mode == SUM_SQ:
            highest *= highest
        if counts[j] < k or highest >= tau[j]:
            active[kept] = j
            kept += 1
    return kept


@_compiled
def top_products(
    a, d, starts, visits, bound, reach, rare, rare_starts, rare_groups, mode, values, members, first, stop
):
    """For units first..stop-1 of d and every unit of a: the groups of largest value, exactly.

    A cell is sum over its rows of d a, and a group's value at most bound[unit, group] * reach[column] (its square for
    sum x^2). Groups are taken in falling order of the first factor, and a column is done once no later group can reach
    its k-th value: Fagin's threshold algorithm with one sorted list. Columns that are zero but in a few groups are
    taken from the list of those. Groups of value zero are no members.

    Args:
        a: (rows, columns) float32, rows sorted by group.
        d: (units, rows) float32.
        starts: (groups + 1,) first row of each group.
        visits: (rows,) number of the visit of each row; the rows of a visit add up to one cell.
        bound: (units, groups) float32 sums of |d| over a group's rows.
        reach: (columns,) float32 largest |a|.
        rare: (columns,) bool whether a column has a list.
        rare_starts: (columns + 1,) offsets of the lists.
        rare_groups: the groups in them.
        mode: one of the numbers above.
        values: (units, columns, k) result, from largest to smallest.
        members: (units, columns, k) groups, -1 where there are none.
        first: first unit.
        stop: end of the half-open range of units.
    """
    columns, k = len(reach), values.shape[2]
    lowest = -np.inf if mode in (SUM, MAX) else 0.0
    active, counts = np.empty(columns, np.int32), np.zeros(columns, np.int32)
    tau, cells, totals = np.empty(columns, np.float32), np.empty(columns), np.empty(columns)
    for unit in range(first, stop):
        n_active = 0
        counts[:] = 0
        tau[:] = lowest
        for j in range(columns):
            if rare[j]:
                for place in range(rare_starts[j], rare_starts[j + 1]):
                    g = rare_groups[place]
                    cell, total = 0.0, -np.inf if mode == MAX else 0.0
                    for row in range(starts[g], starts[g + 1]):
                        cell += np.float64(d[unit, row]) * np.float64(a[row, j])
                        if row + 1 == starts[g + 1] or visits[row + 1] != visits[row]:
                            total, cell = _folded(total, cell, mode), 0.0
                    x = np.float32(abs(total) if mode == ABS_SUM else total)
                    if x != 0:
                        counts[j] = _insert(values[unit, j], members[unit, j], counts[j], x, g)
            else:
                active[n_active] = j
                n_active += 1
        limits = bound[unit]
        left = np.nonzero(limits > 0)[0].astype(np.int32)
        while n_active > 0 and len(left) > 0:
            band, left = _next_band(limits, left)
            for r in range(len(band)):
                g = band[r]
                if r % CHECK == 0:
                    n_active = _still_open(active, n_active, limits[g], reach, counts, tau, k, mode)
                    if n_active == 0:
                        break
                for q in range(n_active):
                    cells[q] = 0.0
                    totals[q] = -np.inf if mode == MAX else 0.0
                for row in range(starts[g], starts[g + 1]):
                    x = np.float64(d[unit, row])
                    for q in range(n_active):
                        cells[q] += x * np.float64(a[row, active[q]])
                    if row + 1 == starts[g + 1] or visits[row + 1] != visits[row]:
                        for q in range(n_active):
                            totals[q] = _folded(totals[q], cells[q], mode)
                            cells[q] = 0.0
                for q in range(n_active):
                    j = active[q]
                    x = np.float32(abs(totals[q]) if mode == ABS_SUM else totals[q])
                    if x >= tau[j] and x != 0:
                        counts[j] = _insert(values[unit, j], members[unit, j], counts[j], x, g)
                        if counts[j] == k:
                            tau[j] = values[unit, j, k - 1]


@_compiled
def top_cells(a, d, numbers, reach, rare, rare_starts, rare_rows, signed, values, members, first, stop):
    """`top_products` where every group has one row: the k largest |d a|, or d a where `signed`.

    `numbers` says which group each row is, -1 for none; the lists of rare columns hold rows.
    """
    columns, k = len(reach), values.shape[2]
    active, counts = np.empty(columns, np.int32), np.zeros(columns, np.int32)
    tau = np.empty(columns, np.float32)
    for unit in range(first, stop):
        n_active = 0
        counts[:] = 0
        tau[:] = -np.inf if signed else 0.0
        for j in range(columns):
            if rare[j]:
                for place in range(rare_starts[j], rare_starts[j + 1]):
                    row = rare_rows[place]
                    x = d[unit, row] * a[row, j]
                    x = x if signed else abs(x)
                    if x != 0:
                        counts[j] = _insert(values[unit, j], members[unit, j], counts[j], x, numbers[row])
            else:
                active[n_active] = j
                n_active += 1
        limits = np.where(numbers >= 0, np.abs(d[unit]), 0).astype(np.float32)
        left = np.nonzero(limits > 0)[0].astype(np.int32)
        while n_active > 0 and len(left) > 0:
            band, left = _next_band(limits, left)
            for r in range(len(band)):
                g = band[r]
                if r % CHECK == 0:
                    n_active = _still_open(active, n_active, limits[g], reach, counts, tau, k, SUM)
                    if n_active == 0:
                        break
                factor = d[unit, g]
                for q in range(n_active):
                    j = active[q]
                    x = factor * a[g, j]
                    x = x if signed else abs(x)
                    if x >= tau[j] and x != 0:
                        counts[j] = _insert(values[unit, j], members[unit, j], counts[j], x, numbers[g])
                        if counts[j] == k:
                            tau[j] = values[unit, j, k - 1]


@_compiled
def keep_largest(tile, numbers, values, members, counts, first, stop):
    """Bring rows of a tile into the lists of columns first..stop-1.

    Args:
        tile: (rows, columns) float32; NaN and zeros are no members.
        numbers: (rows,) the member that each row is.
        values: (columns, k) the lists, from largest to smallest.
        members: (columns, k) the members in them.
        counts: (columns,) how long each is.
        first: first column.
        stop: end of the half-open range of columns.
    """
    k = values.shape[1]
    for row in range(len(tile)):
        number = numbers[row]
        for j in range(first, stop):
            x = tile[row, j]
            if x != 0 and x == x and (counts[j] < k or x >= values[j, k - 1]):
                counts[j] = _insert(values[j], members[j], counts[j], x, number)
