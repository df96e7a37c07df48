"""Block bootstrap: exact distributions of tiny series, coverage for correlated ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.signal import lfilter

from nbdyn.errors import Incompatible
from nbdyn.statistics.bootstrap import block_length, block_means


def test_blocks_of_all_steps_give_the_mean() -> None:
    assert np.ptp(block_means([1.0, 2.0, 6.0], 3, draws=50)) < 1e-12
    assert block_means([1.0, 2.0, 6.0], 3, draws=50)[0] == pytest.approx(3.0)


def test_every_circular_block_is_as_likely() -> None:
    # T = 3, blocks of 2 and a cut of 1: sums of pairs 3, 6, 5 (circular) and singles 1, 2, 4.
    means = block_means([1.0, 2.0, 4.0], 2, draws=90_000, seed=1)
    values, counts = np.unique(np.round(means * 3).astype(int), return_counts=True)
    expected: dict[int, float] = {}
    for pair in (3, 6, 5):
        for single in (1, 2, 4):
            expected[pair + single] = expected.get(pair + single, 0) + 1 / 9
    assert values.tolist() == sorted(expected)
    np.testing.assert_allclose(counts / 90_000, [expected[v] for v in values], atol=0.006)


def test_plain_bootstrap_has_the_standard_error() -> None:
    x = np.random.default_rng(0).normal(size=400)
    means = block_means(x, 1, draws=4_000)
    assert means.std() == pytest.approx(x.std() / 20, rel=0.05) and means.mean() == pytest.approx(x.mean(), abs=0.005)


def test_chunks_are_one_stream_of_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdyn.statistics.bootstrap.CHUNK", 7)
    means = block_means(np.arange(10.0), 3, draws=500)
    assert len(means) == 500 and means.mean() == pytest.approx(4.5, abs=0.4)


def test_length_grows_with_correlation() -> None:
    rng = np.random.default_rng(0)
    white = rng.normal(size=1_000)
    lengths = [block_length(lfilter([1], [1, -r], white)) for r in (0.0, 0.5, 0.9)]
    assert lengths[0] <= 3 < lengths[1] < lengths[2]
    assert lengths[1] == pytest.approx((6 * 0.25 / 0.75**2 * 1_000) ** (1 / 3), rel=0.2)
    assert block_length(np.ones(9)) == 1 and block_length([1.0]) == 1
    assert block_length(np.arange(30.0)) == 10  # a trend: T / 3 at most


def test_intervals_of_correlated_series_cover() -> None:
    """Blocks of one step cover far too little, the chosen ones nearly 95 %."""
    rng = np.random.default_rng(0)
    hits = {"chosen": 0, "single": 0}
    for _ in range(200):
        x = lfilter([1], [1, -0.7], rng.normal(size=600))[100:]
        for name, block in (("chosen", block_length(x)), ("single", 1)):
            low, high = np.quantile(block_means(x, block, draws=300), [0.025, 0.975])
            hits[name] += int(low <= 0 <= high)
    assert hits["single"] / 200 < 0.75 and 0.86 < hits["chosen"] / 200 <= 0.99


@pytest.mark.parametrize(("length", "block"), [(0, 1), (3, 0), (3, 4)])
def test_blocks_must_fit(length: int, block: int) -> None:
    with pytest.raises(Incompatible, match="do not fit"):
        block_means(np.ones(length), block)


def test_length_of_blocks_at_the_edges() -> None:
    x = np.random.default_rng(0).normal(size=300).cumsum()
    assert block_length(1e-200 * x) == block_length(x) == block_length(1e200 * x) > 10
    assert block_length(np.full(7, 0.1)) == 1  # the mean is off by rounding
    for bad in (math.nan, math.inf):
        with pytest.raises(Incompatible, match="1 of 301 values are not finite"):
            block_length(np.append(x, bad))
    with pytest.raises(Incompatible, match="1 of 3 values are NaN"):
        block_means([1.0, math.nan, 2.0], 1)
