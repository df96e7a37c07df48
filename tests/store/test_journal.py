"""The journal: every byte back as it was given, however the system takes it; no file, however made, does any harm."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nbdyn
from nbdyn.errors import CorruptRun
from nbdyn.store import Store, backend, journal, verify
from nbdyn.store.compact import compact
from nbdyn.store.journal import DTYPES, FOOTER, MAGIC, Entry, Journal, JournalSegment, JournalWriter
from tests.captures import Recording, entry, linear

SITES = [linear(3, 2).to_json()]


class Place:
    """What of a run the journal looks at: where it is, and its last committed segment."""

    def __init__(self, path: Path, timestamp: int = 1) -> None:
        self.uri, self.timestamp = str(path), timestamp

    @property
    def file(self) -> Path:
        return Path(journal.path_of(self.uri, 1))

    def write(self, *parts: list[Entry], segment: int = 1) -> Path:
        writer = self.writer(segment)
        for entries in parts:
            writer.append(entries)
        writer.finish(SITES, {"bn.weight": "couples the samples"})
        file = Path(journal.path_of(self.uri, segment))
        assert file.stat().st_size == writer.nbytes
        return file

    def writer(self, segment: int = 1) -> JournalWriter:
        return JournalWriter(self.uri, backend.context(self.uri, writing=True), segment)

    def read(self, segment: int = 1) -> JournalSegment:
        return Journal(self).read(segment)  # type: ignore[arg-type]

    def segments(self, after: int = 0) -> list[int]:
        return Journal(self).segments(after)  # type: ignore[arg-type]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def bits(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Any bits: NaNs of every payload, infinities, denormal numbers."""
    kind = DTYPES[dtype]
    count = int(np.prod(shape)) * kind.itemsize
    return np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8).view(kind).reshape(shape)


def call(tensors: dict[str, np.ndarray], **where: Any) -> Entry:
    return entry(0, tensors, **where)


def assert_same(found: list[Entry], given: list[Entry]) -> None:
    assert len(found) == len(given)
    for one, other in zip(found, given, strict=True):
        for name in ("step", "batch", "position", "size", "site", "call", "factor", "data", "dtypes"):
            assert getattr(one, name) == getattr(other, name), name
        assert list(one.tensors) == list(other.tensors) and one.nbytes == other.nbytes
        for slot, tensor in other.tensors.items():
            read = one.tensors[slot]
            assert (read.shape, read.dtype) == (tensor.shape, DTYPES[other.dtypes[slot]])
            assert read.tobytes() == tensor.tobytes()


# Round trip -------------------------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "whole": lambda x: x,
    "transposed": lambda x: x.T,
    "strided": lambda x: x[::2, :, 1:],
    "reversed": lambda x: x[::-1],
    "broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "fortran": np.asfortranarray,
    "none of them": lambda x: x[:0],
    "no columns": lambda x: x[:, :, :0],
    "one number": lambda x: x[1, 1, 1:2],
}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_and_layout_bit_for_bit(dtype: str, place: Place) -> None:
    given = [call({"a": view(bits((4, 3, 5), dtype, k))}) for k, view in enumerate(VIEWS.values())]
    place.write(given)
    assert_same(place.read().entries, given)


def test_what_is_said_of_calls_and_sites(place: Place) -> None:
    given = [
        call(
            {"a": bits((2, 1, 3), "f4"), "d": bits((2, 1, 2), "f4")}, batch=1, position=8, factor=1 / 65536, data=True
        ),
        entry(0, {"g": bits((1, 7), "bf2"), "p": np.zeros(1, np.int32)}, call=2, factor=0.1),
        entry(3, {"ids": bits((0, 4), "i4"), "d": bits((0, 4, 5), "f8")}),
    ]
    given[0].step, given[1].step = 2**31, 7
    place.write(given[:1], [], given[1:])
    found = place.read()
    assert_same(found.entries, given)
    assert found.sites == json.loads(json.dumps(SITES)) and found.batch_only == {"bn.weight": "couples the samples"}
    for one in found.entries:
        for tensor in one.tensors.values():
            assert tensor.ctypes.data % journal.ALIGNMENT == 0  # the file is mapped at a whole page


def test_an_empty_segment(place: Place) -> None:
    place.write([])
    assert place.read().entries == []


