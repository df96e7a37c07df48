"""The ledger's file: what is changed, moved, removed or cut short is found, and several processes may append."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdyn.analysis.ledger import chain
from nbdyn.analysis.ledger.chain import Tampered
from nbdyn.errors import NbdynError

ROOT = Path(__file__).parents[3]


def entry(number: int = 0) -> dict[str, Any]:
    return {"event": "declared", "name": f"h-{number}", "claim": 'it is "so" \n — ümläut', "p": 0.1 * number}


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A ledger of five entries."""
    found = str(tmp_path / "runs" / chain.FILE)
    for number in range(5):
        chain.append(found, lambda _, number=number: entry(number))
    return found


def lines(path: str) -> list[bytes]:
    return Path(path).read_bytes().splitlines(keepends=True)


def test_what_is_appended_is_read(path: str):
    found = chain.read(path)
    assert [one["name"] for one in found.entries] == [f"h-{n}" for n in range(5)]
    assert [one["n"] for one in found.entries] == list(range(5))
    assert found.entries[3]["previous"] == found.hashes[2] and found.entries[0]["previous"] == chain.START
    assert len({one["ledger"] for one in found.entries}) == 1 and not found.torn
    assert found.entries[1] | entry(1) == found.entries[1]


def test_the_hash_is_sha256_of_the_line_as_anybody_can_compute_it(path: str):
    import hashlib

    record = json.loads(lines(path)[2])
    text = json.dumps(record["entry"], sort_keys=True, separators=(",", ":"))
    assert record["hash"] == hashlib.sha256(text.encode()).hexdigest()


def test_no_file_is_an_empty_ledger(tmp_path: Path):
    assert chain.read(str(tmp_path / "none")) == chain.Chain()


@pytest.mark.parametrize("field", ["event", "name", "claim", "p", "n", "previous", "ledger", "time", "hash"])
@pytest.mark.parametrize("rehash", [False, True])
def test_a_changed_field_is_detected(path: str, field: str, rehash: bool):
    kept = lines(path)
    record = json.loads(kept[2])
    inside = record if field == "hash" else record["entry"]
    inside[field] = inside[field] + 1 if isinstance(inside[field], float | int) else inside[field][:-1] + "!"
    if rehash:  # whoever also computes the hash of the entry anew breaks the next one
        record["hash"] = chain.digest(record["entry"])
    kept[2] = chain.canonical(record) + b"\n"
    if field == "hash" and rehash:
        assert b"".join(kept) == Path(path).read_bytes()
        return
    Path(path).write_bytes(b"".join(kept))
    with pytest.raises(Tampered, match=r"entry [23] .* before it are whole. Restore the file from a copy."):
        chain.read(path)


@given(data=st.data())
def test_no_byte_can_change_unseen(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.getbasetemp() / "bytes.jsonl"
    if not path.exists():
        for number in range(3):
            chain.append(str(path), lambda _, number=number: entry(number))
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    torn = whole[:place] + bytes([changed]) + whole[place + 1 :]
    with pytest.raises(Tampered):
        chain.check(torn, "ledger")


@pytest.mark.parametrize(
    ("order", "which"),
    [
        ([1, 2, 3, 4], 0), ([0, 2, 3, 4], 1), ([0, 2, 1, 3, 4], 1), ([0, 1, 1, 2, 3, 4], 2), ([0, 1, 2, 4, 3], 3),
        ([4], 0),
    ],
)  # fmt: skip
def test_lines_removed_moved_or_doubled_are_detected(path: str, order: list[int], which: int):
    kept = lines(path)
    Path(path).write_bytes(b"".join(kept[place] for place in order))
    with pytest.raises(Tampered, match=f"entry {which} "):
        chain.read(path)


def test_lines_of_another_ledger_are_detected(path: str, tmp_path: Path):
    other = str(tmp_path / "other")
    for number in range(5):
        chain.append(other, lambda _, number=number: entry(number))
    kept, foreign = lines(path), lines(other)
    Path(path).write_bytes(b"".join([*kept[:3], *foreign[3:]]))
    with pytest.raises(Tampered, match=r'entry 3 \(number 3, "h-3"\) does not follow the one before it'):
        chain.read(path)


@pytest.mark.parametrize("left", [1, 10, 200, -2])
def test_an_append_that_was_cut_short_is_recognised_and_removed(path: str, left: int):
    kept = lines(path)
    torn = kept[4][:left]
    Path(path).write_bytes(b"".join(kept[:4]) + torn)
    found = chain.read(path)
    assert (len(found.entries), found.torn) == (4, torn)
    chain.append(path, lambda _: entry(9))
    again = chain.read(path)
    assert [one["name"] for one in again.entries] == ["h-0", "h-1", "h-2", "h-3", "h-9"] and not again.torn


def test_a_changed_last_entry_without_its_line_break_is_not_taken_for_a_torn_one(path: str):
    """What an editor leaves that strips the end of the file: the next append would else remove the entry."""
    changed = Path(path).read_bytes().replace(b"h-4", b"h-7")[:-1]
    for data in (changed, Path(path).read_bytes()[:-1] + b" ", b"".join(lines(path)[:4]) + b"{}"):
        Path(path).write_bytes(data)
        with pytest.raises(Tampered, match="entry 4 "):
            chain.append(path, lambda _: entry(5))
        assert Path(path).read_bytes() == data
    Path(path).write_bytes(b"".join(lines(path)[:4]) + bytes(4096))  # what a file system may leave after a power cut
    assert chain.read(path).torn == bytes(4096)


def test_an_entry_that_lacks_only_its_line_break_counts(path: str):
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:-1])
    assert len(chain.read(path).entries) == 5 and not chain.read(path).torn
    chain.append(path, lambda _: entry(5))
    assert Path(path).read_bytes().startswith(whole) and len(chain.read(path).entries) == 6


