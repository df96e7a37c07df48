"""One live writer a run: a lock that the system releases when the writer dies."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

from nbdyn.errors import RunBusy
from nbdyn.store.backend import basename, context, is_local, join, reading, tiledb

LOCK_NAME = "writer.lock"
REMOTE_LEASE_SECONDS = 120
"""On an object store, a writer that has committed nothing for so long counts as dead."""

_held: dict[str, WriterLock] = {}


class WriterLock:
    """The right to write a run, held until `release` or the end of the process.

    Locally a POSIX record lock on `writer.lock` (the kernel frees it when the process dies, however it dies);
    on an object store a lease in the group's metadata that every commit renews.

    Raises:
        RunBusy: if a live writer holds the run.
    """

    def __init__(self, uri: str) -> None:
        if is_held(uri):
            raise RunBusy(
                f"{basename(uri)} is being recorded by {holder(uri)}; close that recorder (rec.close()), "
                "or record under another name."
            )
        self.uri = uri
        self._file = None
        if is_local(uri):
            import fcntl

            # Kept open for the life of the lock: closing any handle on the file would free a POSIX lock.
            self._file = open(join(uri, LOCK_NAME), "a+")  # noqa: SIM115
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(0)
            self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
            self._file.flush()
        _held[uri] = self

    def lease(self) -> str:
        """The entry that renews a remote writer's claim."""
        return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()})

    def release(self) -> None:
        """Give the run back; harmless twice."""
        _held.pop(self.uri, None)
        if self._file is not None:
            self._file.close()
            self._file = None


def is_held(uri: str) -> bool:
    """Whether a live writer, of this process or another, holds the run."""
    if uri in _held:
        return True
    if not is_local(uri):
        entry = _remote_holder(uri)
        return time.time() - entry.get("time", 0) < REMOTE_LEASE_SECONDS
    import fcntl

    path = join(uri, LOCK_NAME)
    if not os.path.exists(path):
        return False
    try:
        with open(path, "r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except PermissionError:
        return False  # a run that this user cannot write: no writer of ours, reading it is harmless
    return False


def holder(uri: str) -> str:
    """Who holds the run, in words."""
    if uri in _held:
        return "this process"
    if is_local(uri):
        with open(join(uri, LOCK_NAME)) as file:
            text = file.read()
        try:
            entry: dict[str, Any] = json.loads(text)
        except json.JSONDecodeError:
            entry = {}
    else:
        entry = _remote_holder(uri)
    return f"process {entry.get('pid', '?')} on {entry.get('host', '?')}"


def _remote_holder(uri: str) -> dict[str, Any]:
    with reading(uri), tiledb().Group(uri, "r", ctx=context(uri)) as group:
        text = group.meta["writer"] if "writer" in group.meta else "{}"  # noqa: SIM401 (metadata has no get)
    return json.loads(text)
