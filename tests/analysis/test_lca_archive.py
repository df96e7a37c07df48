"""Allocations stored with a run: the same as in memory, taken up where they ended, and refused when damaged."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import nbdyn
from nbdyn.analysis.lca import compute
from nbdyn.analysis.lca.engine import Allocator
from nbdyn.analysis.lca.precision import Precision
from nbdyn.analysis.lca.result import Allocation
from nbdyn.errors import CorruptRun, Incompatible, NbdynError, RunBusy
from nbdyn.store import allocations, backend, verify
from nbdyn.store.allocations import Archive
from tests import problems

STEPS = 12
DATA = problems.data()
LOSS = nn.CrossEntropyLoss()
FIXED = Precision("simpson")
FRAMES = ("steps", "layers", "by_tensor", "units", "parameters")


def net(batch_norm: bool = False) -> nn.Sequential:
    return problems.mlp(12, 6, 4, batch_norm=batch_norm)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 12 steps, a snapshot every 5, without and with batch normalization; "done" has allocations, too."""
    folder = tmp_path_factory.mktemp("lca")
    for name in ("plain", "batch norm"):
        model = net(name == "batch norm")
        optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.5, weight_decay=1e-2)
        with nbdyn.record(folder / name, model, optimizer, LOSS, weights="every", snapshot_every=5) as rec:
            problems.train(rec, model, optimizer, LOSS, DataLoader(DATA, 20), 2)
    shutil.copytree(folder / "plain", folder / "done")
    allocate(folder / "done", name="one", classes=True)
    allocate(folder / "done", name="good")
    return folder


@pytest.fixture
def path(originals: Path, tmp_path: Path) -> Path:
    shutil.copytree(originals / "plain", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def normed(originals: Path, tmp_path: Path) -> Path:
    shutil.copytree(originals / "batch norm", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def done(originals: Path, tmp_path: Path) -> Path:
    shutil.copytree(originals / "done", tmp_path / "run")
    return tmp_path / "run"


def allocate(path: Path, **options: Any) -> Allocation:
    run = nbdyn.open(path)
    model = net(bool(run.store.config["buffers"]))
    return run.lca(DATA, LOSS, model, **{"progress": False, "precision": FIXED, "chunk": 60, **options})


def same(a: Allocation, b: Allocation, tolerance: float = 0.0) -> None:
    """Every frame, and the cells."""
    for name in FRAMES:
        options: Any = {"check_exact": True} if not tolerance else {"rtol": tolerance, "atol": tolerance}
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name), **options)
    if a.labels["kind"] == "class":
        pd.testing.assert_frame_equal(a.classes, b.classes, rtol=tolerance, atol=tolerance)
    if a.spec["cells"]:
        assert np.allclose(a.cells(), b.cells(), rtol=0, atol=tolerance)
    assert a.labels == b.labels and a.spec == b.spec


class Stop(KeyboardInterrupt):
    """The user's interrupt."""


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException | None = None) -> None:
    """An interrupt in the middle of the computation, whose results are written after every step."""
    plain, done = Allocator.step, []

    def stopping(self: Allocator, before: np.ndarray, after: np.ndarray) -> Any:
        if len(done) == step:
            raise error or Stop
        done.append(1)
        return plain(self, before, after)

    monkeypatch.setattr(Allocator, "step", stopping)
    monkeypatch.setattr(compute, "COMMIT_SECONDS", 0.0)


# The same as in memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"classes": True}, {"cells": False}, {"motion": True}, {"subset": 40}], ids=str
)
def test_stored_reopened_and_in_memory_are_equal(path: Path, options: dict[str, Any]) -> None:
    stored, memory = allocate(path, name="one", **options), allocate(path, save=False, **options)
    same(stored, memory)
    run = nbdyn.open(path)
    same(run.lca(name="one"), memory)
    same(run.lca(), memory)  # the only one
    assert allocations.names(run.uri) == ["one"]
    if options.get("cells") is False:
        with pytest.raises(NbdynError, match="cells=True"):
            stored.cells()
        return
    for steps in (slice(None), slice(2, 9, 3), slice(-1, None), slice(5, 5), slice(None, None, -2), slice(0, 1000)):
        for a in (stored, memory):
            assert np.array_equal(a.cells(steps=steps), memory.cells()[steps])
            assert np.array_equal(a.cells("0.weight[2,:]", steps), memory.cells()[steps][:, 24:36])
            assert np.array_equal(a.cells("*.bias", steps), memory.cells("*.bias")[steps])


