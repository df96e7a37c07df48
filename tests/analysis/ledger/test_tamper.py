"""What the logbooks of runs know of the ledger: entries cut off its end are missed there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nbdyn
from nbdyn.analysis.ledger import chain, looks
from nbdyn.analysis.ledger.chain import Tampered
from nbdyn.errors import NbdynError
from nbdyn.settings import options
from tests.analysis.ledger.conftest import Give
from tests.analysis.ledger.test_ledger import BODY, again


@pytest.fixture
def folder(give: Give) -> Path:
    """Two runs and a tested hypothesis."""
    found = give("a-0", "a-1")
    again(found)
    return found


def lines(folder: Path) -> list[bytes]:
    return (folder / chain.FILE).read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("kept", [0, 1])
def test_entries_cut_off_the_end_are_missed(folder: Path, kept: int):
    (folder / chain.FILE).write_bytes(b"".join(lines(folder)[:kept]))
    if kept:
        with pytest.raises(
            Tampered, match=r"entry 1 is missing. 1 are there, and the logbook of a-0 says: tested learns"
        ):
            nbdyn.ledger(folder)
    else:
        assert (
            nbdyn.ledger(folder).entries == []
        )  # an empty file has no id: the runs know another ledger, which is said


@pytest.mark.parametrize("remove", [True, False])
def test_a_ledger_that_is_gone_or_begun_anew_is_said(folder: Path, remove: bool, capsys: pytest.CaptureFixture[str]):
    os.remove(folder / chain.FILE)
    if not remove:
        again(folder, 1)
    for shown in (nbdyn.ledger(folder).markdown(), nbdyn.ledger(folder).frame().attrs["nbdyn"]["note"]):
        assert "a-0, a-1: known to another ledger" in shown.replace("\\", "")  # also if nothing is said
    options.quiet = False
    nbdyn.ledger(folder)
    assert "a-0, a-1: known to another ledger" in capsys.readouterr().out


def test_what_was_tested_by_another_ledger_was_seen(folder: Path):
    os.remove(folder / chain.FILE)
    assert again(folder, 1).kind == "exploratory"


def test_an_outcome_rewritten_with_all_hashes_is_missed(folder: Path):
    """The last entry has no follower that would notice: the runs do."""
    kept = lines(folder)
    record = json.loads(kept[1])
    record["entry"]["p"] = 1e-9
    record["hash"] = chain.digest(record["entry"])
    (folder / chain.FILE).write_bytes(kept[0] + chain.canonical(record) + b"\n")
    assert len(chain.read(str(folder / chain.FILE)).entries) == 2  # the chain itself is whole
    with pytest.raises(Tampered, match="entry 1 is not the one that the logbook of a-0 knows"):
        nbdyn.ledger(folder)


def test_nothing_is_declared_or_tested_on_a_damaged_ledger(folder: Path):
    ledger, path = nbdyn.ledger(folder), folder / chain.FILE
    path.write_bytes(path.read_bytes().replace(b"It learns.", b"It lerans."))
    for call in (
        lambda: ledger.run_cell("other", BODY, "a-*"),
        lambda: ledger.test("learns"),
        ledger.frame,
        ledger.markdown,
        lambda: ledger["learns"],
        lambda: nbdyn.ledger(folder),
    ):
        with pytest.raises(Tampered, match=r'entry 0 \("learns", declared\) was changed'):
            call()


def test_a_torn_end_is_said_and_repaired(folder: Path, capsys: pytest.CaptureFixture[str]):
    path = folder / chain.FILE
    with path.open("ab") as file:
        file.write(b'{"entry":{"claim":"half')
    options.quiet = False
    ledger = nbdyn.ledger(folder)
    assert "the last append was cut short (23 bytes)" in capsys.readouterr().out
    assert ledger["learns"].state == "tested"
    ledger.run_cell("next", BODY, "a-*")
    assert "removed 23 bytes of an append that was cut short" in capsys.readouterr().out
    nbdyn.ledger(folder)
    assert capsys.readouterr().out == ""


def test_runs_moved_to_another_folder_take_nothing_with_them(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "a-0", tmp_path / "elsewhere" / "a-0")
    assert len(nbdyn.ledger(tmp_path / "elsewhere")) == 0


def test_a_run_that_cannot_be_written_or_read_does_not_stop_the_ledger(give: Give, capsys: pytest.CaptureFixture[str]):
    from nbdyn.store import Store

    folder = give("a-0", "a-1")
    options.quiet = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "write_note", lambda *_: (_ for _ in ()).throw(NbdynError("no")))
        nbdyn.ledger(folder).run_cell("learns", BODY, "a-*")
    assert "the logbook of a-0, a-1 cannot be written" in capsys.readouterr().out
    shutil.rmtree(folder / "a-1" / "notes")
    assert len(nbdyn.ledger(folder)) == 1
    assert "a-1: its logbook cannot be read" in capsys.readouterr().out


def test_reopening_shows_everything(folder: Path):
    ledger = nbdyn.ledger(folder)
    before = ledger.frame()
    after = nbdyn.ledger(str(folder) + "/").frame()
    assert before.equals(after) and repr(ledger["learns"]) == repr(nbdyn.ledger(folder)["learns"])
    assert ledger.verify() == 2


def test_an_entry_that_another_process_adds_meanwhile_is_no_tampering(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """It does so between the two things that are read to open a ledger, file and logbooks, in whichever order."""
    read = {"read": chain.read, "logbooks": looks.logbooks}

    def then(name: str) -> Callable[[str], Any]:
        def called(path: str) -> Any:
            found = read[name](path)
            monkeypatch.setattr(chain, "read", read["read"])
            monkeypatch.setattr(looks, "logbooks", read["logbooks"])
            nbdyn.ledger(folder).run_cell("meanwhile", BODY, "a-*")
            return found

        return called

    monkeypatch.setattr(chain, "read", then("read"))
    monkeypatch.setattr(looks, "logbooks", then("logbooks"))
    assert len(nbdyn.ledger(folder)) == 2
