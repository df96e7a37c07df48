"""Weibull, lognormal, Student t, generalized Pareto, Hill and moment estimators against SciPy and exact answers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from nbdyn.errors import Incompatible
from nbdyn.statistics import heavy_tail as ht
from nbdyn.statistics.heavy_tail.alternatives import Alternative, of_positive, of_signed, ranking
from nbdyn.statistics.heavy_tail.extremes import profile_interval
from nbdyn.statistics.heavy_tail.family import Family, distances, goodness
from nbdyn.statistics.heavy_tail.hill import EXPONENTIAL
from nbdyn.statistics.heavy_tail.likelihood import (
    DOUBLE_WEIBULL,
    LOGNORMAL,
    PARETO,
    STUDENT,
    WEIBULL,
    student_information,
)

RNG = np.random.default_rng


# Maximum likelihood, many samples at once -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [0.1, 0.5, 1.0, 3.0, 20.0])
def test_weibull_solves_its_equations(shape: float) -> None:
    x = np.sort(1e5 * RNG(0).weibull(shape, (4, 200)), axis=1)
    k, scale = WEIBULL.fit(x).T
    power = x ** k[:, None] / scale[:, None] ** k[:, None]
    np.testing.assert_allclose(power.mean(axis=1), 1, rtol=1e-8)
    left = (power * np.log(x)).mean(axis=1) - 1 / k
    np.testing.assert_allclose(left, np.log(x).mean(axis=1), atol=1e-6)


@pytest.mark.parametrize("freedom", [0.7, 1.0, 2.5, 5.0, 30.0])
def test_student_has_the_largest_likelihood(freedom: float) -> None:
    x = np.sort(2 + 3 * RNG(1).standard_t(freedom, (3, 300)), axis=1)
    for row, found in zip(x, STUDENT.fit(x), strict=True):
        reached = STUDENT.law(found).logpdf(row).sum()
        v, m, s = stats.t.fit(row)
        assert reached >= stats.t.logpdf(row, v, m, s).sum() - (1e-6 if v < 200 else 0.5)
        assert found[0] == pytest.approx(min(v, 200), rel=1e-2) or v > 100


@pytest.mark.parametrize("freedom", [0.12, 0.15, 0.2])
def test_student_of_values_over_many_decades(freedom: float) -> None:
    """The truth has no larger likelihood; the location stays among the values."""
    truth = np.array([freedom, 0.0, 1.0])
    x = np.sort(STUDENT.draw(truth, (5, 200), RNG(1)), axis=1)
    for row, found in zip(x, STUDENT.fit(x), strict=True):
        assert STUDENT.law(found).logpdf(row).sum() >= STUDENT.law(truth).logpdf(row).sum()
        assert found[0] == pytest.approx(freedom, rel=0.35) and abs(found[1]) < 50


@pytest.mark.parametrize("shape", [-0.3, 1e-9, 0.3, 1.0, 2.5])
def test_generalized_pareto_has_the_largest_likelihood(shape: float) -> None:
    x = np.sort(PARETO.draw(np.array([shape, 2.0]), (3, 300), RNG(0)), axis=1)
    for row, found in zip(x, PARETO.fit(x), strict=True):
        xi, _, sigma = stats.genpareto.fit(row, shape + 0.1, floc=0, scale=2.0)
        assert PARETO.law(found).logpdf(row).sum() >= stats.genpareto.logpdf(row, xi, 0, sigma).sum() - 1e-6
        np.testing.assert_allclose(found, [xi, sigma], rtol=2e-3, atol=2e-3)


def test_fisher_information_of_student() -> None:
    """Against the mean of the squared score, by quadrature."""
    v = 3.0
    h = 1e-4
    x = stats.t.ppf((np.arange(200_000) + 0.5) / 200_000, v)
    of_v = (stats.t.logpdf(x, v + h) - stats.t.logpdf(x, v - h)) / (2 * h)
    of_s = (stats.t.logpdf(x, v, scale=1 + h) - stats.t.logpdf(x, v, scale=1 - h)) / (2 * h)
    expected = [(of_s**2).mean(), (of_s * of_v).mean(), (of_v**2).mean()]
    np.testing.assert_allclose(np.array(student_information(np.array(v))), expected, rtol=5e-3)


FAMILIES = [
    (WEIBULL, [0.5, 3.0]), (DOUBLE_WEIBULL, [0.8, 2.0]), (STUDENT, [3.0, 1.0, 2.0]), (LOGNORMAL, [1.5, 0.5]),
    (PARETO, [0.4, 2.0]), (EXPONENTIAL, [2.0]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "parameters"), FAMILIES, ids=lambda x: x.name if isinstance(x, Family) else "")
def test_families_agree_with_themselves(kind: Family, parameters: list[float]) -> None:
    """Distribution function, random numbers, frozen law and fit belong together."""
    p = np.array(parameters)
    x = np.sort(kind.draw(p, (1, 40_000), RNG(2)), axis=1)
    law = kind.law(p)
    np.testing.assert_allclose(kind.cdf(x, p[None])[0], 1 - law.sf(x[0]), atol=1e-10)
    assert stats.kstest(x[0], law.cdf).pvalue > 0.001
    np.testing.assert_allclose(kind.fit(x)[0], p, rtol=0.06, atol=0.02)


@pytest.mark.parametrize(("kind", "parameters"), FAMILIES, ids=lambda x: x.name if isinstance(x, Family) else "")
def test_goodness_of_fit_keeps_its_level(kind: Family, parameters: list[float]) -> None:
    """Of 300 samples of the family 5 % are rejected: 2 to 8 % but for one seed in 100; of 150 t (slow), one in 20."""
    count = 150 if kind is STUDENT else 300
    drawn = np.sort(kind.draw(np.array(parameters), (count, 50), RNG(5)), axis=1)
    found = kind.fit(drawn)
    ks = distances(drawn, kind, found)
    p = [goodness(kind, q, float(d), 50, 19, seed)[0] for seed, (q, d) in enumerate(zip(found, ks, strict=True))]
    assert 0.019 < np.mean(np.array(p) <= 0.05) < 0.084


def test_distance_is_scipys() -> None:
    x = np.sort(RNG(0).weibull(0.7, (3, 50)), axis=1)
    found = WEIBULL.fit(x)
    expected = [stats.kstest(row, WEIBULL.law(p).cdf).statistic for row, p in zip(x, found, strict=True)]
    np.testing.assert_allclose(distances(x, WEIBULL, found), expected, rtol=1e-10)


def test_lilliefors_by_the_bootstrap() -> None:
    """Lilliefors (1969), table 1: the 5 % point for an exponential of n = 20 is 0.234; of n = 30, 0.192."""
    for n, point in ((20, 0.234), (30, 0.192)):
        p, null = goodness(EXPONENTIAL, np.array([1.0]), point, n, 4_000, 0)
        assert 0.035 < p < 0.07
        assert "4,000 samples" in null


def test_no_p_where_samples_of_the_fit_have_no_fit() -> None:
    never = dataclasses.replace(EXPONENTIAL, fit=lambda x: np.where(x[:, :1] < 0.02, np.nan, x.mean(axis=1)[:, None]))
    p, null = goodness(never, np.array([1.0]), 0.1, 20, 99, 0)
    assert math.isnan(p) and "of 99 samples drawn from the fit have no fit of their own" in null
    for draws in (-1, -5):
        with pytest.raises(Incompatible, match="give 0 replicates or more"):
            ht.weibull(np.arange(1.0, 50.0), bootstrap=draws)


def test_large_samples_are_compared_by_the_root_of_n() -> None:
    p, null = goodness(EXPONENTIAL, np.array([1.0]), 1.0 / math.sqrt(1e6), 10**6, 199, 0)
    same, _ = goodness(EXPONENTIAL, np.array([1.0]), 1.0 / math.sqrt(2_000), 2_000, 199, 0)
    assert p == same and "root of n" in null


# The fits ---------------------------------------------------------------------------------------------------------

CASES: list[tuple[Callable[..., ht.TailFit], Callable[[np.random.Generator], np.ndarray], dict[str, float]]] = [
    (ht.weibull, lambda r: 2 * r.weibull(0.5, 2_000), {"shape": 0.5, "scale": 2.0}),
    (ht.double_weibull, lambda r: 2 * r.laplace(size=2_000), {"shape": 1.0, "scale": 2.0}),
    (ht.lognormal, lambda r: r.lognormal(-1, 2, 500), {"sigma": 2.0, "mu": -1.0}),
    (ht.student_t, lambda r: 1 + 3 * r.standard_t(2.5, 2_000), {"df": 2.5, "scale": 3.0, "location": 1.0}),
    (ht.generalized_pareto, lambda r: r.pareto(2.0, 5_000), {"shape": 0.5, "tail index": 2.0}),
    (ht.hill, lambda r: 1 + r.pareto(1.5, 2_000), {"tail index": 1.5, "alpha of the density": 2.5}),
    (ht.moment_estimator, lambda r: 1 + r.pareto(1.5, 2_000), {"gamma": 1 / 1.5, "tail index": 1.5}),
]


@pytest.mark.parametrize(("fit", "draw", "truth"), CASES, ids=[case[0].__name__ for case in CASES])
def test_truth_is_in_the_intervals(fit: Callable[..., ht.TailFit], draw: Any, truth: dict[str, float]) -> None:
    x = draw(RNG(3))
    alone, blocks = fit(x), fit(x, block=1, bootstrap=99)
    for name, value in truth.items():
        assert alone[name].low < value < alone[name].high
        ratio = (blocks[name].high - blocks[name].low) / (alone[name].high - alone[name].low)
        assert 0.7 < ratio < 1.4  # the plain bootstrap of independent values
    assert alone.p > 0.02 or fit is ht.moment_estimator
    assert 0 < alone.ks < 0.1
    assert list(alone.estimates) == list(blocks.estimates)
    assert "bootstrap, 99 replicates" in next(iter(blocks.estimates.values())).interval


@pytest.mark.parametrize(
    ("fit", "values"),
    [
        (ht.weibull, RNG(0).lognormal(size=2_000)),
        (ht.double_weibull, RNG(0).standard_t(1.5, 2_000)),
        (ht.lognormal, RNG(0).exponential(size=1_000)),
        (ht.student_t, RNG(0).uniform(size=1_000)),
        (ht.generalized_pareto, np.concatenate([RNG(0).uniform(size=5_000), 5 + RNG(1).uniform(size=300)])),
        (ht.hill, np.abs(RNG(0).normal(size=20_000))),
    ],
)
def test_other_data_are_ruled_out(fit: Callable[..., ht.TailFit], values: np.ndarray) -> None:
    found = fit(values)
    assert found.p <= 0.01 and found.verdict().startswith("ruled out")


@pytest.mark.parametrize("name", ht.FAMILIES)
def test_families_are_found_by_the_name_of_their_fit(name: str) -> None:
    fit = ht.FAMILIES[name](RNG(0).pareto(1.5, 200) + 1, bootstrap=0)
    assert fit.family == name and math.isnan(fit.p)


def test_blocks_of_excesses_over_a_threshold_below_all_values() -> None:
    x = 100 + RNG(0).pareto(2.0, 2_000)
    alone, blocks = (ht.generalized_pareto(x, threshold=100, **o) for o in ({}, {"block": 1, "bootstrap": 99}))
    for name in ("shape", "scale"):
        ratio = (blocks[name].high - blocks[name].low) / (alone[name].high - alone[name].low)
        assert 0.7 < ratio < 1.4


@pytest.mark.parametrize("unit", [1e-200, 1e200])
@pytest.mark.parametrize("name", [name for name in ht.FAMILIES if name != "power law"])
def test_units_do_not_matter(name: str, unit: float) -> None:
    x = RNG(1).pareto(1.5, 200) + 1
    one, other = (ht.FAMILIES[name](scale * x, bootstrap=0) for scale in (1.0, unit))
    assert next(iter(other.estimates.values())).value == pytest.approx(next(iter(one.estimates.values())).value)
    assert other.alternatives["R"].to_numpy() == pytest.approx(one.alternatives["R"].to_numpy(), rel=1e-6, abs=1e-4)


def test_tails_over_more_than_doubles_hold() -> None:
    """The largest value over the smallest overflows."""
    logs = RNG(0).standard_exponential(300) * 120 - 340
    x = np.exp(logs)
    tail = np.sort(logs)[-51:]
    assert ht.hill(x, k=50, bootstrap=0)["tail index"].value == pytest.approx(1 / (tail[1:] - tail[0]).mean())


def test_exact_intervals_of_lognormal_and_hill() -> None:
    x = np.exp(RNG(0).normal(1.0, 2.0, 40))
    logs = np.log(x)
    fit = ht.lognormal(x, bootstrap=0)
    interval = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    assert fit["mu"][:3] == pytest.approx((logs.mean(), interval.low, interval.high))
    variance = logs.var() * 40
    assert fit["sigma"].low == pytest.approx(math.sqrt(variance / stats.chi2.ppf(0.975, 39)))
    tail = ht.hill(x, k=20, bootstrap=0)
    logs = np.sort(logs)
    index = 1 / (logs[-20:] - logs[-21]).mean()
    assert tail["tail index"][:3] == pytest.approx((index, *(index * stats.gamma.ppf([0.025, 0.975], 20) / 20)))
    assert tail.xmin == pytest.approx(math.exp(logs[-21])) and tail.n_tail == 20


def test_moment_estimator_by_hand() -> None:
    x = np.sort(RNG(0).pareto(1.0, 300) + 1)
    logs = np.log(x[-50:] / x[-51])
    first, second = logs.mean(), (logs**2).mean()
    gamma = first + 1 - 0.5 / (1 - first**2 / second)
    fit = ht.moment_estimator(x, k=50, bootstrap=0)
    assert fit["gamma"].value == pytest.approx(gamma)
    assert fit["gamma"].high - gamma == pytest.approx(1.959964 * math.sqrt((1 + gamma**2) / 50))
    low = ht.moment_estimator(1 - RNG(0).uniform(size=5_000) ** 2, bootstrap=0)  # ends at 1: gamma = -1
    assert low["gamma"].high < 0 and low["tail index"].value == math.inf


def test_paths_are_the_estimates_at_each_k() -> None:
    x = RNG(0).pareto(1.5, 3_000) + 1
    for path, fit, name in ((ht.hill_path, ht.hill, "tail index"), (ht.moment_path, ht.moment_estimator, "gamma")):
        table = path(x)
        assert 50 < len(table) <= 200 and table["k"].iloc[0] == 10 and table["k"].iloc[-1] == 2_999
        row = table.iloc[len(table) // 2]
        found = fit(x, k=int(row["k"]), bootstrap=0)[name]
        assert (row["index"], row["low"], row["high"]) == pytest.approx(found[:3])


def test_profile_likelihood_interval() -> None:
    """Its ends lose 1.92 nats, the scale being the best at each; a general search knows of no better."""
    x = np.sort(PARETO.draw(np.array([0.3, 2.0]), (1, 200), RNG(0))[0])
    shape, scale = PARETO.fit(x[None])[0]
    most = PARETO.law(np.array([shape, scale])).logpdf(x).sum()
    for end in profile_interval(x, shape, scale):
        found = optimize.minimize_scalar(
            lambda s, end=end: -stats.genpareto.logpdf(x, end, 0, s).sum(), bounds=(0.2, 8), method="bounded"
        )
        assert most + found.fun == pytest.approx(stats.chi2.ppf(0.95, 1) / 2, abs=1e-3)


def test_no_normal_is_left_out_of_the_degrees_of_freedom() -> None:
    fit = ht.student_t(stats.norm.ppf((np.arange(500) + 0.5) / 500), bootstrap=0)
    assert fit["df"].value == 200 and fit["df"].high == math.inf and 5 < fit["df"].low < 50
    assert any("a normal distribution does" in note for note in fit.warnings)
    assert fit.alternatives.set_index("alternative").loc["normal", "verdict"] == "undecided"
    wide = ht.student_t(np.exp(np.linspace(0, 60, 100)) * np.tile([-1, 1], 50), bootstrap=0)
    assert wide["df"].value == 0.1 and any("the least that is fitted" in note for note in wide.warnings)


# Alternatives -----------------------------------------------------------------------------------------------------


def test_vuong_and_nested_by_hand() -> None:
    x = np.sort(RNG(0).weibull(0.8, 400))
    law = WEIBULL.law(WEIBULL.fit(x[None])[0])
    others = [
        Alternative("lognormal", stats.lognorm(1.2, scale=0.6), 2),
        Alternative("exponential", stats.expon(scale=x.mean()), 1, "inside"),
        Alternative("edge", stats.expon(scale=x.mean()), 1, "edge"),
    ]
    table, laws = ranking(x, law, 2, others)
    rows = table.set_index("alternative")
    difference = law.logpdf(x) - stats.lognorm.logpdf(x, 1.2, scale=0.6)
    z = difference.sum() / (math.sqrt(400) * difference.std())
    assert rows.loc["lognormal", ["R", "statistic", "p"]].tolist() == pytest.approx(
        [difference.sum(), z, 2 * stats.norm.sf(abs(z))]
    )
    ratio = (law.logpdf(x) - stats.expon.logpdf(x, scale=x.mean())).sum()
    assert rows.loc["exponential", ["statistic", "p"]].tolist() == pytest.approx(
        [2 * ratio, stats.chi2.sf(2 * ratio, 1)]
    )
    assert rows.loc["edge", "p"] == pytest.approx(rows.loc["exponential", "p"] / 2)
    assert rows.loc["exponential", "aic"] == pytest.approx(2 * ratio - 2)
    assert (np.diff(table["R"]) >= 0).all() and set(laws) == set(rows.index)


def test_a_law_is_undecided_against_itself() -> None:
    x = RNG(0).normal(size=100)
    table, _ = ranking(x, stats.norm(), 2, [Alternative("same", stats.norm(), 2)])
    assert table.loc[0, ["R", "p", "verdict"]].tolist() == [0.0, 1.0, "undecided"]


def test_no_density_at_a_value_loses() -> None:
    x = np.array([0.5, 1.0, 3.0])
    bounded, same = stats.uniform(0, 2), stats.uniform(0, 2.5)
    table, _ = ranking(x, bounded, 1, [Alternative("exponential", stats.expon(), 1)])
    assert table.loc[0, ["R", "p", "verdict"]].tolist() == [-math.inf, 0.0, "alternative"]
    table, _ = ranking(x, bounded, 1, [Alternative("as bad", same, 1)])
    assert table.loc[0, "R"] == pytest.approx(2 * math.log(2.5 / 2))


def test_alternatives_are_the_others() -> None:
    x = np.sort(RNG(0).standard_t(3, 500))
    assert {a.name for a in of_signed(x, "Student t")} == {"normal", "Laplace", "double Weibull", "stable"}
    assert {a.name: a.nested for a in of_signed(x, "Student t")}["normal"] == "edge"
    assert {a.name: a.nested for a in of_signed(x, "double Weibull")}["Laplace"] == "inside"
    nested = {a.name: a.nested for a in of_positive(np.abs(x), "Weibull")}
    assert nested.pop("exponential") == "inside" and not any(nested.values()) and "Weibull" not in nested
