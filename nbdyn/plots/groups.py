"""The picture of `group`: how many members are in each group."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from nbdyn.plots.labels import places, values_of
from nbdyn.plots.panels import AXIS, COLORS, show_number


def groups(frame: pd.DataFrame) -> tuple[Any, list[str]]:
    """Bars of counts over groups of equal width on a logarithmic scale, zeros first, NaN and Inf last.

    Weights are told apart by their tensor, where there are at most as many tensors as colours.

    Args:
        frame: as `group` gives it: labels of the member, value, group, low, high.
    """
    value = values_of(frame)[-1]
    table: Any = pd.DataFrame({"name": _names(frame), "order": _order(frame), "of": _tensors(frame)})
    table = table.groupby(["name", "order", "of"], sort=False).size().rename("count").reset_index()
    table = table.sort_values(["order", "of"])
    names = list(dict.fromkeys(table["name"]))
    y = alt.Axis(title="members", tickCount=4, gridColor="#e9e9ec", **AXIS)
    x = alt.X("name:N", sort=names, axis=alt.Axis(title=value, labelAngle=-30, **AXIS))
    parts = table["of"].nunique()
    stroke = alt.Color("of:N", title=None, scale=alt.Scale(range=list(COLORS))) if parts > 1 else alt.value(COLORS[0])
    drawn = alt.Chart(table).mark_bar().encode(x=x, y=alt.Y("count:Q", axis=y), color=stroke)
    totals = table.groupby("name", sort=False)["count"].sum().reset_index()
    text = alt.Chart(totals).mark_text(dy=-6, fontSize=9).encode(x=x, y="count:Q", text=alt.Text("count:Q", format=","))
    chart = alt.layer(drawn, text, view=alt.ViewBackground(stroke=None))
    return chart.properties(width=alt.Step(54), height=220), []


def _names(frame: Any) -> Any:
    """Bounds of the groups as words."""
    # NaN and the negative group nearest to 0 have the same number, but other bounds
    keys = pd.MultiIndex.from_frame(frame[["group", "low", "high"]])
    code, found = pd.factorize(keys)
    words = []
    for group, low, high in found:
        minus = "-" if group < 0 else ""
        usual = f"{minus}{show_number(low)} to {minus}{show_number(high)}"
        words.append("NaN, Inf" if np.isnan(low) else "0" if group == 0 else usual)
    return np.array(words, dtype=object)[code]


def _order(frame: pd.DataFrame) -> np.ndarray:
    """Groups from the most negative to the largest; NaN (group -1 without bounds) last."""
    return np.where(frame["low"].isna(), np.inf, frame["group"].to_numpy(np.float64))


def _tensors(frame: Any) -> Any:
    if "weight" not in frame.columns:
        return ""
    tensors: Any = places(frame["weight"])["tensor"]
    return tensors if tensors.nunique() <= len(COLORS) else ""
