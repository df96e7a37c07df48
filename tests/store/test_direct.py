"""Files written past the page cache: the bytes are what was given, whatever the system takes at once, or refuses."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from nbdyn.store import direct
from nbdyn.store.direct import STAGE_BYTES, DirectFile


def pieces(seed: int, *sizes: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]


SIZES = [
    (),
    (0, 1),
    (mmap.PAGESIZE,),
    (100, mmap.PAGESIZE - 100, 7),
    (STAGE_BYTES - 3, 5, 2 * STAGE_BYTES, 11),
    (STAGE_BYTES,),
]


def written(path: Path, given: list[np.ndarray]) -> bytes:
    file = DirectFile(str(path))
    for piece in given:
        file.write(piece)
    assert file.place == sum(map(len, given))
    file.close()
    return path.read_bytes()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_bytes_are_those_given(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    given = pieces(0, *sizes)
    assert written(tmp_path / "file", given) == b"".join(piece.tobytes() for piece in given)


@pytest.mark.parametrize("most", [1 + mmap.PAGESIZE, 3 * mmap.PAGESIZE, 1_000_001])
def test_a_system_that_takes_only_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    original, given = os.write, pieces(1, STAGE_BYTES + 99, 12_345)
    monkeypatch.setattr(os, "write", lambda fd, data: original(fd, bytes(data[:most])))
    monkeypatch.setattr(direct, "_DIRECT", 0)  # `bytes` above are aligned to nothing
    assert written(tmp_path / "file", given) == b"".join(piece.tobytes() for piece in given)


def test_a_file_system_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may refuse the flag, or the first write."""
    given = pieces(2, STAGE_BYTES + 99)
    expected = given[0].tobytes()
    open_, write = os.open, os.write

    def refuse_flag(path: str, flags: int, *more: int) -> int:
        if flags & direct._DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return open_(path, flags, *more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse_flag)
        assert written(tmp_path / "flag", given) == expected
    refused = []

    def refuse_write(fd: int, data: memoryview) -> int:
        if not refused:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "Invalid argument")
        return write(fd, data)

    if direct._DIRECT:
        monkeypatch.setattr(os, "write", refuse_write)
        assert written(tmp_path / "write", given) == expected
        assert refused == [STAGE_BYTES]


def test_a_full_disk_goes_on_to_the_caller_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = DirectFile(str(tmp_path / "file"))
    file.write(pieces(3, 100)[0])
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        file.write(pieces(3, STAGE_BYTES)[0])
    file.abandon()
    assert not list(tmp_path.iterdir())
    file.abandon()  # harmless twice
