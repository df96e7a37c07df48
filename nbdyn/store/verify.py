"""Is a run whole? What did a killed writer leave behind? And the safe deletion of a run."""

from __future__ import annotations

import numpy as np
import pandas as pd

from nbdyn.errors import NbdynError, RunBusy
from nbdyn.schema import ARRAYS, PART_SNAPSHOT
from nbdyn.store import frames, lock, state
from nbdyn.store.backend import basename, context, join, normalize, object_type, reading, tiledb
from nbdyn.store.layout import MAX_STEP
from nbdyn.store.metadata import read_group, remove_torn
from nbdyn.store.store import Store

BLOCK_BYTES = 64_000_000
"""Weights are read in blocks of about this size."""


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
    return _findings(findings)


def _findings(rows: list[tuple[str, int, str]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["array", "step", "problem"])


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
    removed: list[tuple[str, str, str]] = []
    try:
        removed += [("metadata of the run", file, "torn") for file in remove_torn(store.uri)]
        for name in ARRAYS:
            uri = join(store.uri, name)
            removed += [(name, fragment, "not committed") for fragment in _remove_uncommitted(uri)]
            if name != "notes":  # its fragments carry wall-clock time; every committed one counts
                removed += _remove_unfinished(uri, name, store.timestamp)
    except tiledb().TileDBError as error:
        raise NbdynError(f"cannot clean {store.uri}: {error}. Is it a place that you can write?") from error
    return pd.DataFrame(removed, columns=["array", "fragment", "reason"])


def _remove_uncommitted(uri: str) -> list[str]:
    """Fragment folders that no commit file names."""
    vfs = tiledb().VFS(ctx=context(uri))
    committed = set()
    for path in _list(vfs, join(uri, "__commits")):
        name = basename(path)
        if name.endswith(".wrt"):
            committed.add(name.removesuffix(".wrt"))
        elif name.endswith(".con"):  # consolidated commits list the fragments inside
            with vfs.open(path) as file:
                text = file.read().decode(errors="replace")
            committed |= {basename(line).removesuffix(".wrt") for line in text.split("\n") if line}
    removed = []
    for path in _list(vfs, join(uri, "__fragments")):
        if basename(path) not in committed:
            vfs.remove_dir(path)
            removed.append(basename(path))
    return removed


def _list(vfs: object, uri: str) -> list[str]:
    return list(vfs.ls(uri)) if vfs.is_dir(uri) else []  # type: ignore[attr-defined]


def _remove_unfinished(uri: str, name: str, timestamp: int) -> list[tuple[str, str, str]]:
    """Fragments and array metadata of segments after the last one whose `steps` were committed."""
    fragments = tiledb().array_fragments(uri, ctx=context(uri))
    late = [
        basename(path)
        for path, (start, _) in zip(fragments.uri, fragments.timestamp_range, strict=True)
        if start > timestamp
    ]
    if late:
        tiledb().Array.delete_fragments(uri, timestamp + 1, 2**63 - 1, ctx=context(uri))
    # Metadata files are named __first_last_id: one left behind would rival that of the segment to come.
    vfs = tiledb().VFS(ctx=context(uri))
    for path in _list(vfs, join(uri, "__meta")):
        if int(basename(path).split("_")[2]) > timestamp:
            vfs.remove_file(path)
            late.append(basename(path))
    return [(name, fragment, "of a segment that was never finished") for fragment in late]


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
    if not members <= set(ARRAYS) or not members >= {"steps", "visits"}:
        raise NbdynError(f"{uri} is a TileDB group but no run; nbdyn deletes nothing else. Choose another path.")
    if lock.is_held(uri):
        raise RunBusy(f"{basename(uri)} is being recorded by {lock.holder(uri)}; it cannot be replaced now.")
    vfs = tiledb().VFS(ctx=context(uri))
    known = {*ARRAYS, lock.LOCK_NAME}
    foreign = [name for name in map(basename, vfs.ls(uri)) if name not in known and not name.startswith("__")]
    if foreign:
        raise NbdynError(f"{uri} holds {foreign[0]}, which nbdyn did not write; move it elsewhere, then replace it.")
    vfs.remove_dir(uri)
