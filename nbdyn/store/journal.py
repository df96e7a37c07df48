"""The journal: what per-sample capture left of each segment, raw, until it is compacted into compressed arrays.

Training must not wait for compression, and a TileDB fragment costs several times what the bytes do; a plain file
costs a copy. A journal file counts once the `steps` of its segment are committed. Layout: MAGIC, the tensors' bytes
(each aligned to ALIGNMENT), the index as JSON, and FOOTER (place and length of the index, and its CRC-32). The bytes
carry no checksum of their own, which would cost training several per cent; the arrays that they are compacted into do.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nbdyn.errors import CorruptRun
from nbdyn.store.backend import basename, context, is_local, join, reading, tiledb
from nbdyn.store.direct import DirectFile, RemoteFile, address

if TYPE_CHECKING:
    from nbdyn.store.store import Store

MAGIC = b"nbdynJ1\n"
FOOTER = struct.Struct("<QQI8s")
ALIGNMENT = 64
FOLDER = "journal"
DTYPES: dict[str, np.dtype] = {
    "f4": np.dtype("<f4"), "f8": np.dtype("<f8"), "f2": np.dtype("<f2"), "bf2": np.dtype("<u2"),
    "i4": np.dtype("<i4"), "i8": np.dtype("<i8"),
}  # fmt: skip
"""How tensors are stored; "bf2" is the upper half of a float32, kept as its bits."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}
LARGEST, MAX_AXES = 2**40, 16
"""A place in a file and an axis of a tensor are below, and a tensor has at most so many axes: more is no recorder's."""


