"""Associations: against scipy, on known truths, with halves that do not overlap, at the level they claim."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pandas as pd
import pytest
from scipy import signal, stats

from nbdyn.accessor import dyn
from nbdyn.errors import Incompatible, UnknownName
from nbdyn.schema import PROVENANCE
from nbdyn.statistics import associations
from nbdyn.statistics.associations import BLOCKS, confirm, suggest
from nbdyn.statistics.testing import benjamini_hochberg


def autoregression(rng: np.random.Generator, shape: tuple[int, ...], r: float = 0.8) -> np.ndarray:
    noise = rng.normal(size=(*shape[:-1], shape[-1] + 100))
    return np.asarray(signal.lfilter([1.0], [1.0, -r], noise))[..., 100:]


def rows(size: int = 200, seed: int = 0) -> pd.DataFrame:
    """Independent rows: b follows a, c is the square of a, d is nothing."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=size)
    return pd.DataFrame({"a": a, "b": a + rng.normal(size=size), "c": a**2, "d": rng.normal(size=size)})


def steps(size: int = 400, seed: int = 0) -> pd.DataFrame:
    """One run: two series that share half of their variance, one that does not, and all with a trend."""
    rng = np.random.default_rng(seed)
    common, *own = autoregression(rng, (4, size))
    trend = np.arange(size) / 40
    table = {"step": np.arange(size), "x": common + own[0] + trend, "y": common + own[1] - trend, "z": own[2] + trend}
    return pd.DataFrame(table)


def runs(count: int, size: int, seed: int = 0) -> pd.DataFrame:
    parts = [steps(size, seed + number).assign(run=f"r{number}") for number in range(count)]
    return pd.concat(parts, ignore_index=True)


def test_of_independent_rows_rho_and_p_are_scipys():
    frame = rows()
    found = suggest(frame, list("abcd")).set_index(["x", "y"])
    half = np.random.default_rng(0).permutation(len(frame)) % 2 == 0
    for pair in found.index:
        reference = stats.spearmanr(frame.loc[half, pair[0]], frame.loc[half, pair[1]])
        assert found.loc[pair, "rho"] == pytest.approx(reference.statistic)
        assert found.loc[pair, "p_rho"] == pytest.approx(reference.pvalue, abs=0.04)
        assert found.loc[pair, "rho_plain"] == pytest.approx(found.loc[pair, "rho"])
    assert found["n"].tolist() == [100] * 6
    assert found["p"].to_numpy() == pytest.approx(np.minimum(1, 2 * found[["p_rho", "p_mi"]].min(axis=1)))
    assert found["p_bh"].to_numpy() == pytest.approx(benjamini_hochberg(found["p"]))


def test_what_is_no_line_is_seen_by_the_information():
    found = suggest(rows(), list("abcd"))
    assert set(map(tuple, found.loc[:1, ["x", "y"]].to_numpy())) == {("a", "b"), ("a", "c")}
    square = found.set_index(["x", "y"]).loc[("a", "c")]
    assert square["p_mi"] < 0.001 < 0.05 < square["p_rho"] and square["mi"] > 0.4
    assert found["p"].is_monotonic_increasing
    assert found.set_index(["x", "y"]).loc[("b", "d"), "p"] > 0.05


