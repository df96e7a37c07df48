"""Segments of steps, committed atomically: the rows of `steps` are written last and make the rest visible."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nbdyn.store.backend import join, tiledb


@dataclass
class Segment:
    """Some consecutive steps, ready to be written.

    Attributes:
        start: the first step.
        steps: columns of the `steps` array, each (n,).
        scalars: column name -> values (n,) float64, NaN where a step has none.
        visits: columns of the `visits` array, sorted by (step, position).
        weights: pieces (first step, rows (m, parameters)) of consecutive steps.
        state: (step, part, bytes).
        notes: (step, time in ns, kind, text).
    """

    start: int
    steps: dict[str, np.ndarray] = field(default_factory=dict)
    scalars: dict[str, np.ndarray] = field(default_factory=dict)
    visits: dict[str, np.ndarray] = field(default_factory=dict)
    weights: list[tuple[int, np.ndarray]] = field(default_factory=list)
    state: list[tuple[int, int, bytes]] = field(default_factory=list)
    notes: list[tuple[int, int, str, str]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """How many steps; 0 for the state after the last step alone."""
        return len(self.steps["epoch"]) if self.steps else 0

    def nbytes(self) -> int:
        """Bytes before any filter."""
        columns = [*self.steps.values(), *self.scalars.values(), *self.visits.values()]
        arrays = sum(a.nbytes for a in columns) + sum(rows.nbytes for _, rows in self.weights)
        return arrays + sum(len(data) for _, _, data in self.state)


class SegmentWriter:
    """Writes segments to the arrays of one run, under one timestamp a segment (1, 2, ...).

    A reader opens every array up to the timestamp of the last committed segment, so that what a killed writer
    left of an unfinished one is invisible.
    """

    def __init__(self, uri: str, ctx: Any, segment: int, columns: list[str]) -> None:
        self.uri = uri
        self.ctx = ctx
        self.segment = segment
        self.columns = columns
        self.bytes_written = 0

    def commit(self, segment: Segment) -> None:
        """Write a segment; when this returns, it is on disk."""
        # State after the last step, written at close, belongs to the segment that is committed already.
        number = self.segment + 1 if segment.count else self.segment
        for first, rows in segment.weights:
            self._write_rows(number, first, rows)
        if segment.state:
            self._write_state(number, segment.state)
        if segment.notes:
            write_notes(self.uri, self.ctx, segment.notes)
        if segment.count:
            self._write_scalars(number, segment)
            self._write_visits(number, segment.visits)
            self._write_steps(number, segment)
            self.segment = number
        self.bytes_written += segment.nbytes()

    def _open(self, name: str, number: int) -> Any:
        return tiledb().open(join(self.uri, name), "w", ctx=self.ctx, timestamp=number)

    def _write_rows(self, number: int, first: int, rows: np.ndarray) -> None:
        with self._open("weights", number) as array:
            array[first : first + len(rows), :] = rows.view(f"u{rows.itemsize}")

    def _write_state(self, number: int, state: list[tuple[int, int, bytes]]) -> None:
        steps, parts, blobs = zip(*state, strict=True)
        with self._open("state", number) as array:
            array[np.array(steps, np.uint32), np.array(parts, np.uint32)] = {"data": _cells(blobs)}

    def _write_scalars(self, number: int, segment: Segment) -> None:
        new = [name for name in segment.scalars if name not in self.columns]
        self.columns += new
        table = np.full((segment.count, len(self.columns)), np.nan)
        for name, values in segment.scalars.items():
            table[:, self.columns.index(name)] = values
        with self._open("scalars", number) as array:
            if table.shape[1]:
                array[segment.start : segment.start + segment.count, : table.shape[1]] = table
            if new:
                array.meta["columns"] = json.dumps(self.columns)

    def _write_visits(self, number: int, visits: dict[str, np.ndarray]) -> None:
        if not len(visits["step"]):
            return
        lib = tiledb().libtiledb
        with self._open("visits", number) as array:
            # Global order skips TileDB's sort and a copy: 7 times cheaper than array[coordinates] = values.
            query = lib.Query(self.ctx, lib.Array(self.ctx, array), lib.QueryType.WRITE)
            query.layout = lib.LayoutType.GLOBAL_ORDER
            # The query keeps raw pointers: `visits` must outlive finalize, which it does here.
            for name, values in visits.items():
                # A run that an older nbdyn began has no `target`, and goes on without it.
                if array.schema.domain.has_dim(name) or array.schema.has_attr(name):
                    query.set_data_buffer(name, values, len(values))
            query._submit()
            query.finalize()

    def _write_steps(self, number: int, segment: Segment) -> None:
        columns = segment.steps | {"segment": np.full(segment.count, number, np.int32)}
        with self._open("steps", number) as array:
            array[segment.start : segment.start + segment.count] = columns


def write_notes(uri: str, ctx: Any, notes: list[tuple[int, int, str, str]]) -> None:
    """Append to the logbook of a run: (step, time in ns, kind, text)."""
    steps, times, kinds, texts = zip(*notes, strict=True)
    with tiledb().open(join(uri, "notes"), "w", ctx=ctx) as array:
        array[np.array(steps, np.uint32), np.array(times, np.uint64)] = {
            "kind": _cells([kind.encode() for kind in kinds]),
            "text": _cells([text.encode(errors="replace") for text in texts]),
        }


def now_ns() -> int:
    """Wall-clock time in ns since 1970, the second dimension of `notes`."""
    return time.time_ns()


def _cells(blobs: Any) -> np.ndarray:
    """Bytes as cells of a variable-length uint8 attribute."""
    cells = np.empty(len(blobs), dtype=object)
    for place, blob in enumerate(blobs):
        cells[place] = np.frombuffer(blob, np.uint8)
    return cells