@dataclass(slots=True, eq=False)
class Entry:
    """One call of one site.

    Attributes:
        step: the step it belongs to.
        batch: the how-manieth batch of the step, from 0.
        position: place of its first visit among those of the step.
        size: how many visits were captured.
        site: number of the site.
        call: the how-manieth call of this site with this batch.
        factor: contribution = factor * what the form gives.
        data: whether slot "a" holds rows of the data set.
        tensors: slot -> array (size, ...) of one of the types in DTYPES.
    """

    step: int
    batch: int
    position: int
    size: int
    site: int
    call: int
    factor: float
    data: bool
    tensors: dict[str, np.ndarray]

    @property
    def dtypes(self) -> dict[str, str]:
        """Slot -> key of DTYPES."""
        return {slot: _CODES[array.dtype] for slot, array in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(array.nbytes for array in self.tensors.values())


@dataclass
class JournalSegment:
    """What one file holds: the sites known so far, tensors recorded by batch only (name -> reason), the calls."""

    sites: list[dict[str, Any]]
    batch_only: dict[str, str]
    entries: list[Entry] = field(default_factory=list)


class JournalWriter:
    """Writes the file of one segment: tensors as they come, the index at the end.

    Args:
        uri: the run.
        ctx: the writer's TileDB context.
        segment: the number that the segment will have.
    """

    def __init__(self, uri: str, ctx: Any, segment: int) -> None:
        path = path_of(uri, segment)
        self._index: list[list[Any]] = []
        if is_local(uri):
            os.makedirs(join(uri, FOLDER), exist_ok=True)
            self._file: DirectFile | RemoteFile = DirectFile(path)
        else:
            self._file = RemoteFile(tiledb().VFS(ctx=ctx).open(path, "wb"))
        self._write(MAGIC)

    def _write(self, data: bytes) -> None:
        self._file.write(np.frombuffer(data, np.uint8))

    def append(self, entries: list[Entry], memory: Sequence[np.ndarray] = ()) -> None:
        """Write the tensors of some calls; their memory may be reused when this returns.

        Args:
            entries: the calls.
            memory: whole pages of memory, (n,) uint8, that tensors lie in; each piece is written as it is.
        """
        pieces = []  # (where it begins and ends in memory, where it begins in the file)
        for piece in memory:
            self._file.fill_page()
            pieces.append((address(piece), address(piece) + len(piece), self._file.place))
            self._file.write(piece)
        places: dict[tuple[int, int], int] = {}  # an input that several sites share is written once
        kept = []  # copies stay alive, so that their addresses stay their own
        for entry in entries:
            slots, dtypes = [], entry.dtypes
            for slot, array in entry.tensors.items():
                flat = np.ascontiguousarray(array).reshape(-1)
                kept.append(flat)
                key = start, _ = address(flat), flat.nbytes
                place = next((at + start - first for first, stop, at in pieces if first <= start < stop), None)
                if place is None and key not in places:
                    self._write(bytes(-self._file.place % ALIGNMENT))
                    places[key] = self._file.place
                    self._file.write(flat.view(np.uint8))
                slots.append([slot, dtypes[slot], array.shape, places[key] if place is None else place])
            head = [entry.step, entry.batch, entry.position, entry.size, entry.site, entry.call]
            self._index.append([*head, entry.factor, entry.data, slots])

    @property
    def nbytes(self) -> int:
        """Bytes written so far."""
        return self._file.place

    def finish(self, sites: list[dict[str, Any]], batch_only: dict[str, str]) -> None:
        """Write the index and close the file."""
        start = self._file.place
        index = json.dumps({"sites": sites, "batch_only": batch_only, "entries": self._index}).encode()
        self._write(index)
        self._write(FOOTER.pack(start, len(index), zlib.crc32(index), MAGIC))
        self._file.close()

    def abandon(self) -> None:
        """Close and remove the file: its segment will not be committed."""
        self._file.abandon()


class Journal:
    """The journal of a run, for reading."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def segments(self, after: int = 0) -> list[int]:
        """Committed segments later than `after` that have a file, in order."""
        return sorted(s for s in numbers(self._store.uri) if after < s <= self._store.timestamp)

    def read(self, segment: int) -> JournalSegment:
        """What a segment's file holds.

        Raises:
            CorruptRun: if the file is cut short or damaged.
        """
        path = path_of(self._store.uri, segment)
        try:
            data = _bytes_of(path)
            if len(data) < FOOTER.size:
                raise ValueError("it is cut short")
            start, length, crc, magic = FOOTER.unpack(data[-FOOTER.size :].tobytes())
            text = data[start : start + length].tobytes()
            whole = magic == MAGIC and start + length + FOOTER.size == len(data) and zlib.crc32(text) == crc
            if not whole:
                raise ValueError("its checksum does not match")
            return _segment(data[:start], text)
        except (ValueError, OSError) as error:
            raise CorruptRun(
                f"cannot read {path}: {error}. Type `python -m nbdyn verify {self._store.uri}` to see what is damaged."
            ) from error


def _segment(data: np.ndarray, text: bytes) -> JournalSegment:
    """What the index says of the bytes before it.

    Raises:
        ValueError: if it is not what a writer writes.
    """
    try:
        index = json.loads(text)
        entries = [_entry(data, row) for row in index["entries"]]
        return JournalSegment(list(index["sites"]), dict(index["batch_only"]), entries)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"its index is damaged ({type(error).__name__}: {error})") from error


def _entry(data: np.ndarray, row: list[Any]) -> Entry:
    step, batch, position, size, site, call, factor, is_data, slots = row
    tensors = {}
    for slot, dtype, shape, place in slots:
        # Looked at before anything is computed from them: [[0], 10**9] has a product, a list of eight gigabytes.
        sound = all(type(n) is int and 0 <= n < LARGEST for n in (place, *shape)) and 1 <= len(shape) <= MAX_AXES
        count = math.prod(shape) * DTYPES[dtype].itemsize if sound else 0
        if not sound or place + count > len(data):
            raise ValueError(f"a tensor of step {str(step)[:20]} lies outside the file or has no shape")
        tensors[slot] = data[place : place + count].view(DTYPES[dtype]).reshape(shape)
    return Entry(step, batch, position, size, site, call, float(factor), bool(is_data), tensors)


def _bytes_of(path: str) -> np.ndarray:
    """The file's bytes, (n,) uint8: mapped where it is local, read where it is not."""
    if is_local(path):
        return np.memmap(path, dtype=np.uint8, mode="r") if os.path.getsize(path) else np.empty(0, np.uint8)
    with reading(path), tiledb().VFS(ctx=context(path)).open(path) as file:
        return np.frombuffer(file.read(), np.uint8)


def path_of(uri: str, segment: int) -> str:
    """The file of a segment."""
    return join(uri, FOLDER, file_name(segment))


def file_name(segment: int) -> str:
    """The name of a segment's file.

    >>> file_name(12)
    '00000012.journal'
    """
    return f"{segment:08d}.journal"


def numbers(uri: str) -> Iterator[int]:
    """The segments that have a file, committed or not, in no order."""
    folder = join(uri, FOLDER)
    if is_local(uri):
        names = os.listdir(folder) if os.path.isdir(folder) else []
    else:
        vfs = tiledb().VFS(ctx=context(uri))
        names = [basename(path) for path in vfs.ls(folder)] if vfs.is_dir(folder) else []
    for name in names:
        stem = name.removesuffix(".journal")
        # No other spelling of a number: it would count a segment twice, or one that is not there.
        if stem.isascii() and stem.isdigit() and name == file_name(int(stem)):
            yield int(stem)


def size(uri: str) -> int:
    """Bytes of all its files."""
    vfs = tiledb().VFS(ctx=context(uri))
    return sum(int(vfs.file_size(path_of(uri, segment))) for segment in numbers(uri))


def remove(uri: str, segments: list[int]) -> None:
    """Remove the files of some segments."""
    vfs = tiledb().VFS(ctx=context(uri))
    for segment in segments:
        vfs.remove_file(path_of(uri, segment))
