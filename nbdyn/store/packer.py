"""The writing side of compaction: appends blocks of the journal to streams, the table of calls and `gradients`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nbdyn.errors import CorruptRun
from nbdyn.schema import CAPTURE
from nbdyn.store import calls, layout, streams
from nbdyn.store.backend import context, join, reading, tiledb
from nbdyn.store.calls import Sites, split_shape
from nbdyn.store.distinct import KNOWN_MOST, Distinct, keys_of
from nbdyn.store.journal import Entry, JournalSegment
from nbdyn.store.sites import Site
from nbdyn.store.store import Store
from nbdyn.store.streams import FACTORS, REFERENCE, ROWS, Stream

GRADIENTS = "gradients"
Cells = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Written-out cells: step, parameter, sample, value, each (n,)."""
CellsOf = Callable[[list[Entry], list[Site]], Cells | None]
"""Which cells of some calls to write out, given the run's sites (which the entries' `site` numbers); None for none."""


@dataclass(eq=False)
class _Tail:
    """Where a stream is appended to.

    Attributes:
        rows, data_rows, keys: how many its three arrays have.
        end: how many `rows` will be with those that wait.
        distinct: what is known of its distinct rows.
        waiting: calls and tensors to append.
    """

    stream: Stream
    rows: int = 0
    end: int = 0
    data_rows: int = 0
    keys: int = 0
    distinct: Distinct | None = None
    waiting: list[tuple[Entry, np.ndarray]] = field(default_factory=list)


