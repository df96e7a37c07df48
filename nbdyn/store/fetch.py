"""Reading the tensors of chosen visits: ranges of rows of the streams, or pieces of the journal's files."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from nbdyn.errors import CorruptRun, Incompatible
from nbdyn.store import streams
from nbdyn.store.backend import context, join, reading, tiledb
from nbdyn.store.calls import JOURNALED, LENGTH, NONE, STREAM, Calls, Kind, check_shapes, kinds_of
from nbdyn.store.journal import Entry, Journal
from nbdyn.store.streams import SEQUENCES, SLOTS, Stream, expand, read_rows, read_visits, value_dtype, values_of

if TYPE_CHECKING:
    from nbdyn.store.store import Store

ROWS_BYTES = 256_000_000
"""Rows of the data set are kept in memory up to this size once as many were read one by one: later epochs pick them
at random."""
SEGMENTS_KEPT = 2
MAX_CELLS = 2**31
"""A tensor of one visit has at most so many cells: more is no recorder's, but a damaged or hostile number."""


class Moved(Exception):
    """A segment is in the journal no more: a compaction took it."""


class Fetch:
    """Reads the tensors of one site.

    Args:
        store: the run.
        calls: its table of calls.
        site: number of the site.
        columns: slot -> the columns that are wanted.
    """

    def __init__(self, store: Store, calls: Calls, site: int, columns: dict[str, np.ndarray]) -> None:
        self._store = store
        self._site = calls.sites.known[site]
        self._columns = {slot: np.asarray(wanted, np.int64) for slot, wanted in columns.items()}
        self._checked: set[tuple[int, ...]] = set()
        self._segments: dict[int, list[Entry]] = {}
        self._data: dict[int, _Data] = {}
        self.update(calls)

    def update(self, calls: Calls) -> None:
        """Take a newer table of the same calls."""
        self._calls = calls
        for known in (self._checked, self._segments, self._data):
            known.clear()

    # What a visit needs ----------------------------------------------------------------------------------------

    def visit_bytes(self, calls: np.ndarray) -> np.ndarray:
        """Bytes of the tensors of a visit of each of some calls, (V,)."""
        kinds, _, which = kinds_of(self._calls.table, calls, [LENGTH, STREAM, STREAM + 2])
        each = [self._bytes_of(int(length), (int(first), int(second))) for length, first, second in kinds]
        return np.array(each, np.int64)[which]

    def check(self, call: int) -> None:
        """Raise CorruptRun unless a call's tensors are what the site's form asks for; `visit_bytes` does so, too."""
        length, first, second = (int(n) for n in self._calls.table[call, [LENGTH, STREAM, STREAM + 2]])
        self._check(length, (first, second))

    def _bytes_of(self, length: int, numbers: tuple[int, int]) -> int:
        self._check(length, numbers)
        total = 0
        for slot, number in zip(SLOTS[self._site.form], numbers, strict=False):
            kind = self._kind(number, slot)
            self._check_columns(slot, kind)
            shape = self._shape(slot, length, kind.shape)
            total += math.prod(shape) * value_dtype(kind.dtype).itemsize
        return total

    def _check(self, length: int, numbers: tuple[int, int]) -> None:
        """Raise CorruptRun unless these streams hold what the site's form asks for."""
        if (length, *numbers) in self._checked:
            return
        slots = SLOTS[self._site.form]
        if any(number != NONE for number in numbers[len(slots) :]):
            raise CorruptRun(f"a call of {self._site.name} has more tensors than its form; restore the run.")
        kinds = {slot: self._kind(number, slot) for slot, number in zip(slots, numbers, strict=False)}
        shapes = {slot: self._with_length(slot, length, kind.shape) for slot, kind in kinds.items()}
        check_shapes(self._site, shapes, {slot: kind.dtype for slot, kind in kinds.items()})
        if max(map(math.prod, shapes.values())) > MAX_CELLS:
            raise CorruptRun(f"a visit of {self._site.name} with tensors of shapes {shapes}: no recorder wrote that.")
        self._checked.add((length, *numbers))

    def _check_columns(self, slot: str, kind: Kind) -> None:
        wanted = self._columns.get(slot)
        if wanted is not None and len(wanted) and not (wanted.min() >= 0 and wanted.max() < kind.shape[-1]):
            raise Incompatible(
                f'slot "{slot}" of {self._site.name} has {kind.shape[-1]} columns; found {wanted.max()}.'
            )

    def _kind(self, number: int, slot: str) -> Kind:
        """What a stream, or a kind of the journal's slots, holds for a slot."""
        if number == NONE:
            raise CorruptRun(f"a call of {self._site.name} lacks a tensor; restore the run from a copy.")
        if number <= JOURNALED:
            return self._calls.kinds[JOURNALED - number]
        stream = self._stream(number)
        if (stream.form, stream.slot) != (self._site.form, slot):
            raise CorruptRun(f"a call of {self._site.name} names stream {number}, which is none of its {slot!r}.")
        return Kind(stream.dtype, stream.shape)

    def _stream(self, number: int) -> Stream:
        known = self._calls.streams
        if number not in known:
            stream = streams.load(self._store.uri, number, self._calls.compacted)
            if stream is None:
                raise CorruptRun(f"{join(self._store.uri, streams.FACTORS, str(number))} is missing or of another run.")
            known[number] = stream
        return known[number]

    def _shape(self, slot: str, length: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a visit's part as it is handed out."""
        shape = self._with_length(slot, length, shape)
        return (*shape[:-1], len(self._columns[slot])) if slot in self._columns else shape

    def _with_length(self, slot: str, length: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (length, *shape) if (self._site.form, slot) in SEQUENCES else shape

    # Positions -------------------------------------------------------------------------------------------------

    def fill_positions(self, calls: np.ndarray, owner: np.ndarray, position: np.ndarray) -> None:
        """Put the positions of visits of which not all were captured in place.

        Args:
            calls: rows of the table of calls.
            owner: (V,) the call of each visit, by its place in `calls`.
            position: (V,) changed in place.
        """
        numbers = self._calls.table[calls, STREAM + 4]
        for number in np.unique(numbers[numbers != NONE]):
            visits = np.nonzero(numbers[owner] == number)[0]
            chosen = calls[owner[visits]]
            kind = self._kind(int(number), "p")
            if kind.shape or kind.dtype[0] != "i":
                raise CorruptRun(f"the positions of {self._site.name} are {kind}: none of a recorder's.")
            offset = visits - np.searchsorted(owner, owner[visits])
            position[visits] = self._values(STREAM + 4, "p", chosen, offset, 1)[:, 0]

    # Tensors ---------------------------------------------------------------------------------------------------

    def tensor(self, place: int, slot: str, calls: np.ndarray, offset: np.ndarray) -> np.ndarray:
        """A slot of some visits, (V, ...); their calls have one length and one stream of it.

        Args:
            place: of the slot in its form.
            slot: its name.
            calls: (V,) rows of the table of calls, ascending.
            offset: (V,) places within the calls.
        """
        column = STREAM + 2 * place
        length, number = (int(n) for n in self._calls.table[calls[0], [LENGTH, column]])
        shape = self._kind(number, slot).shape
        rows = length if (self._site.form, slot) in SEQUENCES else 1
        values = self._values(column, slot, calls, offset, rows)
        if slot == "ids" and len(values) and not (values.min() >= -1 and values.max() < self._site.shape[0]):
            raise CorruptRun(f"{self._site.name} has ids beyond its {self._site.shape[0]} rows; restore the run.")
        return values.reshape(len(calls), *self._shape(slot, length, shape))

    def _values(self, column: int, slot: str, calls: np.ndarray, offset: np.ndarray, rows: int) -> np.ndarray:
        """Rows of a slot, `rows` a visit: (V * rows, columns) of what readers get."""
        number = int(self._calls.table[calls[0], column])
        wanted = self._columns.get(slot)
        if wanted is not None and not len(wanted):
            return np.empty((len(calls) * rows, 0), value_dtype(self._kind(number, slot).dtype))
        if number <= JOURNALED:
            return self._journaled(slot, self._kind(number, slot), calls, offset, wanted)
        stream = self._stream(number)
        first = self._calls.table[calls, column + 1]
        if stream.data:
            data = self._data.setdefault(number, _Data(stream, wanted))
            with self._open(stream.uri) as array:
                places = read_visits(array, first + offset, 1)[:, 0].astype(np.int64)
            with self._open(stream.rows_uri) as array:
                bits = data.read(array, places, rows)
        else:
            with self._open(stream.uri) as array:
                bits = read_visits(array, first + offset * rows, rows, wanted)
        return values_of(bits, stream.dtype)

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[Any]:
        uri = join(self._store.uri, name)
        at = (0, self._calls.compacted)
        with reading(uri), tiledb().open(uri, ctx=context(self._store.uri), timestamp=at) as array:
            yield array

    def _journaled(
        self, slot: str, kind: Kind, calls: np.ndarray, offset: np.ndarray, columns: np.ndarray | None
    ) -> np.ndarray:
        parts = []
        bounds = np.r_[0, np.nonzero(np.diff(calls))[0] + 1, len(calls)]
        for a, b in itertools.pairwise(bounds):
            entry = self._entry(int(calls[a]))
            tensor = entry.tensors[slot]
            whole = b - a == len(tensor)
            part = tensor if whole else tensor[offset[a:b]]
            part = part.reshape(-1, math.prod(kind.shape))
            parts.append(part if columns is None else part[:, columns])
        bits = np.concatenate(parts)
        return values_of(bits.view(f"u{bits.itemsize}"), kind.dtype)

    def _entry(self, call: int) -> Entry:
        """A journaled call."""
        segment, place = int(self._calls.segment[call]), int(self._calls.table[call, STREAM + 1])
        if segment not in self._segments:
            try:
                found = Journal(self._store).read(segment)
            except CorruptRun as error:
                if self._store.read_compacted() >= segment:
                    raise Moved from error
                raise
            while len(self._segments) >= SEGMENTS_KEPT:
                del self._segments[next(iter(self._segments))]
            self._segments[segment] = found.entries
        return self._segments[segment][place]


class _Data:
    """The distinct rows of a stream: picked from the array, until that has cost as much as reading all of them."""

    def __init__(self, stream: Stream, columns: np.ndarray | None) -> None:
        self._columns = columns
        width = stream.columns if columns is None else len(columns)
        self._row_bytes = width * stream.row_bytes // stream.columns
        self._picked = 0
        self._all: np.ndarray | None = None

    def read(self, array: Any, places: np.ndarray, rows: int) -> np.ndarray:
        """The rows of some visits, (V * rows, columns), from the first row of each."""
        total, tile = streams.length(array), int(array.schema.domain.dim(0).tile)
        if self._all is None:
            self._picked += len(np.unique(places // tile)) * tile
            if self._picked <= 2 * total or total * self._row_bytes > ROWS_BYTES:
                return read_visits(array, places, rows, self._columns)
            tiles = np.arange(0, total, tile)
            self._all = read_rows(array, tiles, np.minimum(tile, total - tiles), self._columns)
        if len(places) and not (places.min() >= 0 and places.max() + rows <= total):
            raise CorruptRun(f"the visits of {array.uri} lie outside it; restore the run from a copy.")
        return self._all[expand(places, np.full(len(places), rows))]
