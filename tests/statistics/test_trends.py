"""Trends: exact slopes, known order, level and power by simulation, frames of runs."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import signal, stats

from nbdyn.errors import Incompatible, UnknownName
from nbdyn.statistics.trends import autoregression, trend, trends


def series(length: int, r: float, seed: int, slope: float = 0.0) -> np.ndarray:
    """A first-order autoregression with a trend."""
    noise = np.random.default_rng(seed).normal(size=length + 200)
    return signal.lfilter([1.0], [1.0, -r], noise)[200:] + slope * np.arange(length)


def test_rho_and_slope_are_scipys() -> None:
    y, t = series(60, 0.5, 0), np.sort(np.random.default_rng(1).choice(1000, 60, replace=False))
    found = trend(y, t)
    assert found.rho == pytest.approx(stats.spearmanr(t, y).statistic)
    assert found.slope == pytest.approx(stats.linregress(t, y).slope)
    assert found.low < found.slope < found.high and found.n == 60 and found.draws == 999


def test_nan_is_left_out() -> None:
    y = series(60, 0.5, 0)
    gaps = np.insert(y, [10, 30], np.nan)
    t = np.insert(np.arange(60.0), [10, 30], 999)
    assert trend(gaps, t) == trend(y)


def test_rows_come_in_any_order() -> None:
    y, t = series(60, 0.7, 0), np.arange(60.0)
    order = np.random.default_rng(0).permutation(60)
    assert trend(y[order], t[order], draws=99) == trend(y, t, draws=99)


@pytest.mark.parametrize(("length", "r"), [(60, 0.0), (200, 0.7)])
def test_level_and_cover(length: int, r: float) -> None:
    found = [trend(series(length, r, seed), draws=99, seed=seed) for seed in range(300)]
    # 300 series: 5 % plus three standard errors is 8.8 %
    assert 0.015 < np.mean([f.p <= 0.05 for f in found]) < 0.09
    assert np.mean([f.low <= 0 <= f.high for f in found]) > 0.90


def test_a_test_that_ignores_dependence_would_fail_here() -> None:
    tau = [stats.kendalltau(np.arange(200), series(200, 0.7, seed)).pvalue for seed in range(300)]
    assert np.mean(np.array(tau) <= 0.05) > 0.25


def test_power() -> None:
    found = [trend(series(200, 0.5, seed, slope=0.01), draws=99, seed=seed) for seed in range(60)]
    assert np.mean([f.p <= 0.05 for f in found]) > 0.8
    assert np.mean([f.low <= 0.01 <= f.high for f in found]) > 0.85


def test_autoregression_of_known_order() -> None:
    x = signal.lfilter([1.0], [1.0, -0.5, 0.3], np.random.default_rng(0).normal(size=20_200))[200:]
    weights, innovations = autoregression(x)
    assert len(weights) >= 2 and weights[:2] == pytest.approx([0.5, -0.3], abs=0.03)
    assert innovations.std() == pytest.approx(1, abs=0.02) and abs(innovations.mean()) < 1e-12


@pytest.mark.parametrize("y", [np.ones(20), np.arange(20.0)])
def test_without_residuals_there_is_no_test(y: np.ndarray) -> None:
    found = trend(y)
    assert np.isnan(found.p) and found.low == found.slope == found.high and found.order == 0


def test_what_is_refused() -> None:
    with pytest.raises(Incompatible, match="ten values or more; there are 9"):
        trend(np.arange(9.0))
    with pytest.raises(Incompatible, match="3 steps and 20 values"):
        trend(np.arange(20.0), [1, 2, 3])
    for steps in (np.repeat(np.arange(10.0), 2), np.append(np.arange(19.0), np.nan), np.zeros(20)):
        with pytest.raises(Incompatible, match="a step is there twice, or NaN; rows of several layers"):
            trend(np.random.default_rng(0).normal(size=20), steps)
    with pytest.raises(UnknownName, match=r"no column 'los'.*loss"):
        trends(pd.DataFrame({"step": [0], "loss": [1.0]}), "los")


def test_frames_of_runs() -> None:
    slopes = [0.05, 0.06, 0.04]
    frame = pd.concat([
        pd.DataFrame({"run": f"r{k}", "step": np.arange(100), "loss": series(100, 0.3, k, slope)}).sample(
            frac=1, random_state=k
        )
        for k, slope in enumerate(slopes)
    ])  # fmt: skip
    found = trends(frame, "loss", draws=99).set_index("run")
    assert list(found.index) == ["r0", "r1", "r2", "all runs"]
    alone = trend(series(100, 0.3, 1, 0.06), draws=99)
    assert found.loc["r1", "slope"] == pytest.approx(alone.slope) and found.loc["r1", "p"] == alone.p
    over = stats.ttest_1samp(found["slope"].iloc[:3], 0)
    assert found.loc["all runs", "p"] == pytest.approx(over.pvalue) and found.loc["all runs", "n"] == 3
    assert list(trends(frame[frame["run"] == "r0"].drop(columns="run"), "loss", draws=9)["run"]) == [""]
