"""What could give wrong numbers without a word: another loss, other buffers, other data, chunks, an interrupt."""

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
from nbdyn.analysis.lca import compute
from nbdyn.analysis.lca.objective import Objective
from nbdyn.analysis.lca.of_run import decay_of
from nbdyn.analysis.lca.precision import Precision
from nbdyn.analysis.lca.result import Allocation
from nbdyn.analysis.lca.samples import samples_of
from nbdyn.analysis.lca.totals import Totals, units_of
from nbdyn.errors import Incompatible, NbdynError, NotRecorded, UnknownName
from nbdyn.store.verify import verify
from tests import problems

DATA, LOSS, FIXED = problems.data(), nn.CrossEntropyLoss(), Precision("simpson")


def train(path: Path, model: nn.Module, loss_fn: Any = LOSS, **options: Any) -> nbdyn.Run:
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.5)
    with nbdyn.record(path, model, optimizer, loss_fn, **{"snapshot_every": 4, **options}) as rec:
        problems.train(rec, model, optimizer, loss_fn, DataLoader(DATA, 20), 2)
    return nbdyn.open(path, model=model, data=DATA)


def allocate(run: nbdyn.Run, data: Any = DATA, loss_fn: Any = LOSS, **options: Any) -> Allocation:
    return run.lca(data, loss_fn, **{"progress": False, "precision": FIXED, **options})


def test_a_replay_is_of_the_loss_of_the_training(tmp_path: Path) -> None:
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.5)
    run = train(tmp_path / "run", problems.mlp(12, 6, 4), smoothed, per_sample=False)
    assert len(allocate(run, loss_fn=smoothed, save=False)) == len(run)
    with pytest.raises(Incompatible, match="has to be the loss of the training"):
        allocate(run, save=False)


