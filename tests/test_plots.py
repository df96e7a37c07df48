"""Charts show themselves without network, stay altair charts, and leave the user's settings alone."""

from __future__ import annotations

import altair as alt
import numpy as np
import pandas as pd
import pytest

from nbdyn import plots
from nbdyn.settings import options


@pytest.fixture
def chart() -> plots.OfflineChart:
    return plots.offline(alt.Chart(pd.DataFrame({"x": [1, 2], "y": [3, 4]})).mark_line().encode(x="x", y="y"))


def test_the_bundle_is_a_picture_of_the_right_size(chart: plots.OfflineChart):
    data, metadata = chart.properties(width=300, height=100)._repr_mimebundle_()
    assert data["image/png"].startswith(b"\x89PNG") and set(data) == {"image/png", "text/plain"}
    assert 300 < metadata["image/png"]["width"] < 400 and 100 < metadata["image/png"]["height"] < 200


def test_it_stays_an_altair_chart(chart: plots.OfflineChart, tmp_path):
    same = alt.Chart(pd.DataFrame({"x": [1, 2], "y": [3, 4]})).mark_line().encode(x="x", y="y")
    assert chart.to_dict() == same.to_dict()
    for built, kind in [
        (chart + chart, alt.LayerChart),
        (chart & chart, alt.VConcatChart),
        (chart | chart, alt.HConcatChart),
        ((chart & chart) | chart, alt.HConcatChart),
        (chart.facet("x:N"), alt.FacetChart),
        (chart.interactive(), alt.Chart),
        (chart.properties(title="a"), alt.Chart),
        (chart.configure(font="serif"), alt.Chart),
        (chart.transform_filter("datum.x > 1"), alt.Chart),
    ]:
        assert isinstance(built, kind)
        assert "image/png" in built._repr_mimebundle_()[0]
    chart.save(tmp_path / "chart.html")
    assert plots.offline(chart) is chart
    with pytest.raises(TypeError, match="takes an altair chart, not dict"):
        plots.offline({})


def test_a_renderer_that_the_user_chose_is_left_to_work(chart: plots.OfflineChart, monkeypatch: pytest.MonkeyPatch):
    assert alt.renderers.active == "default"
    with alt.renderers.enable("mimetype"):
        assert "image/png" not in chart._repr_mimebundle_()
    assert alt.renderers.active == "default"
    monkeypatch.setattr(options, "static_png", False)
    assert "text/html" in chart._repr_mimebundle_()


def test_decimate_over_real_numbers_keeps_extremes():
    x = np.linspace(0.0, 9.5, 10_001)[::-1]
    y = np.sin(x)
    y[5000] = -8.0
    x[3] = np.nan
    table = plots.decimate(x, y, 100)
    assert len(table) <= 100 and table.low.min() == -8.0
    assert table.x_first.min() == pytest.approx(0) and table.x_last.max() == pytest.approx(9.5)
    assert plots.decimate(np.array([2.5]), np.array([1.0]), 10)[["x_first", "high"]].values.tolist() == [[2.5, 1.0]]


def test_a_panel_lives_with_zeros_and_constants():
    table = plots.decimate(np.arange(4), np.array([0.0, 1e-3, 10.0, np.nan]), 10)
    for log in (True, False):
        assert plots.to_png(plots.stack([plots.panel(table, "a", "step", log=log)], "", ""))
    zeros = table.assign(low=0.0, high=0.0, mean=0.0)
    assert plots.to_png(plots.stack([plots.panel(zeros, "a", "step", log=True)], "t", "s"))
