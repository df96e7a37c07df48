"""Compaction: lossless, killed at any point without loss or duplicates, each distinct row of the data set once."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbdyn.__main__ import main
from nbdyn.errors import CorruptRun, NbdynError, RunBusy
from nbdyn.schema import CAPTURE
from nbdyn.store import Store, backend, distinct, journal, layout, lock, metadata, packer, verify
from nbdyn.store import compact as compact_module
from nbdyn.store.compact import compact
from nbdyn.store.journal import Entry
from nbdyn.store.sites import Site
from tests.captures import Recording, entry, linear

Table = dict[tuple[int, int], bytes]
"""(site, number of the visit) -> the bytes of everything that a reader gets of it."""

SITES = [linear(6, 4, 0, "fc"), linear(3, 2, 100, "head")]


def step_of(rng: np.random.Generator, data: np.ndarray, size: int = 6) -> tuple[list[int], list[Entry]]:
    samples = rng.permutation(len(data))[:size]
    first = entry(0, {"a": data[samples][:, None], "d": rng.normal(size=(size, 1, 4)).astype("f4")}, data=True)
    some = rng.permutation(size)[:3].astype(np.int32)
    tensors = {"a": rng.normal(size=(3, 2, 3)), "d": rng.normal(size=(3, 2, 2))}
    second = entry(1, {slot: t.astype("f4") for slot, t in tensors.items()} | {"p": np.sort(some)})
    return samples.tolist(), [first, second]


def record(path: Path | str, segments: int = 3, seed: int = 0) -> Recording:
    rng = np.random.default_rng(seed)
    data = rng.normal(size=(15, 6)).astype("f4")
    rec = Recording(path, SITES)
    for _ in range(segments):
        rec.commit([step_of(rng, data) for _ in range(2)])
    return rec


def table(path: Path | str) -> Table:
    store, found = Store(path), {}
    for site, _ in enumerate(store.factors.sites):
        rows: list[bytes] = []
        for block in store.factors.blocks(site, 0, 10**6):
            columns = [block.step, block.position, block.sample, block.factor, *block.tensors.values()]
            rows += [b"".join(c[k].tobytes() for c in columns) for k in range(len(block))]
        found |= {(site, number): row for number, row in enumerate(rows)}
    return found


def tree(path: Path) -> list[str]:
    return sorted(str(entry.relative_to(path)) for entry in path.rglob("*"))


def kinds(path: Path) -> Counter[str]:
    """How many files of each kind the arrays of a run have; their names hold random numbers."""
    files = (p.relative_to(path).parts for name in CAPTURE for p in (path / name).rglob("*") if p.is_file())
    files = (parts for parts in files if "__schema" not in parts and "__group" not in parts)
    return Counter(
        "/".join("*" if part.startswith("__") and "_" in part[2:] else part for part in parts) for parts in files
    )


def cells_of(entries: list[Entry], sites: list[Site]) -> tuple[np.ndarray, ...]:
    """One cell of each call, in no order; the first twice."""
    found = [(e.step, sites[e.site].runs[0][0] + k, k - 1, float(e.size + k)) for e in entries for k in (2, 0, 1)]
    return tuple(np.array(column) for column in zip(*found, found[0], strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def path(whole: Recording, tmp_path: Path) -> Path:
    """A copy of a run whose three segments are all in the journal."""
    shutil.copytree(whole.path, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each segment is a block of its own."""
    monkeypatch.setattr(compact_module, "BLOCK_BYTES", 1)


# What it does -----------------------------------------------------------------------------------------------------


def test_the_journal_becomes_arrays(path: Path) -> None:
    before = table(path)
    size = sum(p.stat().st_size for p in (path / "journal").iterdir())
    done = compact(path)
    assert (done.segments, done.bytes_before) == (3, size) and done.bytes_after > 0
    assert str(done).startswith("3 segments, ") and " -> " in str(done)
    assert table(path) == before
    assert not list((path / "journal").iterdir())
    assert len(verify.verify(str(path))) == len(verify.gc(str(path))) == 0
    again = tree(path)
    assert str(compact(path)) == "nothing to compact" and tree(path) == again
    with backend.tiledb().Group(str(path), ctx=backend.context()) as group:
        assert {member.name for member in group} >= set(CAPTURE)


