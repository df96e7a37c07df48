"""Allocations of recorded runs, however their weights are known, and while training goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import nbdyn
from nbdyn.analysis.lca import online
from nbdyn.analysis.lca.engine import Allocator
from nbdyn.analysis.lca.paths import RunPath
from nbdyn.analysis.lca.precision import Precision
from nbdyn.analysis.lca.result import Allocation
from nbdyn.errors import Incompatible, NbdynError, NotRecorded
from tests import problems

DATA = problems.data()
LOSS = nn.CrossEntropyLoss()
FIXED = Precision("simpson")
STEPS = 12


def net(**options: Any) -> nn.Sequential:
    return problems.mlp(12, 6, 4, **options)


def train(
    path: Path, model: nn.Module, epochs: int = 2, each: Callable[[int], None] | None = None, **options: Any
) -> tuple[nbdyn.Run, np.ndarray]:
    """Record a plain loop of 6 steps an epoch; the run, and the weights that the loop saw."""
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.5, weight_decay=1e-2)
    loader = DataLoader(DATA, 20, shuffle=True, generator=torch.Generator().manual_seed(1))
    weights = [problems.flat(model)]
    with nbdyn.record(path, model, optimizer, LOSS, **{"snapshot_every": 5, **options}) as rec:
        for _ in range(epochs):
            for x, y in rec.watch(loader):
                optimizer.zero_grad()
                LOSS(model(x), y).backward()
                optimizer.step()
                weights.append(problems.flat(model))
                if each is not None:
                    each(len(weights) - 1)
    return nbdyn.open(rec.uri), torch.stack(weights).numpy()


def allocate(run: nbdyn.Run, model: nn.Module, **options: Any) -> Allocation:
    return run.lca(DATA, LOSS, model, **{"progress": False, "precision": FIXED, "chunk": 120, "save": False, **options})


# Paths ----------------------------------------------------------------------------------------------------------


def test_the_ways_to_know_the_weights_agree(tmp_path: Path) -> None:
    every, weights = train(tmp_path / "every", net(), weights="every")
    gradients, _ = train(tmp_path / "gradients", net())
    sparse, _ = train(tmp_path / "sparse", net(), per_sample=False)
    replayed = nbdyn.open(sparse.uri, data=DATA)
    hows = {}
    for how, run in (("stored", every), ("rebuilt from gradients", gradients), ("replayed", replayed)):
        path = RunPath(run.store, 0, STEPS, net(), LOSS, run.data)
        assert path.how == how
        rows = np.stack(list(path.rows(0)))
        assert np.abs(rows - weights).max() < (1e-7 if how != "stored" else 1e-30)
        for first in (1, 5, 7, 12):
            assert np.abs(np.stack(list(path.rows(first))) - weights[first:]).max() < 1e-7
        assert all(residual < 1e-6 for residual in path.residuals.values())
        hows[how] = allocate(run, net())
    for found in list(hows.values())[1:]:
        assert np.abs(found.cells() - hows["stored"].cells()).max() < 1e-6
        assert np.allclose(found.steps["loss"], hows["stored"].steps["loss"], rtol=1e-6)
    assert abs(hows["stored"].check().iloc[0]["residual_percent"]) < 1


def test_a_part_of_the_steps(tmp_path: Path) -> None:
    for options in ({"weights": "every"}, {}, {"per_sample": False}):
        run, _ = train(tmp_path / str(options), net(), **options)
        run = nbdyn.open(run.uri, data=DATA)
        whole = allocate(run, net())
        for a, b in ((0, 1), (3, 9), (5, 10), (11, 12), (4, 5)):
            part = allocate(run, net(), steps=(a, b))
            assert part.steps["step"].tolist() == list(range(a, b))
            assert np.allclose(part.cells(), whole.cells(steps=slice(a, b)), rtol=0, atol=1e-7)
        for steps in ((0, 13), (-1, 3), (4, 4), (5, 3)):
            with pytest.raises(NotRecorded, match=r"has steps 0\.\.11"):
                allocate(run, net(), steps=steps)


def test_weights_that_can_be_known_in_no_way(tmp_path: Path) -> None:
    run, _ = train(tmp_path / "run", net(), per_sample=False)
    with pytest.raises(NotRecorded, match="data=train_set"):
        allocate(run, net())


def test_gradients_of_some_layers_alone_do_not_rebuild(tmp_path: Path) -> None:
    run, weights = train(tmp_path / "run", net(), layers=["0"])
    path = RunPath(run.store, 0, STEPS, net(), LOSS, DATA)
    assert path.how == "replayed" and np.abs(np.stack(list(path.rows(0))) - weights).max() < 1e-7


def test_other_networks_are_refused(tmp_path: Path) -> None:
    run, _ = train(tmp_path / "run", net(), weights="every")
    for model in (problems.mlp(12, 7, 4), problems.mlp(12, 6, 6, 4), nn.Linear(12, 4), None):
        with pytest.raises(Incompatible):
            allocate(run, model)
    run.store.config["loss"] = "mine"
    with pytest.raises(Incompatible, match=r"torch\.nn does not have"):
        run.lca(DATA, model=net(), save=False)


def test_the_loss_of_the_run_is_the_default(tmp_path: Path) -> None:
    run, _ = train(tmp_path / "run", net(), weights="every")
    found = nbdyn.open(run.uri, model=net(), data=DATA).lca(None, LOSS, progress=False, save=False)
    assert np.allclose(found.steps["loss"], run.lca(DATA, model=net(), progress=False, save=False).steps["loss"])
    with pytest.raises(NbdynError):
        run.lca(DATA, LOSS)


def test_running_statistics_are_those_of_snapshots(tmp_path: Path) -> None:
    model = net(batch_norm=True)
    run, _ = train(tmp_path / "run", model, weights="every")
    found = allocate(run, net(batch_norm=True), batch_norm="running")
    drift = found.steps["drift"].to_numpy()
    assert np.flatnonzero(drift).tolist() == [5, 10]  # the snapshots
    steps = found.steps
    assert np.allclose(steps["loss"].to_numpy()[1:] - steps["loss_after"].to_numpy()[:-1], drift[1:], atol=1e-12)
    row = found.check().iloc[0]
    assert row["drift"] == pytest.approx(drift.sum()) and abs(row["residual"]) < 1e-2
    part = allocate(run, net(batch_norm=True), batch_norm="running", steps=(7, 12))  # begins between snapshots
    assert np.allclose(part.steps["loss"], steps["loss"][7:], rtol=0, atol=1e-7)
    assert np.allclose(part.cells(), found.cells(steps=slice(7, None)), rtol=0, atol=1e-7)
    assert part.steps["drift"].iloc[0] == 0


# While training goes on -----------------------------------------------------------------------------------------


def losses(run: nbdyn.Run) -> pd.DataFrame:
    return run.steps.drop(columns=[c for c in run.steps if "time" in c or "seconds" in c or "wall" in c])


@pytest.mark.parametrize("options", [{}, {"classes": True}, {"subset": 40, "seed": 3}, {"cells": False}], ids=str)
@pytest.mark.parametrize("weights", ["every", "snapshots"])
def test_online_equals_afterwards(tmp_path: Path, weights: str, options: dict[str, Any]) -> None:
    asked = {"data": DATA, "precision": FIXED, "chunk": 120, "name": "on", **options}
    plain, _ = train(tmp_path / "plain", net(), weights=weights)
    run, _ = train(tmp_path / "run", net(), weights=weights, lca=asked)
    found, after = run.lca(name="on"), allocate(run, net(), **options)
    assert len(found) == STEPS and found.labels == after.labels
    tolerance = 0.0 if weights == "every" else 1e-6
    for name in ("steps", "layers", "by_tensor", "units", "parameters"):
        columns = [c for c in getattr(after, name).columns if "turns" not in c and "ing" not in c]
        pd.testing.assert_frame_equal(getattr(found, name)[columns], getattr(after, name)[columns],
                                      rtol=0, atol=tolerance)  # fmt: skip
    if weights == "every":
        pd.testing.assert_frame_equal(found.parameters, after.parameters)
    if options.get("cells") is not False:
        assert np.abs(found.cells() - after.cells()).max() <= tolerance
    if "classes" in options:
        pd.testing.assert_frame_equal(found.classes, after.classes, rtol=0, atol=tolerance)
    # The recording is the same as without it.
    pd.testing.assert_frame_equal(losses(run), losses(plain))
    assert np.array_equal(run.weights["all"], plain.weights["all"])
    for step in (0, 7):  # what was captured, too
        mine, theirs = (r.gradients[step, "0.weight"].frame() for r in (run, plain))
        pd.testing.assert_frame_equal(mine, theirs)


def test_steps_that_a_scaler_skips(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)
    x, y = DATA.tensors
    with nbdyn.record(tmp_path / "run", model, optimizer, LOSS, weights="every",
                      lca={"data": DATA, "precision": FIXED, "chunk": 120}) as rec:  # fmt: skip
        for step in range(8):
            rec.batch(range(20))
            optimizer.zero_grad()
            loss = LOSS(model(x[:20]), y[:20])
            scaler.scale(loss * (torch.inf if step in (0, 3, 4, 7) else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    run = nbdyn.open(tmp_path / "run")
    found, after = run.lca(name="train"), allocate(run, net())
    assert len(run) == len(after) == len(found) >= 7  # a recorder may not see that the last one was skipped
    assert (~found.cells().any(1)).sum() >= 3
    assert np.array_equal(found.cells(), after.cells())
    pd.testing.assert_frame_equal(found.steps.drop(columns="gradients"), after.steps.drop(columns="gradients"))


def test_an_exception_in_the_loop_keeps_what_was_allocated(tmp_path: Path) -> None:
    def stop(step: int) -> None:
        if step == 7:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "run", net(), weights="every", each=stop, lca={"data": DATA, "precision": FIXED, "chunk": 120})
    run = nbdyn.open(tmp_path / "run")
    found = run.lca(name="train")
    assert len(found) == len(run) == 7
    assert np.array_equal(found.cells(), allocate(run, net()).cells())


@pytest.mark.parametrize("error", [KeyboardInterrupt, NbdynError("no space")], ids=str)
def test_an_allocation_that_fails_ends_but_not_the_recording(
    tmp_path: Path, error: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = online.Online._allocate

    def failing(self: Any, after: np.ndarray) -> None:
        if self._next == 4:
            raise error
        plain(self, after)

    monkeypatch.setattr(online.Online, "_allocate", failing)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.2)
    rec = nbdyn.record(tmp_path / "run", model, optimizer, LOSS, weights="every",
                       lca={"data": DATA, "precision": FIXED, "chunk": 120})  # fmt: skip
    raised = []
    for x, y in rec.watch(DataLoader(DATA, 20)):
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        try:
            optimizer.step()
        except (KeyboardInterrupt, NbdynError):
            raised.append(rec.step)
    rec.close()
    run = nbdyn.open(tmp_path / "run")
    assert raised == [5] and len(run) == 6  # once
    found = run.lca(name="train")
    assert len(found) == 4 and np.array_equal(found.cells(), allocate(run, net(), steps=(0, 4)).cells())


def test_what_is_asked_wrongly_leaves_nothing_hooked(tmp_path: Path) -> None:
    for wrong, match in (
        ({"data": DATA, "dta": 1}, "dta"), ({"classes": True}, "data is missing"),
        ({"data": DATA, "name": "../x"}, "name="),
        ({"data": DATA, "subset": 3}, "at least 20"),
    ):  # fmt: skip
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), 0.2)
        with pytest.raises(NbdynError, match=match):
            nbdyn.record(tmp_path / "run", model, optimizer, LOSS, lca=wrong)
        assert not optimizer._optimizer_step_post_hooks and not model._forward_hooks
        assert not (tmp_path / "run").exists()


def test_a_resumed_training_goes_on_with_its_allocation(tmp_path: Path) -> None:
    asked = {"data": DATA, "precision": FIXED, "chunk": 120}
    train(tmp_path / "run", net(), epochs=1, weights="every", lca=asked)
    run, _ = train(tmp_path / "run", net(), epochs=1, weights="every", lca=asked, mode="resume")
    found, after = run.lca(name="train"), allocate(run, net())
    assert len(run) == len(found) == STEPS and found.steps["step"].tolist() == list(range(STEPS))
    assert np.array_equal(found.cells(), after.cells())
    pd.testing.assert_frame_equal(found.parameters, after.parameters, rtol=0, atol=1e-12)
    # One that does not fit is not overwritten.
    with pytest.raises(NbdynError, match="needs a name of its own"):
        train(
            tmp_path / "run",
            net(),
            epochs=1,
            weights="every",
            lca={**asked, "classes": True, "name": "train"},
            mode="resume",
        )
    assert len(nbdyn.open(tmp_path / "run").lca(name="train")) == STEPS


def test_what_is_there_counts_and_the_rest_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an allocation made while training went on, and of a run that went on since."""
    asked = {"data": DATA, "precision": FIXED, "chunk": 120}
    run, _ = train(tmp_path / "run", net(), epochs=1, weights="every", lca=asked)
    monkeypatch.setattr(Allocator, "step", None)  # nothing is computed again
    assert len(allocate(run, net(), save=True)) == len(run)
    monkeypatch.undo()
    run, _ = train(tmp_path / "run", net(), epochs=1, weights="every", mode="resume")
    found, whole = allocate(run, net(), save=True), allocate(run, net())
    assert len(found) == len(run) == STEPS
    assert np.array_equal(found.cells(), whole.cells())
    pd.testing.assert_frame_equal(found.parameters, whole.parameters, rtol=0, atol=1e-12)
    with pytest.raises(NbdynError, match="steps differ"):
        allocate(run, net(), save=True, steps=(0, 4))