def test_what_is_there_is_read_not_computed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = allocate(path, name="one", steps=(2, 7))
    assert first.steps["step"].tolist() == [2, 3, 4, 5, 6]
    monkeypatch.setattr(Allocator, "step", None)
    same(allocate(path, name="one", steps=(2, 7)), first)


@pytest.mark.parametrize(
    ("options", "differ"),
    [
        ({"precision": Precision("boole")}, "precision"), ({"steps": (0, 5)}, "steps"), ({"cells": False}, "cells"),
        ({"classes": True}, "objective"), ({"motion": True}, "parts"),
        ({"loss": nn.CrossEntropyLoss(torch.ones(4) * 2)}, "objective"),
    ],
)  # fmt: skip
def test_a_name_means_one_allocation(path: Path, options: dict[str, Any], differ: str) -> None:
    first = allocate(path, name="one")
    loss = options.pop("loss", LOSS)
    run, model = nbdyn.open(path), net(bool(nbdyn.open(path).store.config["buffers"]))
    asked = {"name": "one", "progress": False, "precision": FIXED, "chunk": 60, **options}
    with pytest.raises(NbdynError, match=rf"computed otherwise \({differ} differ\).*replace=True"):
        run.lca(DATA, loss, model, **asked)
    same(run.lca(name="one"), first)
    second = run.lca(DATA, loss, model, replace=True, **asked)
    same(run.lca(name="one"), second)
    assert second.spec != first.spec
    assert verify.verify(str(path)).empty and verify.gc(str(path)).empty


# Taken up -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"classes": True, "motion": True}, {"batch_norm": "running"},
                                     {"precision": Precision(tolerance=1e-5)}], ids=str)  # fmt: skip
@pytest.mark.parametrize("after", [1, 5, 7])
def test_an_interrupted_one_goes_on(
    normed: Path,
    after: int,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = normed
    whole = allocate(path, name="whole", **options)
    with monkeypatch.context() as patch:
        stop_at(patch, after)
        with pytest.raises(Stop):
            allocate(path, name="one", **options)
    assert f"stopped after {after} of {STEPS} steps; the same call goes on" in capsys.readouterr().out
    part = nbdyn.open(path).lca(name="one")
    assert len(part) == after
    assert np.array_equal(part.steps["loss"], whole.steps["loss"][:after])
    calls = []
    plain = Allocator.step
    monkeypatch.setattr(Allocator, "step", lambda self, a, b: calls.append(1) or plain(self, a, b))
    found = allocate(path, name="one", **options)
    assert len(calls) == STEPS - after
    for name in FRAMES[1:]:
        pd.testing.assert_frame_equal(getattr(found, name), getattr(whole, name), rtol=0, atol=1e-12)
    columns = ["step", "loss", "loss_after", "allocated", "residual", "error", "drift", "met"]  # not gradients
    pd.testing.assert_frame_equal(found.steps[columns], whole.steps[columns], rtol=0, atol=1e-12)
    assert np.array_equal(found.cells(), whole.cells())
    assert verify.verify(str(path)).empty and verify.gc(str(path)).empty


def test_an_interrupt_before_anything_is_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 0)
        with pytest.raises(Stop):
            allocate(path, name="one")
    with pytest.raises(Incompatible, match="it has none"):
        nbdyn.open(path).lca(name="one")
    assert verify.verify(str(path)).empty and verify.gc(str(path)).empty
    same(allocate(path, name="one"), allocate(path, save=False))


def test_an_interrupt_does_not_hold_the_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stop):
            allocate(path)
    with Lock(path, "train"):
        pass


class Lock:
    """Somebody who computes."""

    def __init__(self, path: Path, name: str) -> None:
        self.archive = Archive(str(path), name)

    def __enter__(self) -> None:
        self.archive.lock()

    def __exit__(self, *_: Any) -> None:
        self.archive.close()


