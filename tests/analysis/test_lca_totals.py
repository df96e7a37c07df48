"""Sums and counts of an allocation as steps go by, against the same from all of its cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from nbdyn.analysis.lca.engine import Allocator, StepAllocation
from nbdyn.analysis.lca.helping import crossings, turns
from nbdyn.analysis.lca.objective import Objective
from nbdyn.analysis.lca.precision import Precision
from nbdyn.analysis.lca.samples import samples_of
from nbdyn.analysis.lca.totals import PARAMETER_COLUMNS, STEP_COLUMNS, Rows, Totals, units_of
from nbdyn.recorder.describe import named_parameters, tensor_entries

STEPS, PARTS = 7, 3


class Everything(nn.Module):
    """A layer of every kind, float64, and a bare scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 3, 2)
        self.lstm = nn.LSTM(3, 2, batch_first=True)
        self.norm = nn.LayerNorm(2)
        self.fc = nn.Linear(2, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(self.embed(x).transpose(1, 2))).transpose(1, 2)
        return self.scale * self.fc(self.norm(self.lstm(x)[0][:, -1]))


class Walk:
    """Steps of a network, one of which stays, and weights that rest now and then; everything from all cells."""

    def __init__(self, classes: bool = True, rule: str = "simpson") -> None:
        torch.manual_seed(0)
        model = Everything().double()
        x, y = torch.randint(0, 6, (40, 5)), torch.randint(0, 3, (40,))  # row 6 of the embedding is never used
        self.objective = Objective(model, nn.CrossEntropyLoss(), samples_of((x, y), classes=classes))
        self.tensors: list[dict[str, Any]] = tensor_entries(named_parameters(model))
        rng, size = np.random.default_rng(0), self.objective.parameters
        moves = rng.normal(size=(STEPS, size)) * (rng.random((STEPS, size)) < 0.7) * 0.3
        moves[4] = 0
        start = np.concatenate([p.detach().numpy().reshape(-1) for p in model.parameters()])
        self.weights = start + np.concatenate([np.zeros((1, size)), moves]).cumsum(0)
        self.weights[5] = self.weights[4]
        self.decay = rng.random(size) * 0.1
        self.parts = rng.normal(size=(STEPS, PARTS, size))
        allocator = Allocator(self.objective, Precision(rule))
        self.steps: list[StepAllocation] = [
            allocator.step(a, b) for a, b in zip(self.weights, self.weights[1:], strict=False)
        ]
        self.cells = np.stack([step.cells for step in self.steps])

    def totals(self, **options: Any) -> tuple[Rows, Totals]:
        totals = Totals(self.tensors, True, self.decay, self.objective.samples.groups, **options)
        rows = [totals.add(s, w, p) for s, w, p in zip(self.steps, self.weights[1:], self.parts, strict=True)]
        return Rows.joined(rows), totals

    def by_tensor(self, values: np.ndarray) -> np.ndarray:
        return np.stack([values[..., t["first"] : t["first"] + t["size"]].sum(-1) for t in self.tensors], -1)


@pytest.fixture(scope="module")
def walk() -> Walk:
    return Walk()


def test_steps_and_tensors(walk: Walk) -> None:
    rows, _ = walk.totals()
    assert len(rows) == STEPS and set(rows.steps) == set(STEP_COLUMNS)
    assert np.array_equal(rows.steps["allocated"], [s.cells.sum() for s in walk.steps])
    assert np.array_equal(rows.steps["loss"][1:], rows.steps["loss_after"][:-1])
    change = rows.steps["loss_after"] - rows.steps["loss"]
    assert np.allclose(rows.steps["residual"], change - walk.cells.sum(1), rtol=0, atol=1e-15)
    assert rows.steps["gradients"].tolist() == [s.gradients for s in walk.steps]
    cells = walk.cells
    expected = {"sum": cells, "hurt": np.where(cells > 0, cells, 0), "helping": cells < 0, "hurting": cells > 0}
    for name, values in expected.items():
        assert np.allclose(rows.tensors[name], walk.by_tensor(values), rtol=0, atol=1e-14), name
    squares = walk.decay / 2 * (walk.weights[1:] ** 2 - walk.weights[:-1] ** 2)
    assert np.allclose(rows.tensors["decay"], walk.by_tensor(squares), rtol=0, atol=1e-14)
    assert np.abs(rows.tensors["decay"]).max() > 1e-3
    averages = np.stack([s.average for s in walk.steps])
    assert np.allclose(rows.parts, walk.by_tensor(averages[:, None] * walk.parts), rtol=0, atol=1e-13)
    assert rows.cells.dtype == np.float32 and np.array_equal(rows.cells, cells.astype(np.float32))
    assert not rows.cells[4].any()


