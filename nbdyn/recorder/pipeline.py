"""The writer's thread: takes finished step records, assembles segments, commits them; bounded memory."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from nbdyn.errors import RecordingStopped

WAKE_SECONDS = 0.2
"""How often the writer looks for new records; also the pace of live views (5 Hz)."""
NICENESS = 19
"""Training goes first: with a niced writer the loop took 1.33 times the plain one's time instead of 1.53."""


class Pipeline:
    """A queue of records and one thread that drains it.

    Args:
        work: called on the writer's thread as work(records, final, hurry); returns the bytes that it released.
            `hurry`: training waits until memory is released.
        memory: bytes that may wait; `put` blocks above it, until the writer has caught up. Nothing is dropped.
        setup: called once on the writer's thread before anything else.
    """

    def __init__(self, work: Callable[[list[Any], bool, bool], int], memory: int, setup: Callable[[], None]) -> None:
        self._work = work
        self._memory = memory
        self._setup = setup
        self._records: list[Any] = []
        self._waiting = 0
        self._closing = False
        self._urgent = False
        self._hurry = False
        self._changed = threading.Condition()
        self.error: BaseException | None = None
        self.seconds_waited = 0.0
        self._thread = threading.Thread(target=self._run, name="nbdyn-writer", daemon=True)
        self._thread.start()

    def put(self, record: Any, nbytes: int, urgent: bool) -> None:
        """Hand over a record; `urgent` wakes the writer now (a block of weights is full).

        Raises:
            RecordingStopped: if the writer failed.
        """
        with self._changed:
            try:
                if self._waiting + nbytes > self._memory:
                    self._wait_for_room(nbytes)
            finally:  # also when an interrupt ends the wait: a step that was taken must not be missing
                self._waiting += nbytes
                self._records.append(record)
            if urgent:
                self._urgent = True
                self._changed.notify_all()
        self.check()

    def _wait_for_room(self, nbytes: int) -> None:
        started = time.perf_counter()
        while self._waiting and self._waiting + nbytes > self._memory and self.error is None:
            self._urgent = self._hurry = True
            self._changed.notify_all()
            self._changed.wait()
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
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            _step_back()
            self._setup()
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or self._urgent, timeout=WAKE_SECONDS)
                    hurry, self._urgent, self._hurry = self._hurry, False, False
                    records, self._records = self._records, []
                    final = self._closing
                released = self._work(records, final, hurry)
                with self._changed:
                    self._waiting -= released
                    self._changed.notify_all()
                    if final and not self._records:
                        return
        except BaseException as error:  # reported to the training thread by the next put, check or close
            with self._changed:
                self.error = error
                self._changed.notify_all()


def _step_back() -> None:
    """Lower this thread's priority where the system has per-thread ones (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox may forbid it; the writer then works at training's priority
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
