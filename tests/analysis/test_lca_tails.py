"""Tails of allocations: fits of single steps are those of the statistics, of cells of known law."""

from __future__ import annotations

import numpy as np
import pytest

from nbdyn.analysis.lca import tails
from nbdyn.statistics.heavy_tail.weibull import double_weibull


def cells(shape: float, steps: int = 6, size: int = 4_000, grow: float = 1.0) -> np.ndarray:
    """Double Weibull values, every fifth one 0."""
    rng = np.random.default_rng(0)
    values = rng.weibull(shape, (steps, size)) * rng.choice([-1, 1], (steps, size))
    values[:, ::5] = 0
    return values * grow ** np.arange(steps)[:, None]


@pytest.mark.parametrize("shape", [0.3, 1.5])
def test_each_step_has_the_shape_of_its_law(shape: float) -> None:
    values = cells(shape)
    table = tails.table(lambda place: values[place], [0, 3], np.arange(10, 16), 99, 0)
    assert list(table["step"]) == ["10", "13", "pooled"]
    assert list(table["n"]) == [3_200, 3_200, 6_400] and list(table["zeros"]) == [800, 800, 1_600]
    assert (table["low"] < shape).all() and (shape < table["high"]).all()
    assert (table["best"] == "double Weibull").all() and (table["p"] > 0.02).all()
    assert table["shape"][0] == double_weibull(values[0], bootstrap=0)["shape"].value


def test_pooled_scales_look_heavier_than_any_step() -> None:
    values = cells(1.0, grow=4.0)
    table = tails.table(lambda place: values[place], range(6), np.arange(6), 99, 0)
    *single, pooled = table["shape"]
    assert pooled < min(single) - 0.2 and table["p"].iloc[-1] == 0.01


def test_many_values_are_sampled() -> None:
    values = cells(1.0, steps=3, size=60_000)
    found = tails.fit(lambda place: values[place], range(3), 0, 0)
    assert found.n_tail + found.zeros == 99_999
    assert found.n_tail == pytest.approx(80_000, rel=0.01)
    assert found["shape"].value == pytest.approx(1, abs=0.01)
