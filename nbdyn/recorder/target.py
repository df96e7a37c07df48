"""Where a recording goes: the free name, the lock, the metadata; what `mode` means."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass, field
from typing import Any

from nbdyn.errors import Incompatible, NbdynError, RunBusy
from nbdyn.recorder import session
from nbdyn.schema import ARRAYS
from nbdyn.settings import say
from nbdyn.store import Store, layout, verify
from nbdyn.store.backend import context, is_local, normalize, object_type, tiledb
from nbdyn.store.lock import LOCK_NAME, WriterLock, holder, is_held
from nbdyn.store.metadata import write_metadata
from nbdyn.store.sites import Site


@dataclass
class Target:
    """An open run to write to: its lock is held.

    Attributes:
        uri: the run; `shown` is how the user wrote it.
        config: its metadata.
        start: number of the next step (0 for a new run).
        epochs: passes recorded so far.
        seconds: wall time of the last recorded step.
        segment, columns: where the writer goes on.
        size: bytes that the run had when it was opened.
        status: what it was marked before.
    """

    uri: str
    shown: str
    config: dict[str, Any]
    lock: WriterLock
    start: int = 0
    epochs: int = 0
    seconds: float = 0.0
    segment: int = 0
    columns: list[str] = field(default_factory=list)
    size: int = 0
    status: str = "interrupted"
    _sources: list[Any] = field(default_factory=list)

    def store(self) -> Store:
        """The run, opened for reading."""
        return Store(self.uri)

    def sites(self) -> list[Site]:
        """The per-sample sites that a run to resume has met already, in their order."""
        return self.store().factors.sites if self.start else []

    def source_of(self, dataset: Any) -> int:
        """The number of a data set among those seen, by identity; new ones are described in the metadata."""
        for number, known in enumerate(self._sources):
            if known is dataset:
                return number
        described = {"type": type(dataset).__name__, "size": _length(dataset)}
        if dataset is None:
            described = {"type": "ids given by rec.batch", "size": None}
        number = len(self._sources)
        self._sources.append(dataset)
        # A resumed run meets the same data sets again, as new objects, in the same order.
        if number >= len(self.config["sources"]) or self.config["sources"][number] != described:
            self.config["sources"] = [*self.config["sources"][:number], described]
        return number

    def write_metadata(self, ctx: Any, **entries: Any) -> None:
        """Update the group's metadata."""
        write_metadata(self.uri, ctx, **entries)

    def give_back(self) -> None:
        """Nothing will be recorded after all: mark the run as it was, release the lock."""
        try:
            self.write_metadata(context(self.uri), status=self.status)
        finally:
            self.lock.release()


def open_target(path: str | os.PathLike[str], mode: str, config: dict[str, Any]) -> Target:
    """Create or reopen a run for writing.

    Raises:
        RunBusy: if a live writer of another process holds it.
        NbdynError: if the place cannot be written, or holds something else.
        Incompatible: if a run to resume has other parameters or another optimizer.
    """
    uri, shown = normalize(path), os.fspath(path)
    if uri in session.recording():
        session.close_superseded(uri)
    exists = _exists(uri)
    if exists and (is_local(uri) or object_type(uri) == "group") and is_held(uri):
        raise RunBusy(
            f"{shown} is being recorded by {holder(uri)}; wait for it, stop it, or record under another name."
        )
    try:
        if mode == "resume" and exists:
            return _reopen(uri, shown, config)
        if mode == "resume":
            say(f"nothing to resume at {shown}; a new run begins.")
        if exists and mode == "replace":
            verify.delete(uri)
        elif exists:
            uri, shown = _free_name(uri, shown)
        return _create(uri, shown, config)
    except (OSError, tiledb().TileDBError) as error:
        reason = str(error).splitlines()[0]
        raise NbdynError(f"cannot record to {shown}: {reason}. Give a path in a folder that you can write.") from error


def _exists(uri: str) -> bool:
    """Whether anything is at the URI; an empty folder is nothing."""
    if not is_local(uri):
        return object_type(uri) is not None
    if not os.path.isdir(uri):
        return os.path.lexists(uri)
    try:
        return bool(os.listdir(uri))
    except PermissionError:
        return True


