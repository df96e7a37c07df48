"""One live writer a run: a lock that the system releases when the writer dies."""

from __future__ import annotations

import json
import os
import socket
import time
from typing import IO, Any

from nbdyn.errors import RunBusy
from nbdyn.store.backend import basename, is_local, join
from nbdyn.store.metadata import read_group

LOCK_NAME = "writer.lock"
REMOTE_LEASE_SECONDS = 120
"""On an object store, a writer that has committed nothing for so long counts as dead."""

LOCK_TRIES = 20
"""Ten milliseconds apart."""

_held: dict[str, WriterLock] = {}


def _let_go() -> None:
    """In a forked child: close its copies of the files, or the locks would outlive the parent."""
    for held in _held.values():
        held.close_file()
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class WriterLock:
    """The right to write a run, held until `release` or the end of the process.

    Locally an flock on `writer.lock`: the kernel frees it when the process dies, however it dies. (Not a POSIX record
    lock: those are lost when the process closes any handle on the file, and TileDB opens every file of a group that
    it looks at.) On an object store a lease in the group's metadata that every commit renews.

    Raises:
        RunBusy: if a live writer holds the run.
    """

    def __init__(self, uri: str) -> None:
        if is_held(uri):
            raise _busy(uri)
        self.uri = uri
        self._file = None
        if is_local(uri):
            # Kept open for the life of the lock. Unbuffered: on a full disk, closing must not fail a second time.
            self._file = open(join(uri, LOCK_NAME), "a+b", buffering=0)  # noqa: SIM115
            if not _lock(self._file):
                self._file.close()
                raise _busy(uri)
        _held[_key(uri)] = self  # from here on `is_held` leaves the file alone
        try:
            if self._file is not None:
                self._file.truncate(0)
                self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        except OSError:  # a full disk
            self.release()
            raise

    def lease(self) -> str:
        """The entry that renews a remote writer's claim."""
        return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "time": time.time()})

    def release(self) -> None:
        """Give the run back; harmless twice."""
        _held.pop(_key(self.uri), None)
        self.close_file()

    def close_file(self) -> None:
        """Close this process's handle; the lock is free once no process has one."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _busy(uri: str) -> RunBusy:
    return RunBusy(
        f"{basename(uri)} is being recorded by {holder(uri)}; close that recorder (rec.close()), "
        "or record under another name."
    )


def _key(uri: str) -> str:
    """One key a run, also where links lead to it under several names."""
    return os.path.realpath(uri) if is_local(uri) else uri


def _lock(file: IO[bytes]) -> bool:
    """Take the lock; False if a writer has it. Others look for it by a shared lock, for an instant: hence the tries."""
    import fcntl

    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.01)
    return False


def is_held(uri: str) -> bool:
    """Whether a live writer, of this process or another, holds the run."""
    if _key(uri) in _held:
        return True
    if not is_local(uri):
        entry = _remote_holder(uri)
        return time.time() - entry.get("time", 0) < REMOTE_LEASE_SECONDS
    import fcntl

    try:
        # A shared lock: two readers that look at the same time must not take each other for a writer.
        with open(join(uri, LOCK_NAME)) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return False  # never written, or by a user whose runs are none of ours
    return False


def holder(uri: str) -> str:
    """Who holds the run, in words."""
    if _key(uri) in _held:
        return "this process"
    if is_local(uri):
        with open(join(uri, LOCK_NAME)) as file:
            entry = _entry(file.read())
    else:
        entry = _remote_holder(uri)
    return f"process {entry.get('pid', '?')} on {entry.get('host', '?')}"


def _remote_holder(uri: str) -> dict[str, Any]:
    return _entry(read_group(uri)[0].get("writer", "{}"))


def _entry(text: str) -> dict[str, Any]:
    """What a writer says of itself; empty if it was just about to say it."""
    try:
        entry = json.loads(text)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}