def test_shared_memory_is_written_once(place: Place) -> None:
    shared, other = bits((50, 1, 40), "f4"), bits((50, 1, 40), "f4", 1)
    given = [call({"a": shared, "d": other}), call({"a": shared.reshape(50, 40), "d": other[:10]})]
    assert place.write(given).stat().st_size < shared.nbytes + 1.2 * other.nbytes + 2000
    assert_same(place.read().entries, given)


def test_views_that_begin_at_one_address_are_not_confused(place: Place) -> None:
    square = bits((6, 6), "f4")
    views = [square, square.T, square[::2], square[:3], square[:, :3], square[:3, ::2], square[:3, :3]]
    views += [square[:3, :3].T, square.reshape(36), square.reshape(36)[:18]]
    for some in itertools.permutations(views, 2):
        given = [call({"a": view}) for view in some]
        place.write(given)
        assert_same(place.read().entries, given)


def test_memory_is_used_again_after_append(place: Place) -> None:
    writer, given = place.writer(), []
    memory = np.empty((4, 9), np.float32)
    for number in range(5):
        memory[:] = number
        writer.append([call({"a": memory, "d": memory.T})])
        given.append(call({"a": memory.copy(), "d": memory.T.copy()}))
    writer.finish(SITES, {})
    assert_same(place.read().entries, given)


def test_a_mapped_file_may_be_removed(place: Place) -> None:
    """A compaction takes it away while a reader is at it."""
    given = [call({"a": bits((300, 40), "f4")})]
    place.write(given)
    found = place.read()
    journal.remove(place.uri, [1])
    assert place.segments() == []
    assert_same(found.entries, given)
    with pytest.raises(CorruptRun, match=r"cannot read .*00000001\.journal: .*No such file.*python -m nbdyn verify"):
        place.read()


def test_a_file_that_cannot_be_made(place: Place) -> None:
    (Path(place.uri) / "journal").write_text("in the way")
    with pytest.raises(OSError):
        place.writer()


