"""Loss change allocations on disk: `lca/<name>` of a run, a group of dense arrays that grow step by step.

What counts is what the entry in the group's metadata says, written last: `done` steps, as of a timestamp. A writer that
is killed leaves what it had committed; the next one removes what it had not, and goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbdyn.errors import CorruptRun, NbdynError
from nbdyn.schema import LCA
from nbdyn.store import leftovers
from nbdyn.store.backend import basename, context, is_local, join, object_type, reading, tiledb
from nbdyn.store.layout import MAX_STEP, add_members, allocation_schemas
from nbdyn.store.lock import WriterLock, is_held
from nbdyn.store.metadata import read_group, write_metadata

ENTRY = "allocation"
CHECKED_STEPS = 64
"""Cells are checked so many steps at a time."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
ROWS = ("steps", "tensors", "units", "groups", "parts", "cells")
"""Arrays with a row a step."""
SUMS = ("parameters", "unit_groups")
"""Arrays of what is summed over all steps so far."""

_SPEC = {"objective", "precision", "steps", "cells", "parts"}
_LABELS = {"steps", "kind", "groups", "shares", "of", "size", "parts", "version"}
"""What a spec and labels hold at least (`nbdyn.analysis.lca.compute.Task`)."""

Columns = Mapping[str, Mapping[str, np.ndarray]]
"""Array -> attribute -> values; of ROWS (steps, ...)."""


@dataclass(frozen=True)
class Entry:
    """What is there.

    Attributes:
        timestamp: the arrays count as of it.
        done: steps that are allocated.
        spec: what was asked for, JSON-able: one taken up again must be the same.
        status: "running" or "complete".
        labels: names of groups, parts and so on, JSON-able.
    """

    timestamp: int
    done: int
    spec: dict[str, Any]
    labels: dict[str, Any]
    status: str


