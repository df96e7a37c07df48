"""The care of runs: verify finds what is missing, gc removes what a killed writer left, delete deletes only runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import nbdyn
from nbdyn.__main__ import main
from nbdyn.errors import CorruptRun, NbdynError
from nbdyn.store import Store, backend, metadata, verify
from nbdyn.store.layout import STEP_ATTRIBUTES
from nbdyn.store.writer import Segment, SegmentWriter
from tests import problems


def make(path: Path, **options: Any) -> None:
    """A run of 24 steps in four segments."""
    model = problems.mlp(12, 8, 4)
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), nn.CrossEntropyLoss()
    loader = DataLoader(problems.data(), 20)
    for _ in range(4):
        with nbdyn.record(
            path, model, optimizer, loss_fn, mode="resume", snapshot_every=5, note="again", **options
        ) as rec:
            problems.train(rec, model, optimizer, loss_fn, loader, 1)
            rec.log(value=1.0)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    for weights in ("every", "snapshots"):
        make(folder / weights, weights=weights)
    return folder


@pytest.fixture(params=["every", "snapshots"])
def path(request: pytest.FixtureRequest, originals: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(originals / request.param, tmp_path / "run")
    return tmp_path / "run"


def tree(path: Path) -> list[str]:
    return sorted(str(entry.relative_to(path)) for entry in path.rglob("*"))


def fragments(path: Path, array: str, number: int) -> list[Path]:
    """The fragments of an array that a segment wrote (segments count from 1)."""
    return [entry for entry in (path / array / "__fragments").iterdir() if int(entry.name.split("_")[2]) == number]


def lose(path: Path, array: str, number: int) -> None:
    """Delete what a segment wrote to an array."""
    for fragment in fragments(path, array, number):
        (path / array / "__commits" / f"{fragment.name}.wrt").unlink()
        shutil.rmtree(fragment)


def test_a_whole_run_has_no_findings(path: Path) -> None:
    before = tree(path)
    assert len(verify.verify(str(path))) == 0
    assert len(verify.verify(str(path), chunk=5)) == 0
    assert len(verify.gc(str(path))) == 0
    assert tree(path) == before


# Every file, cut or gone: findings or an error of ours, never a crash, never a wrong number that looks right.
# (TileDB protects neither the footers of fragments nor, here, rows of every step, against flipped bits.)


def files(path: Path) -> list[Path]:
    """One file of each kind, of the middle segment where there are several; of the ten columns of `steps`, two."""
    kinds: dict[str, list[Path]] = {}
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file() and entry.stat().st_size):
        parts = file.relative_to(path).parts
        kind = "/".join((*parts[:2], parts[-1] if "__fragments" in parts else ""))
        kinds.setdefault(kind, []).append(file)
    alike = {f"steps/__fragments/a{number}.tdb" for number in range(1, 9)}
    return [found[len(found) // 2] for kind, found in kinds.items() if "lock" not in kind and kind not in alike]


def read_everything(path: Path) -> None:
    run = nbdyn.open(path)
    for name in ("steps", "visits", "norms", "samples", "notes", "layers", "parameters"):
        getattr(run, name)
    assert run._repr_html_() and repr(run) and run.status
    run.weights["all"]
    for site in range(len(run.store.factors.sites)):
        for _ in run.store.factors.blocks(site, 0, 10**6):
            pass


def test_any_file_cut_short(path: Path) -> None:
    """Empty, half as long, or a byte short: found by verify; a clear error where it is read."""
    first = Store(path).config["weights"] == "every"
    for number, file in enumerate(files(path)):
        whole = file.read_bytes()
        how = ("empty", "half", "one byte short")[(number + first) % 3]
        file.write_bytes(whole[: {"empty": 0, "half": len(whole) // 2, "one byte short": len(whole) - 1}[how]])
        array = file.relative_to(path).parts[0]
        try:
            read_everything(path)
        except CorruptRun as error:
            assert array in str(error) or "group" in str(error), f"{file}: {error}"
        else:
            unread = array == "gradients" or "-keys" in str(file) or "/__group" in str(file)
            assert unread or array in ("state", "__meta"), f"{how}: {file} was read as if nothing were wrong"
        # The newest entry of the metadata is read as it was before (below).
        assert len(verify.verify(str(path))) or array == "__meta", f"{how}: {file} is not found"
        file.write_bytes(whole)
    assert len(verify.verify(str(path))) == 0


@pytest.mark.parametrize("array", ["weights", "scalars", "visits", "steps"])
def test_a_lost_segment_is_found(array: str, path: Path) -> None:
    lose(path, array, 2)
    findings = verify.verify(str(path))
    found = set(findings["step"][findings["array"] == ("visits" if array == "steps" else array)])
    snapshots = Store(path).config["weights"] == "snapshots"
    # Row 6 was written at the end of segment 1, row 12 at the end of segment 2.
    assert found >= ({10} if array == "weights" and snapshots else set(range(7, 12)))
    assert not found & {1, 2, 20, 21}


def test_a_lost_snapshot_and_lost_names_are_found(path: Path) -> None:
    lose(path, "state", 2)
    assert "the snapshot is missing" in set(verify.verify(str(path))["problem"])
    for entry in (path / "scalars" / "__meta").iterdir():
        entry.unlink()
    assert "the names of its columns are missing" in set(verify.verify(str(path))["problem"])


def test_runs_and_doctor_name_the_damage(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = fragments(path, "steps", 4)[0] / "a9.tdb"  # the segment numbers, which every opening reads
    with open(cut, "r+b") as file:
        file.truncate(cut.stat().st_size // 2)
    shutil.copytree(path, path.parent / "again")
    table = nbdyn.runs(path.parent)
    assert table["status"].tolist() == ["corrupt", "corrupt"]
    assert f"cannot read {path}/steps" in table["problem"][1]
    assert main(["doctor", str(path)]) == 0
    assert f"cannot read {path}/steps" in capsys.readouterr().out
    assert main(["gc", str(path)]) == 1
    assert f"cannot read {path}/steps" in capsys.readouterr().err


# gc -------------------------------------------------------------------------------------------------------------


def unfinished(path: Path, last: str = "_write_steps", column: str = "log/ghost") -> None:
    """What a writer leaves that is killed in the middle of a fifth segment, before it comes to the method `last`."""
    store = Store(path)
    writer = SegmentWriter(store.uri, backend.context(store.uri), store.timestamp, list(store.columns))
    start, rows = store.steps_committed, np.ones((3, store.parameters), np.float32)
    visits: dict[str, np.ndarray] = {
        "step": np.arange(start, start + 3, dtype=np.uint32),
        "position": np.zeros(3, np.uint32),
        "sample": np.zeros(3, np.int64),
        "target": np.zeros(3, np.int32),
        "loss": np.zeros(3, np.float32),
        "correct": np.zeros(3, np.int8),
    }
    steps = {name: np.zeros(3, dtype) for name, dtype in STEP_ATTRIBUTES if name != "segment"}
    segment = Segment(start, steps, {column: np.ones(3)}, visits, [(start, rows)], [(start, 0, b"x")])

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    setattr(writer, last, die)
    with pytest.raises(KeyboardInterrupt):
        writer.commit(segment)


@pytest.mark.parametrize("last", ["_write_state", "_write_scalars", "_write_visits", "_write_steps"])
def test_an_unfinished_segment_is_invisible_and_gc_removes_it(last: str, path: Path) -> None:
    before, whole = tree(path), nbdyn.open(path)
    weights, steps, visits = whole.weights["all"], whole.steps, whole.visits
    unfinished(path, last)
    assert len(tree(path)) > len(before)
    run = nbdyn.open(path)
    assert len(run) == len(whole)
    np.testing.assert_array_equal(run.weights["all"], weights)
    assert run.steps.equals(steps) and run.visits.equals(visits)
    assert len(verify.verify(str(path))) == 0
    removed = verify.gc(str(path))
    left = {"_write_state": 1, "_write_scalars": 2, "_write_visits": 3, "_write_steps": 4}[last]
    assert set(removed["array"]) == set(("weights", "state", "scalars", "visits")[:left])
    assert tree(path) == before
    np.testing.assert_array_equal(nbdyn.open(path).weights["all"], weights)


def test_the_columns_of_an_unfinished_segment_do_not_name_those_of_the_next(path: Path) -> None:
    """Killed while logging `ghost`, resumed logging `real`: both wrote names under the same segment number."""
    unfinished(path)
    model = problems.mlp(12, 8, 4)
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), nn.CrossEntropyLoss()
    with nbdyn.record(path, model, optimizer, loss_fn, mode="resume") as rec:
        problems.train(rec, model, optimizer, loss_fn, DataLoader(problems.data(), 20), 1)
        rec.log(real=2.0)
    steps = nbdyn.open(path).steps
    assert "ghost" not in steps
    assert steps["real"].dropna().tolist() == [2.0]
    assert len(verify.verify(str(path))) == 0


def test_gc_removes_fragments_without_a_commit(path: Path) -> None:
    """Files of a fragment come first, its commit last; killed between the two, the fragment is no one's."""
    before = tree(path)
    for array in ("weights", "visits", "notes", "steps"):
        whole = next((path / array / "__fragments").iterdir())
        torn = whole.with_name(whole.name.replace("__", "__9", 1).replace(whole.name[-8:], "0000abcd"))
        shutil.copytree(whole, torn)
        (torn / "__fragment_metadata.tdb").unlink()
    removed = verify.gc(str(path))
    assert removed["array"].tolist() == ["weights", "visits", "notes", "steps"]
    assert set(removed["reason"]) == {"not committed"}
    assert tree(path) == before


