"""Cells written out into the sparse array `gradients`: read by step, parameter and sample."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nbdyn.store.backend import join, object_type, reading

if TYPE_CHECKING:
    from nbdyn.store.store import Store

ARRAY = "gradients"
MOST_RANGES = 2000
"""More ranges than these are read as one and picked from: TileDB plans each of them."""


class Coo(NamedTuple):
    """Cells in coordinates, (n,) each: steps, global parameter indices and sample ids int64, values."""

    step: np.ndarray
    parameter: np.ndarray
    sample: np.ndarray
    value: np.ndarray

    def take(self, places: np.ndarray) -> Coo:
        """Some of the cells."""
        return Coo(self.step[places], self.parameter[places], self.sample[places], self.value[places])

    @staticmethod
    def join(parts: list[Coo], dtype: np.dtype | type = np.float32) -> Coo:
        """Several as one; of `dtype` where there are none."""
        none = np.empty(0, np.int64)
        parts = [part for part in parts if len(part.step)] or [Coo(none, none, none, np.empty(0, dtype))]
        step, parameter, sample, value = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Coo(step, parameter, sample, value)


class WrittenCells:
    """The written-out cells of a run; it may have none.

    Args:
        store: the run.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    @cached_property
    def exists(self) -> bool:
        """Whether the run has such an array."""
        return object_type(join(self._store.uri, ARRAY)) == "array"

    def steps(self, start: int, stop: int) -> np.ndarray:
        """Steps start <= t < stop of which cells are written out, sorted."""
        if not self.exists or stop <= start:
            return np.empty(0, np.int64)
        with self._store.open(ARRAY) as array, reading(array.uri):
            found = array.query(attrs=[], dims=["step"], order="U").multi_index[start : stop - 1]
        return np.unique(found["step"]).astype(np.int64)

    def read(self, steps: np.ndarray, indices: np.ndarray, samples: np.ndarray | None) -> Coo:
        """The cells at some steps of some parameters and samples (None: all), sorted by step, sample, parameter.

        A sample that was visited twice in a step may have two cells with the same coordinates.
        """
        if not self.exists or not len(steps) or not len(indices):
            return Coo.join([])
        wanted = [_ranges(steps), _ranges(indices), slice(None) if samples is None else _ranges(samples)]
        with self._store.open(ARRAY) as array, reading(array.uri):
            cells = array.query(order="U").multi_index[tuple(wanted)]
        step, parameter, sample = (np.asarray(cells[name]).astype(np.int64) for name in Coo._fields[:3])
        found = Coo(step, parameter, sample, np.asarray(cells["value"]))
        kept = np.isin(found.step, steps) & np.isin(found.parameter, indices)
        if samples is not None:
            kept &= np.isin(found.sample, samples)
        found = found.take(np.nonzero(kept)[0])
        return found.take(np.lexsort((found.value, found.parameter, found.sample, found.step)))


def _ranges(numbers: np.ndarray) -> list[Any]:
    """Inclusive slices for `multi_index` that hold the numbers; one for all of them where there would be many."""
    unique = np.unique(numbers)
    cuts = np.nonzero(np.diff(unique) > 1)[0]
    if not len(unique):
        return []
    if len(cuts) >= MOST_RANGES:
        return [slice(int(unique[0]), int(unique[-1]))]
    starts, stops = unique[np.r_[0, cuts + 1]], unique[np.r_[cuts, len(unique) - 1]]
    return [slice(a, b) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
