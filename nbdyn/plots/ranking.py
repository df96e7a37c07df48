"""Pictures of `top`: bars for one list, panels or a heat map for a few, maps and counts for a list of each weight."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from nbdyn.plots.grids import heat_map, weight_maps
from nbdyn.plots.labels import label, label_groups, values_of
from nbdyn.plots.panels import AXIS, COLORS, MAX_ROWS, PLAIN, decimate, panel, show_number

BARS = 50
"""Bars under each other, at most; what is longer is drawn as a curve over the rank."""
PANELS = 12
"""Lists that are drawn as panels of bars, at most."""
LISTS = 60
"""Lists that are drawn as lines of a heat map, at most."""


def ranking(frame: pd.DataFrame) -> tuple[Any, list[str]]:
    """The picture of a ranking, and what is to be said about it.

    Args:
        frame: as `top` gives it: labels of the list, rank, labels of the member, value.
    """
    names = list(map(str, frame.columns))
    at = names.index("rank")
    value = values_of(frame)[-1]
    lists, members = label_groups(names[:at]), label_groups(names[at + 1 :])
    member = _joined(frame, members)
    if not lists:
        return _one_list(frame, member, value)
    if lists == [["parameter", "weight"]]:
        return _of_weights(frame, member, value)
    table: Any = pd.DataFrame(
        {"list": _joined(frame, lists), "rank": frame["rank"], "member": member, "value": frame[value]}
    )
    firsts = table["list"].drop_duplicates()
    if len(firsts) <= PANELS and table["rank"].max() <= BARS:
        return _panels(table, value), []
    return _lines(table, value)


def _joined(frame: pd.DataFrame, groups: list[list[str]]) -> Any:
    words = [label(frame, group) for group in groups]
    joined = words[0]
    for more in words[1:]:
        joined = joined + ", " + more
    return joined


def _one_list(frame: Any, member: Any, value: str) -> tuple[Any, list[str]]:
    if len(frame) <= BARS:
        return bars(member, frame[value].to_numpy(np.float64), value), []
    table = decimate(frame["rank"].to_numpy(), frame[value].to_numpy(np.float64), 800)
    positive = bool((frame[value] > 0).all())
    return panel(table, value, "rank", log=positive, size=(560, 220)), [f"first: {', '.join(member.head(3))}"]


def bars(names: Any, values: np.ndarray, title: str, *, width: int = 380, color: str = COLORS[0]) -> Any:
    """Horizontal bars in the order given, each with its number."""
    numbers = [show_number(value) for value in values]
    table = pd.DataFrame({"name": names.astype(str).to_numpy(), "value": values, "number": numbers})
    # the label stands at the larger end, also of a negative value
    table["end"] = np.maximum(table["value"], 0)
    x_axis, y_axis = (
        alt.Axis(title=title, grid=False, tickCount=4, labelExpr=PLAIN, **AXIS),
        alt.Axis(title=None, **AXIS),
    )
    base = alt.Chart(table).encode(y=alt.Y("name:N", sort=None, axis=y_axis))
    drawn = base.mark_bar(color=color, height={"band": 0.75}).encode(x=alt.X("value:Q", axis=x_axis))
    text = base.mark_text(align="left", dx=4, fontSize=9).encode(x="end:Q", text="number:N")
    return alt.layer(drawn, text, view=alt.ViewBackground(stroke=None)).properties(width=width, height=alt.Step(15))


def _panels(table: pd.DataFrame, value: str) -> Any:
    """Bars for each list, on the same scale."""
    charts = []
    for name, rows in table.groupby("list", sort=False):
        chart = bars(rows["member"], rows["value"].to_numpy(np.float64), value, width=200)
        charts.append(chart.properties(title=alt.Title(str(name), anchor="start", fontSize=11, fontWeight="normal")))
    return alt.concat(*charts, columns=3).resolve_scale(x="shared", y="independent")


def _lines(table: Any, value: str) -> tuple[Any, list[str]]:
    """A heat map: a line for each list, its ranks from left to right."""
    firsts = table[table["rank"] == 1]
    notes: list[str] = []
    if len(firsts) > LISTS:
        kept = firsts.nlargest(LISTS, "value")["list"]
        notes.append(f"the {LISTS} of {len(firsts)} lists with the largest first value")
        table = table[table["list"].isin(kept)]
    ranks = max(1, MAX_ROWS // max(1, table["list"].nunique()))
    if table["rank"].max() > ranks:
        notes.append(f"the first {ranks} ranks")
        table = table[table["rank"] <= ranks]
    table = table.rename(columns={"list": "row", "rank": "column"})
    table["text"] = table["member"]
    return heat_map(table, value, "", "rank", texts=bool(table["column"].max() <= 8)), notes


def _of_weights(frame: Any, member: Any, value: str) -> tuple[Any, list[str]]:
    """Where the first value is large, over rows and columns of the weights; beside it who is in the most lists."""
    firsts = frame["rank"] == 1
    maps, notes = weight_maps(frame[firsts], value)
    counts = member.value_counts().head(20)
    lists = int(firsts.sum())
    among = bars(counts.index.to_series(), counts.to_numpy(np.float64), f"in how many of {lists:,} lists", width=180)
    return alt.hconcat(maps, among, spacing=30), [f"colour: the first of each list, {value}", *notes]
