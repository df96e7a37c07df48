"""Captures of single samples, read back: from the journal, from arrays, from both; whole and in part; bit for bit."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nbdyn
from nbdyn.errors import CorruptRun, Incompatible
from nbdyn.store import Store, backend, calls, fetch, layout, streams, verify
from nbdyn.store import factors as factors_module
from nbdyn.store.compact import compact
from nbdyn.store.factors import Block
from nbdyn.store.journal import Entry
from nbdyn.store.metadata import write_metadata
from nbdyn.store.sites import Site
from tests.captures import Recording, entry, linear

SITES = [
    linear(6, 4, 0, "fc"),
    Site("conv", "conv", "conv", first=100, shape=(3, 2, 3), options={"stride": [1], "groups": 1, "transposed": False}),
    Site("emb", "emb", "embedding", first=200, shape=(9, 5)),
    Site("norm", "norm", "dense", ranges=((300, 4), (310, 3))),
    linear(5, 2, 400, "rnn"),
]


def numbers(rng: np.random.Generator, *shape: int, dtype: str = "f4") -> np.ndarray:
    """Normal numbers, some of them -0.0, infinite or NaN with a payload."""
    values = rng.normal(size=shape).astype(dtype)
    flat, bits = values.reshape(-1), values.reshape(-1).view(f"u{values.itemsize}")
    flat[:: max(3, flat.size // 4)] = -0.0
    flat[1::7], bits[2::11] = np.inf, bits[2::11] | {2: 0x7E01, 4: 0x7FC00123, 8: 0x7FF8000000000123}[values.itemsize]
    return values


def step_of(rng: np.random.Generator, data: np.ndarray) -> tuple[list[int], list[Entry]]:
    """One step of two batches (of 5 and 3 visits), with calls of every form; sequences vary in length."""
    samples = rng.choice(len(data), 8, replace=False)
    entries = []
    for batch, (first, size) in enumerate(((0, 5), (5, 3))):
        where: dict[str, Any] = {"batch": batch, "position": first}
        ids = samples[first : first + size]
        entries.append(entry(0, {"a": data[ids][:, None], "d": numbers(rng, size, 1, 4)}, data=True, **where))
        entries.append(entry(1, {"a": numbers(rng, size, 2, 8), "d": numbers(rng, size, 3, 6)}, factor=0.5, **where))
        length = int(rng.integers(1, 4))
        words = rng.integers(-1, 9, (size, length)).astype(np.int32)
        entries.append(entry(2, {"ids": words, "d": numbers(rng, size, length, 5)}, **where))
        chosen = np.sort(rng.choice(size, 2, replace=False)).astype(np.int32)
        entries.append(entry(3, {"g": numbers(rng, 2, 7), "p": chosen + np.int32(first)}, **where))
        for call in (0, 1):
            length = int(rng.integers(1, 4))
            tensors = {"a": numbers(rng, size, length, 5), "d": numbers(rng, size, length, 2)}
            entries.append(entry(4, tensors, call=call, factor=2.0**-batch, **where))
    return samples.tolist(), entries


def record(path: Path, segments: int = 4, steps: int = 3) -> Recording:
    rng = np.random.default_rng(5)
    data = numbers(rng, 20, 6)
    rec = Recording(path, SITES)
    rec.batch_only = {"bn.weight": "couples the samples"}
    for _ in range(segments):
        rec.commit([step_of(rng, data) for _ in range(steps)])
    return rec


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return record(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(params=["journal", "arrays", "both"], scope="module")
def store(request: pytest.FixtureRequest, whole: Recording, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run of which nothing, everything, or the first half is compacted."""
    path = tmp_path_factory.mktemp(request.param) / "run"
    shutil.copytree(whole.path, path)
    if request.param != "journal":
        compact(path, upto=2 if request.param == "both" else None)
    return Store(path)


# What must be read, and what is -----------------------------------------------------------------------------------

Visit = tuple[int, int, int, int]
"""Step, position, sample, call."""


