"""Compaction: what training left raw in the journal, compressed into arrays; nothing is lost whenever it is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from nbdyn.errors import NbdynError
from nbdyn.schema import CAPTURE
from nbdyn.settings import format_size
from nbdyn.store import journal, leftovers
from nbdyn.store.backend import context, is_local, join, tiledb
from nbdyn.store.journal import Journal, JournalSegment
from nbdyn.store.lock import WriterLock
from nbdyn.store.metadata import remove_torn, write_metadata
from nbdyn.store.packer import CellsOf, Packer
from nbdyn.store.store import Store

BLOCK_BYTES = 128_000_000
"""Segments are compacted together, up to about so many bytes; memory used is about three times that."""
PROGRESS_SECONDS = 1.0
"""Compactions that take longer show a bar."""


@dataclass(frozen=True)
class Compaction:
    """What a compaction did: segments taken out of the journal, their bytes there, and in the arrays."""

    segments: int
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        if not self.segments:
            return "nothing to compact"
        sizes = f"{format_size(self.bytes_before)} -> {format_size(self.bytes_after)}"
        return f"{self.segments:,} segment{'s' if self.segments > 1 else ''}, {sizes}"


def compact(
    run: Store | str | os.PathLike[str],
    *,
    progress: bool = True,
    upto: int | None = None,
    locked: bool = False,
    cells: CellsOf | None = None,
) -> Compaction:
    """Move the captures of committed segments from the journal into compressed arrays, block by block.

    A block is committed by the entry `compacted` of the run's metadata; then its journal files are removed. Readers
    open the arrays as of that segment, so that what a killed compaction left is invisible; the next one removes it.

    Args:
        run: a path, or a store as of the steps to compact.
        progress: whether a bar is shown if it takes long.
        upto: the last segment to compact; None for all committed ones.
        locked: whether the caller holds the run's lock: a recorder, for the run that it writes. Otherwise it is taken.
        cells: gives the cells to write out into the array `gradients`.

    Raises:
        RunBusy: if a live writer holds the run.
        CorruptRun: if the journal is damaged.
        NbdynError: if the place cannot be written, or the disk is full.
    """
    store = run if isinstance(run, Store) else Store(run)
    if locked:
        return _compact(store, None, progress, upto, cells)
    try:
        lock = WriterLock(store.uri)
    except OSError as error:
        raise NbdynError(f"cannot write to {store.uri}: {error}.") from error
    try:
        if not is_local(store.uri):
            write_metadata(store.uri, context(store.uri), writer=lock.lease())
        store.refresh()  # a writer may have gone on until just now
        return _compact(store, lock, progress, upto, cells)
    finally:
        if not is_local(store.uri):
            write_metadata(store.uri, context(store.uri), writer="{}")
        lock.release()


def _compact(
    store: Store, lock: WriterLock | None, progress: bool, upto: int | None, cells: CellsOf | None
) -> Compaction:
    from tqdm.auto import tqdm

    uri = store.uri
    vfs = tiledb().VFS(ctx=context(uri))
    try:
        remove_torn(uri)
        leftovers.of_compaction(uri)
        last = store.read_compacted()
        segments = [s for s in Journal(store).segments(after=last) if upto is None or s <= upto]
        if not segments:
            return Compaction(0, 0, 0)
        sizes = {segment: int(vfs.file_size(journal.path_of(uri, segment))) for segment in segments}
        before = _array_bytes(uri)
        bar = tqdm(
            total=sum(sizes.values()), desc=f"compacting {store.name}", unit="B", unit_scale=True, leave=False,
            delay=PROGRESS_SECONDS, disable=not progress,
        )  # fmt: skip
        with bar:
            packer = Packer(store, last, cells)
            for block in _blocks(Journal(store), segments):
                packer.write(block)
                lease = {} if is_local(uri) or lock is None else {"writer": lock.lease()}
                write_metadata(uri, context(uri), compacted=packer.timestamp, **lease)
                journal.remove(uri, list(block))
                bar.update(sum(sizes[segment] for segment in block))
        return Compaction(len(segments), sum(sizes.values()), _array_bytes(uri) - before)
    except tiledb().TileDBError as error:
        raise NbdynError(f"cannot compact {uri}: {error}. What was captured is still whole in its journal.") from error


def _array_bytes(uri: str) -> int:
    vfs = tiledb().VFS(ctx=context(uri))
    folders = [join(uri, name) for name in CAPTURE]
    return sum(int(vfs.dir_size(folder)) for folder in folders if vfs.is_dir(folder))


def _blocks(reader: Journal, segments: list[int]) -> Iterator[dict[int, JournalSegment]]:
    """Consecutive segments of about BLOCK_BYTES together, at least one."""
    block: dict[int, JournalSegment] = {}
    nbytes = 0
    for segment in segments:
        found = reader.read(segment)
        size = sum(entry.nbytes for entry in found.entries)
        if block and nbytes + size > BLOCK_BYTES:
            yield block
            block, nbytes = {}, 0
        block[segment] = found
        nbytes += size
    yield block
