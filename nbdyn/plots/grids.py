"""Heat maps of answers: values over two labels, and over the rows and columns of weights."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from nbdyn.plots.labels import places
from nbdyn.plots.panels import AXIS, MAX_ROWS, PLAIN

MAPS = 6
"""Tensors or quantities in one picture, at most."""
SIDE = 160
"""Rows and columns of a heat map, at most."""


def heat_map(
    table: pd.DataFrame, title: str, rows: str, columns: str, *, texts: bool = False, numbers: bool = False
) -> Any:
    """Rectangles coloured by value.

    Args:
        table: columns row, column, value, and text where `texts`; at most one row for each place.
        title: what the values are.
        rows: title of the axis at the left.
        columns: title of the axis below.
        texts: whether the column text is written into the rectangles.
        numbers: whether row and column are numbers, so that the axes are marked now and then, or words.
    """
    kind = "row:O", "column:O"
    n_rows, n_columns = table["row"].nunique(), table["column"].nunique()
    side = 96 if texts else max(4.0, min(26.0, 460 / n_columns))
    height = 18 if texts else max(4.0, min(26.0, 460 / n_rows))
    axis: dict[str, Any] = AXIS | {"labelOverlap": True, "labelLimit": 160}
    base = alt.Chart(table).encode(
        x=alt.X(kind[1], sort=None if not numbers else "ascending", axis=alt.Axis(title=columns, labelAngle=0, **axis)),
        y=alt.Y(kind[0], sort=None if not numbers else "ascending", axis=alt.Axis(title=rows, **axis)),
    )
    layers = [base.mark_rect().encode(color=colour(table["value"].to_numpy(), title))]
    if texts:
        layers.append(written(base, table["value"].to_numpy(), "text:N"))
    return alt.layer(*layers, view=alt.ViewBackground(stroke=None)).properties(
        width=max(40, side * n_columns), height=max(18, height * n_rows)
    )


def written(base: Any, values: np.ndarray, text: str) -> Any:
    """Text on coloured places: white on the dark ones."""
    size = np.abs(values[np.isfinite(values)])
    dark = f"abs(datum.value) > {0.6 * float(size.max()) if size.size else 0.0}"
    ink = alt.condition(dark, alt.value("white"), alt.value("black"))
    return base.mark_text(fontSize=9).encode(text=text, color=ink)


def colour(values: np.ndarray, title: str, length: int = 110) -> Any:
    """The colour scale of values: from white, or about white where there are both signs."""
    finite = values[np.isfinite(values)]
    signed = finite.size and finite.min() < 0
    end = float(np.abs(finite).max()) if finite.size else 1.0
    scale = alt.Scale(scheme="redblue", domain=[-end, end]) if signed else alt.Scale(scheme="tealblues")
    legend = alt.Legend(title=title or None, gradientLength=length, gradientThickness=9, **_LEGEND)
    return alt.Color("value:Q", scale=scale, legend=legend)


_LEGEND: dict[str, Any] = {"labelExpr": PLAIN, "tickCount": 4, "labelFontSize": 9, "titleFontSize": 10,
                           "titleFontWeight": "normal", "titleLimit": 180}  # fmt: skip


def weight_maps(frame: Any, value: str) -> tuple[Any, list[str]]:
    """A map of a value over each tensor's rows and columns, and what is to be said about it.

    Rows are the first index of a weight, columns all others flattened (of a convolution: input channel and place of the
    kernel). What is more than a chart can hold is reduced to blocks that keep their value of largest magnitude.

    Args:
        frame: columns weight and `value`, one row a weight.
        value: the column that is drawn.
    """
    table: Any = places(frame["weight"].reset_index(drop=True)).assign(value=frame[value].to_numpy(np.float64))
    tensors = table["tensor"].unique()
    maps, notes = [], []
    for tensor in tensors[:MAPS]:
        some, block = reduce_blocks(table[table["tensor"] == tensor])
        if block != (1, 1):
            notes.append(f"{tensor}: the largest of each {block[0]} x {block[1]} weights")
        chart = heat_map(some, value, "row", "column", numbers=True)
        maps.append(chart.properties(title=alt.Title(str(tensor), anchor="start", fontSize=11, fontWeight="normal")))
    if len(tensors) > MAPS:
        notes.append(f"{MAPS} of {len(tensors)} tensors; `of` names others")
    return alt.hconcat(*maps).resolve_scale(color="independent"), notes


def reduce_blocks(table: Any, side: int = SIDE, cells: int = MAX_ROWS) -> tuple[pd.DataFrame, tuple[int, int]]:
    """A table of (row, column, value) made small enough to draw: each block keeps its value of largest magnitude.

    Args:
        table: columns row and column (whole numbers from 0) and value.
        side: rows and columns of blocks, at most.
        cells: blocks, at most.

    Returns:
        The table, with the first row and column of each block, and the size of the blocks.

    >>> table = pd.DataFrame({"row": [0, 0, 1, 1], "column": [0, 1, 0, 1], "value": [1.0, -5.0, 2.0, 3.0]})
    >>> reduce_blocks(table, cells=1)[0].values.tolist()
    [[0.0, 0.0, -5.0]]
    """
    high, wide = (int(table[c].max()) + 1 if len(table) else 1 for c in ("row", "column"))
    down, across = -(-high // side), -(-wide // side)
    while -(-high // down) * -(-wide // across) > cells:  # the side with more blocks is halved
        down, across = (2 * down, across) if high / down > wide / across else (down, 2 * across)
    if (down, across) == (1, 1):
        return table, (1, 1)
    size = table["value"].abs()
    blocks = table.assign(size=size, row=table["row"] // down * down, column=table["column"] // across * across)
    best = blocks.sort_values("size", ascending=False, na_position="last").drop_duplicates(["row", "column"])
    return best.sort_values(["row", "column"])[["row", "column", "value"]], (down, across)
