"""Every condition of a share, NaN in it, what norms may decide of it; `sign` and `var` of recorded fields."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from nbdyn.query import execute
from nbdyn.query.cell_plan import plan_cells
from nbdyn.query.exceeding import _bounds  # what it says must hold of every condition
from nbdyn.query.language import parse
from nbdyn.query.reduce.batches import reduce_batches
from nbdyn.query.reduce.general import reduced
from nbdyn.query.reduce.linear import Rows, divided
from nbdyn.query.reduce.measures import Condition
from nbdyn.query.reduce.members import PLACES, members_of
from nbdyn.query.reduce.targets import targets_of
from nbdyn.query.source import Source
from nbdyn.store import Store, frames
from tests.networks import mlp
from tests.query.brute import Trained, own_cells, parameter_table, train

COMPARE = {"=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt,
           ">=": operator.ge}  # fmt: skip
CONDITIONS = ["g > 0", "g < -0.01", "|g| < 1e-3", "|g| <= 0", "g = 0", "g != 0", "|g| >= 0.02", "|g| > 0.02", "g >= 0"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 10).relu(), torch.randint(4, (24,)))
    return train(tmp_path_factory.mktemp("conditions") / "run", mlp(10, 14, 4), data, nn.CrossEntropyLoss(), batch=8)


def shares(cells: np.ndarray, condition: str, columns: pd.Series | None = None) -> Any:
    """The share of the cells (rows, parameters) of which a condition holds: in all, or of each group of columns."""
    quantity, sign, limit = condition.split()
    x = np.abs(cells) if "|" in quantity else cells
    holds = COMPARE[sign](x, float(limit))
    return holds.mean() if columns is None else pd.DataFrame(holds).T.groupby(columns.to_numpy()).mean().mean(axis=1)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_shares_of_samples_gradients(trained: Trained, condition: str) -> None:
    visits, cells = own_cells(trained.store, 0, 9)
    found = execute(f"show share({condition}) of all per class", trained.store)
    for number, value in found.itertuples(index=False):
        np.testing.assert_allclose(value, shares(cells[visits["class"] == number], condition), atol=1e-9)
    assert execute(f"show share({condition}) of all", trained.store).iloc[0, 0] == pytest.approx(
        shares(cells, condition)
    )
    few = execute(f"show share({condition}) of 0.weight[3,:] per sample", trained.store)
    some = parameter_table(trained.store).query("tensor == '0.weight' and unit == 3")["parameter"]
    for sample, value in few.itertuples(index=False):
        expected = shares(cells[visits["sample"] == sample][:, some], condition)
        np.testing.assert_allclose(value, expected, atol=1e-9)


@pytest.mark.parametrize("condition", [text.replace("g", "grad", 1) for text in CONDITIONS])
def test_shares_of_batch_gradients(trained: Trained, condition: str) -> None:
    parameters = parameter_table(trained.store)
    by_weight = execute(f"show share({condition}) of all per weight", trained.store)
    by_unit = execute(f"show share({condition}) of all per layer", trained.store)
    np.testing.assert_allclose(by_unit.iloc[:, -1], shares(trained.grads, condition, parameters["layer"]), atol=1e-9)
    columns = pd.Series(np.arange(len(parameters)))
    np.testing.assert_allclose(by_weight.iloc[:, -1], shares(trained.grads, condition, columns), atol=1e-9)


@pytest.mark.parametrize("condition", ["grad > 0", "|grad| >= 0", "|grad| > 0", "|grad| > 0.05", "|grad| >= 0.05",
                                       "grad > 0.05", "|grad| < 0.01", "grad = 0", "|grad| > -1"])  # fmt: skip
def test_norms_decide_nothing_wrongly(trained: Trained, condition: str) -> None:
    truth = np.array([shares(row[None], condition) for row in trained.grads])
    source = Source(trained.store, "")
    low, high = _bounds(plan_cells(parse(f"show share({condition}) of all per step"), source), source)  # pyright: ignore
    assert (low <= truth + 1e-9).all() and (truth <= high + 1e-9).all()
    limit = float(np.median(truth))
    over = truth > limit
    rising = np.flatnonzero(over & ~np.append(False, over[:-1]))
    frame = execute(f"last 3 samples before every share({condition}) > {limit}", trained.store)
    assert sorted(set(frame["event_step"])) == [step for step in rising if step > 0]


NAN_CELLS = np.array([[np.nan, 1.0, -3.0], [np.inf, 0.0, np.nan], [2.0, -np.inf, 0.5]], np.float32)
HOLDS = {  # of NAN_CELLS and 1: NaN is beyond every limit, other comparisons with it are false
    Condition(">", magnitude=True): [3, 1, 2],
    Condition(">=", magnitude=True): [3, 2, 2],
    Condition("<", magnitude=True): [0, 1, 1],
    Condition(">", magnitude=False): [2, 0, 0],
    Condition("!=", magnitude=False): [2, 2, 2],
    Condition("=", magnitude=False): [0, 1, 0],
    Condition("<=", magnitude=False): [0, 3, 2],
}


@pytest.mark.parametrize("condition", HOLDS)
def test_nan_is_beyond_a_threshold_and_nothing_else(condition: Condition) -> None:
    members = members_of(pd.DataFrame({"step": [0, 1, 2]}), ())
    tensors = [{"name": "w", "layer": "l", "first": 0, "size": 3, "shape": [3]}]
    targets = targets_of(np.arange(3), "weight", tensors)
    pieces = iter([(np.arange(3) * PLACES, np.arange(3), NAN_CELLS)])
    found, missing = reduced(pieces, members, targets, ("exceed", "cells"), lambda keys, indices: 1.0, condition)
    assert found["exceed"].tolist() == [HOLDS[condition]] and found["cells"].tolist() == [[3, 3, 3]] and missing == 2
    assert condition.holds(torch.from_numpy(NAN_CELLS), 1.0).sum(0).tolist() == HOLDS[condition]


def test_batches_of_linear_layers_take_the_condition(trained: Trained) -> None:
    store = trained.store
    visits = frames.visits(store, 0, 9)
    indices = np.arange(14 * 11)
    part = divided(store, indices, 0, 9, tokens=False)[0][0]
    batches, members = members_of(visits, ("batch",)), members_of(pd.DataFrame({"step": np.arange(9)}), ())
    targets = targets_of(indices, "", store.config["tensors"])
    for sign in COMPARE:
        out = {"exceed": np.zeros((1, 1))}
        reduce_batches(part, Rows(store, part, batches), np.arange(9), members, targets, ("exceed",),
                       lambda keys, some: 0.0, out, Condition(sign, magnitude=False))  # fmt: skip
        assert out["exceed"][0, 0] == COMPARE[sign](trained.grads[:, indices], 0.0).sum()


def test_nan_gradients_are_told(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(24, 10), torch.randint(4, (24,)))
    broken = train(tmp_path / "run", mlp(10, 14, 4), data, nn.CrossEntropyLoss(), batch=8, epochs=1,
                   factor=lambda step: float("nan") if step == 2 else 1.0)  # fmt: skip
    assert np.isnan(broken.grads[2]).any()
    beyond = execute("show share(|grad| > 1e9) of all per step", broken.store)
    signed = execute("show share(grad > 1e9) of all per step", broken.store)
    # A gradient of 0 times NaN is NaN, too, but where ReLU is closed backward leaves a zero.
    assert beyond.iloc[:, 1].tolist() == [0, 0, np.isnan(broken.grads[2]).mean()]
    assert signed.iloc[:, 1].tolist() == [0, 0, 0]
    assert "they are beyond the threshold" in beyond.attrs["nbdyn"]["note"]
    assert "they do not fulfil the condition" in signed.attrs["nbdyn"]["note"]


def test_sign_and_population_variance(store: Store) -> None:
    steps = execute("show loss, lr", store)
    found = execute("show sign(loss - 1), sign(-lr), sign(loss - loss)", store)
    np.testing.assert_array_equal(found.iloc[:, -3], np.sign(steps["loss"] - 1))
    assert set(found.iloc[:, -2]) == {-1.0} and set(found.iloc[:, -1].dropna()) == {0.0}
    variance = execute("show var(loss), var loss, var(loss) / mean(loss) per epoch", store)
    loss = execute("show epoch, loss", store).groupby("epoch")["loss"]
    np.testing.assert_allclose(variance["var(loss)"], [np.var(values) for _, values in loss], rtol=1e-12)
    one = execute("show var(loss) per step", store)  # of the visits of a step
    per_visit = execute("show visits", store).groupby("step")["loss"].agg(lambda x: np.var(x.dropna()))
    np.testing.assert_allclose(one["var(loss)"], per_visit, rtol=1e-12)
    assert str(parse("show var loss, sign(loss)")) == "show var(loss), sign(loss)"
    ranked = execute("top 2 epochs by var(loss)", store)
    assert ranked["var(loss)"].is_monotonic_decreasing
