"""Autocorrelation times, thinning, independence, surrogates, and log-moments beside their null."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import signal, stats

from nbdyn.errors import Incompatible
from nbdyn.statistics import heavy_tail as ht
from nbdyn.statistics.heavy_tail.dependence import autocorrelations, average_ranks, depends, resampled
from nbdyn.statistics.surrogates import gaussian_surrogate

RNG = np.random.default_rng


def autoregression(rho: float, n: int, seed: int = 0) -> np.ndarray:
    """First order, variance 1."""
    return signal.lfilter([math.sqrt(1 - rho**2)], [1, -rho], RNG(seed).normal(size=n))


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_autocorrelation_time_of_an_autoregression(rho: float) -> None:
    """(1 + rho) / (1 - rho)."""
    found = ht.autocorrelation_time(autoregression(rho, 100_000))
    assert found.low < (1 + rho) / (1 - rho) < found.high
    assert found.window >= 5 * found.tau and found.n == 100_000


def test_autocorrelations_by_hand() -> None:
    x = RNG(0).normal(size=50).cumsum()
    y = x - x.mean()
    expected = [(y[: 50 - k] @ y[k:]) / (y @ y) for k in range(50)]
    np.testing.assert_allclose(autocorrelations(x), expected, atol=1e-12)


def test_thinned_series_is_independent() -> None:
    x = np.exp(2 * autoregression(0.9, 40_000))
    assert depends(x) < 1e-6
    thinned = ht.thin(x)
    assert 10 <= len(x) / len(thinned) <= 30  # 19 of the Gaussian's ranks
    assert abs(np.corrcoef(thinned[1:], thinned[:-1])[0, 1]) < 0.2
    independent = RNG(0).standard_cauchy(5_000)
    assert len(ht.thin(independent)) == 5_000
    assert len(ht.thin([1.0, math.nan, 2.0, 3.0], every=2)) == 2


def test_independence_test_keeps_its_level_and_sees_scales() -> None:
    rng = RNG(0)
    p = np.array([depends(rng.standard_cauchy(200)) for _ in range(600)])
    assert 0.025 < (p <= 0.05).mean() < 0.075
    scale = np.exp(autoregression(0.8, 2_000))
    assert depends(scale * rng.normal(size=2_000)) < 1e-6  # signs are independent, sizes are not
    assert depends(np.sort(rng.normal(size=500))) == 1.0  # sorted: no order to speak of


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0], ids=["above 0", "below 0", "both"])
def test_independence_test_is_that_of_ljung_and_box(sign: float) -> None:
    """By its definition, on SciPy's ranks; with ties."""
    x = autoregression(0.1, 300).round(1)
    x = sign * (x - x.min() + 0.1) if sign else x
    p = []
    for ranks in (stats.rankdata(x), stats.rankdata(np.abs(x))):
        np.testing.assert_array_equal(stats.rankdata(ranks), ranks)
        lags = np.arange(1, 11)
        r = autocorrelations(ranks)[lags]
        p.append(stats.chi2.sf(300 * 302 * (r**2 / (300 - lags)).sum(), 10))
    assert 1e-6 < depends(x) < 0.9 and depends(x) == pytest.approx(2 * min(p), rel=1e-9)
    np.testing.assert_array_equal(average_ranks(x), stats.rankdata(x))


def test_blocks_are_those_of_the_bootstrap() -> None:
    """Each is a run of neighbours, round the end; the mean of means is the series' mean."""
    x = np.arange(10.0)
    rows = np.concatenate(list(resampled(x, 4, 3_000, 0)))
    assert rows.shape == (3_000, 10)
    steps = np.diff(rows, axis=1) % 10
    inside = [i for i in range(9) if i % 4 != 3]
    assert (steps[:, inside] == 1).all() and (steps[:, 3] != 1).any()
    assert rows.mean() == pytest.approx(4.5, abs=0.1)
    np.testing.assert_array_equal(np.bincount(rows.astype(int).ravel()) > 2_500, True)


def test_errors_of_dependence() -> None:
    with pytest.raises(Incompatible, match="10 finite ones that differ"):
        ht.autocorrelation_time(np.ones(20))
    with pytest.raises(Incompatible, match="every = 0"):
        ht.thin(np.ones(20), every=0)
    with pytest.raises(Incompatible, match=r"give block = 1\.\.10"):
        next(resampled(np.arange(10.0), 11, 5, 0))


# Surrogates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 8), (8, 30)], ids=["samples", "coordinates"])
def test_surrogate_has_the_covariance_and_no_tails(shape: tuple[int, int]) -> None:
    noise = RNG(0).standard_t(3, shape) @ RNG(1).normal(size=(shape[1], shape[1])) + 5
    drawn = np.stack(list(gaussian_surrogate(noise, draws=2_000, seed=1)))
    assert drawn.shape == (2_000, *shape)
    rows = drawn.reshape(-1, shape[1])
    expected = np.cov(noise.T, bias=True)
    error = np.sqrt((expected**2 + np.outer(np.diag(expected), np.diag(expected))) / len(rows))
    assert (np.abs(rows.T @ rows / len(rows) - expected) < 5 * error).all()
    assert (np.abs(rows.mean(axis=0)) < 5 * np.sqrt(np.diag(expected) / len(rows))).all()
    kurtosis = (rows**4).mean(axis=0) / (rows**2).mean(axis=0) ** 2
    np.testing.assert_allclose(kurtosis, 3, atol=0.3)
    between = (drawn[:, 0] * drawn[:, 1]).mean(axis=0) / np.diag(expected)
    assert (np.abs(between) < 5 / math.sqrt(2_000)).all()  # rows are independent


