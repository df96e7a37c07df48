"""Power laws: the search against brute force, fits against SciPy and published values, tests against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from nbdyn.errors import Incompatible
from nbdyn.statistics.heavy_tail import power_law_kernels as kernels
from nbdyn.statistics.heavy_tail.power_law import power_law
from nbdyn.statistics.heavy_tail.power_law_search import Search, goodness, replicates, simulated

# The search -------------------------------------------------------------------------------------------------------


def brute_force(x: np.ndarray, least: int, both_sides: bool) -> dict[float, float]:
    """The distance of every candidate from its definition: xmin -> distance."""
    found = {}
    for xmin in np.unique(x):
        tail = np.sort(x[x >= xmin])
        if len(tail) < least or tail[-1] == xmin:
            continue
        alpha = 1 + len(tail) / np.log(tail / xmin).sum()
        fit = 1 - (tail / xmin) ** (1 - alpha)
        n = len(tail)
        before = np.arange(n) / n  # as plfit: places, also within equal values
        after = np.arange(1, n + 1) / n
        found[float(xmin)] = max(np.abs(fit - before).max(), np.abs(fit - after).max() if both_sides else 0.0)
    return found


def pareto(n: int, index: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(n) ** (-1 / index)


def samples(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(12, 500))
    heavy = pareto(n, float(rng.uniform(0.3, 4)), seed)
    return {
        "Pareto": heavy,
        "lognormal": np.exp(rng.normal(size=n) * rng.uniform(0.1, 5)),
        "exponential": rng.exponential(size=n),
        "uniform": rng.random(n) + 1e-9,
        "whole numbers": np.floor(heavy),
        "rounded": np.round(heavy, 1),
        "body and tail": np.where(rng.random(n) < 0.8, rng.random(n) + 1e-9, heavy),
        "several clusters": np.exp(rng.integers(0, 4, n) * 5 + rng.normal(size=n) * 0.01),
        "enormous range": np.exp(np.clip(rng.standard_cauchy(n) * 30, -340, 340)),
        "many equal at the top": np.minimum(heavy, np.quantile(heavy, 0.8)),
    }


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("both_sides", [True, False])
def test_search_is_the_minimum_over_all_values(seed: int, both_sides: bool) -> None:
    for name, x in samples(seed).items():
        exact = brute_force(x, 10, both_sides)
        found = Search(10, both_sides)(np.log(np.sort(x)))
        if not exact:
            assert math.isnan(found.ks), name
            continue
        assert found.ks == pytest.approx(min(exact.values()), abs=1e-9), name
        xmin = np.sort(x)[found.first]
        assert exact[float(xmin)] == pytest.approx(min(exact.values()), abs=1e-9), name
        assert found.alpha == pytest.approx(1 + (x >= xmin).sum() / np.log(x[x >= xmin] / xmin).sum(), rel=1e-9)


@given(st.lists(st.integers(1, 30), min_size=4, max_size=60), st.integers(2, 5), st.booleans())
@settings(max_examples=150, deadline=None)
def test_search_of_any_whole_numbers(values: list[int], least: int, both_sides: bool) -> None:
    x = np.array(values, np.float64)
    exact, found = brute_force(x, least, both_sides), Search(least, both_sides)(np.log(np.sort(x)))
    assert math.isnan(found.ks) if not exact else found.ks == pytest.approx(min(exact.values()), abs=1e-12)


@pytest.mark.parametrize("kind", ["Pareto", "lognormal", "body and tail"])
def test_few_of_many_candidates_are_walked(kind: str) -> None:
    """A larger sample against a second way, for every 20th candidate and those near the best."""
    rng = np.random.default_rng(3)
    n = 20_000
    y = {"Pareto": rng.exponential(size=n), "lognormal": rng.normal(size=n)}.get(
        kind, np.where(rng.random(n) < 0.9, np.log(rng.random(n)), rng.exponential(size=n) / 1.5)
    )
    logs = np.sort(y)
    ks, first, walked = kernels.search(logs, np.arange(n - 9), 1)
    assert walked < 500

    def distance(i: int) -> float:
        tail = logs[i:] - logs[i]
        m = len(tail)
        fit = np.exp(-tail * m / tail.sum())
        return max(np.abs(np.arange(m, 0, -1) / m - fit).max(), np.abs(np.arange(m - 1, -1, -1) / m - fit).max())

    assert distance(first) == pytest.approx(ks, abs=1e-12)
    near = range(max(0, first - 100), min(n - 9, first + 100))
    assert min(distance(i) for i in [*range(0, n - 9, 20), *near]) >= ks - 1e-12


def test_distance_is_that_of_scipy() -> None:
    x = pareto(400, 1.5, 1)
    fit = power_law(x)
    assert fit.xmin is not None
    tail = x[x >= fit.xmin]
    assert len(tail) == fit.n_tail
    assert fit.ks == pytest.approx(stats.kstest(tail, lambda v: 1 - fit.distribution.sf(v)).statistic, abs=1e-12)
    given = power_law(x, xmin=0.7)  # below the smallest value: a gap that counts
    assert given.ks == pytest.approx(stats.kstest(x, lambda v: 1 - given.distribution.sf(v)).statistic, abs=1e-12)
    assert given.ks >= 1 - 0.7 ** (given["alpha"].value - 1) - 1e-12 or given.ks > 0.1


# Published --------------------------------------------------------------------------------------------------------

QUAKES = {
    0: 1852, 5: 2, 7: 1, 8: 1, 9: 2, 10: 9, 11: 10, 12: 24, 13: 23, 14: 32, 15: 39, 16: 68, 17: 98, 18: 109, 19:
    116, 20: 242, 21: 226, 22: 252, 23: 297, 24: 339, 25: 1045, 26: 954, 27: 912, 28: 952, 29: 874, 30: 1400, 31:
    998, 32: 934, 33: 833, 34: 748, 35: 986, 36: 687, 37: 595, 38: 559, 39: 424, 40: 606, 41: 338, 42: 289, 43: 240,
    44: 198, 45: 209, 46: 123, 47: 120, 48: 85, 49: 53, 50: 83, 51: 46, 52: 36, 53: 40, 54: 29, 55: 36, 56: 18, 57:
    15, 58: 14, 59: 8, 60: 19, 61: 13, 62: 6, 63: 4, 64: 6, 65: 5, 66: 2, 67: 3, 68: 5, 69: 1, 70: 3, 71: 1, 72: 3,
    73: 1, 78: 1,
}  # fmt: skip
"""Earthquakes of Clauset et al. (2009, table 6.1): how many had which magnitude (times 10). The counts are those of the
file `quakes.txt` in the sources of the package powerlaw 2.0.0 (MIT licence)."""


def test_earthquakes_as_published() -> None:
    """Clauset et al., tables 6.1 and 6.2: 1.64, xmin 794, not plausible; statistics -7.14, 11.6, -7.09; R -24.4."""
    x = 10 ** (np.repeat(list(QUAKES), list(QUAKES.values())) / 10)
    fit = power_law(np.random.default_rng(0).permutation(x), bootstrap=19)
    assert len(x) == 19_302 and fit.n_tail == 11_697
    assert fit.xmin == pytest.approx(10**2.9) and fit["alpha"].value == pytest.approx(1.64, abs=0.005)
    assert fit.p == 1 / 20
    table = fit.alternatives.set_index("alternative")
    expected = {"lognormal": -7.14, "exponential": 11.6, "stretched exponential": -7.09}
    for name, statistic in expected.items():
        assert table.loc[name, "statistic"] == pytest.approx(statistic, rel=0.015)
        assert table.loc[name, "verdict"] == ("fit" if statistic > 0 else "alternative")
    assert table.loc["truncated power law", "R"] == pytest.approx(-24.4, abs=0.05)


@pytest.mark.parametrize(
    ("name", "alpha", "xmin"), [("blackouts", 2.3, 230e3), ("cities", 2.37, 52.46e3), ("flares", 1.79, 323)]
)
def test_other_data_as_published(name: str, alpha: float, xmin: float) -> None:
    powerlaw = pytest.importorskip("powerlaw")
    x = powerlaw.load_test_dataset(name)
    fit = power_law(x, distance="one-sided")
    assert fit["alpha"].value == pytest.approx(alpha, abs=0.05 if name == "blackouts" else 0.005)
    assert fit.xmin == pytest.approx(xmin, rel=1e-4)
    assert power_law(x)["alpha"].value == pytest.approx(alpha, abs=0.05 if name == "blackouts" else 0.005)


# Estimates and intervals ------------------------------------------------------------------------------------------


def test_alpha_by_hand() -> None:
    fit = power_law([1.0, 2.0, 4.0, 8.0, 0.25, 0.5], xmin=1.0)
    # logs 0, 1, 2, 3 times log 2: alpha = 1 + 4 / (6 log 2)
    assert fit["alpha"].value == pytest.approx(1 + 4 / (6 * math.log(2)))
    assert fit["tail index"].value == pytest.approx(4 / (6 * math.log(2)))
    assert fit["tail share"].value == pytest.approx(4 / 6) and fit["decades"].value == pytest.approx(math.log10(8))
    assert (fit.n_tail, fit.xmin, fit["xmin"].interval) == (4, 1.0, "given")
    exact = stats.binomtest(4, 6).proportion_ci()
    assert (fit["tail share"].low, fit["tail share"].high) == (exact.low, exact.high)
    assert math.isnan(fit.p)


def test_large_samples_recover_their_law() -> None:
    fit = power_law(3 * pareto(200_000, 1.5, 0))
    assert fit["alpha"].value == pytest.approx(2.5, abs=0.015) and fit.xmin == pytest.approx(3, rel=0.5)
    assert fit.xmin is not None and fit.distribution.sf(4 * fit.xmin) == pytest.approx(4**-1.5, rel=0.02)


def test_scale_and_shape_of_the_array_do_not_matter() -> None:
    x = pareto(600, 0.8, 2)
    one, two = power_law(x), power_law(1e-200 * x.reshape(20, 30))
    assert one["alpha"].value == pytest.approx(two["alpha"].value) and one.n_tail == two.n_tail
    assert one.alternatives["R"].to_numpy() == pytest.approx(two.alternatives["R"].to_numpy(), rel=1e-5, abs=1e-6)


def test_interval_of_a_given_threshold_covers() -> None:
    # At the ends the estimate, n times an inverse gamma variable, is at its own 2.5 % quantiles
    found, law = power_law(pareto(15, 1.5, 0), xmin=1.0)["tail index"], stats.invgamma(15, scale=15)
    assert law.sf(found.value / found.low) == pytest.approx(0.025)
    assert law.cdf(found.value / found.high) == pytest.approx(0.025)
    many = power_law(pareto(2_000, 1.5, 0), xmin=1.0)["alpha"]
    assert many.high - many.low == pytest.approx(2 * 1.96 * (many.value - 1) / math.sqrt(2_000), rel=0.01)


def test_bootstrapped_interval_covers_where_that_of_a_given_threshold_does_not() -> None:
    rng, hits = np.random.default_rng(0), 0
    for seed in range(60):
        x = np.where(rng.random(600) < 0.3, rng.random(600) ** (-1 / 1.5), rng.random(600))
        drawn = replicates(np.log(np.sort(x)), Search(10), 79, seed)
        assert drawn.shape == (79, 3)
        low, high = np.quantile(drawn[:, 0], [0.025, 0.975])
        hits += low <= 2.5 <= high
    assert hits >= 51


def test_intervals_and_their_names() -> None:
    x = pareto(300, 1.5, 3)
    plain, drawn = power_law(x), power_law(x, bootstrap=60, seed=1)
    assert any("does not hold that uncertainty" in warning for warning in plain.warnings)
    assert not any("does not hold" in warning for warning in drawn.warnings)
    assert drawn["alpha"].interval == "bootstrap, 60 replicates" and drawn["alpha"].value == plain["alpha"].value
    for name in ("alpha", "tail index", "xmin", "tail share"):
        assert drawn[name].low <= drawn[name].high
    assert drawn["xmin"].low >= x.min() and math.isnan(plain["xmin"].low)
    again = power_law(x, bootstrap=60, seed=1)
    assert again["alpha"] == drawn["alpha"] and again.p == drawn.p
    assert power_law(x, bootstrap=60, seed=2)["alpha"] != drawn["alpha"]
    few = power_law(x, bootstrap=19)
    assert few["alpha"] == plain["alpha"] and any("does not hold" in warning for warning in few.warnings)


def test_blocks_widen_the_interval_of_dependent_values() -> None:
    rng = np.random.default_rng(0)
    runs = np.repeat(rng.random(80) ** (-1 / 1.5), 25)  # each value 25 times in a row
    narrow = power_law(runs, xmin=1.0)["alpha"]
    wide = power_law(runs, xmin=1.0, bootstrap=200, block=50)
    alpha = wide["alpha"]
    # 2,000 values are worth 80: the width grows about fivefold
    assert 3 < (alpha.high - alpha.low) / (narrow.high - narrow.low) < 7
    assert alpha.interval == "block bootstrap, blocks of 50, 200 replicates"
    single = power_law(rng.permutation(runs), xmin=1.0, bootstrap=200, block=1)["alpha"]
    assert (single.high - single.low) / (narrow.high - narrow.low) == pytest.approx(1, abs=0.25)


def test_blocks_are_of_neighbours_in_the_given_order() -> None:
    rng = np.random.default_rng(0)
    x = np.empty(100)
    x[0::2], x[1::2] = 1 + rng.random(50), 4 * pareto(50, 1.5, 0)
    share = power_law(x, xmin=3.0, bootstrap=40, block=2)["tail share"]
    assert (share.low, share.value, share.high) == pytest.approx((0.5, 0.5, 0.5))  # one of each in any pair
    loose = power_law(x, xmin=3.0, bootstrap=40, block=1)["tail share"]
    assert loose.low < 0.45 and loose.high > 0.55


# Goodness of fit --------------------------------------------------------------------------------------------------


def test_distances_under_the_null_have_the_known_distribution() -> None:
    """For a given xmin: the exponential distribution with estimated mean (Stephens 1974): 0.990 and 1.094."""
    search, n = Search(2, log_xmin=0.0), 100
    logs = np.sort(np.random.default_rng(0).exponential(size=n))
    found, rng = search(logs), np.random.default_rng(1)
    ks = np.array([search(simulated(logs, search, found, rng)).ks for _ in range(6_000)])
    scaled = (ks - 0.2 / n) * (math.sqrt(n) + 0.26 + 0.5 / math.sqrt(n))
    assert np.mean(scaled > 0.990) == pytest.approx(0.10, abs=0.015)
    assert np.mean(scaled > 1.094) == pytest.approx(0.05, abs=0.011)


def test_samples_under_the_null_have_the_body_and_the_fitted_tail() -> None:
    x = np.concatenate([np.linspace(0.1, 0.9, 300), 1 / (1 - np.linspace(0, 0.999, 200))])
    search = Search(10)
    logs = np.log(np.sort(x))
    found = search(logs)
    rng = np.random.default_rng(0)
    drawn = [simulated(logs, search, found, rng) for _ in range(200)]
    assert all(len(one) == len(x) and (np.diff(one) >= 0).all() for one in drawn)
    pooled = np.concatenate(drawn)
    tail = pooled[pooled >= found.log_xmin] - found.log_xmin
    assert len(tail) / len(pooled) == pytest.approx(1 - found.first / len(x), abs=0.01)
    assert stats.kstest(tail * (found.alpha - 1), "expon").pvalue > 0.001
    assert np.isin(pooled[pooled < found.log_xmin], logs[: found.first]).all()
    lengths = [int((one >= found.log_xmin).sum()) for one in drawn]
    share = 1 - found.first / len(x)
    assert np.std(lengths) == pytest.approx(math.sqrt(len(x) * share * (1 - share)), rel=0.2)


def test_goodness_of_fit_keeps_its_level_and_finds_other_curves() -> None:
    def p_of(x: np.ndarray, search: Search) -> float:
        logs = np.log(np.sort(x))
        return goodness(logs, search, search(logs), 39, 0)[0]

    rng = np.random.default_rng(0)
    given = [p_of(pareto(80, 1.5, seed), Search(10, log_xmin=0.0)) for seed in range(300)]
    assert stats.binomtest(sum(p <= 0.1 for p in given), 300, 0.1).pvalue > 0.001  # 39 + 1 replicates: exact
    searched = [p_of(pareto(150, 1.5, seed), Search(10)) for seed in range(150)]
    assert np.mean(np.array(searched) <= 0.1) < 0.15
    assert p_of(1 + rng.exponential(size=300), Search(10, log_xmin=0.0)) == 1 / 40
    assert p_of(1 + np.abs(rng.normal(size=3_000)), Search(1_000)) == 1 / 40


def test_what_p_is_said_to_be() -> None:
    fit = power_law(pareto(200, 1.5, 0), bootstrap=19)
    assert fit.p in {k / 20 for k in range(1, 21)} and fit.null.startswith("19 samples of independent values")
    assert "xmin searched anew" in fit.null
    poor = power_law(1 + np.random.default_rng(0).exponential(size=500), xmin=1.0, bootstrap=19)
    assert poor.p == 1 / 20 and any("further from its fit" in warning for warning in poor.warnings)


@pytest.mark.parametrize("p", [0.1, 0.105])
def test_verdict_and_warning_agree(p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(power_law.__globals__, "goodness", lambda *_: (p, "a null"))
    fit = power_law(pareto(200, 1.5, 0), bootstrap=19)
    warned = any("further from its fit" in warning for warning in fit.warnings)
    assert warned == fit.verdict().startswith("ruled out") == (p == 0.1)


# What a reader must know ------------------------------------------------------------------------------------------


def test_zeros_and_gaps_are_counted() -> None:
    x = np.concatenate([pareto(300, 1.5, 0), np.zeros(7), [math.nan, math.inf, -math.inf]])
    fit = power_law(x)
    assert (fit.zeros, fit.missing, len(fit.values)) == (7, 3, 300)
    assert (np.diff(fit.values) >= 0).all() and fit["alpha"] == power_law(x[:300])["alpha"]


@pytest.mark.parametrize(
    ("values", "options", "sentence"),
    [
        ([-1.0] * 20, {}, "np.abs"),
        ([1.0, 2.0], {}, "takes 10"),
        ([2.0] * 30, {}, "no spread"),
        ([1.0] + [2.0] * 12, {"least": 12}, None),
        ([1.0, 1.5] + [2.0] * 12, {"xmin": 1.8}, "two that differ"),
        ([1.0, 2.0, 3.0], {"xmin": 2.5}, "1 of 3 values"),
        ([1.0, 2.0, 3.0], {"xmin": 0.0}, "positive number"),
        ([1.0, 2.0, 3.0], {"distance": "both"}, "two-sided"),
        ([1.0, 2.0, 3.0], {"bootstrap": -1}, "0 or more"),
        ([1.0, 2.0, 3.0], {"least": 1}, "tails of 2 or more"),
    ],
)
def test_errors(values: list[float], options: dict, sentence: str | None) -> None:
    if sentence is None:
        assert power_law(values, **options).n_tail == len(values)
        return
    with pytest.raises(Incompatible, match=sentence):
        power_law(values, **options)


def test_blocks_must_fit() -> None:
    with pytest.raises(Incompatible, match="blocks of 400"):
        power_law(pareto(300, 1.5, 0), xmin=1.0, bootstrap=20, block=400)
    with pytest.raises(Incompatible, match="blocks of 0"):
        power_law(pareto(300, 1.5, 0), xmin=1.0, bootstrap=20, block=0)
    with pytest.raises(Incompatible, match="by blocks takes 20 replicates"):
        power_law(pareto(300, 1.5, 0), xmin=1.0, block=10)


def test_warnings_in_plain_words() -> None:
    few = power_law(pareto(30, 1.5, 0), xmin=1.0)
    assert any("only 30 values are in the tail" in warning for warning in few.warnings)
    short = power_law(pareto(5_000, 20.0, 0), xmin=1.0)
    assert any("decades" in warning for warning in short.warnings)
    rng = np.random.default_rng(0)
    end = power_law(np.concatenate([rng.random(500), np.array([5.0, 6, 7.5, 8, 11, 13, 17, 22, 30, 45, 80, 200])]))
    assert end.n_tail < 20 and any("end of what was searched" in warning for warning in end.warnings)
    clean = power_law(pareto(3_000, 1.5, 1), xmin=1.0)
    assert not [w for w in clean.warnings if "limit" not in w]


def test_whole_numbers_are_said_to_be_no_continuous_values() -> None:
    """Clauset et al., section 3: of discrete values with alpha = 2.5 from 1 on the formula gives 4.46."""
    x = stats.zipf(2.5).rvs(10_000, random_state=0)
    fit = power_law(x, xmin=1.0)
    assert fit["alpha"].value == pytest.approx(4.46, abs=0.1)
    assert any("all values are whole" in warning for warning in fit.warnings)
    far = power_law(x[x >= 6], xmin=6.0)
    said = next(warning for warning in far.warnings if "all values are whole" in warning)
    assert float(said.split("alpha = ")[1].split(" ")[0]) == pytest.approx(2.5, abs=0.15)
    assert not any("whole" in warning for warning in power_law(x * 1000, xmin=1000.0).warnings)


def test_progress_is_shown_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    power_law(pareto(60, 1.5, 0), bootstrap=3)
    assert capsys.readouterr().err == ""
    power_law(pareto(60, 1.5, 0), bootstrap=3, progress=True)
    assert "goodness of fit" in capsys.readouterr().err
