"""Panels over a shared axis, and how numbers and marks look in all pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import altair as alt
import numpy as np
import pandas as pd

from nbdyn.errors import NbdynError
from nbdyn.plots.offline import offline
from nbdyn.schema import PROVENANCE
from nbdyn.store.envelope import Envelope

COLORS = ("#3f7fd0", "#c8553d", "#2a9483", "#b07d18", "#7d63c4", "#63788f")
"""The colours of lines and panels; they read on a light and on a dark ground."""
ALARM = "#d5473c"
"""The colour of NaN marks."""
MUTED = "#6b6b76"
"""The colour of axes and subtitles."""
MAX_ROWS = 5000
"""Rows in a chart, at most (altair's own limit); beyond, values are reduced to the extremes of a bin."""
LOGARITHMIC = ("grad_norm", "update_ratio", "update_norm", "|grad|", "|dw|")
"""Quantities that are drawn on a logarithmic scale."""
PLAIN = (
    "datum.value == 0 || (abs(datum.value) >= 1e-3 && abs(datum.value) < 1e5) "
    "? format(datum.value, ',') : format(datum.value, '~e')"
)
"""A Vega expression: how numbers along an axis are written."""
AXIS: dict[str, Any] = {
    "domain": False, "ticks": False, "labelColor": MUTED, "titleColor": MUTED, "labelFontSize": 10,
    "titleFontSize": 10, "titleFontWeight": "normal", "labelPadding": 6,
}  # fmt: skip


def show_number(value: float) -> str:
    """A number for people: three significant digits.

    >>> show_number(0.031234), show_number(1.5e-7), show_number(float("nan"))
    ('0.0312', '1.50e-07', 'NaN')
    """
    if np.isnan(value):
        return "NaN"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.2e}"


def decimate(x: np.ndarray, y: np.ndarray, bins: int) -> pd.DataFrame:
    """At most `bins` rows that keep every extreme of y over x: columns x_first, x_last, low, high, mean, nan_count.

    Integer x is binned exactly as in `Envelope`; other x into `bins` equal intervals of their range, each shown at
    its middle.

    Args:
        x: positions, shape (n,), in any order; rows whose x is not finite are left out.
        y: values, shape (n,).
        bins: an even number.
    """
    keep = np.isfinite(x)
    x, y = x[keep], y[keep]
    start, scale = 0.0, 1.0
    if x.size and not np.issubdtype(x.dtype, np.integer):
        start, scale = float(x.min()), float(np.ptp(x)) / (bins - 1) or 1.0
        x = np.round((x - start) / scale)
    envelope = Envelope(bins)
    order = np.argsort(x, kind="stable")
    envelope.add(x[order], y[order])
    return pd.DataFrame(
        {
            "x_first": start + scale * envelope.first,
            "x_last": start + scale * envelope.last,
            "low": envelope.low,
            "high": envelope.high,
            "mean": envelope.mean,
            "nan_count": envelope.nan_count,
        }
    )


def panel(
    table: pd.DataFrame,
    title: str,
    x_title: str | None,
    *,
    color: str = COLORS[0],
    log: bool = False,
    size: tuple[int, int] = (640, 90),
    note: str = "",
) -> Any:
    """One small multiple: the band from least to greatest value, the mean as a line, NaN as ticks along the top.

    Args:
        table: rows of `decimate`; a column "series", if there is one, names the line that a row belongs to.
        title: the quantity, above the panel at the left.
        x_title: the name of the axis under the panel; None draws no axis (another panel below has it).
        color: of the line, where there is one line only.
        log: whether values are shown on a logarithmic scale; values that are not positive are then left out.
        size: width and height in points.
        note: a text above the panel at the right, such as the last value.
    """
    if log:
        table = table.assign(low=table.low.where(table.low > 0, table.low[table.low > 0].min()))
        table = table.assign(mean=table["mean"].where(table["mean"] > 0), high=table.high.where(table.high > 0))
    log = log and bool((table["mean"] > 0).any())
    marks = _powers(table) if log else {"tickCount": 4 if size[1] > 100 else 3, "labelExpr": PLAIN}
    y_axis = alt.Axis(title=None, gridColor="#e9e9ec", **marks, **AXIS)
    y = alt.Y("low:Q", axis=y_axis, scale=alt.Scale(type="log") if log else alt.Scale(zero=False))
    axis = None if x_title is None else alt.Axis(title=x_title, grid=False, tickCount=8, **AXIS)
    ends = alt.Scale(domain=[float(table.x_first.min()), float(table.x_last.max())], nice=False)
    table = table.assign(x=(table.x_first + table.x_last) / 2)
    base = alt.Chart(table).encode(x=alt.X("x:Q", axis=axis, scale=ends))
    legend = alt.Legend(symbolType="stroke", symbolOpacity=1)
    several = alt.Color("series:N", title=None, sort=None, scale=alt.Scale(range=list(COLORS)), legend=legend)
    stroke = several if "series" in table else alt.value(color)
    layers = [
        base.mark_area(opacity=0.25, clip=True).encode(y=y, y2="high:Q", color=stroke),
        base.mark_line(strokeWidth=1.25, clip=True).encode(y="mean:Q", color=stroke),
    ]
    if table.nan_count.any():
        ticks = base.transform_filter("datum.nan_count > 0").mark_tick(color=ALARM, thickness=1.5, size=7)
        layers.append(ticks.encode(y=alt.value(3)))
    layers.append(_text(title, "left", 0, "black" if "series" in table else color))
    layers.append(_text(note, "right", size[0], "black"))
    return alt.layer(*layers, view=alt.ViewBackground(stroke=None)).properties(width=size[0], height=size[1])


