"""Concentration and tails against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from nbdyn.analysis.lca.concentration import concentration, fraction_doing, gini, share_of_top, tail_share
from nbdyn.errors import Incompatible


def test_gini_is_the_mean_difference() -> None:
    x = np.random.default_rng(0).exponential(size=60)
    pairs = np.abs(x[:, None] - x).sum()
    assert gini(x) == pytest.approx(pairs / (2 * 60**2 * x.mean()))
    assert gini([0.0, 0.0, 0.0, 0.0, 1.0]) == pytest.approx(1 - 1 / 5)
    assert math.isnan(gini([])) and math.isnan(gini([0.0, 0.0]))


def test_gini_of_known_distributions() -> None:
    q = (np.arange(20_000) + 0.5) / 20_000
    assert gini(stats.expon.ppf(q)) == pytest.approx(0.5, abs=1e-3)
    assert gini(stats.halfnorm.ppf(q)) == pytest.approx(math.sqrt(2) - 1, abs=1e-3)


def test_shares_of_the_top() -> None:
    amounts = [4.0, 1.0, 0.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert share_of_top(amounts, 10) == pytest.approx(0.4) and share_of_top(amounts, 11) == pytest.approx(0.7)
    assert share_of_top(amounts, 30) == pytest.approx(0.9)  # 10 * 30 / 100 is 3, whatever its rounding
    assert share_of_top(amounts, 100) == 1.0
    assert fraction_doing(amounts) == 0.3 and fraction_doing(amounts, 0.91) == 0.4
    assert fraction_doing(amounts, 1.0) == 0.4 and fraction_doing([1.0] * 10) == 0.9
    assert math.isnan(share_of_top([0.0], 1)) and math.isnan(fraction_doing([]))


@pytest.mark.parametrize("bad", [[-1.0, 2.0], [math.nan], [math.inf]])
def test_amounts_are_finite_and_not_negative(bad: list[float]) -> None:
    for function in (gini, fraction_doing, lambda x: share_of_top(x, 1)):
        with pytest.raises(Incompatible, match="negative or not finite"):
            function(bad)


def test_shares_are_in_range() -> None:
    for percent in (0, 101):
        with pytest.raises(Incompatible, match="percentage"):
            share_of_top([1.0], percent)
    for share in (0, 1.1):
        with pytest.raises(Incompatible, match="above 0, up to 1"):
            fraction_doing([1.0], share)


def test_both_sides() -> None:
    frame = concentration([[-4.0, -1.0], [0.0, 2.0], [-3.0, 2.0]], top=(1, 50)).set_index("side")
    helped, hurt = frame.loc["helped"], frame.loc["hurt"]
    assert (helped["amount"], helped["n"], helped["nonzero"]) == (8.0, 6, 3)
    assert (hurt["amount"], hurt["nonzero"], hurt["gini_nonzero"]) == (4.0, 2, 0.0)
    assert helped["gini"] == pytest.approx(gini([4, 1, 0, 0, 3, 0]))
    assert helped["gini_nonzero"] == pytest.approx(gini([4, 1, 3]))
    assert (helped["top_1_percent"], helped["top_50_percent"]) == (0.5, 1.0)
    assert helped["fraction_90"] == 0.5 and hurt["fraction_90"] == pytest.approx(2 / 6)


def test_totals_that_nobody_hurt() -> None:
    frame = concentration([-1.0, -1.0])
    assert frame["gini"][0] == 0 and math.isnan(frame["gini"][1])
    with pytest.raises(Incompatible):
        concentration([math.nan, 1.0])


def test_tails_of_a_gaussian_are_one() -> None:
    q = (np.arange(400_000) + 0.5) / 400_000
    frame = tail_share(np.concatenate([stats.norm.ppf(q), np.zeros(1_000)]))
    assert frame["ratio"].tolist() == pytest.approx([1.0, 1.0], abs=5e-3)
    assert frame["n"].tolist() == [400_000] * 2 and frame["zeros"].tolist() == [1_000] * 2
    assert frame["sigma"][0] == pytest.approx(1.0, abs=1e-3)


def test_tails_of_a_laplacian() -> None:
    """The share of E|a| beyond k is (1 + k / b) exp(-k / b); sigma is b sqrt 2."""
    q = (np.arange(400_000) + 0.5) / 400_000
    frame = tail_share(1e-200 * stats.laplace.ppf(q), [2.0, 3.0])  # squares of these vanish
    for row in frame.itertuples():
        k = row.kappa * math.sqrt(2)
        assert row.share == pytest.approx((1 + k) * math.exp(-k), rel=5e-3)
        assert row.ratio == pytest.approx(row.share / math.exp(-(row.kappa**2) / 2))


def test_tails_by_hand() -> None:
    frame = tail_share([1.0, -1.0, 1.0, -5.0, 0.0], [0.0, 1.5])
    assert frame["sigma"][0] == pytest.approx(math.sqrt(7)) and frame["share"].tolist() == [1.0, 5 / 8]
    assert frame["n"][0] == 4 and frame["zeros"][0] == 1
    assert tail_share([0.0])["ratio"].isna().all()
    with pytest.raises(Incompatible, match="not finite"):
        tail_share([math.nan])
    with pytest.raises(Incompatible, match="kappa = -1"):
        tail_share([1.0], [-1.0])