def _create(uri: str, shown: str, config: dict[str, Any]) -> Target:
    """A new run. On a local disk the lock comes first: of two processes that want the name, one gets it."""
    ctx = context(uri)
    if not is_local(uri):
        layout.create(uri, config, ctx)
        target = Target(uri, shown, config, WriterLock(uri))
        target.write_metadata(ctx, writer=target.lock.lease())
        return target
    os.makedirs(uri, exist_ok=True)
    lock = None
    try:
        lock = WriterLock(uri)
        if object_type(uri) is not None:
            raise RunBusy(f"another process has recorded to {shown} just now; record again, or under another name.")
        layout.create(uri, config, ctx)
    except RunBusy:
        if lock is not None:
            lock.release()
        raise
    except BaseException:  # also an interrupt: what was created so far is no run
        if lock is not None:
            lock.release()
        _remove_beginnings(uri)
        raise
    return Target(uri, shown, config, lock)


def _remove_beginnings(uri: str) -> None:
    """Remove what `_create` may have made, and the folder if nothing else is in it."""
    for name in (*ARRAYS, "__meta", "__group"):
        shutil.rmtree(os.path.join(uri, name), ignore_errors=True)
    with contextlib.suppress(OSError):
        for name in ("__tiledb_group.tdb", LOCK_NAME):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(uri, name))
        os.rmdir(uri)


def _reopen(uri: str, shown: str, config: dict[str, Any]) -> Target:
    store = Store(uri)
    _check_same_training(store, config)
    before = store.status
    lock = WriterLock(uri)
    try:
        store.refresh()  # another writer may have gone on until just now
        verify.collect(store)
        end = store.steps_committed
        rows = store.read_steps(end - 1, end) if end else {}
        lease = {} if is_local(uri) else {"writer": lock.lease()}
        write_metadata(uri, context(uri), status="recording", **lease)
        _say_differences(store, config)
        return Target(
            uri,
            shown,
            store.config,
            lock,
            start=end,
            epochs=int(rows["epoch"][0]) + 1 if rows else 0,
            seconds=float(rows["seconds"][0]) if rows else 0.0,
            segment=store.timestamp,
            columns=list(store.columns),
            status=before,
            size=int(tiledb().VFS(ctx=context(uri)).dir_size(uri)),
        )
    except BaseException:
        lock.release()
        raise


def _check_same_training(store: Store, config: dict[str, Any]) -> None:
    """The same parameters in the same order, and the same kind of optimizer."""
    here = {t["name"]: t["shape"] for t in config["tensors"]}
    there = {t["name"]: t["shape"] for t in store.config["tensors"]}
    if list(here.items()) != list(there.items()) or config["row_dtype"] != store.config["row_dtype"]:
        differing = [name for name in {**there, **here} if here.get(name) != there.get(name)]
        what = ", ".join(differing[:5]) or ("dtype" if list(here) == list(there) else "the order of its tensors")
        raise Incompatible(
            f'cannot resume {store.name}: this model differs from its own in {what}; use the same model, or mode="new".'
        )
    ours, theirs = config["optimizer"]["name"], store.config["optimizer"]["name"]
    if ours != theirs:
        raise Incompatible(
            f"cannot resume {store.name}, which {theirs} trained, with {ours}: the state of one is nothing to the "
            'other; use the same optimizer, or mode="new".'
        )


def _say_differences(store: Store, config: dict[str, Any]) -> None:
    """A resumed run keeps the settings it was begun with."""
    words = {"weights": "weights", "every": "snapshot_every"}
    kept = [f"{word}={store.config[key]!r}" for key, word in words.items() if config[key] != store.config[key]]
    if kept:
        say(f"{store.name} was begun with {' and '.join(kept)}, and goes on so.")


def _free_name(uri: str, shown: str) -> tuple[str, str]:
    number = 2
    while _exists(f"{uri}-{number}"):
        number += 1
    say(f"{shown} exists; recording to {shown}-{number} instead.")
    return f"{uri}-{number}", f"{shown}-{number}"


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None


def finish_metadata(target: Target, ctx: Any, status: str, end: int | None) -> None:
    """Write what close knows: the status, the data sets met, and the seam where a row after the last step lies."""
    if end is not None and end not in target.config["seams"]:
        target.config["seams"] = [*target.config["seams"], end]
    lease = {} if is_local(target.uri) else {"writer": "{}"}  # given back, so that the run can be resumed at once
    target.write_metadata(ctx, config=json.dumps(target.config), status=status, **lease)
