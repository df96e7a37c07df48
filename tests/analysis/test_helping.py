"""Shares of helping, oscillations and layers over runs against hand-made arrays."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nbdyn.analysis.lca.helping import (
    crossings,
    helping_share,
    helping_test,
    layers_over_runs,
    per_event,
    percent_helping,
    share_histogram,
    turns,
)
from nbdyn.errors import Incompatible, UnknownName
from nbdyn.statistics.testing import holm

# Steps ----------------------------------------------------------------------------------------------------------


def test_percent_of_a_network() -> None:
    frame = percent_helping([5, 0], [3, 0], 10)
    assert list(frame) == [
        "step", "size", "nonzero", "helping_percent", "zero_percent", "hurting_percent", "helping_of_nonzero_percent",
    ]  # fmt: skip
    assert frame.iloc[0].tolist() == [0, 10, 8, 50.0, 20.0, 30.0, 62.5]
    assert frame.iloc[1, :6].tolist() == [1, 10, 0, 0.0, 100.0, 0.0]
    assert math.isnan(frame["helping_of_nonzero_percent"][1])


def test_percent_of_layers() -> None:
    a = np.random.default_rng(0).normal(size=(6, 30)).round()
    first = slice(0, 10), slice(10, 30)
    helping = np.stack([(a[:, part] < 0).sum(axis=1) for part in first], axis=1)
    hurting = np.stack([(a[:, part] > 0).sum(axis=1) for part in first], axis=1)
    frame = percent_helping(helping, hurting, [10, 20], ["fc1", "fc2"]).set_index(["step", "group"])
    row = frame.loc[(4, "fc2")]
    part = a[4, 10:]
    assert row["helping_percent"] == 5 * (part < 0).sum() and row["zero_percent"] == 5 * (part == 0).sum()
    assert row["helping_of_nonzero_percent"] == 100 * (part < 0).sum() / (part != 0).sum()
    parts = frame[["helping_percent", "zero_percent", "hurting_percent"]].sum(axis=1)
    np.testing.assert_allclose(parts, 100.0)


def test_small_counts_do_not_overflow() -> None:
    frame = percent_helping(np.array([200], np.uint8), np.array([100], np.uint8), 400)
    assert frame["nonzero"][0] == 300


@pytest.mark.parametrize(
    ("helping", "hurting", "size", "groups", "message"),
    [
        ([1, 2], [1], 4, None, "not both"),
        ([3], [2], 4, None, "5 parameters help or hurt, of 4"),
        ([0], [0], 0, None, r"sizes are \[0\]"),
        ([-1], [2], 4, None, r"counts are in 0\.\.size"),
        ([[1, 2]], [[1, 2]], [4, 4, 4], None, "3 sizes"),
        ([[1, 2]], [[1, 2]], 4, ["a"], "1 names"),
    ],
)
def test_counts_that_do_not_fit(helping: list, hurting: list, size: object, groups: object, message: str) -> None:
    with pytest.raises(Incompatible, match=message):
        percent_helping(helping, hurting, size, groups)  # type: ignore[arg-type]


def test_helping_test_of_independent_steps() -> None:
    """The bootstrap of independent shares is the normal approximation."""
    helping = np.random.default_rng(0).binomial(100, 0.53, 300)
    frame = helping_test(helping, 100 - helping, 200).set_index("measure")
    row, of_all = frame.loc["helping_of_nonzero_percent"], frame.loc["helping_percent"]
    half = 1.96 * helping.std() / math.sqrt(300)
    assert row["n"] == 300 and row["mean"] == pytest.approx(helping.mean()) and row["null"] == 50
    assert row["effect"] == pytest.approx(helping.mean() - 50)
    assert row["high"] - row["low"] == pytest.approx(2 * half, rel=0.25)
    assert row["low"] < row["mean"] < row["high"]
    assert row["p"] == 1 / 10_001  # ten standard errors
    assert of_all["mean"] == pytest.approx(helping.mean() / 2) and math.isnan(of_all["p"])


def test_helping_test_by_layer() -> None:
    rng = np.random.default_rng(1)
    helping = np.stack([rng.binomial(50, 0.5, 200), rng.binomial(50, 0.6, 200), np.full(200, 30)], axis=1)
    hurting = 50 - helping
    helping[:4, 0] = hurting[:4, 0] = 0
    frame = helping_test(helping, hurting, [50, 50, 60], ["even", "helps", "constant"], draws=999)
    found = frame[frame["measure"] == "helping_of_nonzero_percent"].set_index("group")
    assert found["n"].tolist() == [196, 200, 200]  # steps at which all are zero do not count
    assert found.loc["even", "p"] > 0.05 and found.loc["helps", "p"] == 0.001
    assert found.loc["helps", "p_holm"] == pytest.approx(0.002)
    assert math.isnan(found.loc["constant", "p"])  # type: ignore[arg-type]
    assert found.loc["constant", "low"] == pytest.approx(60) and found.loc["constant", "high"] == pytest.approx(60)


def test_helping_test_of_nothing() -> None:
    frame = helping_test([0, 0], [0, 0], 5)
    assert frame["n"].tolist() == [0, 2] and math.isnan(frame["mean"][0]) and frame["mean"][1] == 0


# Parameters -----------------------------------------------------------------------------------------------------


def test_share_of_steps() -> None:
    a = np.array([[-1.0, 0.0, 2.0], [-1.0, 0.0, -2.0], [0.0, 0.0, -1.0], [3.0, 0.0, -1.0]])
    helping, hurting = (a < 0).sum(axis=0), (a > 0).sum(axis=0)
    assert helping_share(helping, 4).tolist() == [50.0, 0.0, 75.0]
    np.testing.assert_allclose(helping_share(helping, 4, hurting), [200 / 3, math.nan, 75.0])
    assert helping_share(helping.reshape(3, 1), 4).shape == (3, 1)
    for wrong in ((helping, 2, None), (helping, 3, hurting), (-helping, 4, None), (helping, 4, hurting[:2])):
        with pytest.raises(Incompatible):
            helping_share(*wrong)


def test_histogram_of_shares() -> None:
    frame = share_histogram([0.0, 1.99, 2.0, 50.0, 100.0, math.nan])
    assert len(frame) == 50 and frame["count"].sum() == 5
    assert frame.loc[frame["count"] > 0, ["low", "count"]].to_numpy().tolist() == [[0, 2], [2, 1], [50, 1], [98, 1]]
    assert frame["percent"].sum() == pytest.approx(100)
    assert share_histogram([math.nan])["percent"].isna().all()


# Oscillations ---------------------------------------------------------------------------------------------------


def test_crossings_are_strict() -> None:
    x = np.array([[1.0, 1.0, 1e-200, 0.0], [-1.0, 0.0, -1e-200, 0.0], [2.0, -1.0, 1e-200, 0.0], [3.0, 1.0, 0.0, 0.0]])
    assert crossings(x).tolist() == [2, 1, 2, 0]
    assert crossings(x.T, axis=1).tolist() == [2, 1, 2, 0]
    assert crossings(x[:1]).tolist() == [0, 0, 0, 0] and crossings(x).dtype == np.int64
    assert crossings([1.0, math.nan, -1.0]).item() == 0


def test_turns_are_changes_of_direction() -> None:
    w = np.array([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 0.0], [2.0, -1.0]])
    assert turns(w).tolist() == [2, 0]  # a step of rest parts two directions
    assert turns(w.T, axis=1).tolist() == [2, 0]


def test_random_signs_cross_at_every_second_step() -> None:
    x = np.random.default_rng(0).normal(size=(400, 200))
    frame = per_event(crossings(x), 399)
    assert frame["steps_per_event"][0] == pytest.approx(frame["null_steps_per_event"][0], rel=0.02)


def test_per_event_with_and_without_dead_parameters() -> None:
    frame = per_event([10, 0, 0, 2], 60, alive=[True, True, False, True]).set_index("parameters")
    assert frame.loc["all"].tolist() == [4, 3.0, 20.0, 2.0]
    assert frame.loc["ever non-zero"].tolist() == [3, 4.0, 15.0, 2.0]
    assert per_event([0, 0], 60)["steps_per_event"].tolist() == [math.inf]
    none = per_event([0, 0], 60, alive=[False, False])
    assert none["n"].tolist() == [2, 0] and math.isnan(none["steps_per_event"][1])
    with pytest.raises(Incompatible, match="not of the same parameters"):
        per_event([1, 2], 60, alive=[True])


# Layers over runs -----------------------------------------------------------------------------------------------


def runs_of_layers() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    means = {"first": 0.3, "middle": -0.5, "last": 0.01}
    rows = [(f"run{r}", layer, m + 0.1 * rng.normal()) for r in range(10) for layer, m in means.items()]
    return pd.DataFrame(rows, columns=["run", "layer", "lca"])


def test_layers_over_runs_are_scipys() -> None:
    frame = runs_of_layers()
    found = layers_over_runs(frame).set_index("layer")
    assert found.index.tolist() == ["first", "middle", "last"]
    assert found["verdict"].tolist() == ["hurts", "helps", "undecided"]
    for layer, row in found.iterrows():
        x = frame.loc[frame["layer"] == layer, "lca"].to_numpy()
        student = stats.ttest_1samp(x, 0.0)
        interval = student.confidence_interval()
        assert (row["t"], row["p"]) == pytest.approx((student.statistic, student.pvalue))
        assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
        assert row["p_wilcoxon"] == pytest.approx(stats.wilcoxon(x).pvalue)
        assert row["n"] == 10 and row["hurts"] == (x > 0).mean()
        assert row["mean"] == pytest.approx(x.mean()) and row["std"] == pytest.approx(x.std(ddof=1))
    np.testing.assert_allclose(found["p_holm"], holm(found["p"]))


def test_verdicts_are_corrected() -> None:
    """A layer below the level alone, but not among twenty."""
    x = np.array([1.0, 2.0, 3.0, 4.0])
    one = pd.DataFrame({"run": range(4), "layer": "a", "lca": x})
    assert layers_over_runs(one)["verdict"].tolist() == ["hurts"]
    others = [pd.DataFrame({"run": range(4), "layer": f"l{i}", "lca": [1.0, -1.0, 2.0, -2.0]}) for i in range(19)]
    assert layers_over_runs(pd.concat([one, *others]))["verdict"][0] == "undecided"
    assert layers_over_runs(one, level=0.01)["verdict"].tolist() == ["undecided"]


def test_one_run_decides_nothing() -> None:
    found = layers_over_runs(pd.DataFrame({"run": [0, 0], "layer": ["a", "b"], "lca": [1.0, math.nan]}))
    assert found["n"].tolist() == [1, 0] and found["verdict"].tolist() == ["undecided", "undecided"]
    assert found["p_holm"].isna().all()
    assert layers_over_runs(pd.DataFrame({"run": [], "layer": [], "lca": []})).empty


def test_frames_that_do_not_fit() -> None:
    with pytest.raises(UnknownName, match='no column "lca"'):
        layers_over_runs(pd.DataFrame({"run": [0], "layer": ["a"]}))
    with pytest.raises(Incompatible, match="r has a more than once"):
        layers_over_runs(pd.DataFrame({"run": ["r", "r"], "layer": ["a", "a"], "lca": [1.0, 2.0]}))
