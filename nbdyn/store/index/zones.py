"""Zones of the weights: between which values they lay, how near to 0, over blocks of rows and parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nbdyn.store.index.entry import ZONE_PARAMETERS, ZONE_ROWS

if TYPE_CHECKING:
    from nbdyn.store.store import Store

READ_BYTES = 64_000_000
"""Weights are read so many bytes at a time."""


@dataclass(frozen=True)
class Zones:
    """What is known of blocks of weights, (blocks, zones) each; zone z holds parameters 1024 z to 1024 z + 1023.

    Block b of level k holds 16^(k + 1) stored rows and the first row of the next block, so that what happens between
    the two is seen. NaN are left aside; low, high and nearest are NaN where there is nothing else.

    Attributes:
        low: the smallest weight.
        high: the largest weight.
        nearest: the smallest |w|.
        crossings: how many times a weight changed sign or arrived at 0 from one row to the next (as `crosses 0` of the
            language), int32; 2^31 - 1 stands for as many or more.
    """

    low: np.ndarray
    high: np.ndarray
    nearest: np.ndarray
    crossings: np.ndarray

    def columns(self) -> dict[str, np.ndarray]:
        """Name -> values."""
        return dict(vars(self))


Look = Callable[[int, np.ndarray, np.ndarray, np.ndarray], object]


def levels_of(store: Store, known: Zones | None, look: Look | None, advance: Callable[[int], object]) -> list[Zones]:
    """The zones of all stored rows: level 0 of 16 rows, each further one of 16 blocks, up to a single block.

    Cost: one read of the weights.

    Args:
        store: the run.
        known: the first blocks of level 0, as an earlier build found them.
        look: shown the weights as they are read: number of the first row, steps, parameters, values.
        advance: called with the rows done.
    """
    steps, width = store.weights.steps, store.parameters
    blocks, zones = -(-len(steps) // ZONE_ROWS), -(-width // ZONE_PARAMETERS)
    low, high, nearest = (np.empty((blocks, zones), np.float32) for _ in range(3))
    level = Zones(low, high, nearest, np.empty((blocks, zones), np.int32))
    columns = max(1, READ_BYTES // (8 * (ZONE_ROWS + 1) * ZONE_PARAMETERS)) * ZONE_PARAMETERS
    done = 0 if known is None else len(known.low)
    if known is not None:
        for name, found in known.columns().items():
            getattr(level, name)[:done] = found
        advance(done * ZONE_ROWS)
    for block in range(done, blocks):
        rows = steps[block * ZONE_ROWS : (block + 1) * ZONE_ROWS + 1]
        for first in range(0, width, columns):
            chosen = np.arange(first, min(first + columns, width))
            _, values = store.weights.read(chosen, int(rows[0]), int(rows[-1]) + 1)
            if look is not None:
                look(block * ZONE_ROWS, rows, chosen, values)
            where = slice(first // ZONE_PARAMETERS, -(-(first + len(chosen)) // ZONE_PARAMETERS))
            for name, found in _of_rows(values).items():
                getattr(level, name)[block, where] = found
        advance(min(ZONE_ROWS, len(rows)))
    levels = [level]
    while len(levels[-1].low) > 1:
        levels.append(_coarser(levels[-1]))
    return levels


def _of_rows(values: np.ndarray) -> dict[str, np.ndarray]:
    """Zones of some rows, (zones,) each; rounded outwards where weights are wider than the zones' numbers."""
    starts = np.arange(0, values.shape[1], ZONE_PARAMETERS)
    low = np.fmin.reduceat(np.fmin.reduce(values), starts)
    high = np.fmax.reduceat(np.fmax.reduce(values), starts)
    nearest = np.fmin.reduceat(np.fmin.reduce(np.abs(values)), starts)
    before, after = values[:-1], values[1:]
    changed = ((before < 0) & (after >= 0)) | ((before > 0) & (after <= 0))
    crossings = np.add.reduceat(changed.sum(0), starts)
    return {
        "low": _rounded(low, -np.inf), "high": _rounded(high, np.inf), "nearest": _rounded(nearest, -np.inf),
        "crossings": crossings,
    }  # fmt: skip


def _rounded(values: np.ndarray, towards: float) -> np.ndarray:
    """As float32, never on the other side of the value."""
    with np.errstate(over="ignore"):
        found = values.astype(np.float32)
    beyond = found > values if towards < 0 else found < values
    return np.where(beyond, np.nextafter(found, np.float32(towards)), found)


def _coarser(level: Zones) -> Zones:
    """Each ZONE_ROWS blocks as one."""
    starts = np.arange(0, len(level.low), ZONE_ROWS)
    crossings = np.add.reduceat(level.crossings, starts, axis=0, dtype=np.int64)
    return Zones(
        np.fmin.reduceat(level.low, starts, axis=0),
        np.fmax.reduceat(level.high, starts, axis=0),
        np.fmin.reduceat(level.nearest, starts, axis=0),
        np.minimum(crossings, np.iinfo(np.int32).max).astype(np.int32),
    )
