"""The largest cells of every step, exactly; for linear layers without forming the cells.

Cells are compared by |c| as rounded to the tensors' precision. Rounding is monotone: |d| <= |d'| gives
fl(|d| |a|) <= fl(|d'| |a|), so a unit whose rounded product with the largest partner stays below the k-th of k cells
that are there has no cell among the largest. No tolerance is needed.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nbdyn.store import closed_embedding, closed_linear, closed_tools
from nbdyn.store.closed_tools import Tensors, Tile, expand
from nbdyn.store.sites import Site

if TYPE_CHECKING:
    from torch import Tensor

    TilesOf = Callable[..., Iterator[Tile]]

PROBED = 8
"""Visits with the largest cells of a step, whose largest cells give the first bound."""
MOST_CANDIDATES = 2_000_000
"""Cells of a step that are formed at most by products of candidates; with more (ties) its cells are gone through."""
FIRST_TILE = 64_000
"""Bytes of the first tile where cells are gone through: of ties, and of NaN, the first ones are enough."""


class Found(NamedTuple):
    """Cells of one tensor: group, visit (row of the block), place (in the order of the site), value; (m,) each."""

    group: np.ndarray
    visit: np.ndarray
    place: np.ndarray
    value: np.ndarray


def top_of(
    site: Site, t: Tensors, position: np.ndarray, bounds: np.ndarray, k: int, tiles_of: TilesOf
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k largest cells of each tensor of a site in each group of visits.

    Args:
        site: the site.
        t: its tensors.
        position: place of each visit in its step's batch, for ties.
        bounds: where the groups of visits begin, and the end of the last.
        k: how many.
        tiles_of: the cells of a site in tiles.

    Returns:
        Visit, parameter and value of each, by (group, tensor, |c| falling, parameter, position).
    """
    sizes = np.diff(bounds)
    runs = np.cumsum([0, *(size for _, size in site.runs)])
    parts: list[list[Found]] = [[] for _ in site.runs]
    for size in np.unique(sizes[sizes > 0]):
        groups = np.nonzero(sizes == size)[0]
        at_once = max(1, closed_tools.TILE_BYTES // (int(size) * _bytes_per_visit(site, t)))
        for some in np.split(groups, range(at_once, len(groups), at_once)):
            rows = (bounds[some, None] + np.arange(size)).reshape(-1)
            part = {slot: _rows(x, rows) for slot, x in t.items()}
            for number, found in _search(site, part, len(some), runs, position[rows], k, tiles_of):
                parts[number].append(Found(some[found.group], rows[found.visit], found.place, found.value))
    best = [_best(_joined(found), position, k) for found in parts if found]
    if not best:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    every = _joined(best)
    order = np.argsort(every.group, kind="stable")
    return every.visit[order], site.indices()[every.place[order]], every.value[order]


def _bytes_per_visit(site: Site, t: Tensors) -> int:
    """What searching costs a visit: its cells, or its units where not all cells are formed."""
    if site.form == "embedding":
        return 24 * t["d"].shape[1] * t["d"].shape[2]
    if site.form == "linear" and closed_linear.one_each(t):
        return 8 * (t["a"].shape[2] + t["d"].shape[2])
    return 8 * site.size


def _rows(x: Tensor, rows: np.ndarray) -> Tensor:
    import torch

    if rows[-1] - rows[0] == len(rows) - 1:
        return x[rows[0] : rows[-1] + 1]
    return x[torch.from_numpy(rows)]


def _search(
    site: Site, t: Tensors, groups: int, runs: np.ndarray, position: np.ndarray, k: int, tiles_of: TilesOf
) -> Iterator[tuple[int, Found]]:
    """(number of the run, its largest cells and perhaps more) of `groups` groups of as many visits each."""
    if site.form == "embedding":
        yield from ((0, found) for found in _met(site, t, groups, position, k))
        return
    if not (site.form == "linear" and closed_linear.one_each(t)):
        yield from _gone_through(tiles_of(site, t), groups, len(position), runs, position, k)
        return
    found, left = _pruned(site, t, groups, k)
    yield 0, found
    for group, visits in left:
        some = {slot: _rows(x, visits) for slot, x in t.items()}
        most = float((some["a"].abs().amax(2) * some["d"].abs().amax(2)).max())
        bound = most if math.isfinite(most) else math.nan  # infinity times zero is NaN
        tiles = tiles_of(replace(site, bias=None), some, FIRST_TILE)
        for number, part in _gone_through(tiles, 1, len(visits), runs[:2], position[visits], k, bound):
            yield number, part._replace(group=np.full_like(part.group, group), visit=visits[part.visit])
    if site.bias is not None:
        bias = closed_linear.bias_cells(site, t)
        yield 1, _selected(bias, groups, *_rows_of(slice(0, len(bias)), int(runs[1])), position, k)


def _met(site: Site, t: Tensors, groups: int, position: np.ndarray, k: int) -> Iterator[Found]:
    """The largest cells of each group among the rows of an embedding that its visits met."""
    visit, row, summed = closed_embedding.rows_met(site, t)
    bounds = np.searchsorted(visit.numpy(), np.arange(groups + 1) * (len(position) // groups))
    for group, (start, stop) in enumerate(itertools.pairwise(bounds.tolist())):
        rows = slice(start, stop)
        found = _selected(summed[rows], 1, visit[rows], row[rows] * site.shape[1], position, k)
        yield found._replace(group=found.group + group)


def _gone_through(
    tiles: Iterator[Tile],
    groups: int,
    visits: int,
    runs: np.ndarray,
    position: np.ndarray,
    k: int,
    most: float = math.nan,
) -> Iterator[tuple[int, Found]]:
    """The largest cells from all cells, in tiles; several groups only where one tile holds all visits.

    `most`: no |c| is larger; by default NaN, which counts as largest.
    """
    best: dict[int, Found] = {}
    full: set[int] = set()
    for rows, places, values in tiles:
        number = int(np.searchsorted(runs, places.start, side="right")) - 1
        if number in full:
            continue
        found = _selected(values, groups, *_rows_of(rows, places.start), position, k)
        if number in best:
            found = _joined([best[number], found])
        if len(found.group) > k * groups:
            found = _best(found, position, k)
        best[number] = found
        # Tiles of all visits come in the order of parameters: k cells that nothing exceeds stay the best.
        if groups == 1 and rows == slice(0, visits) and len(found.value) >= k:
            size = np.abs(found.value)
            if ((size >= most) | np.isnan(size)).sum() >= k:
                full.add(number)
                if len(full) == len(runs) - 1:
                    break
    yield from best.items()


def _rows_of(visits: slice, first: int) -> tuple[Tensor, Tensor]:
    """For a tile's rows: their visits, and the places of their first columns."""
    import torch

    visit = torch.arange(visits.start, visits.stop, device="cpu")
    return visit, torch.full_like(visit, first)


def _selected(values: Tensor, groups: int, visit: Tensor, first: Tensor, position: np.ndarray, k: int) -> Found:
    """Of each group's cells those at least as large as the k-th, with its ties; no zeros.

    Args:
        values: (rows, width); each group has as many rows, and they follow each other.
        groups: how many groups.
        visit: of each row, (rows,).
        first: place of each row's first column, (rows,).
        position: of all visits.
        k: how many.
    """
    import torch

    width = max(1, values.shape[1])
    table = keys(values).reshape(groups, -1)
    kth = torch.zeros(groups, 1, dtype=table.dtype, device="cpu")
    if table.shape[1] > k:
        kth = table.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    group, cell = torch.nonzero(table >= kth.clamp(min=1), as_tuple=True)
    row = group * (table.shape[1] // width) + torch.div(cell, width, rounding_mode="floor")
    columns = (group, visit[row], first[row] + cell % width, values[row, cell % width])
    found = Found(*(column.numpy() for column in columns))
    if len(group) > 8 * k * groups:
        kept = _few_ties((table[group, cell] == kth[group, 0]).numpy(), found, position, k)
        found = Found(*(column[kept] for column in found))
    return found


def _few_ties(tied: np.ndarray, found: Found, position: np.ndarray, k: int) -> np.ndarray:
    """Which cells to keep: all that are not tied, and of each group's tied ones the k first by (place, position)."""
    kept = [np.nonzero(~tied)[0]]
    ties = np.nonzero(tied)[0]
    for some in np.split(ties, np.nonzero(np.diff(found.group[ties]))[0] + 1):
        order = found.place[some] * (int(position.max()) + 1) + position[found.visit[some]]
        kept.append(some[np.argpartition(order, k - 1)[:k]] if len(some) > k else some)
    return np.concatenate(kept)


def keys(values: Tensor) -> Tensor:
    """|values| as whole numbers in the same order, zero for zero; all NaN alike and above infinity."""
    import torch

    wide = values.dtype == torch.float64
    bits = values.abs().contiguous().view(torch.int64 if wide else torch.int32)
    infinity = 0x7FF0000000000000 if wide else 0x7F800000
    return bits.clamp(max=infinity + 1)


def _best(found: Found, position: np.ndarray, k: int) -> Found:
    """The k largest of each group, in order."""
    import torch

    key = keys(torch.from_numpy(found.value)).numpy()
    order = np.lexsort((position[found.visit], found.place, -key, found.group))
    group = found.group[order]
    rank = np.arange(len(group)) - np.searchsorted(group, group)
    order = order[rank < k]
    return Found(*(column[order] for column in found))


def _joined(parts: list[Found]) -> Found:
    return parts[0] if len(parts) == 1 else Found(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


# Linear layers with one position per visit --------------------------------------------------------------------------


def _pruned(site: Site, t: Tensors, groups: int, k: int) -> tuple[Found, list[tuple[int, np.ndarray]]]:
    """The largest weight cells (and perhaps more) of each group, and (group, visits) whose cells must be formed.

    With A and D the largest |a| and |d| of a visit, its largest cell is A D. A bound tau comes from k cells that are
    there; units with |d_i| A >= tau and |a_j| D >= tau are candidates, and only their products are formed. Left are
    visits with NaN or infinity, to which this does not apply, and groups with too many candidates (ties).
    """
    import torch

    a, d = (t[slot].reshape(groups, -1, t[slot].shape[2]) for slot in ("a", "d"))
    size_a, size_d = a.abs(), d.abs()
    most_a, most_d = size_a.amax(2), size_d.amax(2)
    odd = ~(torch.isfinite(most_a) & torch.isfinite(most_d))
    for x in (size_a, size_d, most_a, most_d):
        x[odd] = 0.0
    most = most_a * most_d
    tau = _bound(size_a, size_d, most, k)
    group, visit = torch.nonzero((most >= tau) & (most > 0), as_tuple=True)
    limit = tau[group]
    x, y = size_d[group, visit], size_a[group, visit]
    near_d = (x * most_a[group, visit, None] >= limit) & (x > 0)
    near_a = (y * most_d[group, visit, None] >= limit) & (y > 0)
    count = near_d.sum(1) * near_a.sum(1)
    work = torch.zeros(groups, dtype=torch.int64, device="cpu").index_add_(0, group, count)
    feasible = work <= min(MOST_CANDIDATES, a.shape[1] * a.shape[2] * d.shape[2] // 4)
    parts = []
    for some in _batches(torch.where(feasible, work, 0)):
        chosen = torch.nonzero((group >= some.start) & (group < some.stop) & feasible[group])[:, 0]
        i, j, owner = _pairs(near_d[chosen], near_a[chosen])
        row = chosen[owner]
        g, v = group[row], visit[row]
        value = d[g, v, i] * a[g, v, j]
        kept = (value.abs() >= tau[g, 0]) & (value != 0)
        place = j * d.shape[2] + i if closed_linear.is_transposed(site) else i * a.shape[2] + j
        parts.append(Found(*(column[kept].numpy() for column in (g, g * a.shape[1] + v, place, value))))
    formed = [(number, np.nonzero(row)[0]) for number, row in enumerate(odd.numpy()) if row.any()]
    formed += [(number, np.nonzero(~odd[number].numpy())[0]) for number in torch.nonzero(~feasible)[:, 0].tolist()]
    return _joined(parts), [(number, visits + number * a.shape[1]) for number, visits in formed]


def _bound(size_a: Tensor, size_d: Tensor, most: Tensor, k: int) -> Tensor:
    """A value that at least k cells of each group reach, (groups, 1): 0 where that is not known.

    The largest cells of the visits are different cells; so are the largest ones within a few visits, where the k
    largest lie among those of the i-th largest |d| and j-th largest |a| with i j <= k.
    """
    import torch

    groups, visits = most.shape
    probed = most.topk(min(PROBED, visits), dim=1).indices
    every = torch.arange(groups, device="cpu")[:, None]
    large_a = size_a[every, probed].topk(min(k, size_a.shape[2]), dim=2).values
    large_d = size_d[every, probed].topk(min(k, size_d.shape[2]), dim=2).values
    i, j = (torch.from_numpy(n) for n in _under_hyperbola(large_d.shape[2], large_a.shape[2], k))
    cells = (large_d[:, :, i] * large_a[:, :, j]).flatten(1)
    tau = most.new_zeros(groups, 1)
    for known in (most, cells):
        if known.shape[1] >= k:
            tau = torch.maximum(tau, known.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True))
    return tau


@functools.lru_cache(maxsize=64)
def _under_hyperbola(rows: int, columns: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (i, j) from 0 with (i + 1)(j + 1) <= k."""
    i, j = np.indices((rows, columns))
    under = np.argwhere((i + 1) * (j + 1) <= k)
    return under[:, 0].copy(), under[:, 1].copy()


def _batches(work: Tensor) -> Iterator[slice]:
    """Consecutive groups whose candidates together are few enough to be formed at once."""
    done = np.concatenate([[0], np.cumsum(work.numpy())])
    start = 0
    while start < len(work):
        stop = max(start + 1, int(np.searchsorted(done, done[start] + MOST_CANDIDATES, side="right")) - 1)
        yield slice(start, stop)
        start = stop


def _pairs(near_d: Tensor, near_a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every candidate unit of d with every one of a of the same row: units i, j and their row, (m,) each."""
    import torch

    row, i = torch.nonzero(near_d, as_tuple=True)
    _, j = torch.nonzero(near_a, as_tuple=True)
    count = near_a.sum(1)
    first = torch.cumsum(count, 0) - count
    owner, number = expand(count[row])
    return i[owner], j[first[row[owner]] + number], row[owner]
