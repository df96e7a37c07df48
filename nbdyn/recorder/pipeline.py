"""A thread that takes what another one hands over, and bounds the memory of what waits."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from nbdyn.errors import RecordingStopped

WAKE_SECONDS = 0.2
"""How often the thread looks for new records; also the pace of live views (5 Hz)."""


class Pipeline:
    """A queue of records and one thread that drains it.

    Nothing here holds a lock across Python code of the training thread: an interrupt (Ctrl-C) may strike anywhere
    in it, and a condition variable that it leaves locked would hang both threads.

    Args:
        name: the thread's name.
        work: called on the thread as work(records, final, hurry); returns the bytes that it released.
            `hurry`: whoever hands over waits until memory is released.
        memory: bytes that may wait; `put` blocks above it, until the thread has caught up. Nothing is dropped.
        setup: called once on the thread before anything else.
    """

    def __init__(
        self, name: str, work: Callable[[list[Any], bool, bool], int], memory: int, setup: Callable[[], None]
    ) -> None:
        self._work = work
        self._memory = memory
        self._setup = setup
        self._records: deque[Any] = deque()
        self._given = 0  # bytes, counted by the thread that hands over alone
        self._released = 0  # bytes, counted by the thread that takes alone
        self._closing = False
        self._hurry = False
        self._wake, self._room = _Signal(), _Signal()
        self.error: BaseException | None = None
        self.seconds_waited = 0.0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, record: Any, nbytes: int, urgent: bool) -> None:
        """Hand over a record; `urgent` wakes the writer now (a chunk of memory is full).

        Raises:
            RecordingStopped: if the writer failed.
        """
        try:
            if self._given - self._released + nbytes > self._memory:
                self._wait_for_room(nbytes)
        finally:  # also when an interrupt ends the wait: a step that was taken must not be missing
            self._records.append(record)
            self._given += nbytes
        if urgent:
            self._wake.set()
        self.check()

    def _wait_for_room(self, nbytes: int) -> None:
        started = time.perf_counter()
        while 0 < self._given - self._released > self._memory - nbytes and self.error is None:
            self._hurry = True
            self._wake.set()
            self._room.wait(WAKE_SECONDS)
        self.seconds_waited += time.perf_counter() - started

    def check(self) -> None:
        """Raise what stopped the writer, if anything did."""
        if self.error is not None:
            if isinstance(self.error, RecordingStopped):
                raise self.error
            raise RecordingStopped(
                f"recording has stopped, the writer failed: {self.error}. Every acknowledged step is on disk; "
                "training can go on unrecorded (run the loop again)."
            ) from self.error

    def close(self) -> None:
        """Write everything that waits, then end the thread."""
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._setup()
            final = False
            while not final:
                self._wake.wait(WAKE_SECONDS)
                final = self._closing  # looked at before the queue: nothing is put after it is set
                hurry, self._hurry = self._hurry, False
                records = [self._records.popleft() for _ in range(len(self._records))]
                self._released += self._work(records, final, hurry)
                self._room.set()
        except BaseException as error:  # reported to the training thread by the next put, check or close
            self.error = error
            self._room.set()


class _Signal:
    """One thread tells another that there is something to do: `threading.Event` without a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def set(self) -> None:
        """Let the next wait, or the one that is going on, return."""
        with contextlib.suppress(RuntimeError):  # it was set already
            self._lock.release()

    def wait(self, seconds: float) -> None:
        """Return when set, or when the time is over; unset then."""
        self._lock.acquire(timeout=seconds)