def _text(words: str, align: Literal["left", "right"], x: int, color: str) -> alt.Chart:
    """Words above a panel (an altair title would stand apart from a note at the other end)."""
    mark = alt.Chart(pd.DataFrame({"text": [words]})).mark_text(align=align, baseline="bottom", fontSize=11)
    return mark.encode(text="text:N", x=alt.value(x), y=alt.value(-6), color=alt.value(color))


def _powers(table: pd.DataFrame) -> dict[str, Any]:
    """Where a logarithmic axis is marked, and how: at most four powers of ten (Vega rounds the axis out to them)."""
    powers = np.arange(np.floor(np.log10(table.low.min())), np.ceil(np.log10(table.high.max())) + 1)
    return {
        "values": [float(f"1e{power:.0f}") for power in powers[:: -(-len(powers) // 4)]],
        "labelExpr": "format(datum.value, datum.value < 0.01 || datum.value > 100 ? '~e' : '~g')",
    }


def stack(panels: Sequence[Any], title: str, subtitle: str) -> Any:
    """The panels one under the other on a shared x axis, and what they show as the title."""
    return titled(alt.vconcat(*panels, spacing=12).resolve_scale(x="shared", color="shared"), title, subtitle)


def titled(chart: Any, title: str, subtitle: str | Sequence[str] = "") -> Any:
    """A chart that is drawn without network, with what it shows above it (nothing, where there is nothing to say)."""
    heading = alt.TitleParams(
        title, subtitle=subtitle, anchor="start", fontSize=13, subtitleColor=MUTED, subtitlePadding=5, offset=14
    )
    return offline(chart.properties(title=heading) if title or subtitle else chart)


def lines(
    frame: pd.DataFrame, names: Sequence[str], x: str, color: str | None = None, every: Sequence[str] = ()
) -> Any:
    """Small multiples over one axis: a panel for each quantity, a line for each value of one column.

    Args:
        frame: the rows.
        names: the quantities.
        x: the column of the shared axis.
        color: the column that tells lines apart.
        every: quantities whose NaN are marked; in others NaN means that there was no value.

    Raises:
        NbdynError: if there are more lines than a chart can hold.
    """
    groups = [(None, frame)] if color is None else list(frame.groupby(color, sort=False, observed=True))
    bins = min(800, MAX_ROWS // (len(groups) * len(names)) // 2 * 2)
    if bins < 10:
        raise NbdynError(
            f"{len(groups)} lines in {len(names)} panels are more than a chart can show; "
            "choose some with y=... or filter the frame first."
        )
    panels: list[Any] = []
    for i, name in enumerate(names):
        parts: list[pd.DataFrame] = []
        for key, rows in groups:
            values = numbers(rows[name])
            kept = slice(None) if name in every else ~np.isnan(values)
            table = decimate(rows[x].to_numpy()[kept], values[kept], bins)
            parts.append(table if color is None else table.assign(series=str(key)))
        table = pd.concat(parts, ignore_index=True)
        last = x if i == len(names) - 1 else None
        log = name in LOGARITHMIC
        panels.append(panel(table, name, last, color=COLORS[i % len(COLORS)], log=log))
    return stack(panels, *heading(frame))


def heading(frame: pd.DataFrame) -> tuple[str, str]:
    """What stands above a picture of a frame: the run, and the statement with the steps it read."""
    origin = frame.attrs.get(PROVENANCE, {})
    return str(origin.get("run", "")), ", ".join(f"{k} {origin[k]}" for k in ("query", "steps") if origin.get(k))


def numbers(column: Any) -> np.ndarray:
    """A column as float64, whatever pandas holds it in."""
    return column.to_numpy(dtype="float64", na_value=np.nan)