def test_torn_metadata_is_read_as_it_was_before_and_gc_removes_it(path: Path) -> None:
    """A writer died, or met a full disk, while it marked the run complete."""
    store = Store(path)
    newest = metadata._files(store.uri)[-1]
    metadata.write_metadata(store.uri, backend.context(store.uri), status="recording")
    torn = metadata._files(store.uri)[-1]
    assert torn != newest
    for size in (0, 1, 20):
        with open(torn.removeprefix("file://"), "r+b") as file:
            file.truncate(size)
        assert Store(path).status == "complete" and len(Store(path).weights.steps)
        assert nbdyn.runs(path.parent)["status"].tolist() == ["complete"]
        assert len(verify.verify(str(path))) == 0
    removed = verify.gc(str(path))
    assert removed["reason"].tolist() == ["torn"]
    assert metadata._files(store.uri)[-1] == newest
    assert len(verify.gc(str(path))) == 0


def test_metadata_is_written_whole_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(path)
    tiledb = backend.tiledb()

    class Full(tiledb.Group):
        def close(self) -> None:
            super().close()
            raise tiledb.TileDBError("no space left")

        def __exit__(self, *details: object) -> None:
            self.close()

    monkeypatch.setattr(tiledb, "Group", Full)
    with pytest.raises(tiledb.TileDBError, match="no space"):
        metadata.write_metadata(str(path), backend.context(str(path)), status="stopped")
    assert tree(path) == before


# delete ---------------------------------------------------------------------------------------------------------


def test_delete_deletes_a_run(path: Path) -> None:
    verify.delete(str(path))
    assert not path.exists() and path.parent.exists()


@pytest.mark.parametrize("name", ["picture.png", "results/table.csv", ".secret"])
def test_delete_leaves_a_run_that_holds_more(name: str, path: Path) -> None:
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("x")
    before = tree(path)
    with pytest.raises(NbdynError, match=f"holds {name.split('/')[0]}, which nbdyn did not write"):
        verify.delete(str(path))
    assert tree(path) == before