def test_in_parts(path: Path, small_blocks: None) -> None:
    before = table(path)
    for upto, left in ((0, 3), (1, 2), (1, 2), (3, 0)):
        compact(path, upto=upto)
        assert len(list((path / "journal").iterdir())) == left and table(path) == before
    assert Store(path).read_compacted() == 3


def test_while_training_goes_on(tmp_path: Path, small_blocks: None) -> None:
    """The recorder's thread compacts a run that it holds; the journal of the next segment is being written."""
    rec, rng = record(tmp_path / "run", 2), np.random.default_rng(9)
    held = lock.WriterLock(rec.uri)
    with pytest.raises(RunBusy, match="this process"):
        compact(rec.path)
    waiting = step_of(rng, np.ones((15, 6), np.float32))
    rec.journal(3, waiting[1])
    compact(rec.store(), locked=True, progress=False)
    assert [p.name for p in (rec.path / "journal").iterdir()] == ["00000003.journal"]
    rec.commit([waiting])
    before = table(rec.path)
    assert len(Store(rec.path).factors.steps) == 5
    compact(rec.store(), locked=True)
    held.release()
    assert table(rec.path) == before


def test_new_sites_and_another_order_of_them(tmp_path: Path) -> None:
    """A resumed recorder may meet the sites in another order; what they are tells them apart."""
    rng = np.random.default_rng(0)
    rec = Recording(tmp_path / "run", SITES[:1])

    def call(site: Site, number: int) -> Entry:
        out, width = site.shape
        tensors = {"a": rng.normal(size=(2, 1, width)).astype("f4"), "d": rng.normal(size=(2, 1, out)).astype("f4")}
        return entry(number, tensors)

    rec.commit([(range(2), [call(SITES[0], 0)])])
    rec.sites, rec.batch_only = [SITES[1], SITES[0]], {"bn": "couples the samples"}
    rec.commit([(range(2), [call(SITES[0], 1), call(SITES[1], 0)])])
    before = table(rec.path)
    for upto in (1, 2):
        store = rec.store()
        assert store.factors.sites == SITES and store.factors.batch_only == {"bn": "couples the samples"}
        assert sum(len(b) for b in store.factors.blocks(0, 0, 2)) == 4
        compact(rec.path, upto=upto)
        assert table(rec.path) == before


# The data set -----------------------------------------------------------------------------------------------------


def rows_stored(path: Path, stream: int = 0) -> int:
    uri = str(path / "rows" / str(stream))
    with backend.tiledb().open(uri, ctx=backend.context(uri)) as array:
        return int(array.nonempty_domain()[0][1]) + 1


def record_data(path: Path, batches: list[list[tuple[Any, np.ndarray]]]) -> Recording:
    """A run of one first layer; segments of steps of (samples, rows (B, T, 6))."""
    rec = Recording(path, SITES[:1])
    for segment in batches:
        steps = []
        for samples, rows in segment:
            d = np.ones((*rows.shape[:2], 4), np.float32)
            steps.append((samples, [entry(0, {"a": rows, "d": d}, data=True)]))
        rec.commit(steps)
    return rec


