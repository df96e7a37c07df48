"""Altair charts that show themselves as a picture without network, and the panels that nbdyn draws with them."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import altair as alt
import numpy as np
import pandas as pd

from nbdyn.settings import options
from nbdyn.store.envelope import Envelope

COLORS = ("#3f7fd0", "#c8553d", "#2a9483", "#b07d18", "#7d63c4", "#63788f")
"""The colours of lines and panels; they read on a light and on a dark ground."""
ALARM = "#d5473c"
"""The colour of NaN marks."""
_MUTED = "#6b6b76"
_FONT = "Helvetica Neue, Helvetica, Arial, sans-serif"
_AXIS: dict[str, Any] = {
    "domain": False, "ticks": False, "labelColor": _MUTED, "titleColor": _MUTED, "labelFontSize": 10,
    "titleFontSize": 10, "titleFontWeight": "normal", "labelPadding": 6,
}  # fmt: skip


class _Offline:
    """What the classes below add to altair's: the picture, and operators that give charts of the same kind."""

    def _repr_mimebundle_(self, *args: Any, **kwargs: Any) -> Any:
        """A PNG (drawn twice as fine as it is shown) and a line of text.

        A renderer that the user chose, such as `alt.renderers.enable("jupyter", offline=True)`, is left to its work.
        """
        if alt.renderers.active != "default" or not options.static_png:
            return super()._repr_mimebundle_(*args, **kwargs)  # type: ignore[misc]
        picture = to_png(self)
        return {"image/png": picture, "text/plain": f"altair {type(self).__name__}"}, {"image/png": png_size(picture)}

    def __add__(self, other: Any) -> Any:
        return offline(super().__add__(other))  # type: ignore[misc]

    def __and__(self, other: Any) -> Any:
        return offline(super().__and__(other))  # type: ignore[misc]

    def __or__(self, other: Any) -> Any:
        return offline(super().__or__(other))  # type: ignore[misc]

    def facet(self, *args: Any, **kwargs: Any) -> Any:
        """As altair's, the result drawn without network too."""
        return offline(super().facet(*args, **kwargs))  # type: ignore[misc]


class OfflineChart(_Offline, alt.Chart):
    """An `altair.Chart` shown without network."""


class OfflineLayerChart(_Offline, alt.LayerChart):
    """An `altair.LayerChart` shown without network."""


class OfflineVConcatChart(_Offline, alt.VConcatChart):
    """An `altair.VConcatChart` shown without network."""


class OfflineHConcatChart(_Offline, alt.HConcatChart):
    """An `altair.HConcatChart` shown without network."""


class OfflineConcatChart(_Offline, alt.ConcatChart):
    """An `altair.ConcatChart` shown without network."""


class OfflineFacetChart(_Offline, alt.FacetChart):
    """An `altair.FacetChart` shown without network."""


class OfflineRepeatChart(_Offline, alt.RepeatChart):
    """An `altair.RepeatChart` shown without network."""


_OFFLINE = {cls.__mro__[2]: cls for cls in _Offline.__subclasses__()}


def offline(chart: Any) -> Any:
    """The same chart, drawn as a PNG without network when a notebook shows it.

    It stays an altair chart: `.properties`, `.interactive`, `.save`, `.to_dict`, `&`, `|` and `+` work as ever. The
    user's global `alt.renderers` is neither changed nor overruled: once one is chosen, the chart is shown by it.
    Drawing takes 0.7 s the first time, then some 30 ms.

    >>> chart = offline(alt.Chart(pd.DataFrame({"x": [1, 2]})).mark_point().encode(x="x"))
    >>> sorted((chart & chart)._repr_mimebundle_()[0])
    ['image/png', 'text/plain']
    """
    if isinstance(chart, _Offline):
        return chart
    if type(chart) not in _OFFLINE:
        raise TypeError(f"offline() takes an altair chart, not {type(chart).__name__}.")
    twin = chart.copy(deep=False)
    # altair's own __setattr__ writes into the specification, so the class is set past it.
    object.__setattr__(twin, "__class__", _OFFLINE[type(chart)])
    return twin


def to_png(chart: Any) -> bytes:
    """The chart as the bytes of a PNG file, two pixels a point, drawn by vl-convert without a browser."""
    buffer = io.BytesIO()
    if chart._get("config") is alt.Undefined:
        # Set here and not on the chart: altair refuses to place charts that have a config beside others.
        chart = chart.configure(font=_FONT, background="white", padding=14)
    chart.save(buffer, format="png", scale_factor=2)
    return _squeeze(buffer.getvalue())


def _squeeze(picture: bytes) -> bytes:
    """The same PNG, compressed harder: pictures lie in notebooks, and vl-convert's are 2.4 times as large (0.1 s)."""
    kept, pixels, at = [], b"", 8
    while at < len(picture):
        end = at + 12 + int.from_bytes(picture[at : at + 4], "big")  # length, type, data, checksum
        if picture[at + 4 : at + 8] == b"IDAT":
            pixels += picture[at + 8 : end - 4]
        else:
            kept.append(picture[at:end])
        at = end
    body = b"IDAT" + zlib.compress(zlib.decompress(pixels), 9)
    data = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    return picture[:8] + b"".join([*kept[:-1], data, kept[-1]])


def png_size(picture: bytes) -> dict[str, int]:
    """Width and height in points at which a picture of `to_png` should be shown, read from its header."""
    return {
        "width": int.from_bytes(picture[16:20], "big") // 2,
        "height": int.from_bytes(picture[20:24], "big") // 2,
    }


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
    marks = _powers(table) if log else {"tickCount": 4 if size[1] > 100 else 3, "format": "~g"}
    y_axis = alt.Axis(title=None, gridColor="#e9e9ec", **marks, **_AXIS)
    y = alt.Y("low:Q", axis=y_axis, scale=alt.Scale(type="log") if log else alt.Scale(zero=False))
    axis = None if x_title is None else alt.Axis(title=x_title, grid=False, tickCount=8, **_AXIS)
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
    heading = alt.TitleParams(
        title, subtitle=subtitle, anchor="start", fontSize=13, subtitleColor=_MUTED, subtitlePadding=5, offset=14
    )
    chart = alt.vconcat(*panels, spacing=12).resolve_scale(x="shared", color="shared")
    return offline(chart.properties(title=heading) if title or subtitle else chart)