def test_parameters(walk: Walk) -> None:
    _, totals = walk.totals()
    found, cells = totals.sums["parameters"], walk.cells
    gradients = np.stack([walk.objective(w).grad for w in walk.weights])
    expected = {
        "help": np.where(cells < 0, cells, 0).sum(0), "hurt": np.where(cells > 0, cells, 0).sum(0),
        "error": np.stack([s.error for s in walk.steps]).sum(0),
        "helping": (cells < 0).sum(0), "hurting": (cells > 0).sum(0),
        "lca_turns": crossings(cells), "weight_turns": turns(walk.weights), "gradient_turns": crossings(gradients),
        "last_lca": np.sign(cells[-1]), "last_motion": np.sign(np.diff(walk.weights, axis=0)[-1]),
    }  # fmt: skip
    assert set(found) == set(expected) == set(PARAMETER_COLUMNS)
    for name, values in expected.items():
        assert found[name].dtype == PARAMETER_COLUMNS[name]
        assert np.allclose(found[name], values, rtol=0, atol=1e-14), name
    assert found["lca_turns"].max() > 1 and found["gradient_turns"].max() > 0 and (found["hurting"] == 0).any()


def test_turns_are_strict() -> None:
    """Crossings do not reach over a zero, in a stream as in `crossings`."""
    tensors = [{"name": "w", "layer": "", "shape": [5], "size": 5, "first": 0}]
    series = np.array([[1, 1, 1, -1, 0], [-1, 0, 1, 1, 0], [1, -1, -1, 1, 1], [0, 1, 1, 0, -1.0]])
    totals = Totals(tensors, False)
    for a in series:
        zeros = np.zeros(5)
        step = StepAllocation(0, 0, a, a, zeros + 1, None, None, zeros, None, 2, 1, True)
        totals.add(step, zeros)
    assert totals.sums["parameters"]["lca_turns"].tolist() == crossings(series).tolist() == [2, 1, 2, 1, 1]
    assert totals.sums["parameters"]["weight_turns"].tolist() == [2, 1, 2, 1, 1]
    assert not totals.sums["parameters"]["gradient_turns"].any()  # not known without gradients at the ends


def test_units(walk: Walk) -> None:
    rows, totals = walk.totals()
    table = totals.units.table
    sizes = table.groupby("layer", sort=False).size().to_dict()
    assert sizes == {"": 1, "embed": 7, "conv": 3, "lstm": 8, "norm": 2, "fc": 3}
    shapes = {t["name"]: (t["first"], t["shape"]) for t in walk.tensors}

    def of(name: str, values: np.ndarray) -> np.ndarray:
        first, shape = shapes[name]
        size = int(np.prod(shape))
        return values[..., first : first + size].reshape(*values.shape[:-1], shape[0], -1).sum(-1)

    members = {
        "embed": ["embed.weight"], "conv": ["conv.weight", "conv.bias"], "norm": ["norm.weight", "norm.bias"],
        "lstm": ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.bias_ih_l0", "lstm.bias_hh_l0"],
        "fc": ["fc.weight", "fc.bias"],
    }  # fmt: skip
    classes = np.stack([s.groups * s.motion for s in walk.steps if s.groups is not None]).sum(0)
    for layer, names in members.items():
        mine = np.flatnonzero(table["layer"] == layer)
        assert table["unit"][mine].tolist() == list(range(len(mine)))
        assert np.allclose(rows.units[:, mine], sum(of(n, walk.cells) for n in names), rtol=0, atol=1e-14)
        found = totals.sums["unit_groups"]["value"][:, mine]
        assert np.allclose(found, sum(of(n, classes) for n in names), rtol=0, atol=1e-14)
    assert not rows.units[:, np.flatnonzero(table["layer"] == "embed")[6]].any()  # a token that never comes
    assert np.allclose(rows.units.sum(1), walk.cells.sum(1), rtol=0, atol=1e-13)


