"""`df.dyn`: it works where there is a step, says what is missing where not, and loses nothing."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import nbdyn
from nbdyn.accessor import Dyn, as_frame, dyn
from nbdyn.errors import NbdynError, UnknownName


@pytest.fixture
def steps() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    t = np.arange(20_000)
    loss = rng.random(t.size)
    loss[12_345] = 77.0
    loss[400] = np.nan
    frame = pd.DataFrame(
        {
            "step": t, "epoch": t // 1000, "loss": loss, "accuracy": np.nan, "grad_norm": rng.lognormal(size=t.size),
            "update_ratio": np.where(t % 50 == 0, 1e-3, np.nan), "skipped": False,
        }
    )  # fmt: skip
    frame.attrs["nbdyn"] = {"run": "fc", "uri": "runs/fc", "what": "steps", "steps": "0..19999", "version": "0"}
    return frame


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.melt(["step"], ["loss", "grad_norm"], var_name="quantity", value_name="value")


def rows(chart) -> list[dict]:
    return [row for table in chart.to_dict()["datasets"].values() for row in table if "low" in row]


def test_one_class_under_all_its_names(steps: pd.DataFrame):
    assert isinstance(steps.dyn, Dyn) and dyn is Dyn and nbdyn.dyn is Dyn
    assert nbdyn.dyn(steps).smooth(window=3).equals(steps.dyn.smooth(window=3))


def test_a_frame_without_step_says_what_to_type():
    frame = pd.DataFrame({"iter": [1], "loss": [2.0]})
    with pytest.raises(AttributeError) as caught:
        frame.dyn  # noqa: B018
    assert str(caught.value) == (
        "df.dyn needs a 'step' column; this frame has iter, loss. "
        "Use df.rename(columns={'iter': 'step'}) or nbdyn.as_frame(df, step='iter')."
    )
    assert not hasattr(frame, "dyn") and "dyn" not in dir(frame)
    assert hasattr(as_frame(frame, step="iter"), "dyn")


def test_as_frame_refuses_what_it_cannot_rename():
    with pytest.raises(UnknownName, match=r"no column 'itr'; did you mean \"iter\"\?"):
        as_frame({"iter": [1]}, step="itr")
    with pytest.raises(NbdynError, match="a column 'step' already"):
        as_frame({"iter": [1], "step": [2]}, step="iter")


def test_plot_keeps_spikes_and_fits_a_chart(steps: pd.DataFrame):
    chart = steps.dyn.plot()
    drawn = rows(chart)
    assert len(drawn) <= 5000
    assert 77.0 in [row["high"] for row in drawn]
    assert steps.grad_norm.min() in [row["low"] for row in drawn]
    texts = str(chart.to_dict())
    assert "'fc'" in texts and "steps 0..19999" in texts
    # loss, grad_norm, update_ratio; accuracy holds nothing. NaN is news in the loss only.
    assert len(chart.vconcat) == 3
    assert sum(row["nan_count"] for row in drawn) == 1
    assert chart._repr_mimebundle_()[0]["image/png"]


def test_plot_chooses_columns(steps: pd.DataFrame):
    assert len(steps.dyn.plot("loss").vconcat) == 1
    assert len(steps.dyn.plot("epoch").vconcat) == 1
    assert len(steps.dyn.plot(["loss", "grad_norm"], x="epoch").vconcat) == 2
    with pytest.raises(UnknownName, match=r"no 'los'; did you mean \"loss\"\?"):
        steps.dyn.plot("los")
    with pytest.raises(NbdynError, match="'accuracy' holds no finite number"):
        steps.dyn.plot("accuracy")
    with pytest.raises(NbdynError, match="no column of this frame holds a number"):
        steps[["step", "epoch"]].dyn.plot()


def test_plot_tells_lines_apart(steps: pd.DataFrame):
    both = pd.concat([steps.assign(run="a"), steps.assign(run="b", loss=2.0)])
    drawn = rows(both.dyn.plot("loss"))
    assert {row["series"] for row in drawn} == {"a", "b"}
    assert {row["mean"] for row in drawn if row["series"] == "b"} == {2.0}
    crowd = pd.DataFrame({"step": 0, "tensor": [f"t{i}" for i in range(600)], "grad_norm": 1.0})
    with pytest.raises(NbdynError, match="600 lines in 1 panels are more than a chart can show"):
        crowd.dyn.plot()


def test_plot_of_a_tidy_frame_and_of_an_index(steps: pd.DataFrame):
    assert rows(tidy(steps).dyn.plot()) == rows(steps.dyn.plot(["loss", "grad_norm"]))
    assert rows(steps.set_index("step").dyn.plot("loss")) == rows(steps.dyn.plot("loss"))


def test_smooth_by_ema_is_the_stated_formula(steps: pd.DataFrame):
    x = steps.loss.to_numpy()[:300]
    mean, expected = 0.0, []
    for t, value in enumerate(x):
        mean = 0.9 * mean + 0.1 * value
        expected.append(mean / (1 - 0.9 ** (t + 1)))
    got = steps.iloc[:300].dyn.smooth(ema=0.9)
    np.testing.assert_allclose(got.loss, expected, rtol=1e-10)
    assert got.attrs == steps.attrs
    assert got.epoch.equals(steps.epoch.iloc[:300]) and got.skipped.dtype == bool


def test_smooth_leaves_nan_where_it_was(steps: pd.DataFrame):
    got = steps.dyn.smooth(window=25).loss
    assert got.isna().sum() == 1 and np.isnan(got[400])
    assert got[401] == pytest.approx(steps.loss[377:402].mean())
    frame = pd.DataFrame({"step": [0, 1, 2], "loss": [1.0, np.inf, 3.0]})
    assert frame.dyn.smooth(ema=0.5).loss.tolist() == pytest.approx([1.0, np.inf, (0.5 * 0.5 + 0.5 * 3) / 0.75])


def test_smooth_keeps_lines_and_the_order_of_rows_apart():
    frame = pd.DataFrame({"run": [*"abab"], "step": [1, 0, 0, 1], "loss": [3.0, 10.0, 1.0, 30.0]}, index=[7, 5, 3, 1])
    got = frame.dyn.smooth(window=2)
    assert got.loss.tolist() == [2.0, 10.0, 1.0, 20.0]
    assert got.index.tolist() == [7, 5, 3, 1]
    assert frame.loss.tolist() == [3.0, 10.0, 1.0, 30.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({}, "one of the two"), ({"ema": 0.9, "window": 2}, "one of the two"), ({"ema": 1.0}, "weight of the past"),
     ({"window": 0}, "at least 1")],
)  # fmt: skip
def test_smooth_refuses_nonsense(steps: pd.DataFrame, arguments: dict, words: str):
    with pytest.raises(NbdynError, match=words):
        steps.dyn.smooth(**arguments)


def test_wide_undoes_tidy(steps: pd.DataFrame):
    long = tidy(steps)
    long.attrs = steps.attrs
    wide = long.dyn.wide()
    assert wide.index.names == ["step"] and wide.columns.tolist() == ["loss", "grad_norm"]
    pd.testing.assert_series_equal(wide.loss.reset_index(drop=True), steps.loss)
    assert wide.attrs == steps.attrs
    again = long.assign(run="a").dyn.wide()
    assert again.index.names == ["run", "step"]
    assert again.dyn.smooth(window=2).index.names == ["run", "step"]


def test_wide_refuses_what_has_no_shape(steps: pd.DataFrame):
    with pytest.raises(NbdynError, match="wide needs the columns quantity and value; this frame has step, epoch"):
        steps.dyn.wide()
    twice = pd.DataFrame({"step": [4, 4], "quantity": "loss", "value": [1.0, 2.0]})
    with pytest.raises(NbdynError, match="two values of 'loss' at step 4; aggregate them first"):
        twice.dyn.wide()


def test_answers_and_samples_take_part_without_steps():
    answer = pd.DataFrame({"rank": [1], "layer": ["fc"], "net dw": [0.5]})
    assert not hasattr(answer, "dyn")
    answer.attrs["nbdyn"] = {"query": "top 1 layers by net dw", "what": "top"}
    assert hasattr(answer, "dyn") and hasattr(pd.DataFrame({"sample": [3]}), "dyn")
    with pytest.raises(NbdynError, match="no column 'step' to go along; this frame has rank, layer, net dw"):
        answer.dyn.smooth(window=2)
    samples = pd.DataFrame({"sample": [0, 1], "mean_loss": [1.0, 2.0]})
    assert [row["high"] for row in rows(samples.dyn.plot("mean_loss"))] == [1.0, 2.0]


def test_a_tail_and_a_trend_of_a_column():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"step": np.arange(400), "x": rng.pareto(1.5, 400) + 1, "loss": rng.normal(size=400)})
    frame["loss"] -= 0.01 * frame["step"]
    fit = frame.dyn.tail("x", bootstrap=0)
    assert fit.family == "power law" and abs(fit["alpha"].value - 2.5) < 0.4
    assert frame.dyn.tail("loss", "Student t", bootstrap=0).family == "Student t"
    trend = frame.dyn.trend("loss").iloc[0]
    assert trend["p"] < 0.01 and trend["low"] < -0.01 < trend["high"]
    with pytest.raises(UnknownName, match=r"'los'.*loss"):
        frame.dyn.tail("los")
    with pytest.raises(UnknownName, match=r"'stabel'.*stable"):
        frame.dyn.tail("x", "stabel")
