"""Measures of noise on laws that are known, and the noise scale on gradients whose scale is."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nbdyn.analysis.noise import measures, surrogate
from nbdyn.analysis.noise.sampled import choose
from nbdyn.analysis.noise.scale import noise_scale
from nbdyn.analysis.noise.words import _of_surrogates
from nbdyn.errors import Incompatible

ROWS, COLUMNS = 6_000, 20


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def stable() -> np.ndarray:
    """A symmetric stable law of index 1.5, from scipy."""
    return stats.levy_stable.rvs(1.5, 0, size=(ROWS, COLUMNS), random_state=rng())


def batched(values: np.ndarray, batch: int) -> np.ndarray:
    return measures.in_batches(values, batch, rng(1).permutation(len(values)))


def test_batches_are_disjoint_and_leave_no_row_but_the_rest() -> None:
    values = rng().normal(size=(103, 3))
    order = rng(1).permutation(103)
    found = measures.in_batches(values, 10, order)
    assert found.shape == (10, 3)
    assert np.allclose(found[3], values[order[30:40]].mean(axis=0))
    assert np.allclose(found.mean(axis=0), values[order[:100]].mean(axis=0))


def test_a_stable_law_keeps_its_index_and_a_finite_variance_rises(stable: np.ndarray) -> None:
    heavy = rng(3).standard_t(3, (ROWS, COLUMNS))
    for batch in (1, 10, 60):
        found = measures.index(batched(stable, batch), 10**6)
        assert found.low < 1.5 < found.high
        assert found.q1 <= found.median <= found.q3 and found.coordinates == COLUMNS
    few, many = (measures.index(batched(heavy, batch), 10**6) for batch in (1, 60))
    assert few.high < 1.8 and many.low > few.high and many.median > 1.9
    gauss = measures.index(rng(4).normal(size=(ROWS, COLUMNS)), 10**6)
    assert gauss.median > 1.99 and gauss.high == 2.0


def test_intervals_of_the_index_cover() -> None:
    """Coordinates that share their samples' scale: the jackknife over rows has to see that they depend."""
    covered = []
    for seed in range(40):
        draw = rng(seed)
        # Cauchy columns that are alike within a row: x_j = z_j / |w|, one w a row (a multivariate Cauchy law)
        values = draw.normal(size=(1_000, 15)) / np.abs(draw.normal(size=(1_000, 1)))
        found = measures.index(values, 10**6)
        covered.append(found.low <= 1.0 <= found.high)
    assert np.mean(covered) >= 0.9


def test_intervals_of_few_rows_hold_the_bias_of_the_index() -> None:
    """Of 60 rows an index of 1.8 reads 1.89."""
    drawn = stats.levy_stable.rvs(1.8, 0, size=(50, 60, 100), random_state=rng())
    found = [measures.index(values, 10**6) for values in drawn]
    assert 1.87 < np.mean([x.median for x in found]) < 1.92
    assert np.mean([x.low <= 1.8 <= x.high for x in found]) >= 0.86
    assert np.isnan(measures.index(drawn[0, :59], 10**6).low)


