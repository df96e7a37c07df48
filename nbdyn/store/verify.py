"""Is a run whole? What did a killed writer leave behind? And the safe deletion of a run."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from nbdyn.errors import NbdynError, RunBusy
from nbdyn.schema import ARRAYS, CAPTURE, LCA, PART_SNAPSHOT, SUMMARY
from nbdyn.store import allocations, calls, frames, journal, leftovers, lock, state, streams
from nbdyn.store.backend import basename, context, join, normalize, object_type, reading, tiledb
from nbdyn.store.index import entry as index_entry
from nbdyn.store.index.read import open_index
from nbdyn.store.layout import MAX_STEP
from nbdyn.store.metadata import read_group, remove_torn
from nbdyn.store.store import Store

BLOCK_BYTES = 64_000_000
"""Weights are read in blocks of about this size."""
CELL_STEPS = 1024
KEY_ROWS = 2**20
"""Written-out cells and keys of rows are read so many steps, or rows, at a time."""


def verify(uri: str, chunk: int = 4096) -> pd.DataFrame:
    """Read every committed byte of a run and check that its parts agree.

    Cost: one full read. Checksums protect all arrays but the weights of every step (these are checked for
    presence and shape).

    Args:
        uri: the run.
        chunk: steps read at a time.

    Returns:
        One row a finding: array, step, problem. Empty if the run is whole.
    """
    findings: list[tuple[str, int, str]] = []
    try:
        store = Store(uri)
        frames.notes(store)
    except NbdynError as error:
        return _findings([("run", -1, str(error))])
    for start in range(0, store.steps_committed, chunk):
        stop = min(start + chunk, store.steps_committed)
        for check in (_check_visits, _check_scalars, _check_weights, _check_state):
            try:
                findings += check(store, start, stop)
            except NbdynError as error:
                findings.append((check.__name__.removeprefix("_check_"), start, str(error)))
    try:
        captured = _check_capture(store)
    except NbdynError as error:
        captured = [("factors", -1, str(error))]
    findings += _check_index(store)
    findings += [(LCA, -1, problem) for problem in allocations.check(store.uri)]
    known = {problem for _, _, problem in findings}  # damaged visits are met again by every site
    for finding in captured:
        if finding[2] not in known:
            known.add(finding[2])
            findings.append(finding)
    return _findings(findings)


def _findings(rows: list[tuple[str, int, str]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["array", "step", "problem"])


def _check_index(store: Store) -> list[tuple[str, int, str]]:
    """Read the indexes, if there are any; that a run has none, or that they do not reach its end, is no problem."""
    try:
        index = open_index(store)
        if index is not None:
            index.check()
    except NbdynError as error:
        return [(SUMMARY, -1, str(error))]
    return []


def _check_visits(store: Store, start: int, stop: int) -> list[tuple[str, int, str]]:
    rows, visits = store.read_steps(start, stop), store.read_visits(start, stop)
    counted = np.bincount(visits["step"].astype(np.int64) - start, minlength=stop - start)
    wrong = np.nonzero(counted != rows["batch_size"])[0]
    problems = [
        ("visits", start + int(i), f"{counted[i]} visits stored, the step had {rows['batch_size'][i]}") for i in wrong
    ]
    if (np.diff(rows["segment"]) < 0).any():
        problems.append(("steps", start, "segments are out of order"))
    return problems


def _check_scalars(store: Store, start: int, stop: int) -> list[tuple[str, int, str]]:
    store.read_scalars(start, stop)
    if not store.columns:
        return [("scalars", start, "the names of its columns are missing")]
    return _missing(store, "scalars", np.arange(start, stop))


def _check_weights(store: Store, start: int, stop: int) -> list[tuple[str, int, str]]:
    steps = store.weights.steps
    end = stop + 1 if stop == store.steps_committed else stop
    stored = steps[(steps >= start) & (steps < end)]
    problems = _missing(store, "weights", stored)
    if not problems:
        everything = np.arange(store.parameters)
        for first, last in _blocks(store, stored):
            store.weights.read(everything, first, last + 1)
    return problems


def _blocks(store: Store, steps: np.ndarray) -> list[tuple[int, int]]:
    """First and last step of each block of some steps, as many as fit into BLOCK_BYTES."""
    rows = max(1, BLOCK_BYTES // (store.parameters * 8))
    return [(int(steps[i]), int(steps[min(i + rows, len(steps)) - 1])) for i in range(0, len(steps), rows)]


def _missing(store: Store, name: str, steps: np.ndarray) -> list[tuple[str, int, str]]:
    """Steps that no fragment of a dense array covers: reading them would give fill values, not an error."""
    uri = join(store.uri, name)
    with reading(uri):
        fragments = tiledb().array_fragments(uri, ctx=context(uri))
        covered = np.zeros(len(steps), dtype=bool)
        for domain, (written, _) in zip(fragments.nonempty_domain, fragments.timestamp_range, strict=True):
            if written <= store.timestamp:
                covered |= (steps >= domain[0][0]) & (steps <= domain[0][1])
    return [(name, int(step), "the row is missing") for step in steps[~covered]]


def _check_state(store: Store, start: int, stop: int) -> list[tuple[str, int, str]]:
    snapshots = state.places(store, PART_SNAPSHOT)
    for step in snapshots[(snapshots >= start) & (snapshots <= stop)]:
        state.read(store, int(step), PART_SNAPSHOT)
    for first, last in _blocks(store, np.arange(start, stop)):
        with store.open("state") as array, reading(array.uri):
            for parts in (slice(0, PART_SNAPSHOT - 1), slice(PART_SNAPSHOT + 1, MAX_STEP - 1)):
                array.query(order="U").multi_index[first:last, parts]
    every = store.config["every"]
    due = np.arange(-(-start // every) * every, stop, every)
    return [("state", int(step), "the snapshot is missing") for step in np.setdiff1d(due, snapshots)]


def _check_capture(store: Store) -> list[tuple[str, int, str]]:
    """Read everything that was captured of single samples: the journal, the table of calls, every call's tensors."""
    if not store.has_factors:
        return []
    problems: list[tuple[str, int, str]] = []
    factors, end = store.factors, store.steps_committed
    for number, _ in enumerate(factors.sites):
        try:
            for block in factors.blocks(number, 0, end):
                del block
        except NbdynError as error:
            problems.append(("factors", -1, str(error)))
    compacted = store.read_compacted()
    if compacted:
        for name in (streams.FACTORS, streams.ROWS):  # groups are there for other programs
            uri = join(store.uri, name)
            with reading(uri), tiledb().Group(uri, ctx=context(uri)) as group:
                list(group)
        problems += _holes(store, compacted)
        _read_unread(store, compacted)
    return problems


