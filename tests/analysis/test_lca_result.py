"""The frames of an allocation agree with each other, and a subset's intervals hold what they promise."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import nbdyn
from nbdyn.analysis.lca.engine import Allocator
from nbdyn.analysis.lca.helping import crossings, helping_share, percent_helping
from nbdyn.analysis.lca.intervals import of_blocks
from nbdyn.analysis.lca.moments import moments
from nbdyn.analysis.lca.objective import Objective
from nbdyn.analysis.lca.precision import Precision
from nbdyn.analysis.lca.result import Allocation
from nbdyn.analysis.lca.samples import samples_of
from nbdyn.errors import Incompatible, NotRecorded, UnknownName
from nbdyn.schema import PROVENANCE
from tests import problems

STEPS = 18
DATA = problems.data()
LAYERS = ["0", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> nbdyn.Run:
    path, model, loss_fn = tmp_path_factory.mktemp("result") / "run", problems.mlp(12, 6, 4), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.5, weight_decay=1e-2)
    with nbdyn.record(path, model, optimizer, loss_fn, weights="every") as rec:
        problems.train(rec, model, optimizer, loss_fn, DataLoader(DATA, 20, shuffle=True), 3)
    return nbdyn.open(path, model=problems.mlp(12, 6, 4))


@pytest.fixture(scope="module")
def found(run: nbdyn.Run) -> Allocation:
    return run.lca(DATA, classes=True, motion=True, save=False, progress=False)


def test_sums_agree(found: Allocation) -> None:
    cells = found.cells().astype(np.float64)
    assert cells.shape == (STEPS, 106) and len(found) == STEPS
    total, row = float(found.steps["allocated"].sum()), found.check().iloc[0]
    for frame in (found.layers, found.by_tensor, found.units, found.parameters, found.motion):
        assert frame["lca"].sum() == pytest.approx(total, abs=1e-7)  # gradients are float32
    for by, frame in (("layer", found.layers), ("tensor", found.by_tensor), ("unit", found.units)):
        series = found.series(by)
        assert np.allclose(series.sum(axis=0), frame["lca"], rtol=0, atol=1e-12) and series.index.tolist() == list(
            range(STEPS)
        )
        assert np.allclose(series.sum(axis=1), found.steps["allocated"], rtol=0, atol=1e-12)
    assert np.allclose(found.parameters["lca"], cells.sum(0), rtol=0, atol=1e-6)
    for frame in (found.layers, found.by_tensor, found.parameters):
        assert np.allclose(frame["help"] + frame["hurt"], frame["lca"], rtol=0, atol=1e-12)
        assert (frame["help"] <= 1e-15).all() and (frame["hurt"] >= 0).all()
    assert row["change"] == pytest.approx(row["loss_after"] - row["loss"]) and row["allocated"] == pytest.approx(total)
    assert row["residual"] == pytest.approx(row["change"] - total, abs=1e-12) and row["drift"] == 0
    assert row["residual"] == pytest.approx(found.steps["residual"].sum(), abs=1e-9)
    assert abs(row["residual_percent"]) <= 0.01 and row["not_met"] == 0 and row["steps"] == STEPS
    parts = found.motion.groupby("layer", sort=False)["lca"].sum()
    assert np.allclose(parts[LAYERS], found.layers["lca"], rtol=0, atol=1e-7)
    classes = found.classes
    weighted = (classes["lca"] * classes["share"]).groupby(classes["layer"], sort=False).sum()
    assert np.allclose(weighted[LAYERS], found.layers["lca"], rtol=0, atol=1e-7)
    assert classes.drop_duplicates("class")["share"].sum() == pytest.approx(1)
    assert found.layers["size"].tolist() == [78, 28]


def test_counts_agree(found: Allocation) -> None:
    cells = found.cells()
    helping, hurting = (cells < 0).sum(), (cells > 0).sum()
    layers, parameters = found.layers, found.parameters
    assert parameters["helping"].sum() == helping and parameters["hurting"].sum() == hurting
    for name, count in (("helping", helping), ("hurting", hurting), ("zero", cells.size - helping - hurting)):
        assert (layers[f"{name}_percent"] * layers["size"]).sum() / 106 == pytest.approx(100 * count / cells.size)
    assert np.array_equal(parameters["lca_turns"], crossings(cells))
    assert found.helping()["layer"].unique().tolist() == ["all", *LAYERS]
    by_step = found.helping_by_step()
    direct = percent_helping((cells < 0).sum(1)[:, None], (cells > 0).sum(1)[:, None], np.array([106]), ["all"])
    mine = by_step[by_step["layer"] == "all"].reset_index(drop=True)
    for column in direct.columns.intersection(mine.columns).drop("step"):
        assert np.array_equal(mine[column], direct[column], equal_nan=True), column
    events = found.oscillations().set_index(["event", "parameters"])["mean_events"]
    assert events["LCA turn", "all"] == pytest.approx(crossings(cells).mean())
    assert events["weight turn", "all"] == pytest.approx(parameters["weight_turns"].mean())
    assert np.allclose(helping_share(parameters["helping"], STEPS), 100 * (cells < 0).mean(0))


def test_moments_are_those_of_the_series(found: Allocation, run: nbdyn.Run) -> None:
    by_class = found.moments(3)
    assert by_class.marks.shape == (len(found.labels["groups"]), 2, STEPS)
    total = np.tensordot(found.labels["shares"], by_class.series, 1)
    assert np.allclose(total.T, found.series(), rtol=0, atol=1e-7)
    whole = run.lca(DATA, save=False, progress=False).moments(3)
    assert np.array_equal(whole.marks[0], moments(found.series().to_numpy().T, 3))
    frame = whole.frame()
    assert np.allclose(
        frame["lca"], [found.series().loc[s, n] for s, n in zip(frame["step"], frame["layer"], strict=True)]
    )


def test_every_frame_says_where_it_is_from(found: Allocation) -> None:
    frames: list[pd.DataFrame] = [
        found.steps, found.check(), found.layers, found.units, found.parameters, found.series(), found.classes,
        found.motion, found.helping(), found.oscillations(), found.concentration(), found.tail(),
    ]  # fmt: skip
    for frame in frames:
        assert frame.attrs[PROVENANCE]["run"] == "run" and frame.attrs[PROVENANCE]["samples"] == "120"
    assert "18 steps" in repr(found)
    assert found.saliency("0.weight", (3, 4)).shape == (6, 3, 4)


def test_what_was_not_computed_is_told(run: nbdyn.Run, found: Allocation) -> None:
    plain = run.lca(DATA, save=False, progress=False, cells=False)
    for what in (lambda: plain.classes, lambda: plain.motion, plain.intervals, plain.cells, found.intervals):
        with pytest.raises(NotRecorded):
            what()
    with pytest.raises(UnknownName, match="layer"):
        plain.series("layers")
    for wrong in (lambda: found.specialization("3"), lambda: found.saliency("0.weigth", (3, 4))):
        with pytest.raises(UnknownName):
            wrong()
    against = plain.against(found)
    assert np.abs(against["overfit"]).max() < 1e-6
    with pytest.raises(Incompatible, match="not of the same steps"):
        plain.against(run.lca(DATA, save=False, progress=False, steps=(0, 5)))


def test_tolerances_that_are_missed_are_said(run: nbdyn.Run, capsys: pytest.CaptureFixture[str]) -> None:
    precision = Precision(tolerance=1e-14, total=1e-14, most=3)
    found = run.lca(DATA, save=False, progress=False, precision=precision)
    assert found.check().iloc[0]["not_met"] > 0 and not found.steps["met"].all()
    assert "miss the tolerance" in capsys.readouterr().out
    run.lca(DATA, save=False, progress=False)
    assert "tolerance" not in capsys.readouterr().out


def test_a_training_that_diverges_is_told(run: nbdyn.Run, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = DATA.tensors
    found = run.lca((torch.where(x > 0.99, torch.nan, x), y), save=False, progress=False, steps=(0, 3))
    assert found.check().iloc[0]["not_met"] == 3 and "miss the tolerance" in capsys.readouterr().out
    assert repr(found) and not found.steps["met"].any() and len(found.layers) == 2


def test_intervals_cover_the_whole_data_set() -> None:
    """About 95 of 100 random subsets' intervals hold the allocation over all of the data."""
    torch.manual_seed(0)
    x = torch.randn(1000, 3, dtype=torch.float64)
    y = (x @ torch.randn(3, 3, dtype=torch.float64) + torch.randn(1000, 3, dtype=torch.float64)).argmax(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    layers, size = [slice(0, 16), slice(16, 31)], 31
    path = np.random.default_rng(0).normal(size=(3, size)).cumsum(0) * 0.3

    def blocks(subset: int | None, seed: int) -> np.ndarray:
        samples = samples_of((x, y), subset=subset, seed=seed)
        allocator = Allocator(Objective(model, nn.CrossEntropyLoss(), samples, chunk=1000), Precision("trapezoid"))
        steps = [allocator.step(a, b) for a, b in itertools.pairwise(path)]
        cells = np.sum([s.cells if s.groups is None else s.groups * s.motion for s in steps], 0)
        return np.stack([cells[..., layer].sum(-1) for layer in layers], -1)

    whole = blocks(None, 0)
    for subset in (100, 600):
        inside = []
        for seed in range(200):
            frame = of_blocks(blocks(subset, seed), LAYERS, subset, 1000)
            inside.append((frame["low"] <= whole) & (whole <= frame["high"]))
        assert 0.91 <= np.mean(inside) <= 0.985, subset
    assert np.abs(of_blocks(blocks(1000, 1), LAYERS, 1000, 1000)["lca"] - whole).max() < 1e-12  # everything: exact
    assert of_blocks(blocks(1000, 1), LAYERS, 1000, 1000)["standard_error"].max() == 0
