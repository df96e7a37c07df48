"""Is a run whole? What did a killed writer leave behind? And the safe deletion of a run."""

from __future__ import annotations

import numpy as np
import pandas as pd

from nbdyn.errors import NbdynError, RunBusy
from nbdyn.schema import ARRAYS, PART_SNAPSHOT
from nbdyn.store import lock, state
from nbdyn.store.backend import basename, context, join, normalize, object_type, tiledb
from nbdyn.store.store import Store


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
    except NbdynError as error:
        return _findings([("run", -1, str(error))])
    for start in range(0, store.steps_committed, chunk):
        stop = min(start + chunk, store.steps_committed)
        for check in (_check_visits, _check_weights, _check_state):
            try:
                findings += check(store, start, stop)
            except NbdynError as error:
                findings.append((check.__name__.removeprefix("_check_"), start, str(error)))
    return _findings(findings)


def _findings(rows: list[tuple[str, int, str]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["array", "step", "problem"])


def _check_visits(store: Store, start: int, stop: int) -> list[tuple[str, int, str]]:
    rows, visits = store.read_steps(start, stop), store.read_visits(start, stop)
    store.read_scalars(start, stop)
    counted = np.bincount(visits["step"].astype(np.int64) - start, minlength=stop - start)
    wrong = np.nonzero(counted != rows["batch_size"])[0]
    problems = [
        ("visits", start + int(i), f"{counted[i]} visits stored, the step had {rows['batch_size'][i]}") for i in wrong
    ]
    if (np.diff(rows["segment"]) < 0).any():
        problems.append(("steps", start, "segments are out of order"))
    return problems


def _check_weights(store: Store, start: int, stop: int) -> list[tuple[str, int, str]]:
    steps = store.weights.steps
    end = stop + 1 if stop == store.steps_committed else stop
    stored = steps[(steps >= start) & (steps < end)]
    problems = []
    with store.open("weights") as array:
        written = array.nonempty_domain()
    for step in stored:
        if written is None or step > int(written[0][1]):
            problems.append(("weights", int(step), "the row is missing"))
        else:
            store.weights.row(int(step))
    return problems


def _check_state(store: Store, start: int, stop: int) -> list[tuple[str, int, str]]:
    steps = state.places(store, PART_SNAPSHOT)
    for step in steps[(steps >= start) & (steps < stop)]:
        state.read(store, int(step), PART_SNAPSHOT)
    return []


def gc(uri: str) -> pd.DataFrame:
    """Remove what a killed writer left: fragments without a commit, and parts of a segment that was never finished.

    Returns:
        One row a removed fragment: array, fragment, reason.

    Raises:
        RunBusy: if a live writer of another process holds the run.
    """
    store = Store(uri)
    if lock.is_held(store.uri) and lock.holder(store.uri) != "this process":
        raise RunBusy(f"{store.name} is being recorded by {lock.holder(store.uri)}; collect after it has closed.")
    removed: list[tuple[str, str, str]] = []
    for name in ARRAYS:
        removed += [(name, fragment, "not committed") for fragment in _remove_uncommitted(join(store.uri, name))]
        if name != "notes":
            removed += _remove_unfinished(join(store.uri, name), name, store.timestamp)
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
    """Fragments of segments after the last one whose `steps` were committed."""
    fragments = tiledb().array_fragments(uri, ctx=context(uri))
    late = [
        basename(path)
        for path, (start, _) in zip(fragments.uri, fragments.timestamp_range, strict=True)
        if start > timestamp
    ]
    if late:
        tiledb().Array.delete_fragments(uri, timestamp + 1, 2**63 - 1, ctx=context(uri))
    return [(name, fragment, "of a segment that was never finished") for fragment in late]


def delete(uri: str) -> None:
    """Delete a run, and only a run.

    Raises:
        RunBusy: if a live writer holds it.
        NbdynError: if something else is there.
    """
    uri = normalize(uri)
    if object_type(uri) != "group":
        raise NbdynError(f"{uri} is no run; nbdyn deletes nothing else. Choose another path.")
    with tiledb().Group(uri, "r", ctx=context(uri)) as group:
        is_run = "schema" in group.meta or {member.name for member in group} >= {"steps", "visits"}
    if not is_run:
        raise NbdynError(f"{uri} is a TileDB group but no run; nbdyn deletes nothing else. Choose another path.")
    if lock.is_held(uri):
        raise RunBusy(f"{basename(uri)} is being recorded by {lock.holder(uri)}; it cannot be replaced now.")
    tiledb().VFS(ctx=context(uri)).remove_dir(uri)
