"""Slopes of known laws, and the whole benchmark at a tiny size."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests.benchmarks import growth


def test_slope_of_a_power_law():
    sizes = np.array([1e3, 1e4, 1e5, 1e6])
    assert growth.slope(sizes, 2e-6 * sizes**1.5) == (1.5, 0.0)


def test_slope_and_its_error_are_those_of_a_regression():
    from scipy.stats import linregress

    rng = np.random.default_rng(0)
    sizes, seconds = 10.0 ** np.arange(6), 10 ** rng.normal(size=6)
    known = linregress(np.log10(sizes), np.log10(seconds))
    assert growth.slope(sizes, seconds) == pytest.approx((known.slope, known.stderr), abs=1e-3)


def test_axes_span_two_decades_of_one_size_each():
    for axis, problems in growth.AXES.items():
        sizes = [getattr(p, axis) for p in problems]
        assert max(sizes) / min(sizes) >= 99
        for other in {"visits", "parameters", "steps"} - {axis}:
            assert len({getattr(p, other) for p in problems}) == 1


def test_the_whole_at_a_tiny_size(tmp_path):
    axes = {"steps": [growth.problem(160, 4, steps, "digits") for steps in (20, 40, 80)]}
    times = growth.measure(axes, [3, 5], repeats=1)
    assert isinstance(times, pd.DataFrame) and len(times) == 6 and (times["seconds"] > 0).all()
    assert growth.table(times).count("| slope |") == 1
    growth.figure(times, tmp_path / "growth.svg")
    assert (tmp_path / "growth.svg").read_text().startswith("<svg")