def test_two_that_compute_the_same(path: Path) -> None:
    allocate(path, name="other")
    with Lock(path, "one"):
        with pytest.raises(RunBusy):
            allocate(path, name="one")
        allocate(path, name="other", steps=(0, 3), replace=True)  # another name is free
    assert len(allocate(path, name="one")) == STEPS


def test_two_processes(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(path), ready, done))
    process.start()
    try:
        assert ready.wait(60)
        with pytest.raises(RunBusy):
            allocate(path, name="one")
        assert verify.gc(str(path)).empty  # what somebody is writing is left alone
    finally:
        done.set()
        process.join(60)
    assert process.exitcode == 0
    assert len(allocate(path, name="one")) == STEPS


def _hold(path: str, ready: Any, done: Any) -> None:
    archive = Archive(path, "one")
    archive.lock()
    ready.set()
    done.wait(60)
    archive.close()


# A full disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full_at", [0, 3])
@pytest.mark.parametrize("what", ["array", "entry"])
def test_a_full_disk_keeps_what_was_written(
    path: Path, full_at: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[str] = []

    def full(*_: Any, **__: Any) -> Any:
        raise backend.tiledb().TileDBError("[TileDB::IO] No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(compute, "COMMIT_SECONDS", 0.0)
        name = "_open" if what == "array" else "_commit"
        plain = getattr(Archive, name)

        def writing(self: Archive, *arguments: Any) -> Any:
            if what == "array" and "w" not in arguments:
                return plain(self, *arguments)
            if what == "array" and arguments[0] == "units":
                writes.append("units")
            elif what == "entry" and arguments[0].done:
                writes.append("entry")
            return full() if len(writes) > full_at else plain(self, *arguments)

        patch.setattr(Archive, name, writing)
        with pytest.raises(NbdynError, match=rf"No space left on device.* {full_at} steps are kept"):
            allocate(path, name="one")
    assert len(verify.verify(str(path))) == 0
    if full_at:
        assert len(nbdyn.open(path).lca(name="one")) == full_at
    else:
        with pytest.raises(Incompatible, match="it has none"):
            nbdyn.open(path).lca(name="one")
    whole = allocate(path, save=False)
    found = allocate(path, name="one")
    assert np.array_equal(found.cells(), whole.cells())
    pd.testing.assert_frame_equal(found.parameters, whole.parameters, rtol=0, atol=1e-12)
    assert verify.verify(str(path)).empty and verify.gc(str(path)).empty


def test_gc_removes_what_was_not_committed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stop):
            allocate(path, name="one")
    archive = Archive(str(path), "one")
    entry = archive.entry()
    assert entry is not None
    with archive._open("units", "w", entry.timestamp + 1) as array:  # a kill between the arrays and the entry
        array[3:5] = {"value": np.ones((2, 10 + (6 if array.shape[1] > 10 else 0)))[:, : array.shape[1]]}
    before = nbdyn.open(path).lca(name="one")
    removed = verify.gc(str(path))
    assert removed["array"].tolist() == ["lca/one/units"] and verify.gc(str(path)).empty
    same(nbdyn.open(path).lca(name="one"), before)
    assert np.array_equal(allocate(path, name="one").cells(), allocate(path, save=False).cells())


# Damage ---------------------------------------------------------------------------------------------------------


def write_entry(path: Path, name: str, **changes: Any) -> None:
    archive = Archive(str(path), name)
    entry = archive.entry()
    assert entry is not None
    with backend.tiledb().Group(archive.uri, "w", ctx=backend.context()) as group:
        text = changes.pop("text", None)
        group.meta[allocations.ENTRY] = text if text is not None else json.dumps({**vars(entry), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"text": "not json"}, {"text": "[]"}, {"text": "[" * 100_000}, {"done": -1}, {"done": 2**62}, {"done": 10**9},
        {"done": STEPS + 1}, {"timestamp": "x"}, {"timestamp": 1}, {"labels": []}, {"labels": {}}, {"spec": 3},
        {"spec": {}}, {"text": "{}"}, {"done": True}, {"status": 5},
    ],
    ids=lambda c: str(c)[:30],
)  # fmt: skip
def test_a_damaged_entry_is_told_and_can_be_replaced(done: Path, changes: dict[str, Any]) -> None:
    path = done
    write_entry(path, "one", **changes)
    with pytest.raises(CorruptRun, match="replace=True"):
        nbdyn.open(path).lca(name="one")
    assert "lca" in verify.verify(str(path))["array"].tolist()
    good = nbdyn.open(path).lca(name="good")  # the others are whole
    same(allocate(path, name="one", replace=True), good, 1e-6)
    assert verify.verify(str(path)).empty and verify.gc(str(path)).empty