class Projected(nn.Module):
    """A layer behind a fixed random one, which is a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("projection", torch.randn(12, 8, generator=generator))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x @ self.projection)


def test_buffers_are_those_of_the_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = train(tmp_path / "run", Projected(1), weights="every")
    right = allocate(run, save=False)
    wrong = nbdyn.open(tmp_path / "run", model=Projected(2), data=DATA)
    assert np.array_equal(allocate(wrong, save=False).cells(), right.cells())
    recorded = run.steps["loss"].iloc[0]
    first = TensorDataset(*DATA[:20])
    assert allocate(wrong, first, save=False).steps["loss"].iloc[0] == pytest.approx(recorded, rel=1e-5)


def test_a_stored_result_is_of_the_same_loss(tmp_path: Path) -> None:
    run = train(tmp_path / "run", problems.mlp(12, 6, 4), weights="every")
    first = allocate(run, loss_fn=lambda o, t: functional.cross_entropy(o, t))
    again = allocate(run, loss_fn=lambda o, t: functional.cross_entropy(o, t))
    assert np.array_equal(first.cells(), again.cells())
    with pytest.raises(NbdynError, match="of another loss"):
        allocate(run, loss_fn=lambda o, t: functional.multi_margin_loss(o, t))


def test_a_loss_that_is_no_mean_is_found_in_sorted_data() -> None:
    weight = torch.tensor([1.0, 5.0, 9.0, 2.0])
    inputs, targets = DATA[:]
    order = torch.argsort(targets)
    for classes in (False, True):
        with pytest.raises(Incompatible, match="not the mean of its parts"):
            Objective(
                problems.mlp(12, 6, 4), lambda o, t: functional.cross_entropy(o, t, weight=weight),
                samples_of((inputs[order], targets[order]), classes=classes),
            )  # fmt: skip


def test_masks_and_chunks_are_told_apart() -> None:
    model = nn.Sequential(nn.Linear(12, 6), nn.Dropout(0.5), nn.Linear(6, 4))
    made = [Objective(model, LOSS, samples_of(DATA), dropout="fixed", chunk=chunk) for chunk in (16, 40)]
    assert made[0].describe() != made[1].describe()
    with pytest.raises(NbdynError, match="at least 1"):
        Objective(model, LOSS, samples_of(DATA), chunk=-5)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_while_adding_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    """The sums of parameters must not count a step that the rows do not hold."""
    run = train(tmp_path / "run", problems.mlp(12, 6, 4), weights="every")
    whole = allocate(run, save=False)
    monkeypatch.setattr(compute, "COMMIT_SECONDS", 0.0)
    count, original = [0], Totals._by_tensor

    def fails(self: Totals, values: np.ndarray) -> np.ndarray:
        count[0] += 1
        if count[0] == 33:
            raise kind
        return original(self, values)

    with monkeypatch.context() as patched:
        patched.setattr(Totals, "_by_tensor", fails)
        with pytest.raises(kind):
            allocate(run)
    found = allocate(run)
    assert np.array_equal(found.cells(), whole.cells())
    assert np.allclose(found.parameters["lca"], whole.parameters["lca"], rtol=0, atol=1e-12)
    assert (found.parameters["helping"] == whole.parameters["helping"]).all()


def test_empty_tensors() -> None:
    shapes = [("a.weight", "a", [2, 3]), ("a.empty", "a", [3, 0]), ("b.none", "b", [0]), ("b.bias", "b", [2])]
    tensors, first = [], 0
    for name, layer, shape in shapes:
        size = int(np.prod(shape))
        tensors.append({"name": name, "layer": layer, "shape": shape, "size": size, "first": first})
        first += size
    units = units_of(tensors)
    values = np.arange(8.0)
    assert units.by_tensor(units.by_run(values)).tolist() == [15.0, 0.0, 0.0, 13.0]
    assert units.by_unit(units.by_run(values)).tolist() == [3.0, 12.0, 6.0, 7.0]


def test_data_sets_that_change_what_they_hold() -> None:
    class Shifted(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            x, y = super().__getitem__(index)
            return x + 1.0, y

    found = samples_of(Shifted(*DATA[:]))
    assert torch.equal(found.inputs, DATA[:][0] + 1.0)


def test_decoupled_decay_is_no_term_of_the_loss(tmp_path: Path) -> None:
    model = problems.mlp(12, 6, 4)
    for kind, coupled in ((torch.optim.Adam, True), (torch.optim.AdamW, False), (torch.optim.Adafactor, False)):
        optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1)
        with nbdyn.record(tmp_path / kind.__name__, model, optimizer, LOSS, per_sample=False) as rec:
            problems.train(rec, model, optimizer, LOSS, DataLoader(DATA, 60), 1)
        assert (decay_of(nbdyn.open(tmp_path / kind.__name__).store) is not None) == coupled


@pytest.mark.parametrize("rule", ["gauss", "boole", "first order"])
def test_every_rule_has_groups(tmp_path: Path, rule: str) -> None:
    run = train(tmp_path / "run", problems.mlp(12, 6, 4), weights="every")
    found = allocate(run, classes=True, precision=Precision(rule))
    assert found.classes.eval("lca * share").sum() == pytest.approx(found.layers["lca"].sum(), abs=1e-6)
    assert np.isnan(found.parameters["gradient_turns"]).sum() == 0


def test_controls_of_moments(tmp_path: Path) -> None:
    found = allocate(train(tmp_path / "run", problems.mlp(12, 6, 4), weights="every"), save=False)
    weights = nbdyn.open(tmp_path / "run").weights["all"]
    motion = found.moments(of="motion")
    norms = np.linalg.norm(np.diff(weights.astype(np.float64), axis=0)[:, :78], axis=1)
    assert np.allclose(motion.series[0, 0], norms) and "motion" in motion.frame()
    inner = np.flatnonzero((norms[1:-1] > norms[:-2]) & (norms[1:-1] > norms[2:])) + 1
    assert np.flatnonzero(motion.marks[0, 0]).tolist() == inner.tolist()
    assert found.moments(of="gradient").series.shape == motion.series.shape


@pytest.mark.parametrize("save", [False, True])
def test_cells_of_classes(tmp_path: Path, save: bool) -> None:
    run = train(tmp_path / "run", problems.mlp(12, 6, 4), weights="every")
    found = allocate(run, classes=True, cells="classes", save=save)
    of_classes = [found.cells(of_class=label).astype(np.float64) for label in found.labels["groups"]]
    weighted = sum(share * cells for share, cells in zip(found.labels["shares"], of_classes, strict=True))
    assert np.allclose(weighted, found.cells(), rtol=0, atol=1e-7)
    sums = found.classes.pivot(index="class", columns="layer", values="lca")
    assert np.allclose([cells[:, :78].sum() for cells in of_classes], sums["0"], rtol=0, atol=1e-5)
    assert np.array_equal(found.cells("2.bias", slice(2, 5), 1), of_classes[1][2:5, -4:].astype(np.float32))
    with pytest.raises(UnknownName, match="no class 9"):
        found.cells(of_class=9)
    with pytest.raises(NotRecorded, match='cells="classes"'):
        allocate(run, name="plain", save=save, classes=True).cells(of_class=1)
    with pytest.raises(NbdynError, match="with classes=True"):
        allocate(run, cells="classes", save=False)
    if save:
        again = run.lca(name="classes")
        assert np.array_equal(again.cells(of_class=2), found.cells(of_class=2))
        assert verify(run.uri).empty
