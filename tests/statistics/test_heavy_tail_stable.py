"""Symmetric stable laws against closed forms, SciPy, published tables and their own theory."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from nbdyn.errors import Incompatible, UnknownName
from nbdyn.statistics import heavy_tail as ht
from nbdyn.statistics.heavy_tail.ecf import POINTS, STABLE, lines
from nbdyn.statistics.heavy_tail.stable_law import quantiles, standard_cdf
from nbdyn.statistics.heavy_tail.stable_quantiles import quantile_errors, raw, regression_errors, skewness

X = np.concatenate([[0.0, 1e-12, 1e-6], np.geomspace(1e-4, 1e6, 200)])


# The law ----------------------------------------------------------------------------------------------------------


def test_alpha_one_is_cauchy() -> None:
    law = ht.SymmetricStable(1.0, loc=0.5, scale=2.0)
    same = stats.cauchy(0.5, 2.0)
    x = np.concatenate([-X, X])
    np.testing.assert_allclose(law.sf(x), same.sf(x), rtol=1e-8)
    np.testing.assert_allclose(law.logpdf(x), same.logpdf(x), atol=1e-8)
    q = np.concatenate([np.geomspace(1e-12, 0.5, 50), 1 - np.geomspace(1e-6, 0.5, 50)])
    np.testing.assert_allclose(law.ppf(q), same.ppf(q), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("alpha", [2.0, 2 - 1e-7])
def test_alpha_two_is_gaussian(alpha: float) -> None:
    law, same = ht.SymmetricStable(alpha, 1.0, 3.0), stats.norm(1.0, 3 * math.sqrt(2))
    x = np.linspace(-20, 20, 101)
    np.testing.assert_allclose(law.cdf(x), same.cdf(x), atol=1e-6)
    np.testing.assert_allclose(law.logpdf(x), same.logpdf(x), atol=1e-3)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8, 1.2, 1.5, 1.8, 1.95])
def test_density_is_scipys(alpha: float) -> None:
    x = np.array([0.05, 0.5, 1.0, 2.0, 5.0, 20.0, 40.0])
    np.testing.assert_allclose(ht.SymmetricStable(alpha).pdf(x), stats.levy_stable.pdf(x, alpha, 0), rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 0.25, 0.5, 0.8, 1.3, 1.7, 1.99, 1.9999])
def test_distribution_density_and_quantiles_agree(alpha: float) -> None:
    law = ht.SymmetricStable(alpha)
    x = np.geomspace(1e-3, 1e5, 300)
    sf = law.sf(x)
    assert (np.diff(sf) < 0).all()
    nodes, weights = np.polynomial.legendre.leggauss(12)
    middle, half = (x[1:] + x[:-1]) / 2, (x[1:] - x[:-1]) / 2
    between = (law.pdf(middle[:, None] + half[:, None] * nodes) @ weights) * half
    np.testing.assert_allclose(sf[:-1] - sf[1:], between, rtol=1e-4, atol=1e-8)
    q = np.concatenate([np.geomspace(1e-9, 0.4, 60), 1 - np.geomspace(1e-9, 0.4, 60)])
    np.testing.assert_allclose(law.cdf(law.ppf(q)), q, rtol=1e-9)
    assert law.cdf(0.0) == pytest.approx(0.5) and law.ppf(1.0) == math.inf


@pytest.mark.parametrize("alpha", [0.4, 1.5, 1.9])
def test_tail_is_the_power_law_of_theory(alpha: float) -> None:
    """P(X > x) ~ Gamma(alpha) sin(pi alpha / 2) / pi x^-alpha (Nolan 2020, theorem 1.2)."""
    x = 1e12
    expected = math.gamma(alpha) * math.sin(math.pi * alpha / 2) / math.pi * x**-alpha
    assert ht.SymmetricStable(alpha).sf(x) == pytest.approx(expected, rel=1e-4)


def test_table_for_many_alphas() -> None:
    x = np.concatenate([-np.geomspace(1e-3, 1e4, 100), np.geomspace(1e-3, 1e4, 100)])
    alphas = np.array([0.333, 0.777, 1.234, 1.666, 1.995, 2.0])
    found = standard_cdf(np.tile(x, (len(alphas), 1)), alphas)
    for row, alpha in zip(found, alphas, strict=True):
        np.testing.assert_allclose(row, ht.SymmetricStable(alpha).cdf(x), atol=1.5e-4)


@pytest.mark.parametrize("alpha", [0.6, 1.0, 1.5, 2.0])
def test_random_numbers_follow_the_law(alpha: float) -> None:
    law = ht.SymmetricStable(alpha, loc=-1.0, scale=0.5)
    x = law.rvs(20_000, np.random.default_rng(1))
    assert stats.kstest(x, law.cdf).pvalue > 0.01
    t = np.array([0.5, 1.0, 2.0])
    phi = np.exp(1j * np.outer(t, x)).mean(axis=1)
    np.testing.assert_allclose(phi, np.exp(-1j * t - (0.5 * t) ** alpha), atol=0.03)


def test_quantile_ratios_are_mccullochs() -> None:
    """Table III of McCulloch (1986), beta = 0, alpha over (x95 - x05) / (x75 - x25); made from tables of few digits."""
    ratio = [2.439, 2.5, 2.6, 2.7, 2.8, 3.0, 3.2, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 25.0]
    alpha = [2.0, 1.916, 1.808, 1.729, 1.664, 1.563, 1.484, 1.391, 1.279, 1.128, 1.029, 0.896, 0.818, 0.698, 0.593]
    known = quantiles()
    found = np.interp(-np.array(ratio), -known.q95 / known.q75, known.alpha)
    np.testing.assert_allclose(found, alpha, atol=0.004)


def test_out_of_range() -> None:
    with pytest.raises(Incompatible, match=r"alpha = 2\.1"):
        ht.SymmetricStable(2.1)
    with pytest.raises(Incompatible, match="scale = 0"):
        ht.SymmetricStable(1.5, scale=0.0)


# Estimators -------------------------------------------------------------------------------------------------------


def test_regression_by_hand() -> None:
    """The slope of the ordinary least squares line, one column at a time."""
    x = np.random.default_rng(0).standard_t(3, (500, 2))
    x[:7, 1] = 0
    for column, got in zip(x.T, ht.stable_index(x), strict=True):
        kept = column[column != 0]
        unit = np.subtract(*np.quantile(kept, [0.75, 0.25])) / 2
        n = len(kept)
        squares = np.abs(np.exp(1j * np.outer(POINTS, kept / unit)).sum(axis=1)) ** 2
        phi = (squares - n) / (n * (n - 1))
        slope = np.polyfit(np.log(POINTS), np.log(-np.log(phi)), 1)[0]
        assert got == pytest.approx(slope, rel=1e-10)


def test_index_of_many_samples() -> None:
    rng = np.random.default_rng(0)
    x = np.stack([ht.stable_sample(alpha, 5_000, rng) for alpha in (0.8, 1.5, 2.0)])
    found = ht.stable_index(x, axis=1)
    np.testing.assert_allclose(found, [0.8, 1.5, 2.0], atol=0.08)
    assert (found <= 2).all()
    np.testing.assert_allclose(ht.stable_index(7 + 1e-9 * x, axis=1), found, atol=1e-4)  # any location and scale
    np.testing.assert_allclose(ht.stable_index(x.T), found, rtol=1e-12)
    assert ht.stable_index(x.reshape(3, 50, 100), axis=2).shape == (3, 50)


def test_index_where_there_is_none() -> None:
    x = np.random.default_rng(0).normal(size=(100, 4))
    x[:, 1], x[19:, 2], x[:80, 3] = 0, np.nan, 1.0
    found = ht.stable_index(x)
    assert np.isfinite(found[0]) and np.isnan(found[1:]).all()


@pytest.mark.parametrize("alpha", [0.6, 1.0, 1.5, 2.0])
def test_asymptotic_errors(alpha: float) -> None:
    """The delta method's standard errors against those of simulated samples (400 of 2,000: 3.5 % of themselves)."""
    n = 2_000
    x = np.sort(ht.stable_sample(alpha, (400, n), 3), axis=1)
    line, (by_ratio, scale) = lines(x.T), raw(x)
    grid = quantiles().alpha
    pairs = [
        (line.alpha, regression_errors().alpha),
        (np.log(line.scale), regression_errors().log_scale),
        (np.log(scale), quantile_errors().log_scale),
    ]
    if alpha < 2:  # at 2 the ratio's slope changes too fast for the delta method at this n
        pairs.append((by_ratio, quantile_errors().alpha))
    for estimate, errors in pairs:
        assert estimate.std() * math.sqrt(n) == pytest.approx(np.interp(alpha, grid, errors), rel=0.13)