def test_rows_of_the_data_set_are_stored_once(tmp_path: Path, small_blocks: None) -> None:
    """Within a block, across blocks and across compactions; another content of a sample is another row."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(20, 1, 6)).astype("f4")
    flipped = data[:, :, ::-1].copy()
    orders = [rng.permutation(20) for _ in range(4)]
    segments = [[(o, data[o]) for o in orders[:2]], [(orders[2], data[orders[2]]), (orders[3], flipped[orders[3]])]]
    rec = record_data(tmp_path / "run", segments)
    before = table(rec.path)
    for upto, rows in ((1, 20), (2, 40)):
        compact(rec.path, upto=upto)
        assert rows_stored(rec.path) == rows and table(rec.path) == before
    rec.commit([(orders[0], [entry(0, {"a": flipped[orders[0]], "d": np.ones((20, 1, 4), np.float32)}, data=True)])])
    before = table(rec.path)
    compact(rec.path)
    assert rows_stored(rec.path) == 40 and table(rec.path) == before


def test_rows_differ_by_their_bits_and_their_sample(tmp_path: Path) -> None:
    rows = np.zeros((6, 1, 6), np.float32)
    rows[1] = -0.0
    rows[2, 0, 3], rows[3, 0, 3] = np.nan, np.uint32(0x7FC00001).view(np.float32)
    rec = record_data(tmp_path / "run", [[([0] * 6, rows), ([0, 1, 2, -1, -1, 0], np.zeros((6, 1, 6), np.float32))]])
    before = table(rec.path)
    compact(rec.path)
    assert rows_stored(rec.path) == 4 + 3  # 0, -0, two NaNs of sample 0; zeros of samples 1, 2 and the unknown
    assert table(rec.path) == before


def test_sequences_of_the_data_set_may_vary_in_length(tmp_path: Path, small_blocks: None) -> None:
    """Zeros of length 2 are not those of length 3."""
    rng = np.random.default_rng(0)
    rows = {length: rng.normal(size=(4, length, 6)).astype("f4") for length in (1, 2, 3)}
    for length in rows:
        rows[length][0] = 0
    steps = [(range(4), rows[length]) for length in (1, 3, 2, 3, 1, 2)]
    rec = record_data(tmp_path / "run", [steps[:4], steps[4:]])
    before = table(rec.path)
    compact(rec.path)
    assert rows_stored(rec.path) == 4 * (1 + 2 + 3) and table(rec.path) == before


def test_only_the_rows_stored_last_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded: a larger data set is stored again, and read as it was."""
    for module in (distinct, packer):
        monkeypatch.setattr(module, "KNOWN_MOST", 5)
    data = np.random.default_rng(0).normal(size=(12, 1, 6)).astype("f4")
    last = np.arange(8, 12)
    rec = record_data(tmp_path / "run", [[(range(12), data)], [(last, data[last])], [(range(12), data)]])
    before = table(rec.path)
    for upto, rows in ((1, 12), (2, 12), (3, 12 + 7)):
        compact(rec.path, upto=upto)
        assert table(rec.path) == before and rows_stored(rec.path) == rows