def _holes(store: Store, compacted: int) -> list[tuple[str, int, str]]:
    """Rows of the appended arrays that no fragment covers: reading them would give fill values, not an error."""
    problems = []
    for name in (calls.ARRAY, *streams.arrays(store.uri, calls.count_streams(store.uri, compacted))):
        uri = join(store.uri, name)
        with reading(uri):
            fragments = tiledb().array_fragments(uri, ctx=context(uri))
        ends = [(0, 0)]
        for domain, (written, _) in zip(fragments.nonempty_domain, fragments.timestamp_range, strict=True):
            if written <= compacted:
                ends.append((int(domain[0][0]), int(domain[0][1]) + 1))
        ends.sort()
        problems += [
            (name, -1, f"rows {stop:,} to {start:,} are missing")
            for (_, stop), (start, _) in itertools.pairwise(ends)
            if start > stop
        ]
    return problems


def _read_unread(store: Store, compacted: int) -> None:
    """Read what no reader of factors needs, so that its checksums are compared: written-out cells, keys of rows."""
    at = {"ctx": context(store.uri), "timestamp": (0, compacted)}
    uri = join(store.uri, "gradients")
    with reading(uri), tiledb().open(uri, **at) as array:
        for start in range(0, store.steps_committed, CELL_STEPS):
            array.query(order="U").multi_index[start : start + CELL_STEPS - 1]
    for name in streams.arrays(store.uri, calls.count_streams(store.uri, compacted)):
        if name.endswith("-keys"):
            uri = join(store.uri, name)
            with reading(uri), tiledb().open(uri, **at) as array:
                for start in range(0, streams.length(array), KEY_ROWS):
                    array[start : min(start + KEY_ROWS, streams.length(array)), :]


def gc(uri: str) -> pd.DataFrame:
    """Remove what a killed writer left: fragments without a commit, and parts of a segment that was never finished.

    Returns:
        One row a removed file or folder: array, fragment, reason.

    Raises:
        RunBusy: if a live writer holds the run.
        NbdynError: if the place cannot be written.
    """
    store = Store(uri)
    if lock.is_held(store.uri):
        raise RunBusy(f"{store.name} is being recorded by {lock.holder(store.uri)}; collect after it has closed.")
    return collect(store)


def collect(store: Store) -> pd.DataFrame:
    """`gc` for a caller that holds the run's lock, or knows that nobody does."""
    try:
        removed = [("metadata of the run", file, "torn") for file in remove_torn(store.uri)]
        removed += leftovers.of_segments(store.uri, store.timestamp)
        removed += leftovers.of_compaction(store.uri)
        removed += index_entry.clean(store.uri)
        removed += allocations.clean(store.uri)
    except tiledb().TileDBError as error:
        raise NbdynError(f"cannot clean {store.uri}: {error}. Is it a place that you can write?") from error
    return pd.DataFrame(removed, columns=["array", "fragment", "reason"])


def delete(uri: str) -> None:
    """Delete a run, and only a run.

    Raises:
        RunBusy: if a live writer holds it.
        NbdynError: if something else is there, or something else lies inside.
    """
    uri = normalize(uri)
    if object_type(uri) != "group":
        raise NbdynError(f"{uri} is no run; nbdyn deletes nothing else. Choose another path.")
    _, members = read_group(uri)
    if not members <= {*ARRAYS, *CAPTURE, SUMMARY, LCA} or not members >= {"steps", "visits"}:
        raise NbdynError(f"{uri} is a TileDB group but no run; nbdyn deletes nothing else. Choose another path.")
    if lock.is_held(uri):
        raise RunBusy(f"{basename(uri)} is being recorded by {lock.holder(uri)}; it cannot be replaced now.")
    vfs = tiledb().VFS(ctx=context(uri))
    known = {*ARRAYS, *CAPTURE, SUMMARY, LCA, journal.FOLDER, lock.LOCK_NAME}
    foreign = [name for name in map(basename, vfs.ls(uri)) if name not in known and not name.startswith("__")]
    if foreign:
        raise NbdynError(f"{uri} holds {foreign[0]}, which nbdyn did not write; move it elsewhere, then replace it.")
    vfs.remove_dir(uri)
