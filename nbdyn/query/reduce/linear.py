"""Linear layers with one position a visit: their cells are single products, so that most sums are matrix products.

    sum over a group of g: D^T A    of |g|: |D|^T |A|    of g^2: (D*D)^T (A*A)    of g != 0: (D != 0)^T (A != 0)

where the rows of D and A are the group's visits. Over a unit, a tensor or a layer the factors are first added up.
"""

# pyright: standard
# numba and torch ship incomplete types.
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from nbdyn.query.evaluate import Array
from nbdyn.query.reduce.measures import LARGEST, MAX, MAX_ABS, of_cells
from nbdyn.query.reduce.members import Members
from nbdyn.store import Store
from nbdyn.store.calls import CALL, LENGTH
from nbdyn.store.closed_tools import used_of
from nbdyn.store.factors import Block
from nbdyn.store.projection import is_projected

if TYPE_CHECKING:
    import torch

FEW = 64
"""So few parameters are read by their columns of the factors, and computed cell by cell."""
CHUNK = 8192
"""Visits of one product in float32: partial sums are added in float64."""


@dataclass(frozen=True)
class Part:
    """The parameters asked for that one linear site holds: rows x columns of its weight block, and some biases.

    Attributes:
        site: number of the site.
        units: the rows of the block, (r,), or of its transpose: places along d.
        inputs: the columns, (c,): places along a.
        weight: (r, c) which of the parameters asked for each element is.
        biases: places along d, (b,).
        bias: (b,) which of the parameters asked for each bias is.
    """

    site: int
    units: Array
    inputs: Array
    weight: Array
    biases: Array
    bias: Array

    @property
    def size(self) -> int:
        """How many parameters it has."""
        return self.weight.size + self.bias.size


def divided(store: Store, indices: Array, start: int, stop: int, *, tokens: bool) -> tuple[list[Part], Array]:
    """The linear parts of some parameters at steps start..stop-1, and the places of those that are in none.

    A site is taken if no other site has its parameters, it is called once a batch, its visits have one position
    (any number of them where `tokens` are members), and the parameters form a block of its weight.
    """
    factors = store.factors
    used = np.zeros(store.parameters, np.int32)
    for site in factors.sites:
        for first, size in site.runs:
            used[first : first + size] += 1
    parts: list[Part] = []
    rest = np.ones(len(indices), dtype=bool)
    for number, site in enumerate(factors.sites):
        if site.form != "linear" or is_projected(site) or site.first is None:
            continue
        calls = factors.calls_of(number, start, stop)
        plain = not calls[:, CALL].any() and (tokens or (calls[:, LENGTH] == 1).all())
        if not plain or any((used[first : first + size] > 1).any() for first, size in site.runs):
            continue
        part = _part(number, site, indices)
        if part is not None:
            parts.append(part)
            rest[np.concatenate([part.weight.reshape(-1), part.bias])] = False
    return parts, np.flatnonzero(rest)


def _part(number: int, site, indices: Array) -> Part | None:
    first, size = site.runs[0]
    places = np.flatnonzero((indices >= first) & (indices < first + size))
    row, column = np.divmod(indices[places] - first, site.shape[1])
    rows, columns = used_of(row, site.shape[0])[0], used_of(column, site.shape[1])[0]
    if len(rows) * len(columns) != len(places):
        return None
    weight = places.reshape(len(rows), len(columns))
    if site.options.get("transposed"):
        rows, columns, weight = columns, rows, weight.T
    bias = np.empty(0, np.int64)
    if site.bias is not None:
        bias = np.flatnonzero((indices >= site.bias) & (indices < site.bias + site.bias_size))
    biases = indices[bias] - (site.bias or 0)
    return Part(number, rows, columns, weight, biases, bias) if len(places) + len(bias) else None