@pytest.mark.parametrize("dtype", ["u1", "f2", "f4", "f8"])
def test_keys_tell_any_bit_apart(dtype: str) -> None:
    rng = np.random.default_rng(0)
    row = rng.integers(0, 256, (1, 7 * np.dtype(dtype).itemsize), dtype=np.uint8)
    bits = np.repeat(row, 8 * row.size + 1, axis=0)
    places = np.arange(8 * row.size)
    bits[places, places // 8] ^= (1 << (places % 8)).astype(np.uint8)
    keys = distinct.keys_of(np.zeros(len(bits), np.int64), bits.view(dtype))
    assert len(np.unique(keys[:, 0])) == len(np.unique(keys[:, 1])) == len(bits)
    samples = np.array([-1, 0, 1, 2**40, 2**62])
    assert len(np.unique(distinct.keys_of(samples, np.repeat(bits[:1], 5, axis=0).view(dtype)), axis=0)) == 5


def test_pairs_of_high_bits_are_told_apart() -> None:
    """Flipping the signs of two words is what one multilinear hash alone tells apart badly."""
    pairs = np.array(list(itertools.combinations(range(200), 2)))
    rows = np.ones((len(pairs), 200), np.float32)
    np.put_along_axis(rows, pairs, -1.0, axis=1)
    keys = distinct.keys_of(np.zeros(len(rows), np.int64), rows)
    assert len(np.unique(keys, axis=0)) == len(rows) == len(np.unique(keys[:, 1]))


def test_keys_never_change() -> None:
    """They are stored: a later version must find the rows that an earlier one kept."""
    keys = distinct.keys_of(np.array([3]), np.arange(5, dtype=np.float32)[None])
    words = np.array([3, 0, 20, *np.arange(5, dtype=np.float32).view(np.uint32).tolist()], dtype=object)
    reversed_words = [*words[:3], *(int.from_bytes(int(w).to_bytes(4, "little"), "big") for w in words[3:])]
    factors: list[int] = []
    for number in range(1, 17):  # SplitMix64, in Python's own integers
        z = number * 0x9E3779B97F4A7C15 % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        factors.append((z ^ (z >> 31)) | 1)
    expected = [
        sum(map(int.__mul__, map(int, w), factors[half::2])) % 2**64 for half, w in enumerate((words, reversed_words))
    ]
    assert keys.tolist() == [expected]


def test_colliding_first_halves() -> None:
    known = distinct.Distinct(np.array([[5, 1, 0], [5, 2, 1], [7, 7, 2]], np.uint64))
    keys = np.array([[5, 2], [5, 3], [5, 1], [9, 9], [5, 3]], np.uint64)
    places, new, added = known.place(keys, 3, 1)
    assert places.tolist() == [1, 3, 0, 4, 3] and new.tolist() == [1, 3]
    assert added.tolist() == [[5, 3, 3], [9, 9, 4]]
    assert known.place(keys, 5, 1)[0].tolist() == [1, 3, 0, 4, 3]


# Cells ------------------------------------------------------------------------------------------------------------


def test_cells_are_written_out_in_order(path: Path, small_blocks: None) -> None:
    compact(path, cells=cells_of, upto=1)
    compact(path, cells=cells_of)
    uri = str(path / "gradients")
    with backend.tiledb().open(uri, ctx=backend.context(uri)) as array:
        assert array.schema.sparse and array.schema.allows_duplicates
        assert [array.dim(k).name for k in range(3)] == ["step", "parameter", "sample"]
        found = array.multi_index[:]
        one = array.query(order="U").multi_index[3]
    assert len(found["step"]) == 3 * (3 * 2 * 2) + 3
    assert (np.diff(found["step"].astype(int)) >= 0).all() and sorted(set(found["sample"])) == [-1, 0, 1]
    first = found["step"] == 0
    assert found["parameter"][first].tolist() == [0, 1, 2, 2, 100, 101, 102]
    assert found["sample"][first].tolist() == [-1, 0, 1, 1, -1, 0, 1]
    assert found["value"][first].tolist() == [6, 7, 8, 8, 3, 4, 5]
    assert len(one["value"]) == 6
    assert len(verify.verify(str(path))) == 0


def test_no_cells(path: Path) -> None:
    compact(path, cells=lambda entries, sites: None, upto=1)
    compact(path, cells=lambda entries, sites: tuple(np.empty(0) for _ in range(4)))
    assert len(verify.verify(str(path))) == 0


# Killed at any point ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What a kill is to this process."""


class Fuse:
    """Counts what changes the disk; burns through before the change number `at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at, self.names = 0, -1, []
        tiledb = backend.tiledb()
        for holder, name in (
            (tiledb.Array, "create"), (tiledb.Group, "create"), (layout, "add_members"), (packer.Packer, "_write"),
            (packer.Packer, "_write_calls"), (packer.Packer, "_write_cells"), (compact_module, "write_metadata"),
            (tiledb.VFS, "remove_file"), (tiledb.VFS, "remove_dir"),
        ):  # fmt: skip
            monkeypatch.setattr(holder, name, self._wrap(getattr(holder, name), name))

    def _wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def burn(*arguments: Any, **options: Any) -> Any:
            if self.count == self.at:
                raise Killed
            self.count += 1
            self.names.append(name)
            return function(*arguments, **options)

        return burn

    def reset(self, at: int) -> None:
        self.count, self.at = 0, at


def places_to_die(names: list[str]) -> list[int]:
    """Of each kind of change one in the middle. (All of them were tried once.)"""
    where = [[place for place, name in enumerate(names) if name == kind] for kind in dict.fromkeys(names)]
    return [places[len(places) // 2] for places in where]


def test_killed_at_any_point(
    whole: Recording, tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, fuse = table(whole.path), Fuse(monkeypatch)
    path = tmp_path / "whole"
    shutil.copytree(whole.path, path)
    compact(path, cells=cells_of)
    names, clean = fuse.names[:], kinds(path)
    for at in places_to_die(names):
        path = tmp_path / str(at)
        shutil.copytree(whole.path, path)
        fuse.reset(at)
        with pytest.raises(Killed):
            compact(path, cells=cells_of)
        fuse.reset(-1)
        assert table(path) == before, names[at]
        if at % 2:
            verify.gc(str(path))
            assert table(path) == before and len(verify.gc(str(path))) == 0, names[at]
        compact(path, cells=cells_of)
        assert table(path) == before, names[at]
        assert kinds(path) == clean, names[at]
        assert len(verify.verify(str(path))) == 0


def test_leftovers_of_an_unfinished_block_do_not_rival_the_next(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the commit, then the same block together with a later segment, under another number."""
    before = table(path)

    def die(*arguments: Any, **entries: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(compact_module, "write_metadata", die)
        with pytest.raises(Killed):
            compact(path, cells=cells_of, upto=2)
    assert (path / "factors" / "0").is_dir() and table(path) == before
    compact(path, cells=cells_of)
    assert table(path) == before
    with backend.tiledb().open(str(path / "gradients"), ctx=backend.context()) as array:
        assert len(array.multi_index[:]["value"]) == 3 * 2 * 2 * 3 + 1


def test_torn_fragments_and_metadata(path: Path, small_blocks: None) -> None:
    """Files of a fragment without its commit, a torn entry of the run's metadata."""
    before = table(path)
    compact(path, upto=2)
    for array in ("calls", "factors/0", "rows/0", "rows/0-keys", "gradients"):
        torn = path / array / "__fragments" / "__7_7_0123456789abcdef0123456789abcdef_22"
        torn.mkdir(parents=True)
        (torn / "a0.tdb").write_bytes(b"torn")
    metadata.write_metadata(str(path), backend.context(), compacted=3)
    newest = Path(metadata._files(str(path))[-1].removeprefix("file://"))
    newest.write_bytes(newest.read_bytes()[:20])
    assert table(path) == before
    compact(path)
    assert table(path) == before and Store(path).read_compacted() == 3
    assert len(verify.gc(str(path))) == len(verify.verify(str(path))) == 0


def test_gc_removes_the_journal_of_a_segment_that_was_never_finished(tmp_path: Path) -> None:
    rec = record(tmp_path / "run", 2)
    before = table(rec.path)
    rec.journal(3, step_of(np.random.default_rng(0), np.ones((15, 6), np.float32))[1])
    (rec.path / "journal" / "00000004.journal").write_bytes(b"torn")
    assert table(rec.path) == before and len(verify.verify(rec.uri)) == 0
    removed = verify.gc(rec.uri)
    assert removed["fragment"].tolist() == ["00000003.journal", "00000004.journal"]
    assert table(rec.path) == before and len(verify.gc(rec.uri)) == 0


def test_a_full_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = table(path)

    def full(*arguments: Any) -> None:
        raise backend.tiledb().TileDBError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packer.Packer, "_write_calls", full)
        with pytest.raises(NbdynError, match=r"no space left.*still whole"):
            compact(path)
    assert table(path) == before and not lock.is_held(str(path))
    compact(path)
    assert table(path) == before


# Its surroundings -------------------------------------------------------------------------------------------------


def test_the_command(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = table(path)
    assert main(["compact", str(path)]) == 0
    assert capsys.readouterr().out.startswith("3 segments, ")
    assert table(path) == before
    assert main(["compact", str(path)]) == 0
    assert capsys.readouterr().out == "nothing to compact.\n"
    held = lock.WriterLock(str(path))
    assert main(["compact", str(path)]) == 1
    assert "is being recorded by this process" in capsys.readouterr().err
    held.release()
    assert main(["compact", str(path / "missing")]) == 1


def test_a_journal_that_no_recorder_wrote(tmp_path: Path) -> None:
    rec = record(tmp_path / "run", 1)
    bad = step_of(np.random.default_rng(0), np.ones((15, 6), np.float32))
    bad[1][1].position = 10**6
    rec.commit([bad])
    with pytest.raises(CorruptRun):
        compact(rec.path)
    (rec.path / "journal" / "00000002.journal").unlink()
    before = table(rec.path)
    compact(rec.path)
    assert len(before) and table(rec.path) == before


@pytest.mark.parametrize("compacted", [False, True])
def test_delete_knows_the_folders(compacted: bool, path: Path) -> None:
    if compacted:
        compact(path, upto=2)
    (path / "picture.png").write_text("x")
    with pytest.raises(NbdynError, match="picture"):
        verify.delete(str(path))
    (path / "picture.png").unlink()
    verify.delete(str(path))
    assert not path.exists()


def test_metadata_of_one_millisecond_is_read_in_order(path: Path) -> None:
    """TileDB leaves to chance which of two files of one millisecond counts."""
    for value in range(30):
        metadata.write_metadata(str(path), backend.context(), compacted=value)
        assert Store(path).read_compacted() == value


def test_files_of_the_journal_are_named_by_their_segment(path: Path) -> None:
    assert sorted(journal.numbers(str(path))) == [1, 2, 3]
