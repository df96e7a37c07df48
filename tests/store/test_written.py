"""Cells that are written out: against all cells, computed from the factors, with plain tiledb."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiledb
import torch
from torch import nn
from torch.utils.data import DataLoader

import nbdyn
from nbdyn.errors import NbdynError, QueryError, UnknownName
from tests import networks, problems


def trained(path: Path, cells: Any, model: nn.Module | None = None, loss_at: int | None = None) -> nbdyn.Run:
    """Eight steps; the loss of step `loss_at` is large."""
    torch.manual_seed(0)
    model = model or networks.mlp(12, 16, 4)
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss()
    with nbdyn.record(path, model, optimizer, loss_fn, cells=cells) as rec:
        for step, (x, y) in enumerate(rec.watch(DataLoader(problems.data(160), batch_size=20, shuffle=True))):
            optimizer.zero_grad()
            loss_fn(model(1000 * x if step == loss_at else x), y % 4).backward()
            optimizer.step()
    return nbdyn.open(path)


def plain(run: nbdyn.Run) -> dict[str, np.ndarray]:
    """All written-out cells, as anyone reads them."""
    with tiledb.open(f"{run.uri}/gradients") as array:
        return array.query(order="U").multi_index[:]


def every_cell(run: nbdyn.Run, step: int, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples, parameters and values of all cells of a tensor at a step."""
    dense = run.gradients[step, name].dense()
    rows, columns = np.indices(dense.values.shape)
    return dense.visits["sample"].to_numpy()[rows].ravel(), dense.parameters[columns].ravel(), dense.values.ravel()


@pytest.mark.parametrize(
    "model",
    [networks.mlp(12, 16, 4), networks.TiedAutoencoder(12, 12), nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 4))],
    ids=["mlp", "tied weights", "norm"],
)
def test_the_top_cells_of_every_tensor_and_step(tmp_path: Path, model: nn.Module) -> None:
    run = trained(tmp_path / "run", 5, model)
    cells = plain(run)
    for step in range(len(run)):
        for tensor in run.config["tensors"]:
            inside = (cells["parameter"] >= tensor["first"]) & (cells["parameter"] < tensor["first"] + tensor["size"])
            found = np.sort(np.abs(cells["value"][inside & (cells["step"] == step)]))[::-1]
            samples, parameters, values = every_cell(run, step, tensor["name"])
            expected = np.sort(np.abs(values[values != 0]))[::-1][:5]
            np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=f"{tensor['name']} at step {step}")
            lookup = {(int(s), int(p)): v for s, p, v in zip(samples, parameters, values, strict=True)}
            chosen = inside & (cells["step"] == step)
            for s, p, v in zip(
                cells["sample"][chosen], cells["parameter"][chosen], cells["value"][chosen], strict=True
            ):
                assert v == pytest.approx(lookup[int(s), int(p)], rel=1e-5)


def test_all_cells_of_a_layer_and_those_above_a_threshold(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "2.*")
    cells, written = plain(run), nbdyn.WriteOut(top=0, above=0.01)
    for step in range(len(run)):
        _, parameters, values = every_cell(run, step, "2.weight")
        inside = (cells["step"] == step) & np.isin(cells["parameter"], parameters)
        assert inside.sum() == (values != 0).sum()
    run = trained(tmp_path / "above", written)
    cells = plain(run)
    total = 0
    for step in range(len(run)):
        total += sum((np.abs(every_cell(run, step, t["name"])[2]) > 0.01).sum() for t in run.config["tensors"])
    assert len(cells["value"]) == total
    assert np.abs(cells["value"]).min() > 0.01


def test_cells_around_an_event(tmp_path: Path) -> None:
    cells = nbdyn.WriteOut(top=0, of="2.*", around="loss > 20", before=2, after=1)
    run = trained(tmp_path / "run", cells, loss_at=5)
    assert np.flatnonzero(run.steps["loss"] > 20)[0] == 5
    assert np.unique(plain(run)["step"]).tolist() == [3, 4, 5, 6]


def test_no_cells_where_none_are_wanted(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", None)
    assert not len(plain(run)["value"])
    assert len(run.gradients[0, "2.bias"].frame())


@pytest.mark.parametrize(
    ("cells", "kind", "message"),
    [("nowhere", UnknownName, "nowhere"), (nbdyn.WriteOut(around="los > 2"), QueryError, "loss")],
)
def test_a_wrong_choice_is_said_before_anything_is_recorded(
    tmp_path: Path, cells: Any, kind: type[NbdynError], message: str
) -> None:
    model = networks.mlp(12, 4)
    with pytest.raises(kind, match=message):
        nbdyn.record(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1), cells=cells)
