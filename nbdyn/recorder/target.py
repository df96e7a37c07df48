"""Where a recording goes: the free name, the lock, the metadata; what `mode` means."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

from nbdyn.errors import Incompatible, NbdynError, RunBusy
from nbdyn.recorder import session
from nbdyn.settings import say
from nbdyn.store import Store, layout, verify
from nbdyn.store.backend import context, is_local, normalize, object_type, tiledb
from nbdyn.store.lock import WriterLock, holder, is_held
from nbdyn.store.metadata import write_metadata


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
    _sources: list[Any] = field(default_factory=list)

    def store(self) -> Store:
        """The run, opened for reading."""
        return Store(self.uri)

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


def open_target(path: str | os.PathLike[str], mode: str, config: dict[str, Any]) -> Target:
    """Create or reopen a run for writing.

    Raises:
        RunBusy: if a live writer of another process holds it.
        NbdynError: if the place cannot be written, or holds something else.
        Incompatible: if a run to resume has other parameters.
    """
    uri, shown = normalize(path), os.fspath(path)
    if uri in session.recording():
        session.close_superseded(uri)
    exists = object_type(uri) is not None or (is_local(uri) and os.path.exists(uri) and bool(os.listdir(uri)))
    if exists and object_type(uri) == "group" and is_held(uri):
        raise RunBusy(
            f"{shown} is being recorded by {holder(uri)}; wait for it, stop it, or record under another name."
        )
    if mode == "resume" and exists:
        return _reopen(uri, shown, config)
    if mode == "resume":
        say(f"nothing to resume at {shown}; a new run begins.")
    if exists and mode == "replace":
        verify.delete(uri)
    elif exists:
        uri, shown = _free_name(uri, shown)
    return _create(uri, shown, config)


def _create(uri: str, shown: str, config: dict[str, Any]) -> Target:
    ctx = context(uri)
    try:
        if is_local(uri):
            os.makedirs(os.path.dirname(uri), exist_ok=True)
        layout.create(uri, config, ctx)
        lock = WriterLock(uri)
    except (OSError, tiledb().TileDBError) as error:
        reason = str(error).splitlines()[0]
        raise NbdynError(f"cannot record to {shown}: {reason}. Give a path in a folder that you can write.") from error
    return Target(uri, shown, config, lock)


def _reopen(uri: str, shown: str, config: dict[str, Any]) -> Target:
    store = Store(uri)
    _check_same_parameters(store, config)
    lock = WriterLock(uri)
    verify.collect(store)
    end = store.steps_committed
    rows = store.read_steps(end - 1, end) if end else {}
    write_metadata(uri, context(uri), status="recording")
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
    )


def _check_same_parameters(store: Store, config: dict[str, Any]) -> None:
    here = {t["name"]: t["shape"] for t in config["tensors"]}
    there = {t["name"]: t["shape"] for t in store.config["tensors"]}
    if here == there and config["row_dtype"] == store.config["row_dtype"]:
        return
    differing = [name for name in {**there, **here} if here.get(name) != there.get(name)]
    raise Incompatible(
        f"cannot resume {store.name}: this model differs from its own in {', '.join(differing[:5]) or 'dtype'}; "
        'use the same model, or mode="new".'
    )


def _free_name(uri: str, shown: str) -> tuple[str, str]:
    number = 2
    while object_type(f"{uri}-{number}") is not None or (is_local(uri) and os.path.exists(f"{uri}-{number}")):
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
    target.write_metadata(ctx, config=json.dumps(target.config), status=status)
