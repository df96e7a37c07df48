"""Intervals by resampling: scipy's own, coverage under dependence, whole runs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import signal, stats

from nbdyn.errors import Incompatible, UnknownName
from nbdyn.statistics.resampling import bootstrap, moving_blocks, over_runs


def test_bootstrap_is_scipys() -> None:
    x = np.random.default_rng(0).exponential(size=40)
    found = bootstrap(np.append(x, np.nan), np.median, draws=999)
    expected = stats.bootstrap((x,), np.median, n_resamples=999, method="BCa", random_state=np.random.default_rng(0))
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval))
    assert found.value == np.median(x) and found.n == 40


def test_bootstrap_of_equal_values() -> None:
    found = bootstrap([2.0, 2.0, 2.0])
    assert found.value == 2 and np.isnan([found.low, found.high]).all() and found.draws == 0
    assert np.isnan(bootstrap([]).value)


def test_blocks_cover_where_single_values_do_not() -> None:
    covered: dict[str, list[bool]] = {"blocks": [], "single": []}
    for seed in range(200):
        x = signal.lfilter([1.0], [1.0, -0.7], np.random.default_rng(seed).normal(size=700))[200:]
        for name, block in (("blocks", None), ("single", 1)):
            found = moving_blocks(x, block=block, draws=400, seed=seed)
            covered[name].append(found.low <= 0 <= found.high)
    assert np.mean(covered["single"]) < 0.75
    assert 0.86 < np.mean(covered["blocks"]) <= 0.99


def test_one_block_is_the_series() -> None:
    x = np.arange(10.0)
    found = moving_blocks(x, np.max, block=10, draws=20)
    assert (found.value, found.low, found.high) == (9, 9, 9) and found.n == 1


def test_blocks_are_pieces_of_the_series() -> None:
    x = np.arange(12.0)

    def jumps(values: np.ndarray, axis: int) -> np.ndarray:
        return (np.diff(values, axis=axis) != 1).sum(axis=axis)

    found = moving_blocks(x, jumps, block=4, draws=500)
    assert found.value == 0 and -4 <= found.low <= found.high <= 2  # two places where blocks meet, at most


def test_blocks_that_do_not_fit() -> None:
    with pytest.raises(Incompatible, match="blocks of 5 do not fit a series of 4"):
        moving_blocks(np.arange(4.0), block=5)
    with pytest.raises(Incompatible, match="1 NaN"):
        moving_blocks([1.0, np.nan, 2.0], block=1)


def test_runs_are_drawn_whole() -> None:
    frame = pd.DataFrame({"run": np.repeat(["a", "b", "c", "d"], 50), "loss": np.repeat([1.0, 2.0, 3.0, 6.0], 50)})
    found = over_runs(frame, lambda rows: float(rows["loss"].mean()), draws=500)
    means = stats.bootstrap(([1.0, 2.0, 3.0, 6.0],), np.mean, n_resamples=4_000, method="percentile")
    assert found.value == 3 and found.n == 4
    assert (found.low, found.high) == pytest.approx(tuple(means.confidence_interval), abs=0.3)
    with pytest.raises(UnknownName, match=r"'runs'.*run"):
        over_runs(frame, len, run="runs")
    with pytest.raises(Incompatible, match="50 rows have no 'run'"):
        over_runs(frame.replace({"run": {"d": None}}), len)
    with pytest.raises(Incompatible, match="1 run in the frame"):
        over_runs(frame[frame["run"] == "a"], len)
