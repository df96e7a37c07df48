"""Nulls of synchronized moments: brute force on tiny arrays, levels and power in simulation."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from nbdyn.errors import Incompatible
from nbdyn.statistics.surrogates import phase_randomized
from nbdyn.statistics.synchronization import (
    SHIFTS,
    Synchronization,
    block_permutation,
    circular_shift_test,
    paired,
    phase_test,
    shift_test,
    synchronized,
)


def random_moments(shape: tuple[int, ...], chance: float = 0.3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < chance


def count(series: list[np.ndarray], least: int) -> int:
    """The statistic of one class, by loops."""
    return sum(sum(bool(one[t]) for one in series) >= least for t in range(len(series[0])))


def brute(moments: np.ndarray, least: int, shifts: tuple[int, ...] = SHIFTS) -> Counter[int]:
    """How many arrangements of one class give which statistic."""
    first, *rest = moments
    found: Counter[int] = Counter()
    for chosen in itertools.product(shifts, repeat=len(rest)):
        moved = [np.roll(one, s) for one, s in zip(rest, chosen, strict=True)]
        found[count([first, *moved], least)] += 1
    return found


def share_at_least(found: Counter[int], value: int) -> float:
    return sum(n for x, n in found.items() if x >= value) / sum(found.values())


# The statistic --------------------------------------------------------------------------------------------------


def test_statistic_by_loops() -> None:
    moments = random_moments((3, 4, 20), 0.5)
    for least in (2, 3, 4):
        assert synchronized(moments, least) == sum(count(list(one), least) for one in moments)
    assert synchronized(moments) == synchronized(moments, 4)
    assert synchronized(moments[0]) == synchronized(moments[:1])


@pytest.mark.parametrize("bad", [np.ones((2, 3)), np.ones(3, bool), np.ones((1, 5), bool), np.ones((2, 0), bool)])
def test_what_are_no_moments(bad: np.ndarray) -> None:
    with pytest.raises(Incompatible, match="give booleans"):
        synchronized(bad)


@pytest.mark.parametrize("least", [0, 1, 4])
def test_least_is_of_two_or_more(least: int) -> None:
    with pytest.raises(Incompatible, match=r"give 2\.\.3"):
        synchronized(np.ones((3, 5), bool), least)


# Small shifts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [2, 3])
def test_exact_shifts_are_brute_force(least: int) -> None:
    moments = random_moments((3, 12))
    found, expected = shift_test(moments, least), brute(moments, least)
    values = np.repeat(list(expected), list(expected.values()))
    assert found.exact and found.draws == 25
    assert found.statistic == count(list(moments), least)
    assert found.p == pytest.approx(share_at_least(expected, found.statistic), abs=1e-12)
    assert found.null_mean == pytest.approx(values.mean())
    low, high = np.quantile(values, [0.025, 0.975], method="inverted_cdf")
    assert (found.null_low, found.null_high) == (low, high)


def test_classes_are_convolved() -> None:
    """Two classes: all 25 x 25 pairs of arrangements, counted one by one."""
    moments = random_moments((2, 3, 10), 0.4, seed=4)
    found = shift_test(moments, 2)
    a, b = (brute(one, 2) for one in moments)
    both: Counter[int] = Counter()
    for (x, n), (y, m) in itertools.product(a.items(), b.items()):
        both[x + y] += n * m
    assert sum(both.values()) == 625 == found.draws
    assert found.p == pytest.approx(share_at_least(both, found.statistic), abs=1e-12)
    assert found.null_mean == pytest.approx(sum(x * n for x, n in both.items()) / 625)
    np.testing.assert_array_equal(found.observed, [count(list(one), 2) for one in moments])
    np.testing.assert_allclose(found.expected, [sum(x * n for x, n in one.items()) / 25 for one in (a, b)])


def test_together_moves_classes_alike() -> None:
    moments = random_moments((2, 3, 10), 0.4, seed=4)
    expected: Counter[int] = Counter()
    for s, r in itertools.product(SHIFTS, SHIFTS):
        expected[sum(count([a, np.roll(b, s), np.roll(c, r)], 2) for a, b, c in moments)] += 1
    found = shift_test(moments, 2, together=True)
    assert found.p == pytest.approx(share_at_least(expected, found.statistic), abs=1e-12) and found.draws == 25
    assert "alike in all classes" in found.sentence


def test_draws_agree_with_all_arrangements(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = random_moments((2, 4, 30), 0.4, seed=2)
    for together in (False, True):
        exact = shift_test(moments, 3, together=together)
        with monkeypatch.context() as patch:
            patch.setattr("nbdyn.statistics.synchronization.MOST_ARRANGEMENTS", 1)
            patch.setattr("nbdyn.statistics.arrangements.CHUNK", 5_000)
            drawn = shift_test(moments, 3, draws=20_000, together=together)
        assert exact.exact and not drawn.exact and drawn.draws == 20_000
        assert drawn.p == pytest.approx(exact.p, abs=0.015)
        assert drawn.null_mean == pytest.approx(exact.null_mean, rel=0.02)


def test_many_series_are_drawn_and_p_is_never_zero() -> None:
    one = np.zeros(40, bool)
    one[5::8] = True
    found = shift_test(np.tile(one, (8, 1)), draws=500)
    assert not found.exact and found.statistic == 5 and found.p == 1 / 501


def test_perfect_synchrony_is_as_clear_as_can_be() -> None:
    one = np.zeros(60, bool)
    one[7::9] = True
    found = shift_test(np.tile(one, (10, 3, 1)))
    assert found.p == pytest.approx(25.0**-10, rel=1e-9)
    assert found.null_mean == pytest.approx(60 / 25)
    assert shift_test(np.tile(one, (10, 3, 1)), together=True).p == pytest.approx(1 / 25)


def test_moments_at_the_ends_come_in_at_the_other() -> None:
    moments = np.zeros((2, 10), bool)
    moments[0, 0] = moments[1, 8] = True
    found = shift_test(moments)
    assert found.statistic == 0 and found.null_mean == pytest.approx(1 / 5)  # by the shift of 2


def test_no_moments() -> None:
    for found in (shift_test(np.zeros((3, 9), bool)), circular_shift_test(np.zeros((3, 9), bool), draws=20)):
        assert found.statistic == 0 and found.null_mean == 0 and found.p == 1


@pytest.mark.parametrize("shifts", [(-2, -1, 1, 2), (0, 1, 1), (0, 9)])
def test_shifts_hold_zero_and_none_twice(shifts: tuple[int, ...]) -> None:
    with pytest.raises(Incompatible, match="0 among them"):
        shift_test(np.zeros((3, 9), bool), shifts=shifts)


# Other nulls ----------------------------------------------------------------------------------------------------


def test_circular_shifts_have_the_hypergeometric_mean() -> None:
    """Over all rotations of two series the mean overlap is n m / T, whatever the series."""
    moments = random_moments((2, 50), 0.4)
    found = circular_shift_test(moments, draws=20_000)
    n, m = moments.sum(axis=1)
    assert found.null_mean == pytest.approx(n * m / 50, rel=0.01)
    overlaps = [int((moments[0] & np.roll(moments[1], s)).sum()) for s in range(50)]
    assert found.p == pytest.approx(np.mean(np.array(overlaps) >= found.statistic), abs=0.015)


def test_blocks_of_one_step_are_hypergeometric() -> None:
    moments = random_moments((2, 40), 0.4)
    n, m = (int(x) for x in moments.sum(axis=1))
    found = block_permutation(moments, 1, draws=20_000)
    overlap = stats.hypergeom(40, n, m)
    assert found.null_mean == pytest.approx(overlap.mean(), rel=0.01)
    assert found.p == pytest.approx(overlap.sf(found.statistic - 1), abs=0.015)


def test_blocks_keep_what_is_in_them() -> None:
    """Two series of 7 steps in blocks of 3, 3 and 1: all 6 x 6 orders, by loops."""
    moments = random_moments((2, 7), 0.5, seed=3)
    blocks = [slice(0, 3), slice(3, 6), slice(6, 7)]
    orders = list(itertools.permutations(range(3)))
    arranged = [[np.concatenate([one[blocks[i]] for i in order]) for order in orders] for one in moments]
    overlaps = np.array([int((a & b).sum()) for a, b in itertools.product(*arranged)])
    found = block_permutation(moments, 3, draws=30_000)
    assert found.null_mean == pytest.approx(overlaps.mean(), rel=0.02)
    assert found.p == pytest.approx(np.mean(overlaps >= found.statistic), abs=0.015)


def test_blocks_together_move_classes_alike() -> None:
    one = random_moments((2, 30), 0.4)
    single = block_permutation(one, 5, draws=200, seed=1)
    twice = block_permutation(np.stack([one, one]), 5, draws=200, seed=1, together=True)
    assert twice.null_mean == 2 * single.null_mean and twice.p == single.p
    again = circular_shift_test(np.stack([one, one]), draws=200, seed=1, together=True)
    assert again.p == circular_shift_test(one, draws=200, seed=1).p


def test_classes_apart_and_together_by_hand() -> None:
    """One moment at the first of four steps: it meets at 1/4 of rotations, and at 1/2 of the orders of two blocks."""
    moments = np.zeros((2, 2, 4), bool)
    moments[..., 0] = True
    for together, power in ((False, 2), (True, 1)):
        rotated = circular_shift_test(moments, draws=20_000, together=together)
        ordered = block_permutation(moments, 2, draws=20_000, together=together)
        assert rotated.statistic == 2 and rotated.p == pytest.approx(0.25**power, abs=0.015)
        assert ordered.statistic == 2 and ordered.p == pytest.approx(0.5**power, abs=0.015)


@pytest.mark.parametrize("block", [0, 6])
def test_blocks_must_change_places(block: int) -> None:
    with pytest.raises(Incompatible, match=r"block = 1\.\.5"):
        block_permutation(np.zeros((2, 10), bool), block)


@pytest.mark.parametrize("steps", [30, 31])
def test_surrogates_keep_the_spectrum_only(steps: int) -> None:
    x = np.random.default_rng(0).normal(2.0, 1.0, (2, 3, steps))
    found = phase_randomized(x, draws=40)
    assert found.shape == (40, 2, 3, steps)
    np.testing.assert_allclose(np.abs(np.fft.rfft(found)), np.tile(np.abs(np.fft.rfft(x)), (40, 1, 1, 1)), atol=1e-9)
    np.testing.assert_allclose(found.mean(axis=-1), np.tile(x.mean(axis=-1), (40, 1, 1)), atol=1e-12)
    assert np.abs(found - x).max(axis=-1).min() > 0.1
    same = phase_randomized(np.tile(x[:1], (2, 1, 1)), draws=5, together=True)
    np.testing.assert_allclose(same[:, 0], same[:, 1], atol=1e-12)
    assert np.abs(same[:, :, 0] - same[:, :, 1]).max() > 0.1


def low(x: np.ndarray) -> np.ndarray:
    """A detector of moments: strict local minima below zero."""
    found = np.zeros(x.shape, bool)
    found[..., 1:-1] = (x[..., 1:-1] < x[..., :-2]) & (x[..., 1:-1] < x[..., 2:]) & (x[..., 1:-1] < 0)
    return found


def test_phase_test_searches_moments_anew() -> None:
    x = np.random.default_rng(0).normal(size=(3, 200))
    common = x[0] + 0.3 * x
    found = phase_test(common, low, draws=199)
    assert found.statistic == synchronized(low(common)) and found.p == 1 / 200
    assert phase_test(x, low, draws=199).p > 0.02
    with pytest.raises(Incompatible, match="of the same shape"):
        phase_test(x, lambda a: low(a)[..., 1:])


# Level and power ------------------------------------------------------------------------------------------------

TESTS: dict[str, Callable[[np.ndarray], Synchronization]] = {
    "shift": lambda moments: shift_test(moments, 2),
    "shift together": lambda moments: shift_test(moments, 2, together=True),
    "circular": lambda moments: circular_shift_test(moments, 2, draws=99),
    "blocks": lambda moments: block_permutation(moments, 10, 2, draws=99),
}


@pytest.mark.parametrize("name", TESTS)
def test_level_and_power(name: str) -> None:
    """Independent minima: at most about 5 % below 0.05; minima with a common part: nearly all."""
    rng = np.random.default_rng(5)
    independent, common = [], []
    for _ in range(200):
        x = rng.normal(size=(5, 3, 150))
        independent.append(TESTS[name](low(x + 1.0)).p)
        common.append(TESTS[name](low(x + 1.5 * rng.normal(size=(5, 1, 150)) + 1.0)).p)
    assert np.mean(np.array(independent) <= 0.05) <= 0.085  # 5 % and 2.3 standard errors of 200 trials
    assert 0.4 < np.mean(independent) < 0.7
    assert np.mean(np.array(common) <= 0.05) > 0.95


# Results --------------------------------------------------------------------------------------------------------


def test_frame_and_repr() -> None:
    found = shift_test(random_moments((10, 5, 60)), 3)
    (row,) = found.frame().to_dict("records")
    assert row["draws"] == 625.0**10 and row["exact"] and row["least"] == 3
    assert (row["classes"], row["series"], row["steps"]) == (10, 5, 60)
    assert row["excess"] == found.statistic - found.null_mean
    assert row["sentence"].endswith("independently in each class")
    assert "5 series x 10 classes x 60 steps" in repr(found) and "exact" in repr(found)
    assert "99 draws" in repr(circular_shift_test(random_moments((2, 9)), draws=99))


def test_paired_is_scipys() -> None:
    rng = np.random.default_rng(0)
    observed = rng.poisson(6.0, (4, 10)).astype(float)
    expected = np.full((4, 10), 4.3) + rng.random((4, 10))
    frame = paired(observed, expected).set_index("over")
    both, runs = frame.loc["classes and runs"], frame.loc["runs"]
    student = stats.ttest_rel(observed.ravel(), expected.ravel(), alternative="greater")
    assert both["n"] == 40 and (both["t"], both["p"]) == pytest.approx((student.statistic, student.pvalue))
    ranks = stats.wilcoxon(observed.ravel(), expected.ravel(), alternative="greater")
    assert both["p_wilcoxon"] == pytest.approx(ranks.pvalue)
    sums: Any = stats.ttest_rel(observed.sum(axis=1), expected.sum(axis=1), alternative="greater")
    assert runs["n"] == 4 and runs["p"] == pytest.approx(sums.pvalue)
    assert both["difference"] == pytest.approx((observed - expected).mean())


def test_paired_of_one_run_says_so() -> None:
    frame = paired([[3.0, 4.0, 6.0]], [[1.0, 1.0, 1.0]]).set_index("over")
    assert frame.loc["runs", "n"] == 1 and math.isnan(frame.loc["runs", "p"])  # type: ignore[arg-type]
    with pytest.raises(Incompatible, match="runs, classes"):
        paired([1.0], [1.0])