def test_both_families_fit_alike() -> None:
    ordered = np.sort(ht.stable_sample(1.4, (3, 20_000), 0), axis=1) * 5 + 2
    found = STABLE.fit(ordered)
    np.testing.assert_allclose(found, np.tile([1.4, 2.0, 5.0], (3, 1)), atol=0.2)


def test_skewness_test_keeps_its_level() -> None:
    x = np.sort(ht.stable_sample(1.5, (600, 300), 0), axis=1)
    share = np.mean([skewness(row, 1.5) <= 0.05 for row in x])
    assert 0.03 < share < 0.075
    assert skewness(np.sort(np.random.default_rng(0).exponential(size=1_000)), 1.5) < 1e-6


# The fit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["regression", "quantiles"])
def test_fit(method: str) -> None:
    x = 3 * ht.stable_sample(1.5, 4_000, 0) - 1
    x[:40] = 0
    x[40:45] = np.nan
    fit = ht.stable(x, method)  # type: ignore[arg-type]
    for name, truth in (("alpha", 1.5), ("scale", 3.0), ("location", -1.0)):
        assert fit[name].low < truth < fit[name].high
    assert set(fit.estimates) >= {"alpha", "alpha by quantiles" if method == "regression" else "alpha by regression"}
    assert fit.p > 0.05 and "199 samples of 2,000" in fit.null
    assert (fit.zeros, fit.missing, len(fit.values), fit.n_tail) == (40, 5, 3_955, 3_955)
    assert any("40 of 3,995 finite values are exactly zero" in note for note in fit.warnings)
    rows = fit.alternatives.set_index("alternative")
    assert set(rows.index) == {"normal", "Laplace", "Student t", "double Weibull"}
    assert (rows.loc[["normal", "Laplace"], "verdict"] == "fit").all()
    assert set(fit.others) == set(rows.index)