def test_surrogates_are_repeatable_and_checked() -> None:
    noise = RNG(0).normal(size=(20, 5))
    first, again = (list(gaussian_surrogate(noise, 2, seed=3)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first[0], first[1])
    for bad in (noise[0], noise[:1], np.where(noise > 2, np.nan, noise) * np.inf):
        with pytest.raises(Incompatible, match="give finite values"):
            next(gaussian_surrogate(bad))


# Log-moments ------------------------------------------------------------------------------------------------------


def test_log_moments_by_hand() -> None:
    x = ht.stable_sample(1.5, (40, 30), 0)
    y = (x - x.mean(axis=0)).ravel()
    sums = y[: 33 * 36].reshape(36, 33).sum(axis=1)
    expected = math.log(33) / (np.log(np.abs(sums)).mean() - np.log(np.abs(y[: 33 * 36])).mean())
    found = ht.log_moments(x, block=33, surrogates=19)
    assert found.alpha == pytest.approx(expected) and (found.block, found.blocks) == (33, 36)


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0])
def test_log_moments_of_independent_stable_values(alpha: float) -> None:
    found = ht.log_moments(ht.stable_sample(alpha, 90_000, 0))
    assert found.alpha == pytest.approx(alpha, abs=0.12)
    assert (found.p == 0.01) == (alpha < 2) and found.null_low < 2 < found.null_high


def test_correlated_gaussian_noise_reads_below_two_and_the_null_says_so() -> None:
    """Neighbours that depend on each other have a low alpha by algebra, not by tails."""
    mixing = np.linalg.cholesky(0.9 ** np.abs(np.subtract.outer(np.arange(300), np.arange(300))))
    gaussian = RNG(0).normal(size=(100, 300)) @ mixing.T
    found = ht.log_moments(gaussian, seed=1)
    assert found.alpha < 1.75 and found.p > 0.05 and found.null_low < found.alpha < found.null_high
    assert "does not see tails here" in found.sentence
    same = np.repeat(RNG(0).normal(size=(100, 1)), 300, axis=1)
    assert ht.log_moments(same, block=300, surrogates=19).alpha == pytest.approx(1.0)


def test_log_moments_see_tails_of_finite_variance_only() -> None:
    below = ht.log_moments(RNG(2).standard_t(3, (100, 300)), surrogates=39)
    assert below.p == 0.025 and below.alpha < below.null_low and "a sign of tails" in below.sentence
    # The covariance of infinite variance is that of the outliers, and the surrogates have it.
    above = ht.log_moments(ht.stable_sample(1.2, (100, 300), 0), surrogates=39)
    assert above.p > 0.05 and above.alpha > above.null_high and "does not read heavier tails" in above.sentence


def test_sums_that_cancel_are_no_sign_of_tails() -> None:
    x = np.tile([1.0, -1.0], 200) + 1e-3 * RNG(0).normal(size=400)
    found = ht.log_moments(x, block=2, surrogates=19)
    assert found.alpha == math.inf and found.p == 1.0 and "does not read heavier tails" in found.sentence
    with pytest.raises(Incompatible, match="all sums of 2 neighbours are zero"):
        ht.log_moments(x.round(), block=2)


def test_log_moments_keeps_its_level() -> None:
    rng = RNG(0)
    mixing = rng.normal(size=(30, 30))
    p = [ht.log_moments(rng.normal(size=(20, 30)) @ mixing, surrogates=19, seed=i).p for i in range(400)]
    assert 0.025 < np.mean(np.array(p) <= 0.05) < 0.08


def test_log_moments_counts_what_it_leaves_out() -> None:
    x = RNG(0).normal(size=(40, 30))
    x[:, 3] = 0.5
    found = ht.log_moments(x, surrogates=19)
    assert found.constant == 1 and found.shape == (40, 29) and found.zeros == 0
    assert found.frame().loc[0, "alpha"] == found.alpha
    assert "Mohammadi" in found.methods() and "B = 19" in found.methods() and "K1 = 34" in found.methods()
    assert repr(found).startswith("<LogMoments: the block log-moment alpha is")
    assert "of 1 coordinates" not in ht.log_moments(x[:, 0].repeat(5), surrogates=19).methods()


def test_log_moments_errors() -> None:
    x = RNG(0).normal(size=200)
    for bad, options in ((x.reshape(2, 10, 10), {}), (np.append(x, np.nan), {}), (x, {"surrogates": 5})):
        with pytest.raises(Incompatible, match="19 surrogates or more"):
            ht.log_moments(bad, **options)
    for bad, options in ((x[:50], {}), (np.ones((20, 20)), {}), (x, {"block": 1}), (x, {"block": 101})):
        with pytest.raises(Incompatible, match="values vary"):
            ht.log_moments(bad, **options)
