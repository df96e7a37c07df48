"""The language on really recorded runs: every answer against one computed from the recorded arrays directly."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nbdyn.query import execute, explain
from nbdyn.store import Store, frames
from nbdyn.store.index.build import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`every` and `snapshots`: the same network and data in two orders, three epochs with ten steps each."""
    import torch

    import nbdyn

    path = tmp_path_factory.mktemp("runs")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator)
    data = torch.utils.data.TensorDataset(x, x[:, :4].argmax(1))
    for order, weights in enumerate(["every", "snapshots"]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        loss_fn = torch.nn.CrossEntropyLoss()
        loader = torch.utils.data.DataLoader(
            data, batch_size=20, shuffle=True, generator=torch.Generator().manual_seed(order)
        )
        recorder = nbdyn.record(path / weights, model, optimizer, loss_fn, weights=weights, snapshot_every=7)
        with recorder:
            for epoch in range(3):
                for inputs, targets in recorder.watch(loader):
                    optimizer.zero_grad()
                    loss_fn(model(inputs), targets).backward()
                    optimizer.step()
                    recorder.log(phase=float(epoch) ** 2)
    return path


@pytest.fixture
def store(folder: Path) -> Store:
    return Store(str(folder / "every"))


@pytest.mark.parametrize("selector", ["0.weight[3,5]", "0.weight[:,2]", "2.*", "all"])
@pytest.mark.parametrize("value", [0.0, 0.05])
def test_question_five_against_a_plain_loop(store: Store, selector: str, value: float):
    frame = execute(f"last 30 samples before every {selector} crosses {value}", store)
    weights = store.weights[selector].reshape(31, -1).astype(float) - value
    visits = frames.visits(store)
    expected: list[tuple[int, int]] = []
    for step in range(1, 31):
        for column in range(weights.shape[1]):
            before, after = weights[step - 1, column], weights[step, column]
            if before * after < 0 or (after == 0 and before != 0):
                history = visits[visits["step"] < step].tail(30)
                expected += [(step, sample) for sample in history["sample"]]
    assert frame[["event_step", "sample"]].to_numpy().tolist() == [list(pair) for pair in expected]
    if len(frame):
        assert (frame["step"] < frame["event_step"]).all()


def test_a_condition_on_steps(store: Store):
    frame = execute("last 7 samples before |grad| > 0.5", store)
    steps = frames.steps(store)
    truth = steps["grad_norm"] > 0.5
    first = int(steps["step"][truth].iloc[0])
    assert first == 0 or set(frame["event_step"]) == {first}
    assert len(frame) == min(7, 20 * first)


def test_logged_values_are_fields(store: Store):
    frame = execute("show phase, loss per epoch", store)
    assert list(frame["phase"]) == [0.0, 1.0, 4.0]
    np.testing.assert_allclose(frame["loss"], frames.steps(store).groupby("epoch")["loss"].mean())


def test_samples_agree_with_their_visits(store: Store):
    asked = execute("show times_seen, mean_loss per sample", store)
    counted = execute("show count, loss per sample", store)
    assert list(asked["times_seen"]) == list(counted["count"]) == [3] * 200
    np.testing.assert_allclose(asked["mean_loss"], counted["loss"], rtol=1e-6)


def test_whole_tables_are_those_of_the_store(store: Store):
    pd.testing.assert_frame_equal(execute("show visits", store), frames.visits(store))
    pd.testing.assert_frame_equal(execute("show samples", store), frames.samples(store))


def test_question_three_against_numpy(store: Store, folder: Path):
    frame = execute("compare every, snapshots by progress(loss), dist(w, init), acc at step 29", store)
    other = Store(str(folder / "snapshots"))
    losses = [frames.steps(run)["loss"].to_numpy() for run in (store, other)]
    lowest = min(loss.min() for loss in losses)
    np.testing.assert_allclose(frame["progress(loss)"], [(v[0] - v[29]) / (v[0] - lowest) for v in losses])
    rows = [run.weights["all", step].astype(float) for run, step in ((store, 29), (other, 28))]
    start = store.weights["all", 0].astype(float)
    np.testing.assert_allclose(frame["dist(w, init)"], [np.linalg.norm(row - start) for row in rows])
    assert list(frame["w_step"]) == [29, 28]
    assert frame["acc_low"].lt(frame["acc"]).all() and frame["acc_high"].gt(frame["acc"]).all()
    assert "different weights" not in frame.attrs["nbdyn"]["note"]


def test_weights_between_snapshots_are_rebuilt(folder: Path):
    store = Store(str(folder / "snapshots"))
    frame = execute("show dw of 0.weight during steps 0..6", store)
    assert len(frame) == 7 * 96
    moved = frame.groupby("parameter")["value"].sum().to_numpy()
    expected = store.weights["0.weight", 7].reshape(-1) - store.weights["0.weight", 0].reshape(-1)
    np.testing.assert_allclose(moved, expected, atol=1e-6)
    events = execute("last 5 samples before every 0.weight crosses 0", store)
    assert len(events) and "rebuilt from gradients; off by at most" in events.attrs["nbdyn"]["note"]
    changes = frame["parameter"].map(dict(zip(range(96), store.weights["0.weight", 0].reshape(-1), strict=True)))
    path = changes.to_numpy().reshape(7, 96) + frame["value"].to_numpy().reshape(7, 96).cumsum(0)
    first = events.loc[events["event_step"] <= 7, ["event_step", "parameter"]].drop_duplicates()
    sides = np.sign(np.vstack([store.weights["0.weight", 0].reshape(1, -1), path]))
    step, parameter = np.nonzero(np.diff(sides, axis=0))
    assert set(map(tuple, first.to_numpy().tolist())) == set(zip((step + 1).tolist(), parameter.tolist(), strict=True))


def test_statements_stand_in_the_logbook_of_each_run(store: Store, folder: Path):
    execute("compare every,snapshots  by loss at step 3", store)
    for name in ("every", "snapshots"):
        last = frames.notes(Store(str(folder / name))).iloc[-1]
        assert (last["step"], last["kind"]) == (30, "statement")
        assert last["text"] == "compare every, snapshots by loss at step 3"


def test_the_plan_tells_what_is_read(store: Store):
    frame = explain("show w of 0.weight at step 3", store)
    assert frame[["array", "first_step", "last_step", "rows", "bytes"]].to_numpy().tolist() == [
        ["weights", 3, 3, 96, 384]
    ]
    visits = explain("show visits during epoch 1", store)
    assert visits["rows"].tolist() == [200] and visits["first_step"].tolist() == [10]


@pytest.mark.parametrize("event", ["crosses 0", "becomes 0 exactly"])
@pytest.mark.parametrize("every", ["", "every "])
def test_events_from_the_index_are_those_of_the_weights(folder: Path, tmp_path: Path, event: str, every: str):
    shutil.copytree(folder / "every", tmp_path / "run")
    store = Store(str(tmp_path / "run"))
    text = f"last 3 samples before {every}all {event} during steps 3..30"
    scanned = execute(text, store)
    build(store, progress=False)
    pd.testing.assert_frame_equal(execute(text, store), scanned)
