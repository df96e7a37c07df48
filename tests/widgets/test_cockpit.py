"""The cockpit without a browser: what it takes in, what it sends, what it shows where no widget runs."""

from __future__ import annotations

import sys
import threading
import time

import altair as alt
import numpy as np
import pandas as pd
import pytest
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell

from nbdyn.errors import NbdynError, NotRecorded
from nbdyn.query.language import parse
from nbdyn.settings import options
from nbdyn.widgets import Cockpit
from nbdyn.widgets import cockpit as module


def series(n: int, start: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n + start)
    steps = np.arange(start, start + n)
    return {
        "step": steps,
        "loss": rng.normal(size=n),
        "lr": np.full(n, 0.1),
        "grad_norm": rng.lognormal(size=n),
        "update_ratio": np.where(steps % 50 == 0, rng.lognormal(size=n), np.nan),
    }


def brute_force(columns: dict[str, np.ndarray], name: str, width: int) -> pd.DataFrame:
    frame = pd.DataFrame({"step": columns["step"], "value": columns[name]})
    if name == "update_ratio":
        frame = frame.dropna()
    frame["nan_count"] = frame["value"].isna()
    groups = frame.groupby((frame["step"] - frame["step"].min()) // width)
    return pd.DataFrame(
        {
            "step_first": groups["step"].min(), "step_last": groups["step"].max(),
            "low": groups["value"].min(), "high": groups["value"].max(), "mean": groups["value"].mean(),
            "nan_count": groups["nan_count"].sum(),
        }
    ).reset_index(drop=True)  # fmt: skip


@pytest.mark.parametrize(("n", "width"), [(1, 1), (700, 1), (801, 2), (12_345, 16)])
def test_frame_equals_brute_force(n: int, width: int):
    columns = series(n)
    columns["loss"][n // 2] = np.nan
    cockpit = Cockpit("runs/a")
    for at in range(0, n, 97):
        cockpit.feed({name: values[at : at + 97] for name, values in columns.items()})
    cockpit.finish("complete")
    frame = cockpit.frame()
    assert frame.columns.tolist() == ["quantity", "step_first", "step_last", "low", "high", "mean", "nan_count"]
    for name in ("loss", "lr", "grad_norm", "update_ratio"):
        own = frame[frame.quantity == name].drop(columns="quantity").reset_index(drop=True)
        step_width = width if name != "update_ratio" else cockpit._envelopes[name].width
        pd.testing.assert_frame_equal(own, brute_force(columns, name, step_width), check_dtype=False)
    assert frame.attrs["nbdyn"]["steps"] == f"0..{n - 1}"


def test_what_is_sent_stays_small_however_long_the_run():
    cockpit = Cockpit("runs/a")
    for start in range(0, 2_000_000, 250_000):
        cockpit.feed(series(250_000, start))
    cockpit.finish("complete")
    assert cockpit.wire["meta"]["n"] == 2_000_000
    assert len(cockpit.wire["data"]) <= 4 * 6 * 800 * 4 == 76_800
    assert cockpit.frame().step_last.max() == 1_999_999


def test_at_most_five_frames_a_second_and_the_last_always_comes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "INTERVAL", 0.05)
    cockpit = Cockpit("runs/a")
    sent: list[tuple[float, int]] = []
    cockpit.observe(lambda change: sent.append((time.monotonic(), change["new"]["meta"]["n"])), names=["wire"])
    for at in range(300):
        cockpit.feed(series(10, 10 * at))
        time.sleep(0.001)
    end = time.monotonic() + 5
    while sent[-1][1] != 3000 and time.monotonic() < end:  # a timer brings the rest, with no further call
        time.sleep(0.01)
    assert sent[-1][1] == 3000
    gaps = np.diff([at for at, _ in sent])
    assert len(sent) >= 3 and gaps.min() > 0.045
    assert cockpit.wire["meta"]["status"] == "live"
    cockpit.finish("interrupted")
    assert sent[-1][1] == 3000 and cockpit.wire["meta"]["status"] == "interrupted"


def test_fed_from_one_thread_and_read_from_another():
    cockpit = Cockpit("runs/a")
    errors: list[BaseException] = []

    def write() -> None:
        try:
            for at in range(400):
                cockpit.feed(series(50, 50 * at))
        except BaseException as error:
            errors.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        frame = cockpit.frame()
        loss = frame[frame.quantity == "loss"]
        assert (loss.step_first.to_numpy()[1:] == loss.step_last.to_numpy()[:-1] + 1).all()
    writer.join()
    cockpit.finish("complete")
    assert not errors
    assert cockpit.wire["meta"]["n"] == 20_000


def test_nan_is_counted_and_sent_as_json():
    cockpit = Cockpit("runs/a")
    cockpit.feed({"step": [0, 1, 2], "loss": [1.0, np.inf, np.nan], "update_ratio": [0.1, np.nan, np.nan]})
    cockpit.finish("complete")
    loss, _, _, ratio = cockpit.wire["meta"]["series"]
    assert (loss["nan"], loss["last"]) == (2, None)
    assert (ratio["n"], ratio["nan"], ratio["last"]) == (1, 0, 0.1)  # NaN there means: not measured at this step
    assert cockpit.frame().nan_count.tolist() == [0, 1, 1, 0]


def test_wrong_columns_are_refused():
    cockpit = Cockpit("runs/a")
    with pytest.raises(NbdynError, match=r"'los'; did you mean \"loss\"\?"):
        cockpit.feed({"step": [0], "los": [1.0]})
    with pytest.raises(NbdynError, match='needs "step" beside loss'):
        cockpit.feed({"loss": [1.0]})


def test_the_constructor_is_strict():
    with pytest.raises(TypeError, match=r"Cockpit has no argument 'titel'; did you mean \"title\"\?"):
        Cockpit("runs/a", titel="x")  # type: ignore[call-arg]


def test_from_a_frame_of_steps():
    columns = series(100)
    steps = pd.DataFrame(columns | {"epoch": 0, "accuracy": np.nan, "loss": np.nan})
    cockpit = Cockpit.from_frame(steps, "runs/a", uri="runs/a", status="killed")
    assert cockpit.query == "show lr, |grad|, update_ratio"  # the loss was not recorded
    assert cockpit.wire["meta"]["status"] == "killed"
    whole = Cockpit.from_frame(pd.DataFrame(series(3)), "a").query
    assert whole == "show loss, lr, |grad|, update_ratio" == str(parse(whole))
    empty = Cockpit.from_frame(pd.DataFrame(series(0)), "a")
    assert len(empty.frame()) == 0 and empty._repr_mimebundle_()[0]["text/plain"] == "cockpit of a, no steps yet"


def test_code_opens_the_same_view(monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    class Opened:
        def cockpit(self) -> None:
            asked.append("cockpit")

    fake = type(sys)("nbdyn")
    fake.open = lambda uri: asked.append(uri) or Opened()  # type: ignore[attr-defined]
    code = Cockpit("a", uri="runs/it's a").code()
    monkeypatch.setitem(sys.modules, "nbdyn", fake)
    exec(compile(code, "code", "exec"), {})
    assert asked == ["runs/it's a", "cockpit"]
    with pytest.raises(NotRecorded, match="shows no run on disk"):
        Cockpit("a").code()


def test_the_chart_is_valid_and_drawn():
    cockpit = Cockpit("runs/a")
    with pytest.raises(NotRecorded, match="no step yet"):
        cockpit.chart()
    columns = series(3000)
    columns["grad_norm"][7] = 0.0  # a log scale must live with it
    columns["loss"][100:110] = np.nan
    cockpit.feed(columns)
    specification = cockpit.chart().to_dict()
    alt.Chart.from_dict(specification)
    assert sum(len(rows) for rows in specification["datasets"].values()) < 5000
    assert cockpit.png()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_bundle_has_view_picture_and_text(monkeypatch: pytest.MonkeyPatch):
    cockpit = Cockpit("runs/fc")
    data, metadata = cockpit._repr_mimebundle_()
    assert set(data) == {"application/vnd.jupyter.widget-view+json", "text/plain"}  # nothing to draw yet
    assert data["text/plain"] == "cockpit of runs/fc, no steps yet"
    cockpit.feed(series(880))
    data, metadata = cockpit._repr_mimebundle_()
    assert data["text/plain"] == "cockpit of runs/fc, steps 0..879"
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == cockpit.model_id
    assert metadata["image/png"]["width"] > 600 and len(data["image/png"]) < 200_000
    monkeypatch.setattr(options, "static_png", False)
    assert "image/png" not in cockpit._repr_mimebundle_()[0]


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    shell = InteractiveShell.instance()
    publisher = CapturingDisplayPublisher()
    monkeypatch.setattr(shell, "display_pub", publisher)
    yield publisher.outputs
    InteractiveShell.clear_instance()


def test_finish_renews_the_saved_picture_once_shown(published: list[dict]):
    cockpit = Cockpit("runs/fc")
    cockpit.feed(series(880))
    cockpit.finish("complete")
    assert published == []  # never shown: nothing to renew
    cockpit._ipython_display_()
    cockpit.finish("complete")
    first, second = published
    assert second["update"] and first["transient"] == second["transient"]
    view = "application/vnd.jupyter.widget-view+json"
    assert first["data"][view] == second["data"][view]
    thread = threading.Thread(target=cockpit.finish, args=("stopped",))
    thread.start()
    thread.join()
    assert len(published) == 2 and cockpit.wire["meta"]["status"] == "stopped"


def test_a_picture_that_fails_is_said_in_the_widget(published: list[dict], monkeypatch: pytest.MonkeyPatch):
    cockpit = Cockpit("runs/fc")
    cockpit._ipython_display_()
    cockpit.feed(series(10))
    monkeypatch.setattr(Cockpit, "chart", lambda self: 1 / 0)
    cockpit.finish("complete")
    assert cockpit.error == "The static picture could not be renewed: division by zero"
