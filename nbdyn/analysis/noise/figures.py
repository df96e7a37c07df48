"""The noise panel: a column for each layer, a row for each measure, over the steps of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import altair as alt
import numpy as np
import pandas as pd

from nbdyn.plots import AXIS, COLORS, MUTED, titled

if TYPE_CHECKING:
    from nbdyn.analysis.noise.result import Noise

MANY = 8
"""Layers that are drawn, at most: the first and the last ones."""
WIDTH, HEIGHT = 150, 105


def panel(noise: Noise) -> Any:
    """Index and share not normal by batch, and the noise scale, over steps; kurtosis against n; layer by layer."""
    layers = noise.layers if len(noise.layers) <= MANY else [*noise.layers[: MANY // 2], *noise.layers[-MANY // 2 :]]
    index, normality, kurtosis = (noise.usual(name) for name in ("index", "normality", "kurtosis"))
    level = float(normality["level"].iloc[0])
    columns = ["median", "low", "high"]
    places = kurtosis.assign(batch="step " + kurtosis["step"].astype(str), **(kurtosis[columns] + 3))
    rows = [
        Row("stable index", _named(index, "median"), color="means over", line=2.0),
        Row(f"share not normal at {level:g}", _named(normality, "share"), color="means over", line=level),
        Row("kurtosis (excess + 3)", _named(places, "median").dropna(), x="n", color="at", line=3.0, log=True),
    ]
    if noise.has_sums:
        scale = noise.usual("scale").query("resolved").assign(batch="noise scale")
        rows.append(Row("noise scale (samples)", _named(scale, "scale"), log=True))
    drawn = [_row(row, layers) for row in rows if len(row.table)]
    left = "" if len(layers) == len(noise.layers) else f"; {len(layers)} of {len(noise.layers)} layers are drawn"
    chart = alt.vconcat(*drawn, spacing=16).resolve_scale(color="independent")
    return titled(chart, f"gradient noise of {noise.run}", [noise.sampled + left, *noise.warnings])


@dataclass(frozen=True)
class Row:
    """A measure of the panel.

    Attributes:
        name: above the axis of values.
        table: columns layer, the x axis, batch (the lines), value, low, high.
        x: the column along the panels.
        color: the title of the legend; None for one line.
        log: whether values are on a logarithmic scale.
        line: where a dashed line is, which Gaussian noise would follow.
    """

    name: str
    table: Any
    x: str = "step"
    color: str | None = None
    log: bool = False
    line: float | None = None

    @property
    def powers(self) -> list[float]:
        """The powers of ten that a logarithmic axis is marked at."""
        ends = np.log10([self.table["value"].min(), self.table["value"].max()])
        return [10.0**power for power in range(int(np.floor(ends[0])), int(np.ceil(ends[1])) + 1)]


def _named(table: pd.DataFrame, value: str) -> Any:
    return table.rename(columns={value: "value"}).astype({"batch": str})


def _row(row: Row, layers: list[str]) -> Any:
    """The layers side by side on one scale."""
    cells = [_cell(row, layer, i == 0) for i, layer in enumerate(layers)]
    return alt.hconcat(*cells, spacing=10).resolve_scale(y="shared", color="shared")


def _cell(row: Row, layer: str, is_first: bool) -> Any:
    """One measure of one layer: intervals, lines and points; a dashed line where a Gaussian is."""
    names = list(dict.fromkeys(row.table["batch"]))
    x = alt.X(f"{row.x}:O", axis=alt.Axis(title=row.x, labelAngle=0, labelOverlap=True, grid=False, **AXIS))
    marks = {"values": row.powers} if row.log else {"tickCount": 4}
    axis = alt.Axis(title=row.name if is_first else None, labels=is_first, gridColor="#e9e9ec", **marks, **AXIS)
    ends = alt.Scale(type="log") if row.log else alt.Scale(zero=False)
    y = alt.Y("value:Q", axis=axis, scale=ends)
    legend = None if row.color is None else alt.Legend(symbolType="stroke")
    scale = alt.Scale(domain=names, range=list(COLORS))
    color = alt.Color("batch:N", title=row.color, sort=None, scale=scale, legend=legend)
    table: Any = row.table.query("layer == @layer")
    base = alt.Chart(table[[row.x, "batch", "value", "low", "high"]]).encode(x=x, color=color)
    parts = [
        base.mark_rule(opacity=0.6).encode(y=alt.Y("low:Q", axis=axis, scale=ends), y2="high:Q"),
        base.mark_line(strokeWidth=1.25).encode(y=y),
        base.mark_point(filled=True, size=22, opacity=1).encode(y=y, tooltip=[row.x, "batch", "value"]),
    ]
    if row.line is not None:
        mark = alt.Chart(pd.DataFrame({"y": [row.line]})).mark_rule(strokeDash=[3, 3], color=MUTED)
        parts.insert(0, mark.encode(y="y:Q"))
    title = alt.TitleParams(f"layer {layer or '(root)'}", fontSize=11, fontWeight="normal", anchor="start")
    return alt.layer(*parts, view=alt.ViewBackground(stroke=None)).properties(width=WIDTH, height=HEIGHT, title=title)
