"""Tails of allocations: fits of single steps are those of the statistics, of cells of known law."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nbdyn.analysis.lca import tails
from nbdyn.analysis.lca.result import Allocation
from nbdyn.errors import NotRecorded
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


def test_places_of_an_allocation() -> None:
    """Through the allocation: nine steps of many, places from the end, and what is not there."""
    values = cells(1.0, steps=30, size=40).astype(np.float32)

    class Known(Allocation):
        def __init__(self) -> None:
            self._steps = np.arange(100, 130)

        def __len__(self) -> int:
            return len(values)

        def cells(self, selector: str = "all", steps: slice = slice(None), of_class: int | None = None) -> np.ndarray:
            return values[steps]

        def _framed(self, frame: pd.DataFrame, what: str) -> pd.DataFrame:
            return frame

    found = Known()
    assert found.tails(bootstrap=0)["step"].tolist() == [*map(str, np.linspace(100, 129, 9).astype(int)), "pooled"]
    assert found.tails(steps=[-1], bootstrap=0)["step"].tolist() == ["129", "pooled"]
    assert found.tail_fit(step=-30, bootstrap=0)["shape"] == found.tail_fit(step=0, bootstrap=0)["shape"]
    assert found.tail_fit(bootstrap=0).n_tail == 30 * 32
    for steps in ([30], [-31], []):
        with pytest.raises(NotRecorded, match=r"places 0\.\.29"):
            found.tails(steps=steps)
