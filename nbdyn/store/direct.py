"""A file that is written once, from start to end, past the page cache where the system lets us."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from typing import Any

import numpy as np

PAGE = mmap.PAGESIZE
STAGE_BYTES = 4 * 2**20
"""Small pieces are gathered in a buffer of this size. Writing past the page cache takes a tenth of the CPU: the cache
needs a fresh page for every 4 KB, for which training's own tensors then compete."""
_DIRECT = getattr(os, "O_DIRECT", 0)
_spare: list[mmap.mmap] = []


class DirectFile:
    """A new local file.

    Args:
        path: where; a file that is there is replaced.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.place = 0  # bytes given so far
        flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC | getattr(os, "O_BINARY", 0)
        self._is_direct = bool(_DIRECT)
        try:
            self._fd = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if not _DIRECT or error.errno != errno.EINVAL:
                raise
            self._is_direct = False  # a file system that has no such thing
            self._fd = os.open(path, flags, 0o666)
        self._stage: mmap.mmap | None = _buffer()
        self._view = np.frombuffer(self._stage, np.uint8)
        self._used = 0

    def write(self, data: np.ndarray) -> None:
        """Append bytes, (n,) uint8. Whole pages are written from where they are, of other pieces a copy is taken."""
        if len(data) and not (self._used % PAGE or len(data) % PAGE or address(data) % PAGE):
            self._flush()
            self._write_out(data.data)
            self.place += len(data)
            return
        start = 0
        while start < len(data):
            count = min(len(data) - start, STAGE_BYTES - self._used)
            self._view[self._used : self._used + count] = data[start : start + count]
            start, self._used, self.place = start + count, self._used + count, self.place + count
            if self._used == STAGE_BYTES:
                self._flush()

    def fill_page(self) -> None:
        """Append zeros up to the end of a page, so that whole pages can follow."""
        self.write(np.zeros(-self.place % PAGE, np.uint8))

    def _flush(self) -> None:
        assert self._stage is not None
        if self._is_direct and self._used % PAGE:  # the end of the file: only whole pages go past the cache
            self._be_ordinary()
        self._write_out(memoryview(self._stage)[: self._used])
        self._used = 0

    def _write_out(self, view: memoryview) -> None:
        while len(view):
            try:
                view = view[os.write(self._fd, view) :]  # a file may take only a part
            except OSError as error:
                if not self._is_direct or error.errno != errno.EINVAL:
                    raise
                self._be_ordinary()
                continue
            if self._is_direct and len(view) % PAGE:
                self._be_ordinary()

    def _be_ordinary(self) -> None:
        import fcntl  # where there is O_DIRECT, there is this

        fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~_DIRECT)
        self._is_direct = False

    def close(self) -> None:
        """Write what waits, and close."""
        try:
            self._flush()
        finally:
            self._release()

    def abandon(self) -> None:
        """Close and remove the file. What cannot be removed, gc removes later."""
        with contextlib.suppress(OSError):  # what made the writer fail may fail the close too
            self._release()
        with contextlib.suppress(OSError):
            os.remove(self.path)

    def _release(self) -> None:
        if self._stage is not None:
            _spare.append(self._stage)
            self._stage = None
            os.close(self._fd)


def _buffer() -> mmap.mmap:
    """Memory to gather pieces in, at the beginning of a page."""
    try:
        return _spare.pop()
    except IndexError:
        # Private: what mmap gives by default is shared with forked children, which would write into it, too.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        return mmap.mmap(-1, STAGE_BYTES, **private)


def pages(size: int) -> np.ndarray:
    """New memory for at least so many bytes, as whole pages, (bytes,) uint8.

    >>> len(pages(1)) == PAGE
    True
    """
    size = -(-size // PAGE) * PAGE
    memory = np.empty(size + PAGE, np.uint8)
    start = -address(memory) % PAGE
    return memory[start : start + size]


def address(data: np.ndarray) -> int:
    """Where an array's bytes begin in memory."""
    return data.__array_interface__["data"][0]


class RemoteFile:
    """A new object of an object store, with the methods of `DirectFile`.

    Args:
        file: TileDB's file, open for writing.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self.place = 0

    def write(self, data: np.ndarray) -> None:
        """Append bytes, (n,) uint8."""
        self._file.write(data.tobytes())
        self.place += len(data)

    def fill_page(self) -> None:
        """Objects have no pages."""

    def close(self) -> None:
        """Write what waits, and close."""
        # Left as a context manager: the object is written then, and not by TileDB's close().
        self._file.__exit__(None, None, None)

    def abandon(self) -> None:
        """Leave the object, which no segment will name; gc removes it."""
        with contextlib.suppress(Exception):  # what made the writer fail may fail this too
            self.close()