def test_laplace_is_not_stable() -> None:
    """It reads 1.6; the fit says no, in all its ways."""
    x = np.random.default_rng(0).laplace(size=4_000)
    fit = ht.stable(x)
    assert 1.4 < fit["alpha"].value < 1.75
    assert fit.p == 1 / 200
    assert any("the two estimates of alpha differ" in note for note in fit.warnings)
    assert fit.alternatives.set_index("alternative").loc["Laplace", "verdict"] == "alternative"
    assert fit.verdict().startswith("ruled out; better: ")


def test_gaussian_is_at_the_edge() -> None:
    fit = ht.stable(np.random.default_rng(1).normal(size=3_000))
    assert fit["alpha"].high == 2.0 and fit["alpha"].low > 1.9 and fit["alpha"].value <= 2.0
    assert fit.p > 0.05


def test_lighter_tails_than_a_gaussians_are_said() -> None:
    fit = ht.stable(np.random.default_rng(0).uniform(size=3_000), bootstrap=0)
    assert fit["alpha"][:3] == (2.0, 2.0, 2.0)
    assert any("alpha is cut at 2, from 2.15" in note for note in fit.warnings)
    notes = ht.stable(np.random.default_rng(1).normal(size=3_000), bootstrap=0).warnings
    assert not any("cut at 2" in note or "differ" in note for note in notes)


def test_skewed_values_are_warned_of() -> None:
    fit = ht.stable(np.random.default_rng(0).exponential(size=2_000), bootstrap=0)
    assert any("not symmetric" in note for note in fit.warnings)
    assert math.isnan(fit.p) and "not asked for" in fit.null


def test_blocks_widen_the_interval_of_a_series() -> None:
    rng = np.random.default_rng(0)
    x = np.repeat(ht.stable_sample(1.5, 500, rng), 8) + 1e-3 * rng.normal(size=4_000)
    alone, blocks = ht.stable(x, bootstrap=0), ht.stable(x, block=40, bootstrap=99)
    wide, narrow = (fit["alpha"].high - fit["alpha"].low for fit in (blocks, alone))
    assert 1.8 < wide / narrow < 4  # sqrt(8) = 2.8
    assert any("neighbouring values depend on each other" in note for note in alone.warnings)
    assert "blocks of 40" in blocks["alpha"].interval


def test_what_cannot_be_fitted() -> None:
    x = np.random.default_rng(0).normal(size=100)
    with pytest.raises(UnknownName, match='did you mean "regression"'):
        ht.stable(x, "regresion")  # type: ignore[arg-type]
    with pytest.raises(Incompatible, match="this fit takes 20"):
        ht.stable(x[:19])
    with pytest.raises(Incompatible, match="there is no spread"):
        ht.stable(np.ones(100))
    with pytest.raises(Incompatible, match="blocks of 101 do not fit"):
        ht.stable(x, block=101)
    with pytest.raises(Incompatible, match="takes 20 replicates"):
        ht.stable(x, block=5, bootstrap=0)
    with pytest.raises(Incompatible, match="middle half of the values"):
        ht.stable(np.concatenate([np.ones(80), x[:20]]))


def test_values_over_all_decades_have_an_index_and_no_warnings():
    rng = np.random.default_rng(0)
    values = np.exp(rng.normal(0, 200, (2_000, 3))) * rng.choice([-1, 1], (2_000, 3))
    values[:40, 0] = 1e300
    found = ht.stable_index(values)
    assert np.isfinite(found).all() and (found >= 0).all() and (found < 0.2).all()