def wide(tensor: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bf2":
        return (tensor.astype(np.uint32) << 16).view(np.float32)
    return tensor.astype({"f2": np.float32, "i4": np.int64}.get(dtype, tensor.dtype))


def expected(rec: Recording, site: int, start: int, stop: int) -> dict[Visit, tuple[float, dict[str, np.ndarray]]]:
    found = {}
    for e in rec.entries:
        if e.site == site and start <= e.step < stop:
            positions = e.tensors.get("p", e.position + np.arange(e.size))
            for row, position in enumerate(positions):
                visit = (e.step, int(position), int(rec.samples[e.step][position]), e.call)
                parts = {slot: wide(t[row], e.dtypes[slot]) for slot, t in e.tensors.items() if slot != "p"}
                assert visit not in found
                found[visit] = e.factor, parts
    return found


def read(blocks: Iterator[Block]) -> dict[Visit, tuple[float, dict[str, np.ndarray]]]:
    found = {}
    for block in blocks:
        assert len(block) == len(block.position) == len(block.factor) > 0
        for row in range(len(block)):
            visit = (int(block.step[row]), int(block.position[row]), int(block.sample[row]), block.call)
            assert visit not in found
            found[visit] = float(block.factor[row]), {slot: t[row] for slot, t in block.tensors.items()}
    return found


def assert_same(found: dict[Visit, Any], wanted: dict[Visit, Any]) -> None:
    assert found.keys() == wanted.keys()
    for visit, (factor, parts) in wanted.items():
        assert found[visit][0] == factor and found[visit][1].keys() == parts.keys()
        for slot, values in parts.items():
            got = found[visit][1][slot]
            assert got.dtype == values.dtype and got.shape == values.shape
            assert got.tobytes() == values.tobytes()


# Reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", range(5))
def test_every_form_bit_for_bit(site: int, store: Store, whole: Recording) -> None:
    for start, stop in ((0, 12), (2, 7), (6, 7), (11, 40), (5, 5), (40, 50)):
        assert_same(read(store.factors.blocks(site, start, stop)), expected(whole, site, start, stop))


@pytest.mark.parametrize("site", range(5))
def test_chosen_samples(site: int, store: Store, whole: Recording) -> None:
    for samples in ([3], [0, 7, 19], [], [10**9]):
        wanted = {v: parts for v, parts in expected(whole, site, 1, 12).items() if v[2] in samples}
        assert_same(read(store.factors.blocks(site, 1, 12, samples=np.array(samples, np.int64))), wanted)


@pytest.mark.parametrize("site", [0, 4])
def test_chosen_columns(site: int, store: Store, whole: Recording) -> None:
    everything = expected(whole, site, 0, 12)
    for columns in ({"a": [3]}, {"d": [1, 0]}, {"a": [4, 0, 4], "d": [0]}, {"a": []}):
        chosen = {slot: np.array(numbers, np.int64) for slot, numbers in columns.items()}
        wanted = {
            visit: (factor, {s: t[:, chosen[s]] if s in chosen else t for s, t in parts.items()})
            for visit, (factor, parts) in everything.items()
        }
        assert_same(read(store.factors.blocks(site, 0, 12, columns=chosen)), wanted)
    with pytest.raises(Incompatible, match="columns"):
        list(store.factors.blocks(site, 0, 12, columns={"a": np.array([99])}))


def test_columns_of_other_forms_are_read_whole(store: Store, whole: Recording) -> None:
    for site, slot in ((1, "a"), (2, "d"), (3, "g")):
        found = read(store.factors.blocks(site, 0, 12, columns={slot: np.array([0])}))
        assert_same(found, expected(whole, site, 0, 12))


def test_blocks_are_ordered_bounded_and_of_one_shape(store: Store, whole: Recording) -> None:
    for site in range(5):
        for most in (300, 1200, 10**6):
            last, found = -1, {}
            for block in store.factors.blocks(site, 0, 12, max_bytes=most):
                assert block.site == site and (np.diff(block.step) >= 0).all()
                size = sum(t.nbytes for t in block.tensors.values()) + factors_module.VISIT_BYTES * len(block)
                assert size <= most or len(block) == 1
                assert block.step[0] >= last  # a window's steps are over before the next begins
                last = max(last, int(block.step[0]))
                found |= read(iter([block]))
            assert_same(found, expected(whole, site, 0, 12))


def test_whole_steps_stay_together(store: Store) -> None:
    """All calls and shapes of a step come before any of a later window."""
    for site in (2, 4):
        ended: set[int] = set()
        current: set[int] = set()
        for block in store.factors.blocks(site, 0, 12, max_bytes=3000):
            steps = set(block.step.tolist())
            assert not steps & ended
            if current and min(steps) > max(current):
                ended |= current
                current = set()
            current |= steps


def test_small_spans_and_pieces(store: Store, whole: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits that only large runs meet."""
    monkeypatch.setattr(factors_module, "SPAN_VISITS", 10)
    monkeypatch.setattr(streams, "PIECE_BYTES", 60)
    monkeypatch.setattr(streams, "GAP_BYTES", 40)
    monkeypatch.setattr(streams, "GAP_COLUMNS", 1)
    for site in range(5):
        everything = expected(whole, site, 0, 12)
        assert_same(read(store.factors.blocks(site, 0, 12)), everything)
        some = {v: parts for v, parts in everything.items() if v[2] % 3 == 0}
        assert_same(read(store.factors.blocks(site, 0, 12, samples=np.arange(0, 20, 3))), some)
    chosen = {"a": np.array([0, 3])}
    wanted = {v: (f, {"a": p["a"][:, [0, 3]], "d": p["d"]}) for v, (f, p) in expected(whole, 0, 0, 12).items()}
    assert_same(read(store.factors.blocks(0, 0, 12, columns=chosen)), wanted)


def test_rows_of_the_data_set_are_kept_in_memory_once_that_is_cheaper(
    store: Store, whole: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small(fetch._Data):
        def read(self, array: Any, places: np.ndarray, rows: int) -> np.ndarray:
            self._picked += 10**6
            return super().read(array, places, rows)

    monkeypatch.setattr(fetch, "_Data", Small)
    assert_same(read(store.factors.blocks(0, 0, 12)), expected(whole, 0, 0, 12))
    monkeypatch.setattr(fetch, "ROWS_BYTES", 0)
    assert_same(read(store.factors.blocks(0, 0, 12)), expected(whole, 0, 0, 12))


def test_what_factors_say_of_a_run(store: Store, whole: Recording) -> None:
    f = store.factors
    assert store.has_factors and f is store.factors
    assert f.sites == SITES and f.batch_only == whole.batch_only
    assert f.steps.tolist() == list(range(12))
    assert f.sites_of(np.array([23, 24])) == [0]  # the last weight, the first bias
    assert f.sites_of(np.array([27, 303, 312, 99])) == [0, 3]
    assert f.sites_of(np.array([28, 304, 309])) == []
    with pytest.raises(Incompatible, match="has 5 per-sample sites"):
        next(f.blocks(5, 0, 1))
    with pytest.raises(Incompatible):
        next(f.blocks(-1, 0, 1))


def test_parts_of_a_block(store: Store) -> None:
    block = next(store.factors.blocks(4, 0, 12))
    part = block.take(block.position > 0)
    assert len(part) == (block.position > 0).sum() and (part.position > 0).all()
    np.testing.assert_array_equal(part.tensors["d"], block.tensors["d"][block.position > 0])


@pytest.mark.parametrize("dtype", ["f2", "bf2", "f4", "f8"])
@pytest.mark.parametrize("compacted", [False, True])
def test_every_type(dtype: str, compacted: bool, tmp_path: Path) -> None:
    """Half precision is widened exactly; a call of another type begins a stream of its own."""
    rng = np.random.default_rng(0)
    rec = Recording(tmp_path / "run", [linear(7, 3), Site("emb", "emb", "embedding", first=50, shape=(40, 3))])

    def tensor(*shape: int) -> np.ndarray:
        if dtype == "bf2":
            return rng.integers(0, 2**16, shape, dtype=np.uint16)
        return numbers(rng, *shape, dtype=dtype)

    for kind in (np.int32, np.int64):
        ids = rng.integers(-1, 40, (4, 5)).astype(kind)
        rec.commit(
            [
                (range(4), [entry(0, {"a": tensor(4, 2, 7), "d": tensor(4, 2, 3)}, data=True)]),
                (range(4), [entry(0, {"a": numbers(rng, 4, 2, 7), "d": tensor(4, 2, 3)})]),
                (range(4), [entry(1, {"ids": ids, "d": tensor(4, 5, 3)})]),
            ]
        )
    if compacted:
        compact(rec.path)
    for site in (0, 1):
        assert_same(read(rec.store().factors.blocks(site, 0, 6)), expected(rec, site, 0, 6))


def test_an_input_that_sites_share_is_stored_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sites = [linear(64, 2, 200 * k, name) for k, name in enumerate("qkv")]
    rec = Recording(tmp_path / "run", sites)
    for _ in range(2):
        a = numbers(rng, 50, 3, 64)
        rec.commit([(range(50), [entry(k, {"a": a, "d": numbers(rng, 50, 3, 2)}) for k in range(3)])])
    compact(rec.path)
    assert sorted(p.name for p in (rec.path / "factors").iterdir() if p.name.isdigit()) == ["0", "1", "2", "3"]
    for site in range(3):
        assert_same(read(rec.store().factors.blocks(site, 0, 2)), expected(rec, site, 0, 2))


def test_steps_that_were_not_captured(tmp_path: Path) -> None:
    """With every=5, four of five steps have visits, but no calls; one segment has no journal."""
    rng = np.random.default_rng(0)
    rec = Recording(tmp_path / "run", [linear(3, 2)])
    for segment in range(4):
        steps: list[Any] = [(range(6), []) for _ in range(10)]
        if segment != 1:
            for place in (0, 5):
                steps[place] = (
                    rng.permutation(6),
                    [entry(0, {"a": numbers(rng, 6, 1, 3), "d": numbers(rng, 6, 1, 2)})],
                )
        rec.commit(steps, journal=segment != 1)
    for upto in (0, 2, 4):
        compact(rec.path, upto=upto)
        assert rec.store().factors.steps.tolist() == [0, 5, 20, 25, 30, 35]
        assert_same(read(rec.store().factors.blocks(0, 0, 40)), expected(rec, 0, 0, 40))


def test_a_run_without_captures(tmp_path: Path) -> None:
    rec = Recording(tmp_path / "run", [])
    rec.commit([(range(3), [])], journal=False)
    store = rec.store()
    assert not store.has_factors
    assert store.factors.sites == [] and len(store.factors.steps) == 0 and store.factors.batch_only == {}
    assert store.factors.sites_of(np.array([1])) == []
    assert str(compact(rec.path)) == "nothing to compact"
    assert len(verify.verify(rec.uri)) == 0 and not (rec.path / "calls").exists()


def test_a_call_without_visits_or_positions_holds_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rec = Recording(tmp_path / "run", [linear(3, 2)])
    empty = entry(0, {"a": numbers(rng, 3, 1, 3)[:, :0], "d": numbers(rng, 3, 1, 2)[:, :0]})
    nobody = entry(0, {"a": numbers(rng, 3, 1, 3)[:0], "d": numbers(rng, 3, 1, 2)[:0]}, call=1)
    rec.commit(
        [(range(3), [empty, nobody]), (range(3), [entry(0, {"a": numbers(rng, 3, 1, 3), "d": numbers(rng, 3, 1, 2)})])]
    )
    for _ in range(2):
        assert rec.store().factors.steps.tolist() == [1]
        compact(rec.path)


def test_new_segments_are_seen_after_refresh(tmp_path: Path) -> None:
    rec = record(tmp_path / "run", segments=1)
    store = rec.store()
    assert len(store.factors.steps) == 3
    rng = np.random.default_rng(1)
    rec.commit([step_of(rng, numbers(rng, 20, 6))])
    assert len(store.factors.steps) == 3
    assert store.refresh() and len(store.factors.steps) == 4
    for site in range(5):
        assert_same(read(store.factors.blocks(site, 0, 9)), expected(rec, site, 0, 9))


def test_a_reader_does_not_notice_a_compaction(tmp_path: Path) -> None:
    """Journal files vanish while it reads, also those of segments that it knows nothing of."""
    rec = record(tmp_path / "run", segments=3)
    store, wanted = rec.store(), [expected(rec, site, 0, 9) for site in range(5)]
    assert len(store.factors.steps) == 9
    readers = [store.factors.blocks(site, 0, 9, max_bytes=700) for site in range(5)]
    found = [read(iter([next(reader)])) for reader in readers]
    rng = np.random.default_rng(1)
    rec.commit([step_of(rng, numbers(rng, 20, 6))])
    compact(rec.path)
    for site, reader in enumerate(readers):
        assert_same(found[site] | read(reader), wanted[site])
        assert_same(read(store.factors.blocks(site, 0, 99)), wanted[site])


def test_a_table_that_changes_while_it_is_read(
    whole: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compaction commits between the look at `compacted` and the look at the journal."""
    shutil.copytree(whole.path, tmp_path / "run")
    store, reads = Store(tmp_path / "run"), []
    load = calls._load

    def meanwhile(store: Store, compacted: int) -> Any:
        reads.append(compacted)
        if len(reads) == 1:
            compact(tmp_path / "run")
        return load(store, compacted)

    monkeypatch.setattr(calls, "_load", meanwhile)
    assert_same(read(store.factors.blocks(0, 0, 12)), expected(whole, 0, 0, 12))
    assert reads == [0, 4]


# Damaged and hostile runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(whole: Recording, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "run"
    shutil.copytree(whole.path, path)
    compact(path)
    return path


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A compacted run to damage."""
    shutil.copytree(packed, tmp_path / "run")
    return tmp_path / "run"


def read_all(path: Path) -> None:
    store = Store(path)
    for site in range(len(store.factors.sites)):
        for _ in store.factors.blocks(site, 0, 12):
            pass


def assert_damaged(path: Path, how: str) -> None:
    """Reading raises an error of ours."""
    try:
        read_all(path)
    except CorruptRun:
        return
    raise AssertionError(f"{how} was read as if nothing were wrong")


def damaged(path: Path) -> None:
    """Reading raises an error of ours, and verify has a finding."""
    with pytest.raises(CorruptRun):
        read_all(path)
    assert len(verify.verify(str(path)))


@contextlib.contextmanager
def rewriting(path: Path, array: str) -> Iterator[Any]:
    """An array opened to write what counts from then on."""
    uri, last = str(path / array), Store(path).read_compacted() + 1
    with backend.tiledb().open(uri, "w", ctx=backend.context(uri), timestamp=last) as opened:
        yield opened
    write_metadata(str(path), backend.context(str(path)), compacted=last)


def test_damaged_metadata_of_a_stream(copy: Path) -> None:
    uri = str(copy / "factors" / "1")
    with backend.tiledb().open(uri, ctx=backend.context(uri)) as array:
        whole = json.loads(array.meta["stream"])
    assert whole["slot"] == "d" and whole["shape"] == [4]
    changes: list[Any] = [
        {"shape": [6, 10**9]}, {"shape": [-6]}, {"shape": []}, {"shape": [5]}, {"shape": ["6"]}, {"shape": 6},
        {"dtype": "f8"}, {"dtype": "O"}, {"dtype": ["f4"]}, {"slot": "x"}, {"slot": "p"}, {"site": -1},
        {"call": 2**70}, {"data": 3}, {"form": "conv"}, {"form": None}, {"site": None}, "text", [], None,
    ]  # fmt: skip
    texts = [json.dumps(whole | change if isinstance(change, dict) else change) for change in changes]
    for text in [*texts, "{" * 10_000, "", b"\xff"]:
        with rewriting(copy, "factors/1") as array:
            array.meta["stream"] = text
        assert_damaged(copy, str(text)[:200])
    with rewriting(copy, "factors/1") as array:
        del array.meta["stream"]
    damaged(copy)


def test_damaged_calls(copy: Path) -> None:
    uri = str(copy / "calls")
    with backend.tiledb().open(uri, ctx=backend.context(uri)) as array:
        row = array[0, :]["value"]
    for place, field in enumerate(calls.FIELDS):
        if field in ("factor", "batch", "call", "row_p"):  # any number is one
            continue
        for value in (-7, 2**33, -(2**62)):
            changed = row.copy()
            changed[place] = value
            with rewriting(copy, "calls") as array:
                array[0:1, :] = changed.reshape(1, -1)
            assert_damaged(copy, f"{field} = {value}")
    damaged(copy)


def test_a_call_of_another_size_or_stream(copy: Path) -> None:
    uri = str(copy / "calls")
    with backend.tiledb().open(uri, ctx=backend.context(uri)) as array:
        row = array[0, :]["value"]
    for column, values in ((calls.SIZE, (9, 2**30)), (calls.STREAM, range(1, 9)), (calls.LENGTH, (2**30,))):
        for value in values:
            changed = row.copy()
            changed[column] = value
            with rewriting(copy, "calls") as array:
                array[0:1, :] = changed.reshape(1, -1)
            assert_damaged(copy, f"column {column} = {value}")


@pytest.mark.parametrize("value", [-3, "x", 2.5])
def test_damaged_mark_of_the_last_compacted_segment(value: Any, copy: Path) -> None:
    write_metadata(str(copy), backend.context(str(copy)), **{"compacted": value})
    damaged(copy)


def test_damaged_sites(copy: Path) -> None:
    for text in ("[", "{}", '[{"name": "x"}]', "[1]", "null"):
        with rewriting(copy, "calls") as array:
            array.meta["sites"] = text
        with pytest.raises(CorruptRun, match="sites"):
            read_all(copy)
    damaged(copy)


@pytest.mark.parametrize("what", ["factors/0", "factors/3", "rows/0", "calls", "factors", "rows"])
def test_missing_arrays(what: str, copy: Path) -> None:
    shutil.rmtree(copy / what)
    damaged(copy)


@pytest.mark.parametrize(("array", "columns", "itemsize"), [("factors/1", 5, 4), ("factors/1", 4, 2), ("rows/0", 9, 4)])
def test_arrays_of_another_schema(array: str, columns: int, itemsize: int, copy: Path) -> None:
    shutil.rmtree(copy / array)
    uri = str(copy / array)
    schema = layout.bits_schema(backend.context(uri), columns, itemsize, "whole")
    backend.tiledb().Array.create(uri, schema, ctx=backend.context(uri))
    damaged(copy)


@pytest.mark.parametrize("what", ["factors/0", "factors/1", "factors/3", "rows/0", "calls", "gradients"])
def test_cut_files(what: str, copy: Path) -> None:
    if what == "gradients":
        shutil.rmtree(copy / "gradients" / "__schema")
    for file in (copy / what / "__fragments").glob("*/a0.tdb"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert len(verify.verify(str(copy)))


def test_flipped_bits_are_found(copy: Path) -> None:
    for file in (copy / "factors" / "1" / "__fragments").glob("*/a0.tdb"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    damaged(copy)


def test_a_lost_fragment_is_found_by_verify(whole: Recording, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(whole.path, path)
    for upto in (1, 2, 4):
        compact(path, upto=upto)
    assert len(verify.verify(str(path))) == 0
    for array in ("factors/1", "calls"):
        lost = next(p for p in (path / array / "__fragments").iterdir() if p.name.startswith("__2_"))
        (path / array / "__commits" / f"{lost.name}.wrt").unlink()
        problems = verify.verify(str(path))
        assert array in set(problems["array"]) or "table of calls" in problems["problem"][0]


def test_ids_beyond_the_table(whole: Recording, tmp_path: Path) -> None:
    for compacted in (False, True):
        rec = Recording(tmp_path / f"run{compacted}", [SITES[2]])
        ids = np.array([[0, 9]], np.int32)
        rec.commit([([0], [entry(0, {"ids": ids, "d": np.zeros((1, 2, 5), np.float32)})])])
        if compacted:
            compact(rec.path)
        damaged(rec.path)


def test_positions_beyond_the_batch(tmp_path: Path) -> None:
    for compacted in (False, True):
        for bad in (-1, 2):
            rec = Recording(tmp_path / f"run{compacted}{bad}", [SITES[3]])
            tensors = {"g": np.zeros((1, 7), np.float32), "p": np.array([bad], np.int32)}
            rec.commit([([0, 1], [entry(0, tensors)])])
            if compacted:
                compact(rec.path)
            damaged(rec.path)


HOSTILE = [
    {"step": -1}, {"step": 10**12}, {"step": 7}, {"site": 1}, {"site": -1}, {"site": "0"}, {"size": 10**9}, {"size": 1},
    {"position": 1}, {"position": -1}, {"call": -1}, {"batch": 2**80}, {"step": None},
]  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE)
def test_hostile_journals(change: dict[str, Any], tmp_path: Path) -> None:
    rec = Recording(tmp_path / "run", [linear(3, 2)])
    rec.commit([(range(2), [])], journal=False)
    bad = entry(0, {"a": np.zeros((2, 1, 3), np.float32), "d": np.zeros((2, 1, 2), np.float32)})
    for name, value in change.items():
        setattr(bad, name, value)
    rec.journal(1, [bad])
    damaged(rec.path)


@pytest.mark.parametrize(
    ("a", "d"),
    [
        ((2, 1, 4), (2, 1, 2)), ((2, 1, 3), (2, 1, 3)), ((2, 2, 3), (2, 1, 2)), ((2, 3), (2, 2)),
        ((1, 1, 3), (2, 1, 2)),
    ],
)  # fmt: skip
def test_tensors_that_are_none_of_the_site(a: tuple[int, ...], d: tuple[int, ...], tmp_path: Path) -> None:
    rec = Recording(tmp_path / "run", [linear(3, 2)])
    bad = entry(0, {"a": np.zeros(a, np.float32), "d": np.zeros(d, np.float32)})
    bad.size = 2
    rec.commit([(range(2), [bad])])
    damaged(rec.path)
    with pytest.raises(CorruptRun):
        compact(rec.path)


def test_a_damaged_journal(whole: Recording, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(whole.path, path)
    file = path / "journal" / "00000002.journal"
    content = file.read_bytes()
    for cut in (0, 10, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:cut])
        assert_damaged(path, f"the first {cut} bytes")
    assert len(verify.verify(str(path)))
    file.write_bytes(content)
    assert len(verify.verify(str(path))) == 0
    assert nbdyn.open(path).store.has_factors
