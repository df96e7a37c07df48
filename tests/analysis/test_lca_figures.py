"""Pictures of allocations: what they show is what the frames say, and they can be drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nbdyn
from nbdyn.analysis.lca import figures
from nbdyn.analysis.lca.result import Allocation
from nbdyn.plots import to_png
from tests import problems


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Allocation:
    path, model, loss_fn = tmp_path_factory.mktemp("figures") / "run", problems.mlp(12, 6, 4), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.5)
    with nbdyn.record(path, model, optimizer, loss_fn, weights="every") as rec:
        problems.train(rec, model, optimizer, loss_fn, DataLoader(problems.data(), 20), 2)
    return nbdyn.open(path, model=model).lca(problems.data(), classes=True, motion=True, save=False, progress=False)


def rows(chart: Any) -> list[dict[str, Any]]:
    """All rows that a chart holds."""
    return [row for table in chart.to_dict()["datasets"].values() for row in table]


def is_drawn(chart: Any) -> bool:
    return to_png(chart).startswith(b"\x89PNG")


def test_layers_and_steps(found: Allocation) -> None:
    bars = {(row["layer"], row["side"]): row["nats"] for row in rows(figures.layers(found)) if "side" in row}
    for row in found.layers.to_dict("records"):
        assert bars[row["layer"], "help"] == pytest.approx(row["help"])
        assert bars[row["layer"], "hurt"] == pytest.approx(row["hurt"])
    lines = pd.DataFrame([row for row in rows(figures.over_steps(found)) if "series" in row])
    for name, sums in found.series().cumsum().items():
        line = lines[lines["series"] == name].sort_values("x_first")
        assert line["mean"].iloc[-1] == pytest.approx(sums.iloc[-1])
    assert is_drawn(found.plot())


@pytest.mark.parametrize("top", [1, 5])
def test_moments(found: Allocation, top: int) -> None:
    moments = found.moments(top=top)
    drawn = pd.DataFrame([row for row in rows(moments.plot()) if "shared" in row])
    frame = moments.frame()
    assert len(drawn) == len(frame) and drawn["all layers"].sum() == (frame["shared"] == 2).sum()
    assert is_drawn(moments.plot())


def test_saliency_draws_the_units_that_helped_most(found: Allocation) -> None:
    chart = found.plot_saliency("0.weight", (3, 4))
    images = found.saliency("0.weight", (3, 4))
    shown = pd.DataFrame([row for row in rows(chart) if "value" in row])
    assert len(shown) == images.size and np.isclose(shown["value"].sum(), images.sum())
    first = int(np.argmax(images.sum((1, 2))))
    assert f"unit {first}" in str(chart.to_dict()) and is_drawn(chart)


def test_frames_draw_themselves(found: Allocation) -> None:
    for frame in (
        found.layers,
        found.by_tensor,
        found.units,
        found.classes,
        found.motion,
        found.steps,
        found.helping(),
    ):
        assert is_drawn(frame.dyn.plot())


def test_a_run_of_one_step(tmp_path: Path) -> None:
    model, loss_fn = nn.Linear(12, 4), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    data = TensorDataset(*problems.data()[:20])
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn, weights="every") as rec:
        problems.train(rec, model, optimizer, loss_fn, DataLoader(data, 20), 1)
    found = nbdyn.open(tmp_path / "run", model=model).lca(data, save=False, progress=False)
    assert len(found) == 1 and is_drawn(found.plot()) and not len(found.moments().frame())
    assert is_drawn(found.moments().plot())


def test_correlations_of_neurons(found: Allocation) -> None:
    together = found.same_neuron("0.weight")
    drawn = pd.DataFrame([row for row in rows(together.plot()) if "share" in row])
    for kind, r in together.r.items():
        shares = drawn[drawn["kind"] == kind]
        assert shares["share"].sum() == pytest.approx(1)
        assert (shares["r"] * shares["share"]).sum() == pytest.approx(r.mean(), abs=0.0126)  # half a bin
    assert is_drawn(together.plot())


def test_classes_of_neurons(found: Allocation) -> None:
    special = found.specialization("0")
    chart = special.plot()
    values = [row["value"] for row in rows(chart) if "value" in row]
    assert sorted(values) == pytest.approx(sorted(special.neurons[["top_1", "top_2", "entropy"]].stack().dropna()))
    means = {row["observed"] for row in rows(chart) if "observed" in row}
    assert means <= set(special.tests["observed"]) and len(means) == 3
    assert is_drawn(chart)