def test_mutual_information_of_known_tables():
    """A bijection of ranks: log b nats, less Miller's bias; by hand of a table of two by two."""
    n = 400
    a = np.random.default_rng(0).normal(size=n)
    found = suggest(pd.DataFrame({"a": a, "b": np.exp(a)}), ["a", "b"])
    bins = round((n / 2) ** (1 / 3))
    table = np.bincount(((np.arange(n // 2) + 0.5) * bins // (n // 2)).astype(int)) / (n / 2)
    assert found["mi"][0] == pytest.approx(-(table * np.log(table)).sum() - (bins - 1) ** 2 / n)
    assert found["rho"][0] == pytest.approx(1) and np.isnan(found["low"][0])
    from nbdyn.statistics.associations import _information

    x, y = np.repeat([0, 0, 1, 1], [4, 1, 2, 3])[None], np.repeat([0, 1, 0, 1], [4, 1, 2, 3])
    share, expected = np.array([0.4, 0.1, 0.2, 0.3]), np.array([0.3, 0.2, 0.3, 0.2])
    assert _information(x, y, 2)[0] == pytest.approx((share * np.log(share / expected)).sum())


def test_given_the_step_is_the_partial_rank_correlation():
    frame = steps()
    found = suggest(frame, ["x", "y", "z"]).set_index(["x", "y"])
    half = frame[np.arange(400) * BLOCKS // 400 % 2 == 0]
    r = half[["x", "y", "step"]].rank().corr()
    partial = (r.loc["x", "y"] - r.loc["x", "step"] * r.loc["y", "step"]) / np.sqrt(
        (1 - r.loc["x", "step"] ** 2) * (1 - r.loc["y", "step"] ** 2)
    )
    assert found.loc[("x", "y"), "rho"] == pytest.approx(partial)
    assert found.loc[("x", "y"), "rho_plain"] == pytest.approx(r.loc["x", "y"]) and r.loc["x", "y"] < 0 < partial
    # the trend alone brings x and z together, and only what is asked given the step is not fooled
    assert found.loc[("x", "z"), "rho_plain"] > 0.6 and found.loc[("x", "z"), "p"] > 0.05 > found.loc[("x", "y"), "p"]


def test_halves_do_not_share_a_row():
    """A value of the held-back half changes nothing of what is explored, and the other way round."""
    for frame, key in ((steps(), "block"), (runs(5, 40), "run"), (rows(), "row")):
        columns = [name for name in frame if name not in ("step", "run")]
        if key == "block":
            explored = np.arange(400) * BLOCKS // 400 % 2 == 0
        elif key == "run":
            explored = frame["run"].isin(["r0", "r2", "r4"]).to_numpy()
        else:
            explored = np.random.default_rng(0).permutation(200) % 2 == 0
        noise = np.random.default_rng(9).normal(size=(len(frame), len(columns)))
        for mine, same, other in ((explored, suggest, confirm), (~explored, confirm, suggest)):
            changed = frame.copy()
            changed.loc[~mine, columns] += noise[~mine]
            pair = columns[:2]
            ask = {suggest: lambda f, c=columns: suggest(f, c), confirm: lambda f, c=columns, p=pair: confirm(f, c, *p)}
            assert ask[same](frame).equals(ask[same](changed))
            assert not ask[other](frame).equals(ask[other](changed))


def test_halves_are_named():
    assert suggest(runs(5, 40), ["x", "y"])["half"][0] == "explored: 3 of 5 runs"
    assert confirm(runs(5, 40), ["x", "y"], "x", "y")["half"][0] == "held back: 2 of 5 runs"
    assert suggest(runs(3, 80), ["x", "y"])["half"][0] == "explored: every second of 8 blocks of steps"
    assert confirm(rows(), ["a", "b"], "b", "a")["half"][0] == "held back: a random half of the rows"


def test_a_pair_that_is_there_is_confirmed_and_chance_is_not():
    """Of 30 columns of noise the best pair of 435 looks good where it was found; held back, it does not."""
    rng = np.random.default_rng(3)
    noise = pd.DataFrame(autoregression(rng, (30, 400), 0.5).T, columns=[f"c{n}" for n in range(30)])
    noise["step"] = np.arange(400)
    names = [name for name in noise if name != "step"]
    best = suggest(noise, names).iloc[0]
    assert best["p"] < 0.02 and best["p_bh"] > 0.05
    assert confirm(noise, names, best["x"], best["y"])["p"][0] > 0.05
    real = confirm(steps(800), ["x", "y", "z"], "x", "y").iloc[0]
    assert real["p"] < 0.05 and 0 < real["low"] < real["rho"] < real["high"] < 1
    assert "p_bh" not in real.index


def test_several_runs_are_ranked_within_each():
    """Levels that differ between runs say nothing of what goes together within them."""
    frame = runs(4, 100)
    number = frame["run"].str[1:].astype(int)
    shifted = frame.assign(x=frame["x"] + 100 * number, z=frame["z"] - 50 * number)
    columns = ["x", "y", "z"]
    pd.testing.assert_frame_equal(suggest(frame, columns), suggest(shifted, columns))
    means = [
        stats.spearmanr(part["x"], part["y"]).statistic for name, part in frame.groupby("run") if name in ("r0", "r2")
    ]
    found = suggest(frame, columns).set_index(["x", "y"])
    assert found.loc[("x", "y"), "rho_plain"] == pytest.approx(np.mean(means))


def test_a_table_of_runs_has_a_row_a_run():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"run": [f"r{n}" for n in range(40)], "step": 99, "lr": rng.random(40)})
    table["loss"] = table["lr"] + 0.1 * rng.random(40)
    found = suggest(table, ["lr", "loss"]).iloc[0]
    assert found["n"] == 20 and found["p"] < 0.01
    mine = table.iloc[::2]
    assert found["rho"] == pytest.approx(stats.spearmanr(mine["lr"], mine["loss"]).statistic)


@pytest.mark.parametrize(("r", "count", "size"), [(0.0, 0, 80), (0.9, 1, 400), (0.8, 4, 80)])
def test_independent_columns_are_found_at_the_level(r: float, count: int, size: int):
    """120 pairs of independent columns: at p <= 0.05 in 5 %, with a standard error of 2 %; intervals cover 95 %."""
    rng = np.random.default_rng(5)
    p, covered = [], []
    for _ in range(120):
        a, b = (autoregression(rng, (max(count, 1), size), r).reshape(-1) for _ in "ab")
        frame = pd.DataFrame({"a": a, "b": b})
        if count:
            frame["step"] = np.tile(np.arange(size), count)
            frame["run"] = np.repeat(np.arange(count), size)
        found = suggest(frame, ["a", "b"]).iloc[0]
        p.append(found["p"])
        covered.append(found["low"] <= 0 <= found["high"])
    assert np.mean(np.array(p) <= 0.05) <= 0.05 + 3 * 0.02
    assert np.mean(np.array(p) <= 0.3) >= 0.3 - 4 * 0.042
    assert 0.88 <= np.mean(covered) <= 0.995


def test_all_shifts_at_once_are_those_of_each():
    """The convolutions count what shifting the columns by hand counts; of several series, one shift for each."""
    for frame in (steps(120).iloc[::-1], runs(5, 31)):
        found = suggest(frame, ["x", "y", "z"]).set_index(["x", "y"]).loc[("x", "z")]
        usable = associations._usable(frame, ["x", "y", "z"])[1]
        half = associations._half(usable, ["x", "y", "z"], explored=True, seed=0)
        assert half.series is not None
        ranks = np.concatenate([stats.rankdata(half.table[part], axis=0) for part in half.series])
        free = associations._given_steps(ranks, half.steps, half.series)
        z, codes = associations._standardized(free, half.series), associations._binned(free, half.series, 4)
        shifts = associations._shifts(half.series, np.random.default_rng(0))
        rho, mi = associations._shifted(z[:, [0, 2]], codes[:, [0, 2]], 4, half.series, shifts)
        for draw in range(0, len(shifts), 29):
            place = np.concatenate([
                np.roll(np.arange(part.start, part.stop), -by)
                for part, by in zip(half.series, shifts[draw], strict=True)
            ])  # fmt: skip
            assert rho[draw] == pytest.approx(z[place, 0] @ z[:, 2])
            assert mi[draw] == pytest.approx(associations._information(codes[None, place, 0], codes[:, 2], 4)[0])
        assert found["p_rho"] == np.mean(np.append(np.abs(rho), np.inf) >= abs(found["rho"]) - 1e-12)


def test_long_frames_need_little_memory():
    """All rearrangements at once took 16 bytes for each row and draw: 3 GB here."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=200_000), "b": rng.normal(size=200_000), "step": np.arange(200_000)})
    tracemalloc.start()
    suggest(frame, ["a", "b"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6


def test_what_is_left_out_is_said():
    frame = steps().assign(flat=1.0, rare=np.where(np.arange(400) % 50 == 0, 1.0, np.nan), few=np.nan)
    frame.loc[3, "x"], frame.loc[5, "y"] = np.inf, np.nan
    frame.attrs[PROVENANCE] = {"run": "fc"}
    found = suggest(frame, ["x", "y", "flat", "rare", "few"])
    assert len(found) == 1 and found["n"][0] + confirm(frame, ["x", "y"], "x", "y")["n"][0] == 398
    note = found.attrs[PROVENANCE]["note"]
    assert note.startswith("exploratory: 1 pairs were looked at") and note.endswith("left out: flat, rare, few")
    assert found.attrs[PROVENANCE]["run"] == "fc"


def test_what_cannot_be_asked():
    frame = steps()
    with pytest.raises(Incompatible, match="two columns of numbers that vary; there are 1"):
        suggest(frame, ["x"])
    with pytest.raises(Incompatible, match="step 0 is there twice: rows of several layers"):
        suggest(pd.concat([frame, frame]), ["x", "y"])
    with pytest.raises(Incompatible, match="several rows of a run and no column 'step'"):
        suggest(runs(2, 40).drop(columns="step"), ["x", "y"])
    with pytest.raises(Incompatible, match="rows are left in a half"):
        suggest(frame.iloc[:20], ["x", "y"])
    for columns, message in (
        (["x", "x"], "named twice"),
        (["x", "step"], "'step' is no quantity"),
        (["x", "t"], "'t' h"),
    ):
        with pytest.raises(Incompatible, match=message):
            suggest(frame.assign(t="text"), columns)
    with pytest.raises(UnknownName, match="the frame has no column 'xx'"):
        suggest(frame, ["x", "xx"])
    with pytest.raises(UnknownName, match="there is no column 'w' to associate"):
        confirm(frame, ["x", "y"], "x", "w")
    with pytest.raises(Incompatible, match="'x' goes with itself"):
        confirm(frame, ["x", "y"], "x", "x")


def test_the_accessor_takes_tidy_and_wide_frames():
    frame = steps()
    tidy = frame.melt("step", var_name="quantity")
    found = dyn(frame).suggest()
    assert {*found["x"], *found["y"]} == {"x", "y", "z"}
    pd.testing.assert_frame_equal(found, dyn(tidy).suggest())
    pd.testing.assert_frame_equal(found, dyn(frame.set_index("step")).suggest())
    one = dyn(frame).confirm("x", "y")
    assert one["half"][0].startswith("held back") and one.attrs[PROVENANCE]["note"].startswith("one pair")