@pytest.mark.parametrize("array", ["steps", "parameters", "cells", "groups", "unit_groups"])
@pytest.mark.parametrize("how", ["array", "fragments", "torn", "empty", "schema"])
def test_damaged_arrays_are_told_and_can_be_replaced(done: Path, array: str, how: str) -> None:
    path = done
    damage(path / "lca" / "one" / array, how)
    with pytest.raises(CorruptRun):
        found = nbdyn.open(path).lca(name="one")
        found.cells()
    assert verify.verify(str(path))["array"].tolist() == ["lca"]
    replaced = allocate(path, name="one", classes=True, replace=True)
    assert np.abs(replaced.cells() - nbdyn.open(path).lca(name="good").cells()).max() < 1e-6  # samples in another order
    assert verify.verify(str(path)).empty and verify.gc(str(path)).empty


def damage(array: Path, how: str) -> None:
    if how == "array":
        shutil.rmtree(array)
    elif how == "schema":
        for file in (array / "__schema").iterdir():
            file.write_bytes(b"") if file.is_file() else None
    elif how == "fragments":
        for folder in ("__fragments", "__commits"):
            shutil.rmtree(array / folder)
            (array / folder).mkdir()
    else:
        for file in (array / "__fragments").glob("*/a0.tdb"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 if how == "torn" else 0])


def test_a_hole_in_the_middle_is_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "COMMIT_SECONDS", 0.0)
    allocate(path, name="one")
    fragments = sorted(
        (path / "lca" / "one" / "cells" / "__fragments").iterdir(), key=lambda f: int(f.name.split("_")[2])
    )
    (path / "lca" / "one" / "cells" / "__commits" / f"{fragments[4].name}.wrt").unlink()
    shutil.rmtree(fragments[4])
    assert verify.verify(str(path))["array"].tolist() == ["lca"]


# Names, and the run around it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "..", "../weights", "a/b", "a\\b", "é", "a b", ".x", "x\n", "x" * 101, "a\0"])
def test_hostile_names_are_refused(path: Path, name: str) -> None:
    before = sorted(p.name for p in path.iterdir())
    with pytest.raises(NbdynError, match="name="):
        allocate(path, name=name)
    with pytest.raises(NbdynError):
        nbdyn.open(path).lca(name=name)
    assert sorted(p.name for p in path.iterdir()) == before


def test_which_one_is_asked(path: Path) -> None:
    run = nbdyn.open(path)
    with pytest.raises(Incompatible, match="it has none"):
        run.lca()
    allocate(path, name="a", steps=(0, 2))
    allocate(path, name="b.2_x-y", steps=(0, 2))
    with pytest.raises(Incompatible, match=r"it has a, b\.2_x-y"):
        run.lca()
    with pytest.raises(Incompatible, match=r"it has a, b\.2_x-y"):
        run.lca(name="c")
    assert len(run.lca(name="b.2_x-y")) == 2


def test_a_run_with_an_allocation_is_replaced_deleted_and_resumed(path: Path) -> None:
    allocate(path, name="one")
    model = net(bool(nbdyn.open(path).store.config["buffers"]))
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.5, weight_decay=1e-2)
    with nbdyn.record(path, model, optimizer, LOSS, weights="every", snapshot_every=5, mode="resume") as rec:
        problems.train(rec, model, optimizer, LOSS, DataLoader(DATA, 20), 1)
    assert len(nbdyn.open(path).lca(name="one")) == STEPS and len(nbdyn.open(path)) == STEPS + 6
    with nbdyn.record(path, model, optimizer, LOSS, mode="replace") as rec:
        problems.train(rec, model, optimizer, LOSS, DataLoader(DATA, 20), 1)
    assert not (path / "lca").exists()
    allocate(path, name="one", steps=(0, 1))
    verify.delete(str(path))
    assert not path.exists()
