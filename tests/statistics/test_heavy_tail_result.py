"""Results of fits: tables, sentences, pictures, warnings, and what cannot be fitted."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest

from nbdyn.errors import Incompatible, UnknownName
from nbdyn.plots import MAX_ROWS, to_png
from nbdyn.statistics import heavy_tail as ht
from nbdyn.statistics.heavy_tail import figures

RNG = np.random.default_rng


def test_frame_methods_and_repr() -> None:
    x = RNG(0).pareto(1.5, 1_000) + 1
    x[:5] = 0
    fit = ht.generalized_pareto(x)
    frame = fit.frame()
    assert frame["parameter"].tolist() == ["shape", "scale", "tail index"]
    assert frame.loc[0, ["low", "high", "n", "n_tail", "zeros"]].tolist() == [
        fit["shape"].low, fit["shape"].high, 995, fit.n_tail, 5,
    ]  # fmt: skip
    said = fit.methods()
    for part in (
        f"A generalized Pareto distribution was fitted to the {fit.n_tail:,} of 995 values beyond", "5 exact zeros",
        "Davison and Smith 1990", f"shape = {fit['shape'].value:.4g}", f"p = {fit.p:.2g}", "199 samples", "Vuong 1989",
    ):  # fmt: skip
        assert part in said
    assert "shape = " in repr(fit) and "warnings: 1" in repr(fit)
    shown = fit._repr_html_()
    assert "<table" in shown and "exactly zero" in shown and "<TailFit" not in shown
    np.testing.assert_array_equal(fit.tail, np.sort(x)[-fit.n_tail :])
    assert (fit.tail > fit.xmin).all()
    with pytest.raises(UnknownName, match='did you mean "shape"'):
        fit["shap"]
    assert "not asked for" in ht.weibull(x, bootstrap=0).methods() and "not tested" in repr(ht.weibull(x, bootstrap=0))


def test_what_has_no_interval_is_shown_without_one() -> None:
    fit = ht.power_law(RNG(0).pareto(1.5, 300) + 1)
    known, unknown = str(fit["alpha"]), str(fit["decades"])
    assert known == f"{fit['alpha'].value:.4g} ({fit['alpha'].low:.4g} to {fit['alpha'].high:.4g})"
    assert unknown == f"{fit['decades'].value:.4g}"
    none = dataclasses.replace(fit, estimates={"decades": fit["decades"]})
    title = none.plot().to_dict()["title"]
    for shown in (fit.methods(), none.methods(), repr(none), none._repr_html_(), str(title)):
        assert "nan" not in shown.lower()
    assert f"decades = {unknown} (observed)" in none.methods() and f"decades = {unknown};" in str(title)


def test_verdict_at_the_convention() -> None:
    """p = (1 + k) / (1 + B) is 0.1 in one of ten samples or fewer: that is ruled out (Clauset et al. 2009)."""
    fit = ht.weibull(RNG(0).weibull(1.0, 100), bootstrap=0)
    verdicts = {p: dataclasses.replace(fit, p=p).verdict().split(";")[0] for p in (1 / 200, 20 / 200, 21 / 200)}
    assert list(verdicts.values()) == ["ruled out", "ruled out", "plausible"]
    assert fit.verdict().startswith("not tested")


@pytest.mark.parametrize(
    "fit",
    [
        ht.stable(ht.stable_sample(1.2, 3_000, 0), bootstrap=0),
        ht.hill(RNG(0).pareto(1.5, 30_000) + 1, bootstrap=0),
        ht.generalized_pareto(RNG(0).standard_t(3, 3_000), bootstrap=0),
        ht.double_weibull(RNG(0).laplace(size=9), bootstrap=0),
    ],
    ids=["stable", "Hill", "generalized Pareto", "few"],
)
def test_plot(fit: ht.TailFit) -> None:
    """Dots of the survival function are the values' own, the curve is the fit's, and tables are short."""
    picture = fit.plot()
    assert len(picture.to_dict()["hconcat"]) == (3 if len(fit.values) > 11 else 2)
    if len(fit.values) < 20:
        assert to_png(picture)[:4] == b"\x89PNG"
    layers = figures.survival(fit).layer
    curves, dots = pd.DataFrame(layers[0].data), pd.DataFrame(layers[-1].data)
    n = len(fit.values)
    values = np.abs(fit.values) if fit.xmin is None else fit.values  # of a threshold the tail is one-sided
    for _, (x, p) in dots[["x", "p"]].iterrows():
        assert (values >= x).sum() == round(p * n)
    own = curves[curves["law"] == fit.family]
    law, grid = fit.distribution, own["x"].to_numpy()
    expected = fit.n_tail / n * (law.sf(grid) + (law.sf(np.inf) + 1 - law.sf(-grid) if fit.xmin is None else 0))
    np.testing.assert_allclose(own["p"], expected)
    assert len(curves) + len(dots) < MAX_ROWS and len(dots) <= figures.POINTS
    for chart in (figures.quantiles(fit), figures.stability(fit) if n > 11 else figures.quantiles(fit)):
        assert all(len(layer.data) <= 2 * figures.POINTS for layer in chart.layer if hasattr(layer.data, "columns"))


def test_plot_of_a_tail_below_zero() -> None:
    """There is nothing for logarithmic axes; of a threshold below 0 there is the part above."""
    assert len(ht.generalized_pareto(-1 - RNG(0).pareto(2.0, 500), bootstrap=0).plot().to_dict()["hconcat"]) == 1
    fit = ht.generalized_pareto(RNG(0).normal(size=2_000), threshold=-0.5, bootstrap=0)
    layers = figures.survival(fit).layer
    curves, dots = pd.DataFrame(layers[0].data), pd.DataFrame(layers[-1].data)
    own = curves[curves["law"] == fit.family]
    at_one = np.interp(1.0, own["x"], own["p"])
    assert at_one == pytest.approx((fit.values > 1).mean(), abs=0.02) and (dots["x"] > 0).all()


# What cannot be fitted --------------------------------------------------------------------------------------------


def test_errors_say_what_to_do() -> None:
    x = RNG(0).normal(size=200)
    for fit in (ht.weibull, ht.lognormal, ht.hill, ht.moment_estimator, ht.hill_path):
        with pytest.raises(Incompatible, match=r"values are negative.*np\.abs\(values\)"):
            fit(x)
    with pytest.raises(Incompatible, match="values are complex"):
        ht.weibull(np.abs(x) + 1j)
    with pytest.raises(Incompatible, match="this fit takes 5"):
        ht.weibull([1.0, 2.0, 0.0, math.nan])
    with pytest.raises(Incompatible, match="lower the threshold"):
        ht.generalized_pareto(x, threshold=2.5)
    with pytest.raises(Incompatible, match=r"k = 200 of 200 values; give k = 10\.\.199"):
        ht.hill(np.abs(x), k=200)
    with pytest.raises(Incompatible, match="they are no tail"):
        ht.hill(np.concatenate([np.abs(x), np.full(50, 9.0)]), k=30)
    with pytest.raises(Incompatible, match="no spread"):
        ht.student_t(np.full(50, 3.0))


def test_zeros_and_gaps_are_counted() -> None:
    x = np.concatenate([RNG(0).weibull(1.0, 300), np.zeros(100), [math.nan, math.inf]])
    RNG(1).shuffle(x)
    fit = ht.weibull(x, bootstrap=0)
    assert (fit.zeros, fit.missing, len(fit.values)) == (100, 2, 300)
    same = ht.weibull(x[np.isfinite(x) & (x > 0)], bootstrap=0)
    assert fit["shape"] == same["shape"]
    masked = np.ma.masked_array(np.append(x, 1e9), mask=np.append(np.zeros(len(x)), 1))
    assert ht.weibull(masked, bootstrap=0)["shape"] == same["shape"] and ht.weibull(masked, bootstrap=0).missing == 3
    assert any("100 of 400" in note for note in fit.warnings) and any("2 values are NaN" in n for n in fit.warnings)


def test_ties_and_few_values_are_warned_of() -> None:
    notes = ht.weibull(np.tile([1.0, 2.0, 3.0, 5.0], 5), bootstrap=0).warnings
    assert any("only 20 values" in note for note in notes) and any("only 4 of 20" in note for note in notes)
