"""Correlation within neurons, specialization and saliency: exact answers, levels and power."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from nbdyn.analysis.lca.neurons import SameNeuron, saliency, same_neuron, specialization
from nbdyn.analysis.lca.pairs import KINDS, distinct_pairs, grid_of, pair_counts, regrouped
from nbdyn.errors import Incompatible


def kernel(outputs: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    return np.divmod(np.arange(outputs * inputs), inputs)


def kind_of(i: int, j: int, rows: np.ndarray, columns: np.ndarray) -> str:
    same = bool(rows[i] == rows[j]), bool(columns[i] == columns[j])
    return {(True, False): "same output", (False, True): "same input", (False, False): "neither"}.get(same, "both")


# Pairs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
def test_all_pairs_of_each_kind(ragged: bool) -> None:
    rows, columns = kernel(4, 5)
    if ragged:  # some weights are missing, some share both
        keep = np.array([0, 1, 1, 2, 5, 6, 7, 12, 12, 12, 19])
        rows, columns = rows[keep], columns[keep]
    every = {kind: set() for kind in (*KINDS, "both")}
    for i, j in itertools.combinations(range(len(rows)), 2):
        every[kind_of(i, j, rows, columns)].add((i, j))
    assert pair_counts(rows, columns) == {kind: len(every[kind]) for kind in KINDS}
    for kind in KINDS:
        found = distinct_pairs(kind, rows, columns, 1_000, np.random.default_rng(0))
        assert set(zip(*(x.tolist() for x in found), strict=True)) == every[kind]
        assert len(found[0]) == len(every[kind])


def test_pairs_are_alike_likely_in_groups_of_other_sizes() -> None:
    rows, columns = np.array([0, 0, 1, 1, 1, 1, 2]), np.arange(7)
    counts: dict[tuple[int, int], int] = {}
    rng = np.random.default_rng(0)
    for _ in range(7_000):
        first, second = distinct_pairs("same output", rows, columns, 1, rng)
        pair = int(first[0]), int(second[0])
        counts[pair] = counts.get(pair, 0) + 1
    assert len(counts) == 7 and stats.chisquare(list(counts.values())).pvalue > 0.001


def test_blocks_are_grids() -> None:
    rng = np.random.default_rng(0)
    for outputs, inputs in ((100, 784), (10, 400), (500, 3), (4, 5)):
        rows, columns = kernel(outputs, inputs)
        found = grid_of(rows, columns, rng)
        high, wide = len(np.unique(rows[found])), len(np.unique(columns[found]))
        assert len(found) == high * wide == min(900, outputs * inputs)


def test_labels_stay_in_their_group() -> None:
    labels, groups = np.arange(9), np.array([0, 0, 0, 0, 1, 1, 1, 2, 2])
    found = np.array([regrouped(labels, groups, np.random.default_rng(seed)) for seed in range(50)])
    for group in range(3):
        assert (np.sort(found[:, groups == group], axis=1) == labels[groups == group]).all()
    assert len({tuple(row) for row in found}) > 20


# Correlation ----------------------------------------------------------------------------------------------------


def table(found: SameNeuron) -> dict:
    return found.frame().set_index("kind").to_dict("index")  # type: ignore[return-value]


@pytest.mark.parametrize("cumulative", [False, True])
def test_correlations_are_numpys(cumulative: bool) -> None:
    x = np.random.default_rng(0).normal(size=(25, 12))
    rows, columns = kernel(3, 4)
    found = same_neuron(x, rows, columns, pairs=1_000, cumulative=cumulative, draws=9)
    r = np.corrcoef((x.cumsum(axis=0) if cumulative else x).T)
    for kind in KINDS:
        pairs = [p for p in itertools.combinations(range(12), 2) if kind_of(*p, rows, columns) == kind]
        np.testing.assert_allclose(np.sort(found.r[kind]), np.sort([r[p] for p in pairs]), atol=1e-12)
        row = table(found)[kind]
        assert row["n"] == len(pairs) and row["mean_r"] == pytest.approx(np.mean([r[p] for p in pairs]))
        if kind != "neither":  # the block is the whole kernel
            assert row["block"] == 12 and row["block_mean_r"] == pytest.approx(row["mean_r"])
            test = stats.ks_2samp(found.r[kind], found.r["neither"])
            assert (row["ks"], row["ks_p"]) == pytest.approx((test.statistic, test.pvalue))
            assert row["effect"] == pytest.approx(row["mean_r"] - table(found)["neither"]["mean_r"])


def test_permutation_null_is_that_of_all_permutations() -> None:
    """Two neurons of three inputs: all 2^3 ways to label, by loops."""
    x = np.random.default_rng(1).normal(size=(10, 6))
    r = np.corrcoef(x.T)
    values = []
    for flips in itertools.product((False, True), repeat=3):
        first = [column + 3 * flip for column, flip in enumerate(flips)]
        second = [column + 3 * (not flip) for column, flip in enumerate(flips)]
        values.append(np.mean([r[p] for part in (first, second) for p in itertools.combinations(part, 2)]))
    row = table(same_neuron(x, *kernel(2, 3), draws=4_000))["same output"]
    assert row["block_mean_r"] == pytest.approx(values[0])
    assert row["null_mean"] == pytest.approx(np.mean(values), abs=0.01)
    assert row["p"] == pytest.approx(np.mean(np.array(values) >= values[0] - 1e-12), abs=0.03)


def test_what_neurons_share_is_found_and_not_confused() -> None:
    """A part common to an output neuron raises "same output" alone; p of "same input" stays as likely as its value."""
    rng = np.random.default_rng(2)
    p_output, p_input = [], []
    for seed in range(60):
        x = rng.normal(size=(30, 6, 8)) + 0.7 * rng.normal(size=(30, 6, 1))
        found = table(same_neuron(x.reshape(30, -1), *kernel(6, 8), pairs=200, seed=seed, draws=59))
        p_output.append(found["same output"]["p"])
        p_input.append(found["same input"]["p"])
        assert found["same output"]["effect"] > 0.15
    assert max(p_output) <= 1 / 60 + 1e-9
    assert np.mean(np.array(p_input) <= 0.05) <= 0.12 and 0.35 < np.mean(p_input) < 0.65


def test_constant_weights_are_left_out() -> None:
    x = np.random.default_rng(0).normal(size=(20, 20)).astype(np.float32) * 1e-30
    x[:, [3, 8]] = 0.0
    found = same_neuron(x, *kernel(4, 5), draws=9)
    assert (found.parameters, found.constant) == (20, 2) and "2 constant" in repr(found)
    assert all(np.isfinite(r).all() for r in found.r.values())
    assert sum(len(r) for r in found.r.values()) == math.comb(18, 2)


def test_a_kernel_of_one_output_has_no_other_kind() -> None:
    found = table(same_neuron(np.random.default_rng(0).normal(size=(9, 5)), *kernel(1, 5), draws=9))
    assert found["same output"]["n"] == 10 and found["neither"]["n"] == found["same input"]["n"] == 0
    assert math.isnan(found["same output"]["ks"]) and math.isnan(found["same input"]["p"])
    assert found["same output"]["p"] == 1  # one neuron alone: labels cannot change


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(20, 30))
    whole = same_neuron(x, *kernel(5, 6), draws=9)
    monkeypatch.setattr("nbdyn.analysis.lca.neurons.CHUNK", 70)
    parts = same_neuron(x, *kernel(5, 6), draws=9)
    for kind in KINDS:
        np.testing.assert_allclose(whole.r[kind], parts.r[kind], atol=1e-14)


def test_trajectories_that_do_not_fit() -> None:
    x = np.random.default_rng(0).normal(size=(9, 6))
    with pytest.raises(Incompatible, match="do not fit"):
        same_neuron(x, *kernel(2, 4))
    with pytest.raises(Incompatible, match="0 weights vary"):
        same_neuron(np.ones((9, 6)), *kernel(2, 3))
    x[3, 4] = math.nan
    with pytest.raises(Incompatible, match="NaN"):
        same_neuron(x, *kernel(2, 3))


# Classes --------------------------------------------------------------------------------------------------------


def test_shares_by_hand() -> None:
    found = specialization([[4.0, 0, 0, 0], [1.0, 1, 1, 1], [-3.0, 1, 3, 0], [-1.0, 0, 0, 0]], draws=9)
    frame = found.frame()
    assert frame["top_class"].tolist() == [0, 0, 2, -1] and frame["helped"].tolist() == [4.0, 4.0, 4.0, 0.0]
    np.testing.assert_allclose(frame["top_1"], [1.0, 0.25, 0.75, math.nan])
    np.testing.assert_allclose(frame["top_2"], [1.0, 0.5, 1.0, math.nan])
    mixed = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(4)
    np.testing.assert_allclose(frame["entropy"], [0.0, 1.0, mixed, math.nan], atol=1e-12)
    tests = found.tests.set_index("statistic")
    assert (tests["n"] == 3).all() and tests.loc["top_1", "observed"] == pytest.approx(2 / 3)
    assert "4 neurons" in repr(found)


def test_nulls_are_of_all_permutations() -> None:
    """Two neurons, two classes: four ways to deal amounts to neurons, four to deal shares to classes."""
    h = np.array([[3.0, 1.0], [1.0, 2.0]])
    tests = specialization(h, draws=4_000).tests.set_index("statistic")
    dealt = [h, h[:, [0, 1]] * 0 + [[1.0, 1.0], [3.0, 2.0]], np.array([[3.0, 2.0], [1.0, 1.0]]), h[::-1]]
    top = [np.mean(d.max(axis=1) / d.sum(axis=1)) for d in dealt]
    assert tests.loc["top_1", "null_mean"] == pytest.approx(np.mean(top), abs=0.005)
    assert tests.loc["top_1", "p"] == pytest.approx(np.mean(np.array(top) >= top[0] - 1e-12), abs=0.03)
    shares = h / h.sum(axis=1, keepdims=True)
    ways = [np.stack([a, b]).mean(axis=0) for a in (shares[0], shares[0][::-1]) for b in (shares[1], shares[1][::-1])]
    entropies = [stats.entropy(way, base=2) for way in ways]
    assert tests.loc["layer entropy", "null_mean"] == pytest.approx(np.mean(entropies), abs=0.005)
    assert tests.loc["layer entropy", "observed"] == pytest.approx(entropies[0])


def test_special_neurons_and_neurons_that_agree() -> None:
    rng = np.random.default_rng(0)
    special = np.eye(5)[np.arange(40) % 5] + 0.2 * rng.random((40, 5))
    tests = specialization(special, draws=199).tests.set_index("statistic")
    assert tests.loc[["top_1", "top_2", "entropy"], "p"].tolist() == [1 / 200] * 3
    assert tests.loc["layer entropy", "p"] > 0.5
    agree = np.array([5.0, 1, 1, 1, 1]) * (1 + 0.01 * rng.random((40, 5)))
    tests = specialization(agree, draws=199).tests.set_index("statistic")
    assert tests.loc["top_1", "observed"] > 0.5 and tests.loc["layer entropy", "p"] == 1 / 200
    assert abs(tests.loc["top_1", "effect"]) < 1e-3  # type: ignore[arg-type]


def test_level_of_specialization() -> None:
    rng = np.random.default_rng(1)
    layers = rng.exponential(size=(100, 12, 4)) * [1, 2, 3, 4]
    p = np.array([specialization(h, draws=59, seed=k).tests["p"][:3] for k, h in enumerate(layers)])
    assert ((p <= 0.05).mean(axis=0) <= 0.11).all() and ((p.mean(axis=0) > 0.4) & (p.mean(axis=0) < 0.62)).all()


def test_too_little_for_tests() -> None:
    assert specialization([[1.0, 2.0], [-1.0, 0.0]]).tests.empty
    for bad in ([1.0, 2.0], [[1.0], [2.0]], [[1.0, math.nan]]):
        with pytest.raises(Incompatible, match="neurons, classes"):
            specialization(bad)


# Saliency -------------------------------------------------------------------------------------------------------


def test_saliency_has_the_order_of_the_pixels() -> None:
    totals = np.random.default_rng(0).normal(size=(3, 12))
    found = saliency(totals, (2, 6))
    assert found.shape == (3, 2, 6) and found[1, 1, 2] == -totals[1, 8]
    assert saliency(totals, (3, 2, 2)).shape == (3, 3, 2, 2)
    with pytest.raises(Incompatible, match="784 pixels"):
        saliency(totals, (28, 28))
    with pytest.raises(Incompatible):
        saliency(totals[0], (2, 6))