FORK = """
import os, sys
import numpy as np
from nbdyn.store.direct import DirectFile

path = sys.argv[1]
DirectFile(path + "earlier").close()  # its buffer is kept for the next one
told, tell = os.pipe()
if not os.fork():
    os.read(told, 1)
    other = DirectFile(path + "of the child")
    other.write(np.ones(1000, np.uint8))
    other.close()
    os._exit(0)
mine = DirectFile(path + "mine")
mine.write(np.zeros(1000, np.uint8))
os.write(tell, b"x")
os.wait()
mine.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_processes_do_not_write_into_each_other(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", FORK, f"{tmp_path}{os.sep}"], check=True, env=environment)
    assert (tmp_path / "mine").read_bytes() == bytes(1000)
    assert (tmp_path / "of the child").read_bytes() == b"\1" * 1000


# Which files there are --------------------------------------------------------------------------------------------


def test_numbers_and_segments(place: Place) -> None:
    assert list(journal.numbers(place.uri)) == [] == place.segments()
    for number in (3, 1, 12, 123_456_789):
        place.write([], segment=number)
    folder = place.file.parent
    names = (
        "5.journal",
        "00000005",
        "00000005.journal.part",
        "0000000５.journal",
        "²²²²²²²².journal",
        "-0000005.journal",
    )
    for name in (*names, "000000005.journal", "00000005.Journal", ".journal", "x.journal", "picture.png"):
        (folder / name).write_bytes(b"")
    (folder / "00000006.journal.d").mkdir()
    assert sorted(journal.numbers(place.uri)) == [1, 3, 12, 123_456_789]
    for timestamp, after, segments in (
        (0, 0, []), (1, 0, [1]), (11, 0, [1, 3]), (12, 0, [1, 3, 12]), (12, 1, [3, 12]), (12, 12, []),
        (2**40, 3, [12, 123_456_789]),
    ):  # fmt: skip
        assert Place(Path(place.uri), timestamp).segments(after) == segments
    journal.remove(place.uri, [3, 12])
    assert sorted(journal.numbers(place.uri)) == [1, 123_456_789]


# Damaged and hostile files ----------------------------------------------------------------------------------------


def assert_refused(place: Place, reason: str = "") -> None:
    """A clear error that names the file and the way out, and no memory by the numbers in it."""
    size = place.file.stat().st_size if place.file.is_file() else 0
    tracemalloc.start()
    try:
        with pytest.raises(CorruptRun, match=rf"cannot read .*00000001\.journal: .*{reason}.*python -m nbdyn verify"):
            place.read()
        assert tracemalloc.get_traced_memory()[1] < 10 * size + 500_000
    finally:
        tracemalloc.stop()


@pytest.fixture
def written(place: Place) -> bytes:
    """A good file, with its last byte at the end of the footer."""
    return place.write([call({"a": bits((9, 1, 3), "f4"), "d": bits((9, 1, 2), "f4")})]).read_bytes()


def test_files_that_were_cut(place: Place, written: bytes) -> None:
    for cut in {0, 1, 7, FOOTER.size - 1, FOOTER.size, FOOTER.size + 1, *range(0, len(written), 13), len(written) - 1}:
        place.file.write_bytes(written[:cut])
        assert_refused(place, "it is cut short" if cut < FOOTER.size else "its checksum does not match")
    place.file.write_bytes(written[1:])  # the beginning is missing
    assert_refused(place, "its checksum does not match")
    place.file.write_bytes(written + b"\0")
    assert_refused(place, "its checksum does not match")


def test_any_bit_of_index_and_footer(place: Place, written: bytes) -> None:
    """(The tensors have no checksum before they are compacted.)"""
    start = FOOTER.unpack(written[-FOOTER.size :])[0]
    for position in range(start, len(written), 3):
        damaged = bytearray(written)
        damaged[position] ^= 1 << position % 8
        place.file.write_bytes(damaged)
        assert_refused(place, "its checksum does not match")


@pytest.mark.parametrize("size", [28, 100, 5000])
def test_garbage(size: int, place: Place, written: bytes) -> None:
    for seed in range(20):
        garbage = np.random.default_rng(seed).bytes(size)
        place.file.write_bytes(garbage)
        assert_refused(place, "its checksum does not match")
        place.file.write_bytes(garbage[:-8] + MAGIC)
        assert_refused(place, "its checksum does not match")


def test_a_folder_in_its_place(place: Place) -> None:
    place.file.mkdir(parents=True)
    assert_refused(place)


def craft(path: Path, index: Any, data: bytes = bytes(256), start: int | None = None) -> None:
    """A file with a right checksum: what is wrong with it was meant."""
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    start = len(data) if start is None else start
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data + text + FOOTER.pack(start, len(text), zlib.crc32(text), MAGIC))


def index_of(row: Any) -> dict[str, Any]:
    return {"sites": [], "batch_only": {}, "entries": [row]}


def slot_of(shape: Any, place: Any = 0, dtype: Any = "f4", slot: Any = "a") -> dict[str, Any]:
    return index_of([0, 0, 0, 1, 0, 0, 1.0, False, [[slot, dtype, shape, place]]])


def test_a_crafted_file_is_read(place: Place) -> None:
    craft(place.file, slot_of([2, 3], 64), bytes(range(256)))
    (found,) = place.read().entries
    assert found.tensors["a"].tobytes() == bytes(range(64, 88))


DEEP = b"[" * 200_000
WRONG: dict[str, Any] = {
    "no json": b"{'sites': []}", "nothing": b"", "not text": b"\xff\xfe\x00", "cut": b'{"sites": [], "entries": [[0, 0',
    "a number": 3, "null": None, "a list": [], "text": "entries", "no entries": {"sites": [], "batch_only": {}},
    "no sites": {"entries": [], "batch_only": {}}, "sites are a number": {"entries": [], "sites": 3, "batch_only": {}},
    "reasons are text": {"entries": [], "sites": [], "batch_only": "ab"},
    "reasons are a list": {"entries": [], "sites": [], "batch_only": [[1, 2, 3]]},
    "entries are a number": {"entries": 7, "sites": [], "batch_only": {}},
    "entries are text": {"entries": "many", "sites": [], "batch_only": {}},
    "entries are a table": {"entries": {"0": []}, "sites": [], "batch_only": {}},
    "deep": DEEP, "deep in its place": b'{"sites": [], "batch_only": {}, "entries": [[0,0,0,0,0,0,1.0,false,' + DEEP,
    "deep tables": b'{"a":' * 100_000, "a long number": b'{"entries": [' + b"9" * 100_000 + b"]}",
    "row: null": index_of(None), "row: short": index_of([0] * 8), "row: long": index_of([0] * 10),
    "row: slots are a number": index_of([0] * 9), "row: slots are text": index_of([*[0] * 8, "abcd"]),
    "row: slots are a table": index_of([*[0] * 8, {"abcd": 0}]),
    "factor: null": index_of([0, 0, 0, 1, 0, 0, None, 0, []]), "factor: text": index_of([0, 0, 0, 1, 0, 0, "x", 0, []]),
    "factor: large": index_of([0, 0, 0, 1, 0, 0, 10**400, 0, []]),
    "factor: list": index_of([0, 0, 0, 1, 0, 0, [1], 0, []]),
    "dtype: none": slot_of([1, 2], dtype="f3"), "dtype: object": slot_of([1, 2], dtype="O"),
    "dtype: null": slot_of([1, 2], dtype=None), "dtype: list": slot_of([1, 2], dtype=["f4"]),
    "slot: list": slot_of([1, 2], slot=["a"]), "slot: table": slot_of([1, 2], slot={}),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_indexes(what: str, place: Place) -> None:
    craft(place.file, WRONG[what])
    assert_refused(place, "its index is damaged")


PLACES = [(-1, [1, 2]), (-64, [1, 2]), (249, [1, 2]), (256, [1, 2]), (10**9, [1, 2]), (2**63, [1]), (2**64, [1])]
PLACES += [(10**30, [0, 1]), (0.0, [1]), (float("nan"), [1]), ("0", [1]), (None, [1]), (True, [1]), ([0], [1])]
SHAPES = [[65], [-1], [-1, -1], [-2, 3, -1], [0, -1], [2**31], [2**62, 4], [2**63, 2], [2**32, 2**32], [0, 2**40]]
SHAPES += [[0, 10**30], [10**400], [1] * 17, [2**39] * 16, [1] * 10**5, [1.0], [1.5, 2], [float("inf")], [True, 1]]
SHAPES += [["1"], ["a", 10**12], [[0], 10**9], [[], 10**9], [10**9, "aa"], [None], [{}], "", "12", {}, {"1": 1}, 1]
SHAPES += [None, [], [[1, 2]]]


@pytest.mark.parametrize(("where", "shape"), [*PLACES, *((0, shape) for shape in SHAPES)], ids=lambda x: str(x)[:30])
def test_hostile_places_and_shapes(where: Any, shape: Any, place: Place) -> None:
    """Outside the file, negative, absurd, of other types: nothing is computed from them, let alone allocated."""
    craft(place.file, slot_of(shape, where))
    assert_refused(place, "its index is damaged")


@pytest.mark.parametrize("start", [0, 3, 255, 257, 2**63, 2**64 - 1])
def test_an_index_that_is_elsewhere(start: int, place: Place) -> None:
    craft(place.file, slot_of([2]), start=start)
    assert_refused(place, "its checksum does not match")


def test_a_tensor_does_not_reach_into_the_index(place: Place) -> None:
    craft(place.file, slot_of([64], 0))
    assert place.read().entries[0].tensors["a"].nbytes == 256
    craft(place.file, slot_of([64], 1))
    assert_refused(place, "lies outside the file")


# Through the doors ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rec = Recording(tmp_path_factory.mktemp("recorded") / "run", [linear(3, 2)])
    for _ in range(2):
        rec.commit([(range(2), [call({"a": bits((2, 1, 3), "f4"), "d": bits((2, 1, 2), "f4")})])])
    return rec.path


@pytest.mark.parametrize("what", ["deep", "factor: large", "dtype: object", "no sites"])
def test_a_run_with_a_hostile_journal(what: str, recorded: Path, tmp_path: Path) -> None:
    """Opening it is safe; what needs the file says which one it is; everything else can still be read."""
    path = tmp_path / "run"
    shutil.copytree(recorded, path)
    craft(path / "journal" / "00000002.journal", WRONG[what])
    run = nbdyn.open(path)
    assert len(run) == 2 == len(run.steps)
    for ask in (lambda: run.gradients[0], lambda: run.gradients.rebuild(1), lambda: compact(path)):
        with pytest.raises(CorruptRun, match=r"00000002\.journal: its index is damaged"):
            ask()
    findings = verify.verify(str(path))
    assert "00000002.journal" in " ".join(findings["problem"])
    (path / "journal" / "00000002.journal").unlink()
    assert list(Store(path).factors.steps) == [0]
    compact(path)
    assert list(Store(path).factors.steps) == [0] and len(verify.verify(str(path))) == 0


def test_a_segment_that_was_not_committed_is_not_read(recorded: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(recorded, path)
    (path / "journal" / "00000003.journal").write_bytes(b"torn")
    assert list(Store(path).factors.steps) == [0, 1] and len(verify.verify(str(path))) == 0
    compact(path)
    assert list(Store(path).factors.steps) == [0, 1]
    assert verify.gc(str(path))["fragment"].tolist() == ["00000003.journal"]