class Packer:
    """Appends blocks of journal segments to the arrays, each under the number of its last segment as timestamp.

    Nothing that it writes counts until the run's metadata names that segment.

    Args:
        store: the run.
        compacted: the segment up to which the arrays count; nothing later lies in them.
        cells: gives the cells to write out.
    """

    def __init__(self, store: Store, compacted: int, cells: CellsOf | None) -> None:
        self._store, self._uri, self._ctx = store, store.uri, context(store.uri)
        self._began = self.timestamp = compacted
        self._cells = cells
        self._sites = Sites(store.parameters)
        self._said: dict[str, Any] = {}
        self._calls = 0
        self._tails: dict[tuple[Any, ...], _Tail] = {}
        if not compacted:
            self._create()
            return
        self._calls = len(calls.read_table(store, compacted, self._sites))
        for number in range(calls.count_streams(self._uri, compacted)):
            stream = streams.load(self._uri, number, compacted)
            if stream is None:
                raise CorruptRun(f"{join(self._uri, FACTORS, str(number))} is damaged; restore the run from a copy.")
            rows = self._length(stream.uri)
            tail = _Tail(stream, rows, rows)
            if stream.data:
                tail.data_rows, tail.keys = self._length(stream.rows_uri), self._length(stream.keys_uri)
            self._tails[_key(stream)] = tail
        self._said = self._description()

    def _create(self) -> None:
        schemas = {
            calls.ARRAY: layout.calls_schema(self._ctx, len(calls.FIELDS)),
            GRADIENTS: layout.gradients_schema(self._ctx, self._store.parameters),
        }
        for name, schema in schemas.items():
            tiledb().Array.create(join(self._uri, name), schema, ctx=self._ctx)
        for name in (FACTORS, ROWS):
            tiledb().Group.create(join(self._uri, name), ctx=self._ctx)
        layout.add_members(self._uri, self._ctx, list(CAPTURE))

    def _length(self, name: str) -> int:
        uri = join(self._uri, name)
        with reading(uri), tiledb().open(uri, ctx=self._ctx, timestamp=(0, self._began)) as array:
            return streams.length(array)

    def write(self, block: dict[int, JournalSegment]) -> None:
        """Append some segments (number -> what its file holds).

        Raises:
            CorruptRun: if they hold what no recorder writes.
            TileDBError: if they cannot be written.
        """
        self.timestamp = max(block)
        entries: list[Entry] = []
        for segment in block.values():
            calls.number(segment, self._sites)
            entries += [entry for entry in segment.entries if entry.nbytes]
        entries.sort(key=lambda e: (e.step, e.batch, e.site, e.call))
        seen: dict[tuple[Any, ...], tuple[int, int]] = {}
        places = [self._place(entry, seen) for entry in entries]
        for tail in self._tails.values():
            if tail.waiting:
                self._append_data(tail) if tail.stream.data else self._append(tail)
                tail.rows, tail.waiting = tail.end, []
        known = self._sites.known
        rows = [calls.row_of(entry, known[entry.site], place) for entry, place in zip(entries, places, strict=True)]
        table = calls.as_table(rows)
        calls.check(self._store, table, len(known))
        self._write_calls(table)
        found = self._cells(entries, known) if self._cells is not None and entries else None
        if found is not None and len(found[0]):
            self._write_cells(*found)

    def _place(self, entry: Entry, seen: dict[tuple[Any, ...], tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Stream and row of each slot of a call; its tensors wait there to be written.

        Args:
            entry: the call.
            seen: places of the block's tensors by their memory: an input that several sites share is stored once.
        """
        form, places = self._sites.known[entry.site].form, {}
        for slot, tensor in entry.tensors.items():
            length, shape = split_shape(form, slot, tensor.shape[1:])
            what = (slot, form, entry.dtypes[slot], shape, entry.data and slot == "a")
            memory = (tensor.__array_interface__["data"][0], tensor.shape, *what)
            if memory not in seen:
                tail = self._tail(entry, what)
                seen[memory] = tail.stream.number, tail.end
                tail.waiting.append((entry, tensor))
                tail.end += entry.size * (1 if tail.stream.data else length)
            places[slot] = seen[memory]
        return places

    def _tail(self, entry: Entry, what: tuple[Any, ...]) -> _Tail:
        key = (entry.site, entry.call, *what)
        if key not in self._tails:
            stream = Stream(len(self._tails), *key)
            streams.create(self._uri, self._ctx, stream, self.timestamp)
            self._tails[key] = _Tail(stream)
        return self._tails[key]

    def _append(self, tail: _Tail) -> None:
        tensors = [tensor.reshape(-1, tail.stream.columns) for _, tensor in tail.waiting]
        self._write(tail.stream.uri, tail.rows, tensors)

    def _append_data(self, tail: _Tail) -> None:
        """Append rows of the data set: those whose content is new for their sample, and where each visit's lies."""
        stream = tail.stream
        if tail.distinct is None:
            tail.distinct = Distinct(self._known(stream, tail.keys))
        samples = self._samples([entry for entry, _ in tail.waiting])
        rows, keys, places = [], [], []
        first, done = tail.data_rows, 0
        for height, group in itertools.groupby((t for _, t in tail.waiting), lambda t: t[0].size // stream.columns):
            tensors = np.concatenate(list(group))
            found = keys_of(samples[done : done + len(tensors)], tensors)
            place, new, table = tail.distinct.place(found, tail.data_rows, height)
            rows.append(tensors[new].reshape(-1, stream.columns))
            keys.append(table)
            places.append(place.astype(REFERENCE).reshape(-1, 1))
            tail.data_rows += len(rows[-1])
            done += len(tensors)
        self._write(stream.rows_uri, first, rows)
        self._write(stream.keys_uri, tail.keys, keys)
        self._write(stream.uri, tail.rows, places)
        tail.keys += sum(map(len, keys))

    def _known(self, stream: Stream, count: int) -> np.ndarray:
        """The keys stored last."""
        if not count:
            return np.empty((0, 3), np.uint64)
        uri = join(self._uri, stream.keys_uri)
        with reading(uri), tiledb().open(uri, ctx=self._ctx, timestamp=(0, self._began)) as array:
            return array[max(0, count - KNOWN_MOST) : count, :]["bits"]

    def _samples(self, entries: list[Entry]) -> np.ndarray:
        """Sample ids of the visits of some calls."""
        steps = np.repeat([entry.step for entry in entries], [entry.size for entry in entries])
        positions = [
            entry.tensors["p"].astype(np.int64) if "p" in entry.tensors else entry.position + np.arange(entry.size)
            for entry in entries
        ]
        return self._store.sample_ids(steps, np.concatenate(positions))

    def _write(self, name: str, first: int, parts: list[np.ndarray]) -> None:
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if len(rows):
            with self._open(name) as array:
                array[first : first + len(rows), :] = np.ascontiguousarray(rows).view(f"u{rows.itemsize}")

    def _open(self, name: str) -> Any:
        return tiledb().open(join(self._uri, name), "w", ctx=self._ctx, timestamp=self.timestamp)

    # What is said of them --------------------------------------------------------------------------------------

    def _write_calls(self, table: np.ndarray) -> None:
        with self._open(calls.ARRAY) as array:
            if len(table):
                array[self._calls : self._calls + len(table), :] = table
            if (said := self._description()) != self._said:
                for key, value in said.items():
                    array.meta[key] = value
                self._said = said
        self._calls += len(table)

    def _description(self) -> dict[str, Any]:
        """What stands beside the table of calls."""
        sites = json.dumps([site.to_json() for site in self._sites.known])
        return {"sites": sites, "batch_only": json.dumps(self._sites.batch_only), "streams": len(self._tails)}

    def _write_cells(self, step: np.ndarray, parameter: np.ndarray, sample: np.ndarray, value: np.ndarray) -> None:
        """Append cells in global order: see `layout.gradients_schema`."""
        order = np.lexsort((sample, parameter, step))
        columns = {
            "step": step[order].astype(np.uint32),
            "parameter": parameter[order].astype(layout.parameter_dtype(self._store.parameters)),
            "sample": sample[order].astype(np.int64),
            "value": value[order].astype(np.float32),
        }
        lib = tiledb().libtiledb
        with self._open(GRADIENTS) as array:
            query = lib.Query(self._ctx, lib.Array(self._ctx, array), lib.QueryType.WRITE)
            query.layout = lib.LayoutType.GLOBAL_ORDER
            # The query keeps raw pointers: `columns` must outlive finalize, which it does here.
            for name, values in columns.items():
                query.set_data_buffer(name, values, len(values))
            query._submit()
            query.finalize()


def _key(stream: Stream) -> tuple[Any, ...]:
    return stream.site, stream.call, stream.slot, stream.form, stream.dtype, stream.shape, stream.data
