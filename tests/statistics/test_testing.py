"""One-sample tests and corrected p-values against SciPy and hand calculation."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nbdyn.errors import Incompatible
from nbdyn.statistics.comparing import two_samples
from nbdyn.statistics.resampling import bootstrap, moving_blocks, over_runs
from nbdyn.statistics.testing import benjamini_hochberg, holm, one_sample


def test_one_sample_is_scipys() -> None:
    x = np.random.default_rng(0).normal(0.4, 1.0, 10)
    found = one_sample(x, 0.1, level=0.1)
    student = stats.ttest_1samp(x, 0.1)
    interval = student.confidence_interval(0.9)
    assert found.n == 10
    assert found.mean == pytest.approx(x.mean()) and found.std == pytest.approx(x.std(ddof=1))
    assert (found.t, found.p) == pytest.approx((student.statistic, student.pvalue))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.effect == pytest.approx((x.mean() - 0.1) / x.std(ddof=1))
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(x - 0.1).pvalue)


def test_one_sided() -> None:
    x = np.arange(1.0, 8.0)
    assert one_sample(x, alternative="greater").p_wilcoxon == pytest.approx(0.5**7)  # all signs alike
    assert one_sample(x, alternative="less").p == pytest.approx(1 - one_sample(x, alternative="greater").p)


@pytest.mark.parametrize("values", [[], [1.0], [math.nan, 2.0], [0.1, 0.1, 0.1], [0.0, 0.0], [0.3, 0.1 + 0.2, 0.3]])
def test_no_spread_no_test(values: list[float]) -> None:
    found = one_sample(values)
    assert found.n == sum(not math.isnan(value) for value in values)
    assert math.isnan(found.t) and math.isnan(found.p) and math.isnan(found.low) and math.isnan(found.p_wilcoxon)


def test_rounding_is_no_spread_whatever_the_value() -> None:
    assert math.isnan(one_sample([0.3, 0.1 + 0.2, 0.3], 0.3).p)  # differences of 0 and 6e-17
    assert math.isnan(one_sample([1e-17, 3e-17], 1.0).p)
    flat, near = ([0.3, value, 0.2, 0.6, 0.5] for value in (0.3, 0.1 + 0.2))
    assert one_sample(near, 0.3).p_wilcoxon == one_sample(flat, 0.3).p_wilcoxon  # as zeros, not as a smallest rank
    assert one_sample([1e-17, 3e-17]).n == 2 and one_sample([1e-17, 3e-17]).p < 0.4


@pytest.mark.parametrize("level", [0.0, 0.95, 95.0, math.nan])
def test_a_level_that_is_a_coverage_is_refused(level: float) -> None:
    calls = (
        lambda: one_sample([1.0, 2.0], level=level), lambda: two_samples([1.0, 2.0], [3.0, 5.0], level=level),
        lambda: bootstrap([1.0, 2.0], level=level), lambda: moving_blocks([1.0, 2.0], level=level),
        lambda: over_runs(pd.DataFrame({"run": ["a", "b"]}), len, level=level),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(Incompatible, match=r"is not in 0\.\.0\.5: an interval covers 1 - level"):
            call()


def test_nan_zeros_and_ties_are_no_warning() -> None:
    found = one_sample([0.0, 1.0, 1.0, -1.0, 2.0, math.nan])
    assert found.n == 5 and 0 < found.p_wilcoxon < 1


def test_holm_by_hand() -> None:
    p = [0.04, math.nan, 0.01, 0.02, 0.9]
    # sorted: 0.01 * 4, 0.02 * 3, 0.04 * 2, 0.9 * 1, running maximum
    np.testing.assert_allclose(holm(p), [0.08, math.nan, 0.04, 0.06, 0.9])
    assert holm([0.6, 0.5]).tolist() == [1.0, 1.0]
    assert p[0] == 0.04  # a copy was changed
    assert holm([]).tolist() == []


def test_holm_holds_the_level_over_all_tests() -> None:
    rng = np.random.default_rng(0)
    false = np.mean([(holm(rng.random(8)) <= 0.05).any() for _ in range(4_000)])
    assert 0.035 < false < 0.06


def test_benjamini_hochberg_by_hand() -> None:
    np.testing.assert_allclose(benjamini_hochberg([0.04, math.nan, 0.01, 0.9]), [0.06, math.nan, 0.03, 0.9])
    assert np.isnan(benjamini_hochberg([math.nan])).all()


@pytest.mark.parametrize("correct", [holm, benjamini_hochberg])
def test_what_is_no_p_value(correct: object) -> None:
    with pytest.raises(Incompatible, match=r"1\.2 is not a p-value"):
        correct([0.5, 1.2])  # type: ignore[operator]