def test_groups(walk: Walk) -> None:
    rows, totals = walk.totals()
    shares = walk.objective.shares
    assert rows.groups.shape == (STEPS, 3, len(walk.tensors))
    expected = walk.by_tensor(np.stack([s.groups * s.motion for s in walk.steps if s.groups is not None]))
    assert np.allclose(rows.groups, expected, rtol=0, atol=1e-14)
    assert np.allclose(np.einsum("g,tgn->tn", shares, rows.groups), rows.tensors["sum"], rtol=0, atol=1e-12)
    assert np.allclose(shares @ totals.sums["unit_groups"]["value"], rows.units.sum(0), rtol=0, atol=1e-12)


def test_what_is_not_asked_for_is_not_there() -> None:
    walk = Walk(classes=False, rule="gauss")
    totals = Totals(walk.tensors, False)
    rows = Rows.joined([totals.add(s, w) for s, w in zip(walk.steps, walk.weights[1:], strict=True)])
    assert rows.cells.shape == (STEPS, 0) and rows.groups.shape == rows.parts.shape == (STEPS, 0, len(walk.tensors))
    assert not rows.tensors["decay"].any() and totals.sums["unit_groups"]["value"].shape[0] == 0
    back = Rows.from_columns(
        {name: v for name, v in rows.columns().items() if name not in ("groups", "parts", "cells")}
    )
    assert all(getattr(back, n).shape == getattr(rows, n).shape for n in ("units", "groups", "parts", "cells"))


def test_sums_go_on_from_where_they_were(walk: Walk) -> None:
    whole, all_of_it = walk.totals()
    first = Totals(walk.tensors, True, walk.decay, 3)
    rows = [first.add(s, w, p) for s, w, p in zip(walk.steps[:3], walk.weights[1:], walk.parts, strict=False)]
    kept = {name: {k: v.copy() for k, v in columns.items()} for name, columns in first.sums.items()}
    second = Totals(walk.tensors, True, walk.decay, 3, kept)
    rows += [second.add(s, w, p) for s, w, p in zip(walk.steps[3:], walk.weights[4:], walk.parts[3:], strict=True)]
    for name, columns in all_of_it.sums.items():
        for attribute, values in columns.items():
            assert np.array_equal(second.sums[name][attribute], values), (name, attribute)
    joined = Rows.joined(rows)
    for name, columns in whole.columns().items():
        for attribute, values in columns.items():
            assert np.array_equal(joined.columns()[name][attribute], values)


def test_layers_whose_tensors_differ_in_their_first_axis_have_units_of_their_own() -> None:
    model = nn.MultiheadAttention(4, 2)
    units = units_of(tensor_entries(named_parameters(model)))
    assert units.table.groupby("layer", sort=False).size().to_dict() == {"": 12, "out_proj": 4}
    odd = nn.Module()
    odd.register_parameter("a", nn.Parameter(torch.ones(2, 3)))
    odd.register_parameter("b", nn.Parameter(torch.ones(5)))
    units = units_of(tensor_entries(named_parameters(odd)))
    values = np.arange(11.0)
    assert units.by_unit(units.by_run(values)).tolist() == [3, 12, 6, 7, 8, 9, 10]
    expected = pd.DataFrame({"layer": [""] * 7, "unit": [0, 1, 0, 1, 2, 3, 4]})
    pd.testing.assert_frame_equal(units.table, expected)