class Rows:
    """The factors of a part in rows sorted by member, those of one visit together.

    Attributes:
        starts: (members + 1,) first row of each member.
        row: (rows,) the row of `members` that each belongs to: its visit.

    With `double` factors are given in float64, for variances, which are differences of sums.
    """

    def __init__(self, store: Store, part: Part, members: Members, *, double: bool = False) -> None:
        self._store, self._part, self._members, self._double = store, part, members, double
        self._columns = _narrow(store, part, members)
        if self._columns:
            blocks = list(store.factors.blocks(part.site, *members.steps, columns=self._columns))
        else:
            blocks = list(store.factors.warm.blocks(part.site, *members.steps))
        found = [_of_block(block, members) for block in blocks]
        code = np.concatenate([code for _, code, _ in found]) if found else np.empty(0, np.int64)
        row = np.concatenate([row for row, _, _ in found]) if found else np.empty(0, np.int64)
        self._order = np.argsort(code, kind="stable")
        self._order = self._order[np.searchsorted(code[self._order], 0) :]
        self.row = row[self._order]
        self.starts = np.searchsorted(code[self._order], np.arange(members.count + 1))
        self._blocks, self._code = blocks, code
        self._scale = np.concatenate([scale for _, _, scale in found]) if found else np.empty(0)

    @cached_property
    def _whole(self) -> dict[str, Array]:
        """Slot -> (rows, units) of all blocks, positions flattened; one block is not copied."""
        slots = {}
        for slot in ("a", "d"):
            pieces = [b.tensors[slot].reshape(-1, b.tensors[slot].shape[-1]) for b in self._blocks]
            slots[slot] = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        return slots

    def __len__(self) -> int:
        return len(self._order)

    def a(self, rows: slice) -> Array:
        """Inputs (n, c) of some of the sorted rows."""
        return self._taken("a", rows, self._part.inputs)

    def d(self, rows: slice, units: Array | None = None) -> Array:
        """Errors (n, r) of some of the sorted rows, times their scale."""
        found = self._taken("d", rows, self._part.units if units is None else units)
        scale = self._scale[self._order[rows]]
        if (scale == 1.0).all():
            return found
        return found * scale.astype(found.dtype)[:, None]

    def unsorted(self) -> tuple[Array, Array, Array] | None:
        """Inputs (n, c), errors (n, r) times their scale and member of each row (-1: none) in the order of training.

        None where a member has several rows. Sorting by member would copy all factors.
        """
        if (np.diff(self.starts) > 1).any() or not len(self):
            return None
        a, d = self._columns_of("a", self._part.inputs), self._columns_of("d", self._part.units)
        return a, d * self._scale.astype(d.dtype)[:, None], self._code.astype(np.int32)

    def _columns_of(self, slot: str, columns: Array) -> Array:
        """Some columns of all rows, unsorted; all of them are not copied."""
        whole = self._whole[slot]
        if slot in self._columns:
            columns = np.searchsorted(self._columns[slot], columns)
        return whole if len(columns) == whole.shape[1] else np.ascontiguousarray(whole[:, columns])

    def _taken(self, slot: str, rows: slice, columns: Array) -> Array:
        import torch

        whole, order = self._whole[slot], self._order[rows]
        if slot in self._columns:
            columns = np.searchsorted(self._columns[slot], columns)
        if 4 * len(columns) < whole.shape[1]:
            taken = whole[order[:, None], columns]
        elif len(order) and order[-1] - order[0] == len(order) - 1 and (np.diff(order) == 1).all():
            taken = whole[order[0] : order[-1] + 1]
        else:
            taken = torch.from_numpy(whole).index_select(0, torch.from_numpy(order)).numpy()
        taken = taken if len(columns) == taken.shape[1] else taken[:, columns]
        return taken.astype(np.float64) if self._double else taken

    @cached_property
    def is_finite(self) -> bool:
        """Whether there is no NaN and no infinity, which a product would spread over whole rows."""
        import torch

        warm, span = self._store.factors.warm, self._members.steps
        if warm.holds(self._part.site, *span):
            return warm.is_finite(self._part.site)
        return all(bool(torch.isfinite(torch.from_numpy(x).sum(0)).all()) for x in self._whole.values())

    def chunks(self) -> Iterator[tuple[int, slice]]:
        """(member, its rows), at most CHUNK rows at a time."""
        for member in range(len(self.starts) - 1):
            for first in range(self.starts[member], self.starts[member + 1], CHUNK):
                yield member, slice(first, min(first + CHUNK, int(self.starts[member + 1])))

    def fold(self, cells: Array, some: slice, targets: Array, out: Array, *, largest: bool) -> None:
        """Bring values (n, targets) of some rows into `out` (members, all targets) by the members of the rows."""
        first = int(np.searchsorted(self.starts, some.start, side="right")) - 1
        stop = int(np.searchsorted(self.starts, some.stop))
        starts = np.maximum(self.starts[first:stop], some.start)
        there = np.diff(np.append(starts, some.stop)) > 0
        fold = np.maximum if largest else np.add
        members = np.arange(first, stop)[there]
        found = fold.reduceat(cells, starts[there] - some.start, axis=0, dtype=np.float64)
        out[np.ix_(members, targets)] = fold(out[np.ix_(members, targets)], found)


def _narrow(store: Store, part: Part, members: Members) -> dict[str, Array]:
    """The columns of factors to read where they are a few of all, for the first question about a site.

    The second one reads it whole, and keeps it in memory.
    """
    if store.factors.warm.was_asked(part.site):
        return {}
    shape = store.factors.sites[part.site].shape
    widths = shape[::-1] if store.factors.sites[part.site].options.get("transposed") else shape
    units = np.union1d(part.units, part.biases)
    found = {"d": (units, widths[0]), "a": (part.inputs, widths[1])}
    return {slot: columns for slot, (columns, width) in found.items() if 0 < 8 * len(columns) < width}


def _of_block(block: Block, members: Members) -> tuple[Array, Array, Array]:
    """Of every row of a block (visits, times positions): its row of `members`, its member, what it is multiplied by."""
    length = next(iter(block.tensors.values())).shape[1]
    row = members.rows_of(block.step, block.position)
    code = np.where(row >= 0, members.code[row], -1) if len(members.key) else np.full(len(row), -1)
    scale = block.factor if members.scale is None else block.factor * np.where(row >= 0, members.scale[row], 1.0)
    if members.by_token:
        token = np.tile(np.arange(length), len(row))
        code = np.repeat(code, length)
        inside = (code >= 0) & (token < members.length)
        code = np.where(inside, code * members.length + token if members.by_token == "token" else token, -1)
        return np.arange(len(code)), code, np.repeat(scale, length)
    return np.repeat(row, length), np.repeat(code, length), np.repeat(scale, length)


