"""Any cells at all, in pieces of bounded memory: visits of any layer, batch gradients, weights and their changes."""

# pyright: standard
# torch ships incomplete types.
from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from nbdyn.query.evaluate import Array
from nbdyn.query.reduce.measures import BEYOND, CELLS, EXCEED, LARGEST, Condition, of_cells
from nbdyn.query.reduce.members import PLACES, Members
from nbdyn.query.reduce.targets import Targets
from nbdyn.store import Store
from nbdyn.store.gradients import Gradients

PIECE_BYTES = 64_000_000

Piece = tuple[Array, Array, Array]
"""Keys of rows (n,), global parameter indices (m,) and cells (n, m)."""


def visit_pieces(store: Store, indices: Array, members: Members) -> Iterator[Piece]:
    """Cells of visits, times their scale.

    Raises:
        NotRecorded: if some of them were not captured.
    """
    start, stop = members.steps
    captured = store.factors.steps
    steps = captured[(captured >= start) & (captured < stop)]
    steps = steps[np.isin(steps, np.unique(members.key // PLACES))]
    samples = _some_samples(store, members)
    cells = Gradients(store)[steps, indices] if samples is None else Gradients(store)[steps, indices, samples]
    for block in cells.blocks(PIECE_BYTES):
        visits = block.visits
        key = visits["step"].to_numpy() * PLACES + visits["position"].to_numpy()
        row = members.rows_of(visits["step"].to_numpy(), visits["position"].to_numpy())
        values = block.values
        if members.scale is not None and len(members.scale):
            scale = np.where(row >= 0, members.scale[row], 1.0)
            values = values if (scale == 1.0).all() else (values * scale[:, None]).astype(values.dtype)
        yield key, block.parameters, values


def _some_samples(store: Store, members: Members) -> Array | None:
    """The samples whose visits are needed, where they are a few of all: the others need not be read."""
    if "sample" not in members.labels or len(members.labels) > 1000:
        return None
    return members.labels["sample"].to_numpy()


def reduced(
    pieces: Iterator[Piece],
    members: Members,
    targets: Targets,
    operations: tuple[str, ...],
    threshold: Callable[[Array, Array], Array | float],
    condition: Condition = BEYOND,
) -> tuple[dict[str, Array], int]:
    """Each operation over the cells of every member and target, (members, targets) float64; NaN are left out.

    Args:
        pieces: the cells.
        members: of the rows.
        targets: of the parameters.
        operations: which; of EXCEED the condition says whether NaN counts.
        threshold: keys of rows and parameters -> what EXCEED compares with, to be broadcast over (rows, parameters).
        condition: of EXCEED.

    Returns:
        The values, and how many cells were NaN.
    """
    shape = members.count, targets.count
    out = {name: np.full(shape, -np.inf if name in LARGEST else 0.0) for name in operations}
    missing = 0
    for key, indices, cells in pieces:
        row = np.minimum(np.searchsorted(members.key, key), max(0, len(members.key) - 1))
        there = members.key[row] == key
        code, cells = members.code[row[there]], cells[there]
        target = targets.code[np.searchsorted(targets.indices, indices)]
        nan = np.isnan(cells)
        missing += int(nan.sum())
        for name in operations:
            values = of_cells(name, cells, threshold(key[there], indices), condition)
            if missing and name != EXCEED and (name != CELLS or EXCEED not in operations):
                values = np.where(nan, -np.inf if name in LARGEST else 0.0, values)
            _fold(out[name], _by_target(values, target, name), _distinct(target), code, name)
    return out, missing


def _distinct(target: Array) -> Array:
    return target if (np.diff(target) > 0).all() else np.unique(target)


def _by_target(values: Array, target: Array, name: str) -> Array:
    """Columns added up by target, or the largest taken, in the order of np.unique(target)."""
    if (len(target) > 1 and (np.diff(target) > 0).all()) or len(target) == 1:
        return values
    order = np.argsort(target, kind="stable")
    starts = np.flatnonzero(np.diff(target[order], prepend=-1))
    columns = values if (np.diff(order) == 1).all() else values[:, order]
    fold = np.maximum if name in LARGEST else np.add
    return fold.reduceat(columns, starts, axis=1, dtype=np.float64)


def _fold(out: Array, values: Array, targets: Array, code: Array, name: str) -> None:
    """Bring rows into their members."""
    if not len(code):
        return
    order = np.argsort(code, kind="stable")
    starts = np.flatnonzero(np.diff(code[order], prepend=-1))
    fold = np.maximum if name in LARGEST else np.add
    rows = values if (np.diff(order) == 1).all() else values[order]
    found = rows if len(starts) == len(rows) else fold.reduceat(rows, starts, axis=0, dtype=np.float64)
    at = np.ix_(code[order][starts], targets)
    out[at] = fold(out[at], found)