@pytest.mark.parametrize(
    "line", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"entry":{},"hash":""}', b"[" * 5000, b'{"entry":3,"hash":1}']
)
def test_what_is_no_entry_is_detected(path: str, line: bytes):
    Path(path).write_bytes(b"".join(lines(path)[:2]) + line + b"\n" + lines(path)[2])
    with pytest.raises(Tampered, match="entry 2 cannot be read"):
        chain.read(path)


def test_nothing_is_added_where_nothing_is_made_or_the_ledger_is_damaged(path: str):
    before = Path(path).read_bytes()
    found, added = chain.append(path, lambda _: None)
    assert not added and len(found.entries) == 5 and Path(path).read_bytes() == before
    Path(path).write_bytes(before.replace(b"h-1", b"h-7"))
    damaged = Path(path).read_bytes()
    with pytest.raises(Tampered):
        chain.append(path, lambda _: entry(6))
    assert Path(path).read_bytes() == damaged


def test_numbers_that_json_has_not_are_refused(path: str):
    before = Path(path).read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        chain.append(path, lambda _: entry() | {"p": float("nan")})
    assert Path(path).read_bytes() == before


def test_a_full_disk_leaves_whole_entries(path: str, monkeypatch: pytest.MonkeyPatch):
    before, write = Path(path).read_bytes(), os.write

    def half(file: int, data: Any) -> int:
        if len(data) > 100:
            return write(file, data[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(NbdynError, match="No space left on device; the entries before are kept"):
        chain.append(path, lambda _: entry(6) | {"claim": "x" * 20})
    monkeypatch.undo()
    assert Path(path).read_bytes() == before


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NbdynError, match="cannot write"):
        chain.append(str(tmp_path / "file" / chain.FILE), lambda _: entry())


def test_processes_append_at_once_and_none_is_lost(tmp_path: Path):
    """One of them is killed while it holds the lock."""
    path = str(tmp_path / chain.FILE)
    code = (
        "import importlib.util, os, signal, sys\n"
        f"spec = importlib.util.spec_from_file_location('chain', {chain.__file__!r})\n"  # alone: without PyTorch
        "sys.modules['chain'] = chain = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(chain)\n"
        "make = lambda c: {'event': 'x', 'name': sys.argv[1], 'seen': len(c.entries)}\n"
        f"for n in range(15): chain.append({path!r}, make)\n"
        f"if sys.argv[1] == 'one': chain.append({path!r}, lambda c: os.kill(os.getpid(), signal.SIGKILL))"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, name], cwd=ROOT) for name in ("one", "two")]
    assert [worker.wait(60) for worker in workers] == [-9, 0]
    assert chain.append(path, lambda _: entry())[1]
    found = chain.read(path).entries[:-1]
    assert len(found) == 30
    assert all(one["seen"] == one["n"] for one in found)  # each was made in view of all before it
    assert sorted(one["name"] for one in found) == ["one"] * 15 + ["two"] * 15


def test_who_waits_too_long_is_told(path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chain, "WAIT", 0.05)

    def inside(_: chain.Chain) -> None:
        with pytest.raises(NbdynError, match="another process has held"):
            chain.append(path, lambda _: entry())

    chain.append(path, inside)