def of_weights(rows: Rows, part: Part, operation: str, out: Array) -> None:
    """Add a part's operation into `out` (members, parameters asked for). Not for MAX, MAX_ABS and EXCEED."""
    import torch

    if 0 < part.weight.size <= FEW:
        for first in range(0, len(rows), CHUNK):
            some = slice(first, min(first + CHUNK, len(rows)))
            cells = rows.d(some)[:, :, None] * rows.a(some)[:, None, :]
            rows.fold(of_cells(operation, cells.reshape(len(cells), -1)), some, part.weight.reshape(-1), out,
                      largest=False)  # fmt: skip
    elif part.weight.size:
        whole = part.weight.reshape(-1)
        run = slice(whole[0], whole[-1] + 1) if (np.diff(whole) == 1).all() else None
        device = product_device(4 * CHUNK * sum(part.weight.shape))
        for member, some in rows.chunks():
            a, d = (torch.from_numpy(_each(operation, x(some))).to(device) for x in (rows.a, rows.d))
            found = (d.t() @ a).cpu().numpy()
            if run is None:
                out[member, part.weight] += found
            else:
                out[member, run] += found.reshape(-1)
    for first in range(0, len(rows) if len(part.bias) else 0, CHUNK):
        some = slice(first, min(first + CHUNK, len(rows)))
        rows.fold(_each(operation, rows.d(some, part.biases)), some, part.bias, out, largest=False)


def product_device(nbytes: int) -> torch.device:
    """Where products are made: a GPU, if one is there with room for so many bytes and as many for results.

    Its float32 products are those of the CPU within rounding, unless torch was told to allow less (TF32).
    """
    import torch

    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 4 * nbytes:
        return torch.device("cuda")
    return torch.device("cpu")


def _each(operation: str, x: Array) -> Array:
    """The operation on a factor: a cell's is the product of its factors'."""
    match operation:
        case "sum":
            return x
        case "sum_abs":
            return np.abs(x)
        case "sum_sq":
            return np.square(x)
        case "count":
            return (x != 0).astype(np.float32)
        case _:
            raise TypeError(f"{operation} is no sum of products")


def of_targets(rows: Rows, part: Part, operation: str, code: Array, out: Array) -> None:
    """The operation over whole units or more: into `out` (members, targets), added or, of MAX and MAX_ABS, the largest.

    Args:
        rows: the factors.
        part: the part; each of its units lies in one target wholly.
        operation: any but EXCEED.
        code: target of each parameter asked for.
        out: float64.
    """
    targets, place = np.unique(np.concatenate([code[part.weight[:, :1].reshape(-1)], code[part.bias]]),
                               return_inverse=True)  # fmt: skip
    units, biases = np.split(place, [len(place) - len(part.bias)])
    for first in range(0, len(rows), CHUNK):
        some = slice(first, min(first + CHUNK, len(rows)))
        if part.weight.size:
            cells = _over_inputs(operation, rows.a(some), rows.d(some), units, len(targets))
            rows.fold(cells, some, targets, out, largest=operation in LARGEST)
        if len(part.bias):
            d = np.abs(rows.d(some, part.biases)) if operation == MAX_ABS else rows.d(some, part.biases)
            cells = _gathered(d if operation in LARGEST else _each(operation, d), biases, len(targets), operation)
            rows.fold(cells, some, targets, out, largest=operation in LARGEST)


def _over_inputs(operation: str, a: Array, d: Array, units: Array, targets: int) -> Array:
    """The operation over the inputs and the units of each target, (rows, targets)."""
    if operation == MAX_ABS:
        return _gathered(np.abs(d) * np.abs(a).max(1, keepdims=True), units, targets, operation)
    if operation == MAX:
        largest = np.maximum(d * a.max(1, keepdims=True), d * a.min(1, keepdims=True))
        return _gathered(largest, units, targets, operation)
    inputs = _each(operation, a).sum(1, dtype=np.float64)
    return _gathered(_each(operation, d), units, targets, operation) * inputs[:, None]


def _gathered(x: Array, units: Array, targets: int, operation: str) -> Array:
    """Columns of x added up, or the largest taken, by their target, (rows, targets) float64."""
    order = np.argsort(units, kind="stable")
    starts = np.searchsorted(units[order], np.arange(targets))
    there = np.bincount(units, minlength=targets) > 0
    if len(units) == targets and there.all():
        return x[:, order].astype(np.float64)
    out = np.full((len(x), targets), -np.inf if operation in LARGEST else 0.0)
    reduce = np.maximum.reduceat if operation in LARGEST else np.add.reduceat
    out[:, there] = reduce(x[:, order], starts[there], axis=1, dtype=np.float64)
    return out