def test_parts_of_the_interval_of_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other coordinates to draw: the jackknife alone, of the first rows, as small as that of all would be."""
    values = rng().standard_cauchy((4_000, 30))
    monkeypatch.setattr(measures, "JACKKNIFE_ROWS", 1_000)
    found, part = measures.index(values, 30), measures.index(values[:1_000], 30)
    without = [
        np.median(measures.alphas(np.delete(values[:1_000], np.s_[i : i + 100], 0))) for i in range(0, 1_000, 100)
    ]
    error = np.sqrt(0.9 * np.square(without - np.mean(without)).sum())
    assert np.isclose(found.high - found.low, 2 * stats.t.ppf(0.975, 9) * error / 2)
    assert np.isclose(
        part.high - part.low, 2 * stats.t.ppf(0.975, 9) * error + abs(9 * (np.mean(without) - part.median))
    )
    alone, drawn = (measures.kurtosis(values, size) for size in (30, 10**6))
    assert alone.low == alone.median == alone.high and drawn.low < drawn.median < drawn.high


def test_zeros_are_left_out_and_too_few_values_have_no_index() -> None:
    values = rng().standard_cauchy((4_000, 3))
    values[rng(1).random(values.shape) < 0.7] = 0.0
    values[:, 2] = 0.0
    values[:10, 2] = 1.0
    alphas = measures.alphas(values)
    assert np.abs(alphas[:2] - 1).max() < 0.15 and np.isnan(alphas[2])
    none = measures.index(values[:, 2:], 10)
    assert none.coordinates == 0 and np.isnan(none.median) and np.isnan(none.low)
    assert np.isnan(measures.index(rng().normal(size=(30, 4)), 9).low)  # a number, and too few rows for its interval


def test_kurtosis_is_scipys() -> None:
    values = rng().standard_t(5, (2_000, 7))
    assert np.allclose(measures.excess_kurtosis(values), stats.kurtosis(values, axis=0))
    found, blocks = measures.kurtosis_at(values, 600, 10**6)
    pieces = [np.median(stats.kurtosis(values[i : i + 600], axis=0)) for i in (0, 600, 1200)]
    assert blocks == 3 and np.isclose(found.median, np.mean(pieces))
    equal = np.full((30, 3), [1.0, 0.1, 7.7])  # the mean of thirty 0.1 is another number
    assert np.isnan(measures.excess_kurtosis(equal)).all()


def test_growth_of_the_kurtosis_tells_a_finite_fourth_moment_from_a_stable_law(stable: np.ndarray) -> None:
    gauss, laplace = rng(1).normal(size=(ROWS, COLUMNS)), rng(2).laplace(size=(ROWS, COLUMNS))
    for values in (gauss, laplace):
        found = measures.growth(values)
        assert abs(found.slope) < 0.1 and found.high < 0.2 and found.low < found.slope < found.high
    found = measures.growth(stable)
    assert 0.6 < found.slope < 1.4 and found.high > 1


def test_growth_is_what_its_definition_says() -> None:
    values = rng().laplace(size=(1_000, 5)) + 3.0
    whole = np.median(stats.kurtosis(values, axis=0, fisher=False))
    tenths = [np.median(stats.kurtosis(values[i : i + 100], axis=0, fisher=False)) for i in range(0, 1_000, 100)]
    assert np.isclose(measures.growth(values).slope, np.log10(whole / np.mean(tenths)))
    assert np.isnan(measures.growth(values[:100]).slope)


def test_growth_of_rare_values_is_not_that_of_rounding() -> None:
    """Groups of rows in which a coordinate is always zero have a variance of rounding errors."""
    values, draw = np.zeros((1_000, 20)), rng()
    for column in values.T:
        column[draw.integers(0, 1_000, 3)] = draw.normal(size=3)
    assert 0 < measures.growth(values).slope < 2
    assert np.isnan(measures.growth(np.zeros((1_000, 4))).slope)


def test_normality_keeps_its_level_and_is_scipys() -> None:
    values = rng(5).normal(size=(200, 3_000))
    found = measures.normality(values, 0.05)
    assert found.rejected == int((stats.normaltest(values, axis=0).pvalue <= 0.05).sum())
    assert abs(found.share - 0.05) < 0.015 and found.low < found.share < found.high
    assert measures.normality(rng(5).laplace(size=(500, 50)), 0.01).share > 0.9
    assert measures.normality(np.zeros((100, 4)), 0.01).coordinates == 0
    assert measures.normality(values[:10], 0.01).coordinates == 0


# Noise scale ----------------------------------------------------------------------------------------------------


def scale_of(gradients: np.ndarray):
    mean = gradients.mean(axis=0)
    return noise_scale(np.square(gradients).sum(axis=1), gradients @ mean, float(mean @ mean))


def test_the_noise_scale_of_a_known_law() -> None:
    """g = e_1 with noise of 0.5 in 1,000 coordinates: 1000 x 0.25 / 1 = 250."""
    found = scale_of(rng().normal(0, 0.5, (4_000, 1_000)) + np.eye(1_000)[0])
    assert found.resolved and found.low < 250 < found.high and found.high - found.low < 30
    assert abs(found.trace - 250) < 1
    few = rng(1).normal(0, 0.5, (200, 32, 1_000)) + np.eye(1_000)[0]
    naive = [np.square(g - g.mean(0)).sum() / 31 / np.square(g.mean(0)).sum() for g in few[:50]]
    unbiased = [(x.trace, x.signal) for x in map(scale_of, few)]
    assert np.mean(naive) < 60  # of few samples |mean|^2 is mostly noise: the naive ratio is far too low
    assert abs(np.divide(*np.mean(unbiased, axis=0)) - 250) < 20


def test_the_jackknife_is_that_of_leaving_out_each_sample() -> None:
    g = rng().normal(size=(12, 4)) + 2.0
    found = scale_of(g)

    def parts(some: np.ndarray) -> tuple[float, float]:
        trace = np.trace(np.cov(some.T))
        return trace, float(np.square(some.mean(0)).sum() - trace / len(some))

    assert np.allclose([found.trace, found.signal], parts(g))
    without = np.array([parts(np.delete(g, i, axis=0)) for i in range(12)])
    error = np.sqrt(11 / 12 * np.square(without - without.mean(0)).sum(0))
    reach = stats.t.ppf(0.975, 11) * error[1]
    assert np.allclose([found.signal_low, found.signal_high], [found.signal - reach, found.signal + reach])
    assert np.isclose(found.of_these, np.square(g - g.mean(0)).sum() / 12 / np.square(g.mean(0)).sum())


def test_the_interval_covers_and_no_signal_is_not_resolved() -> None:
    covered, resolved = [], []
    for seed in range(300):
        g = rng(seed).normal(0, 1, (80, 10))
        found = scale_of(g + 0.5 * np.eye(10)[0])
        if found.resolved:
            covered.append(found.low <= 40 <= found.high)
        resolved.append(scale_of(g).resolved)
    assert np.mean(covered) > 0.9
    assert np.mean(resolved) < 0.05
    nothing = scale_of(rng(1).normal(size=(80, 10)))
    assert not nothing.resolved and np.isnan([nothing.scale, nothing.low, nothing.high]).all()


def test_what_a_noise_scale_needs() -> None:
    with pytest.raises(Incompatible, match="needs 3"):
        noise_scale([1.0, 2.0], [1.0, 2.0], 1.0)


# Surrogates -----------------------------------------------------------------------------------------------------


def correlated(values: np.ndarray) -> np.ndarray:
    """Neighbouring coordinates that depend on each other, of different scales."""
    mixing = np.tril(np.ones((values.shape[1],) * 2)) * np.linspace(0.1, 3, values.shape[1])
    return values @ mixing


def test_surrogates_tell_tails_from_covariance() -> None:
    gauss, tails = correlated(rng().normal(size=(400, 30))), rng().standard_t(3, (400, 30))
    for values, small in ((gauss, False), (tails, True)):
        rows = list(surrogate.per_coordinate(values, 10**6, 19, 0))
        assert len(rows) == 3
        for row in rows:
            assert (float(str(row["p"])) <= 0.05) is small, row
    layers = {"first": np.arange(10), "all": np.arange(30)}
    rows = list(surrogate.block_log_moments(gauss, layers, 39, 0))
    assert [row["layer"] for row in rows] == ["first", "all"]
    for row in rows:  # far from 2, and yet Gaussian: its null says so
        assert float(str(row["observed"])) < 1.7 and float(str(row["p"])) > 0.05
    assert not list(surrogate.block_log_moments(np.zeros((10, 4)), {"dead": np.arange(4)}, 19, 0))


def test_what_is_said_of_surrogates() -> None:
    rows = [(1.2, 0.01), (1.2, 0.2), (-3.0, 0.01)]
    table = pd.DataFrame(rows, columns=["observed", "p"]).assign(
        statistic="block log-moments", null_mean=1.3, null_low=1.25, null_high=1.35
    )
    for sentence, end in zip(_of_surrogates(table), ("a sign of tails", "sees no tail", "of no law"), strict=True):
        assert sentence.endswith(end)


def test_against_counts_on_the_side_of_heavier_tails() -> None:
    null = np.arange(19.0)
    assert surrogate.against(100.0, null, 1)["p"] == 1 / 20 and surrogate.against(100.0, null, -1)["p"] == 1.0
    assert surrogate.against(-1.0, null, -1)["p"] == 1 / 20
    assert np.isnan(surrogate.against(float("nan"), null, 1)["p"])


def test_coordinates_are_drawn_by_layer_and_seed() -> None:
    layers = {"a": np.arange(500), "b": np.arange(500, 507)}
    found = choose(layers, 40, 0)
    assert len(found["a"]) == 40 and found["b"].tolist() == list(range(500, 507))
    assert len(np.unique(found["a"])) == 40 and np.array_equal(choose(layers, 40, 0)["a"], found["a"])
    assert not np.array_equal(choose(layers, 40, 1)["a"], found["a"])
    for count in (0, 1.5, True):
        with pytest.raises(Incompatible, match="coordinates="):
            choose(layers, count, 0)