class Archive:
    """One allocation of a run.

    Args:
        uri: the run.
        name: of the allocation: letters, digits, ".", "_" and "-".

    Raises:
        NbdynError: if that is no name.
    """

    def __init__(self, uri: str, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise NbdynError(f'name={name!r}: letters, digits, ".", "_" and "-", such as "validation".')
        self.run, self.name, self.uri = uri, name, join(uri, LCA, name)
        self._lock: WriterLock | None = None

    def entry(self) -> Entry | None:
        """What is there, None for nothing.

        Raises:
            CorruptRun: if it is damaged.
        """
        if object_type(self.uri) != "group":
            return None
        text = read_group(self.uri)[0].get(ENTRY)
        if not text:
            return None
        try:
            found = Entry(**json.loads(text))
            whole = all(type(n) is int and 0 <= n < MAX_STEP for n in (found.timestamp, found.done))
            if not whole or found.status not in ("running", "complete"):
                raise ValueError("its numbers")
            if not (isinstance(found.spec, dict) and isinstance(found.labels, dict)):
                raise ValueError("its description")
            if not (set(found.spec) >= _SPEC and set(found.labels) >= _LABELS):
                raise ValueError("its description")
        except (ValueError, TypeError, RecursionError) as error:
            raise self._damaged(str(error)) from error
        return found

    # Writing ------------------------------------------------------------------------------------------------------

    def lock(self) -> None:
        """Become the only writer.

        Raises:
            RunBusy: if another process computes this allocation.
            NbdynError: if the place cannot be written.
        """
        ctx = context(self.run)
        with self._writing():
            for group, member in ((join(self.run, LCA), self.run), (self.uri, join(self.run, LCA))):
                if object_type(group) is None:
                    tiledb().Group.create(group, ctx=ctx)
                if basename(group) not in read_group(member)[1]:
                    add_members(member, ctx, [basename(group)])
            self._lock = WriterLock(self.uri) if is_local(self.uri) else None

    def clean(self) -> leftovers.Removed:
        """Remove what a killed writer left; for who holds the lock, or knows that nobody does."""
        entry = self.entry()
        if entry is None:
            return []
        with self._writing():
            arrays = self._arrays(tiledb().VFS(ctx=context(self.uri)))
            return [found for name in arrays for found in leftovers.of_array(self.uri, name, entry.timestamp)]

    @contextlib.contextmanager
    def _writing(self, kept: str = "") -> Iterator[None]:
        try:
            yield
        except (tiledb().TileDBError, OSError) as error:
            raise NbdynError(f"cannot write to {self.uri}: {error}.{kept}") from error

    def create(self, spec: dict[str, Any], labels: dict[str, Any], first: Columns, sums: Columns) -> None:
        """Begin anew: the arrays, shaped as the first rows and the sums are.

        Raises:
            NbdynError: if the place cannot be written.
        """
        with self._writing(" 0 steps are kept."):
            self._remove_arrays()
            self._create_arrays(first, sums)
            self._commit(Entry(1, 0, spec, labels, "running"))

    def _remove_arrays(self) -> None:
        vfs, ctx = tiledb().VFS(ctx=context(self.run)), context(self.run)
        write_metadata(self.uri, ctx, **{ENTRY: ""})
        for name in self._arrays(vfs):
            with tiledb().Group(self.uri, "w", ctx=ctx) as group:
                if name in read_group(self.uri)[1]:
                    group.remove(name)
            vfs.remove_dir(join(self.uri, name))

    def _create_arrays(self, first: Columns, sums: Columns) -> None:
        ctx = context(self.run)
        shapes = {name: next(iter(values.values())).shape[1:] for name, values in first.items()}
        shapes |= {name: next(iter(values.values())).shape for name, values in sums.items()}
        shapes = {name: shape for name, shape in shapes.items() if 0 not in shape}
        arrays = {**first, **sums}
        attributes = {name: {attr: x.dtype for attr, x in arrays[name].items()} for name in shapes}
        for name, schema in allocation_schemas(ctx, shapes, attributes).items():
            tiledb().Array.create(join(self.uri, name), schema, ctx=ctx)
        add_members(self.uri, ctx, list(shapes))

    def append(self, rows: Columns, sums: Columns, complete: bool) -> None:
        """Write further steps, the sums over all steps so far, and the entry that makes both count.

        Raises:
            NbdynError: if the disk is full; what was committed before is whole.
        """
        entry = self.entry()
        assert entry is not None
        count = len(rows["steps"]["loss"]) if rows else 0
        stamp, stop = entry.timestamp + 1, entry.done + count
        with self._writing(f" {entry.done:,} steps are kept."):
            for name, values in rows.items():
                if count and 0 not in next(iter(values.values())).shape:
                    with self._open(name, "w", stamp) as array:
                        array[entry.done : stop] = {attr: np.ascontiguousarray(x) for attr, x in values.items()}
            for name, values in sums.items():
                if 0 not in next(iter(values.values())).shape:
                    with self._open(name, "w", stamp) as array:
                        array[:] = dict(values)
            status = "complete" if complete else "running"
            self._commit(Entry(stamp, stop, entry.spec, entry.labels, status))
            self._drop_sums(entry.timestamp)

    def _drop_sums(self, timestamp: int) -> None:
        """Remove sums that newer ones have replaced, but for the last, which somebody may be reading."""
        for name in self._arrays(tiledb().VFS(ctx=context(self.uri))) if timestamp > 2 else ():
            if name in SUMS:
                tiledb().Array.delete_fragments(join(self.uri, name), 0, timestamp - 1, ctx=context(self.uri))

    def close(self) -> None:
        """Let others write."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _commit(self, entry: Entry) -> None:
        write_metadata(self.uri, context(self.uri), **{ENTRY: json.dumps(vars(entry))})

    def _arrays(self, vfs: Any) -> list[str]:
        return [name for name in (*ROWS, *SUMS) if vfs.is_dir(join(self.uri, name))]

    def _open(self, name: str, mode: str, timestamp: Any) -> Any:
        return tiledb().open(join(self.uri, name), mode, ctx=context(self.uri), timestamp=timestamp)

    # Reading ------------------------------------------------------------------------------------------------------

    def read(self, entry: Entry) -> dict[str, dict[str, np.ndarray]]:
        """Everything but the cells: array -> attribute -> values.

        Raises:
            CorruptRun: if it is damaged.
        """
        names = self._arrays(tiledb().VFS(ctx=context(self.uri)))
        found: dict[str, dict[str, np.ndarray]] = {}
        for name in (*ROWS[:-1], *SUMS):
            if name in names:
                with reading(join(self.uri, name)), self._open(name, "r", (0, entry.timestamp)) as array:
                    self._check_extent(array, name, entry)
                    rows = slice(None) if name in SUMS else slice(0, entry.done)
                    # One by one: where a file is torn, TileDB's parallel read of all of them can crash the process.
                    kept = [array.schema.attr(number).name for number in range(array.schema.nattr)]
                    found[name] = {attr: array.query(attrs=[attr])[rows][attr] for attr in kept}
        missing = self._expected(entry) - set(names)
        if missing:
            raise self._damaged(f"{min(missing)} is missing")
        return found

    def _expected(self, entry: Entry) -> set[str]:
        """The arrays that there have to be."""
        some = {"groups": entry.labels["groups"], "unit_groups": entry.labels["groups"], "parts": entry.labels["parts"],
                "cells": entry.spec["cells"]}  # fmt: skip
        return {name for name in (*ROWS, *SUMS) if some.get(name, True)}

    def _check_extent(self, array: Any, name: str, entry: Entry) -> None:
        """Raise CorruptRun unless an array reaches as far as the entry says; TileDB would give fill values."""
        filled = array.nonempty_domain()
        if filled is None or (name in ROWS and filled[0][1] + 1 < entry.done):
            raise self._damaged(f"{name} ends before step {entry.done:,}")

    def _damaged(self, why: str) -> CorruptRun:
        return CorruptRun(f"{self.uri} is damaged ({why}); compute it anew with replace=True.")

    def check_rows(self, entry: Entry) -> None:
        """Raise CorruptRun if no fragment covers some of the steps."""
        for name in self._expected(entry) & set(ROWS):
            uri = join(self.uri, name)
            with reading(uri):
                fragments = tiledb().array_fragments(uri, ctx=context(uri))
            covered = np.zeros(entry.done, bool)
            for domain, (written, _) in zip(fragments.nonempty_domain, fragments.timestamp_range, strict=True):
                if written <= entry.timestamp:
                    covered[int(domain[0][0]) : int(domain[0][1]) + 1] = True
            if not covered.all():
                raise self._damaged(f"{name} of step {int(np.argmin(covered)):,} is missing")

    def cells(self, entry: Entry, start: int, stop: int, indices: np.ndarray | slice, group: int = 0) -> np.ndarray:
        """A[t, i] of steps start <= t < stop, counted from the first, (steps, parameters) float32.

        Where cells are kept by class, group 0 is A itself, and 1 + n that of the n-th class.
        """
        which = (slice(group, group + 1),) if entry.spec["cells"] == "classes" else ()
        with reading(join(self.uri, "cells")), self._open("cells", "r", (0, entry.timestamp)) as array:
            self._check_extent(array, "cells", entry)
            if isinstance(indices, slice) or not len(indices):
                found = array[(slice(start, stop), *which, slice(None))]["value"].reshape(stop - start, -1)
                return found[:, indices]
            low, high = int(indices.min()), int(indices.max()) + 1
            found = array[(slice(start, stop), *which, slice(low, high))]["value"].reshape(stop - start, -1)
            return found[:, indices - low]

    def nbytes(self) -> int:
        """Bytes on disk."""
        return int(tiledb().VFS(ctx=context(self.uri)).dir_size(self.uri))


def names(uri: str) -> list[str]:
    """The allocations of a run."""
    group = join(uri, LCA)
    vfs = tiledb().VFS(ctx=context(uri))
    if not vfs.is_dir(group):
        return []
    found = sorted(basename(path) for path in vfs.ls(group) if _NAME.fullmatch(basename(path)))
    return [name for name in found if _is_there(Archive(uri, name))]


def _is_there(archive: Archive) -> bool:
    """Whether something was computed; of what is damaged, its reader says so."""
    try:
        entry = archive.entry()
    except CorruptRun:
        return True
    return entry is not None and entry.done > 0


def check(uri: str) -> list[str]:
    """Read all allocations of a run; what is wrong with them."""
    problems = []
    for name in names(uri):
        archive = Archive(uri, name)
        try:
            entry = archive.entry()
            assert entry is not None
            archive.read(entry)
            archive.check_rows(entry)
            for start in range(0, entry.done if entry.spec["cells"] else 0, CHECKED_STEPS):
                stop = min(start + CHECKED_STEPS, entry.done)
                for group in range(1 + len(entry.labels["groups"]) * (entry.spec["cells"] == "classes")):
                    archive.cells(entry, start, stop, slice(None), group)
        except CorruptRun as error:
            problems.append(str(error))
    return problems


def clean(uri: str) -> leftovers.Removed:
    """Remove what killed writers left."""
    removed: leftovers.Removed = []
    for name in names(uri):
        archive = Archive(uri, name)
        if not is_held(archive.uri):  # somebody is at it
            with contextlib.suppress(CorruptRun):  # `check` tells
                removed += [(join(LCA, name, array), fragment, why) for array, fragment, why in archive.clean()]
    return removed
