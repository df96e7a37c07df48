"""Two samples and pairs: against scipy, by counting, and their level."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from nbdyn.errors import Incompatible
from nbdyn.statistics.comparing import pairs, sign_flips, two_samples
from nbdyn.statistics.testing import one_sample


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_two_samples_are_scipys(alternative: str) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.5, 1, 6), rng.normal(0, 3, 5)
    found = two_samples(np.append(a, np.nan), b, alternative=alternative)  # type: ignore[arg-type]
    welch = stats.ttest_ind(a, b, equal_var=False, alternative=alternative)
    assert (found.t, found.p) == pytest.approx((welch.statistic, welch.pvalue))
    both = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((both.low, both.high))
    assert found.p_rank == pytest.approx(stats.mannwhitneyu(a, b, alternative=alternative).pvalue)
    assert found.n_a == 6 and found.n_b == 5 and found.difference == pytest.approx(a.mean() - b.mean())


def test_permutations_counted_by_hand() -> None:
    a, b = np.array([3.0, 5.0, 9.0]), np.array([1.0, 2.0, 4.0, 4.5])
    everything = np.concatenate([a, b])
    found = []
    for chosen in itertools.combinations(range(7), 3):
        mask = np.isin(np.arange(7), chosen)
        found.append(everything[mask].mean() - everything[~mask].mean())
    observed = a.mean() - b.mean()
    share = np.mean(np.array(found) >= observed - 1e-12)
    result = two_samples(a, b, alternative="greater")
    assert result.p_permutation == pytest.approx(share) and result.exact
    drawn = two_samples(a, b, alternative="greater", draws=20)
    assert not drawn.exact and drawn.p_permutation * 21 == pytest.approx(round(drawn.p_permutation * 21))


def test_hedges_g() -> None:
    a, b = [2.0, 4.0, 6.0], [1.0, 3.0, 5.0]
    assert two_samples(a, b).effect == pytest.approx(0.5 * (1 - 3 / 15))


def test_signs_counted_by_hand() -> None:
    d = np.array([0.5, -0.2, 1.0, 0.7])
    means = [np.mean(d * signs) for signs in itertools.product([1, -1], repeat=4)]
    assert sign_flips(d, "greater") == (pytest.approx(np.mean(np.array(means) >= d.mean() - 1e-12)), True)
    two_sided = np.mean(np.abs(means) >= abs(d.mean()) - 1e-12)
    assert sign_flips(d)[0] == pytest.approx(two_sided)


def test_pairs_are_differences() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=9), rng.normal(size=9)
    found = pairs(np.append(a, np.nan), np.append(b, 1.0), alternative="less")
    assert found.test == one_sample(a - b, alternative="less") and found.test.n == 9
    assert found.p_signs == sign_flips(a - b, "less")[0]
    with pytest.raises(Incompatible, match="3 and 2 values are no pairs"):
        pairs([1, 2, 3], [1, 2])


def test_infinite_values_are_refused() -> None:
    """Means of rearrangements were NaN, which is less extreme than any: p was 0."""
    for call in (
        lambda: two_samples([1.0, np.inf, 2.0], [1.0, 2.0, 3.0]),
        lambda: sign_flips([1.0, np.inf]),
        lambda: pairs([1.0, np.inf, 2.0], [0.0, np.inf, 1.0]),
    ):
        with pytest.raises(Incompatible, match="values are infinite"):
            call()


def test_rounding_is_no_difference() -> None:
    found = pairs([0.3, 0.1 + 0.2, 0.3, 0.7 + 0.1], [0.1 + 0.2, 0.3, 0.3, 0.8])
    assert np.isnan([found.p_signs, found.test.p, found.test.p_wilcoxon]).all() and found.test.mean == 0


def test_nothing_differs() -> None:
    found = two_samples([1.0, 1.0], [1.0, 1.0, 1.0])
    assert found.difference == 0 and np.isnan([found.p, found.p_permutation, found.effect]).all()
    assert np.isnan(two_samples([1.0], [1.0, 2.0]).p)
    assert np.isnan(sign_flips([0.0, 0.0])[0]) and np.isnan(sign_flips([1.0])[0])


def test_level() -> None:
    rng = np.random.default_rng(3)
    found = [two_samples(rng.normal(size=5), rng.normal(size=6), draws=999) for _ in range(300)]
    for p in ("p", "p_permutation", "p_rank"):
        assert 0.01 < np.mean([getattr(f, p) <= 0.05 for f in found]) < 0.09
    signs = [sign_flips(rng.standard_t(2, size=8))[0] for _ in range(300)]
    assert 0.01 < np.mean(np.array(signs) <= 0.05) < 0.09
