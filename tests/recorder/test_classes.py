"""The class of every visit: what the loss function was given, and -1 where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import nbdyn
from nbdyn.recorder import loop
from nbdyn.schema import VISIT_COLUMNS
from nbdyn.store import layout, verify
from tests import problems


def _trained(
    path: Path, loss_fn: Any, targets: torch.Tensor | None = None, size: int = 25, epochs: int = 2, **options: Any
) -> nbdyn.Run:
    """A run over shuffled data, with other targets than the problem's own if they are given."""
    model = problems.mlp(12, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    inputs, own = problems.data().tensors
    loader = DataLoader(TensorDataset(inputs, own if targets is None else targets), size, shuffle=True)
    with nbdyn.record(path, model, optimizer, loss_fn, per_sample=False, **options) as rec:
        problems.train(rec, model, optimizer, loss_fn, loader, epochs)
    return nbdyn.open(rec)


def _partial(outputs: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    return functional.cross_entropy(outputs, targets, reduction=reduction)


@pytest.mark.parametrize("deferred", [True, False], ids=["on the writer's thread", "at once"])
@pytest.mark.parametrize(
    "loss_fn",
    [nn.CrossEntropyLoss(), nn.MultiMarginLoss(reduction="sum"), functional.cross_entropy, _partial],
    ids=["cross-entropy", "margin, summed", "function", "function of the user's"],
)
def test_the_class_is_the_target(tmp_path: Path, monkeypatch: Any, loss_fn: Any, deferred: bool) -> None:
    if not deferred:
        monkeypatch.setattr(loop, "DEFERRED_BYTES", -1)
    visits = _trained(tmp_path / "run", loss_fn).visits
    assert tuple(visits.columns) == VISIT_COLUMNS and visits["class"].dtype == np.int32
    assert len(visits) == 240
    assert np.array_equal(visits["class"], problems.data().tensors[1].numpy()[visits["sample"]])
    assert set(visits["class"]) == {0, 1, 2, 3}
    assert verify.verify(str(tmp_path / "run")).empty


def test_the_class_is_that_of_the_moment(tmp_path: Path) -> None:
    """Targets changed on the way (label noise), or by the loop after the loss, are recorded as the loss saw them."""
    model = problems.mlp(12, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    loss_fn = nn.CrossEntropyLoss()
    expected = []
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn, per_sample=False) as rec:
        for number, (x, y) in enumerate(rec.watch(DataLoader(problems.data(), 30))):
            optimizer.zero_grad()
            noisy = (y + number) % 4
            expected.append(noisy.clone())
            loss_fn(model(x), noisy).backward()
            noisy.fill_(99)
            optimizer.step()
    assert np.array_equal(nbdyn.open(rec).visits["class"], torch.cat(expected))


def test_accumulated_batches_have_their_classes(tmp_path: Path) -> None:
    model = problems.mlp(12, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    loss_fn = nn.CrossEntropyLoss()
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn, per_sample=False) as rec:
        for number, (x, y) in enumerate(rec.watch(DataLoader(problems.data(), 20, shuffle=True))):
            (loss_fn(model(x), y) / 3).backward()
            if number % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
    visits = nbdyn.open(rec).visits
    assert visits["step"].nunique() == 2 and len(visits) == 120
    assert np.array_equal(visits["class"], problems.data().tensors[1].numpy()[visits["sample"]])


@pytest.mark.parametrize("ignored", [2, -100])
def test_ignored_targets_have_no_class(tmp_path: Path, ignored: int) -> None:
    targets = problems.data().tensors[1].clone()
    targets[::7] = ignored
    visits = _trained(tmp_path / "run", nn.CrossEntropyLoss(ignore_index=ignored), targets).visits
    expected = np.where(targets.numpy() == ignored, -1, targets.numpy())[visits["sample"]]
    assert (expected == -1).any() and np.array_equal(visits["class"], expected)


def test_regression_has_no_classes(tmp_path: Path) -> None:
    visits = _trained(tmp_path / "run", nn.MSELoss(), torch.rand(problems.SIZE, 4)).visits
    assert (visits["class"] == -1).all() and (visits["correct"] == -1).all()


def test_without_a_loss_function_there_are_no_classes(tmp_path: Path) -> None:
    model = problems.mlp(12, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    with nbdyn.record(tmp_path / "run", model, optimizer, per_sample=False) as rec:
        problems.train(rec, model, optimizer, nn.CrossEntropyLoss(), DataLoader(problems.data(), 30), 1)
    assert (nbdyn.open(rec).visits["class"] == -1).all()


def test_a_run_of_an_older_nbdyn_is_read_and_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    """Its array of visits has no attribute `target`."""
    with monkeypatch.context() as older:
        older.setattr(layout, "VISIT_ATTRIBUTES", tuple(a for a in layout.VISIT_ATTRIBUTES if a[0] != "target"))
        before = _trained(tmp_path / "run", nn.CrossEntropyLoss(), epochs=1)
    with before.store.open("visits") as array:
        assert not array.schema.has_attr("target")
    visits = before.visits
    assert tuple(visits.columns) == VISIT_COLUMNS and visits["class"].dtype == np.int32
    assert len(visits) == 120 and (visits["class"] == -1).all()
    assert set(visits["correct"]) <= {0, 1} and visits["loss"].notna().all()

    after = _trained(tmp_path / "run", nn.CrossEntropyLoss(), epochs=1, mode="resume").visits
    assert len(after) == 240 and (after["class"] == -1).all()
    assert after[:120].equals(visits)
    assert sorted(after["sample"][120:]) == list(range(120)) and after["loss"].notna().all()
    assert verify.verify(str(tmp_path / "run")).empty
