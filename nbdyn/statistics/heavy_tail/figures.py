"""Pictures of a fit: the tail on logarithmic axes, quantiles against quantiles, and a Hill plot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import numpy as np
import pandas as pd

from nbdyn.plots import AXIS, COLORS, MUTED, titled
from nbdyn.plots.panels import PLAIN
from nbdyn.statistics.heavy_tail.hill import LEAST, hill_path

if TYPE_CHECKING:
    from nbdyn.statistics.heavy_tail.result import Distribution, TailFit

POINTS = 300
"""Values in a panel, at most: the largest and smallest, and log-spaced ranks between."""
CURVE = 200
SIDE = 260
"""Of a panel, in points."""
LEAST_SHOWN = 0.1
"""Curves end at this share of one value."""


def overview(found: TailFit) -> Any:
    """The three panels side by side."""
    count = len(sizes(found))
    panels = ([survival(found)] if count else []) + [quantiles(found)]
    panels += [stability(found)] if count > LEAST + 1 else []
    name, first = next(iter(found.estimates.items()))
    below = f"{name} = {first}; {found.verdict()}"
    chart = alt.hconcat(*panels, spacing=30).resolve_scale(color="independent")
    tail = "" if found.xmin is None else f"{found.n_tail:,} of "
    return titled(chart, f"{found.family} fitted to {tail}{len(found.values):,} values", below)


def sizes(found: TailFit) -> np.ndarray:
    """What tails are drawn of, sorted upwards: magnitudes, or beyond a threshold the values of that side, above 0."""
    return np.sort(np.abs(found.values)) if found.xmin is None else found.values[found.values > 0]


def survival(found: TailFit) -> Any:
    """P(|X| > x) of the values (dots), the fit (line) and its alternatives (dashed); beyond a threshold P(X > x)."""
    x_sizes, n = sizes(found), len(found.values)
    ranks = _ranks(len(x_sizes))  # 1 is the largest
    dots: Any = pd.DataFrame({"x": x_sizes[len(x_sizes) - ranks], "p": ranks / n})
    share = found.n_tail / n
    lowest = float(x_sizes[len(x_sizes) // 50])
    first = found.xmin if found.xmin is not None and found.xmin > 0 else lowest
    grid = np.geomspace(first, x_sizes[-1], CURVE)
    dots = dots[dots["x"] >= min(first, lowest)]
    laws = {found.family: found.distribution} | {f"{name} ": law for name, law in found.others.items()}
    above = beyond if found.xmin is None else (lambda law, x: law.sf(x))
    curves = [pd.DataFrame({"x": grid, "p": share * above(law, grid), "law": name}) for name, law in laws.items()]
    table: Any = pd.concat(curves, ignore_index=True).query("p > @LEAST_SHOWN / @n")
    ends = [LEAST_SHOWN / n, 1.0]
    x = alt.X("x:Q", axis=_axis("|value|" if found.xmin is None else "value"), scale=alt.Scale(type="log", nice=False))
    y = alt.Y("p:Q", axis=_axis("share beyond"), scale=alt.Scale(type="log", domain=ends, nice=False))
    names = list(laws)
    color = alt.Color(
        "law:N", sort=None, title=None, scale=alt.Scale(domain=names, range=_colors(len(names))),
        legend=alt.Legend(orient="bottom", columns=3, symbolType="stroke", labelLimit=130),
    )  # fmt: skip
    base = alt.Chart(table).encode(x=x, y=y, color=color)
    lines = [
        base.transform_filter(alt.datum.law != found.family).mark_line(strokeWidth=1, strokeDash=[4, 3], clip=True),
        base.transform_filter(alt.datum.law == found.family).mark_line(strokeWidth=2, clip=True),
    ]
    points = alt.Chart(dots).mark_circle(size=9, color="black", opacity=0.5, clip=True).encode(x=x, y=y)
    return alt.layer(*lines, points).properties(width=SIDE, height=SIDE)


def beyond(law: Distribution, x: np.ndarray) -> np.ndarray:
    """P(|X| > x); of a law of positive values P(X > x)."""
    return law.sf(x) + np.maximum(1 - law.sf(-x), 0.0)


def quantiles(found: TailFit) -> Any:
    """The values in the fit against what it expects; on the diagonal where the fit holds."""
    tail = found.tail
    n = len(tail)
    upper = _ranks(n)
    ranks = np.unique(np.concatenate([n + 1 - upper, upper]))  # 1 is the smallest
    ranks = ranks[np.unique(np.linspace(0, len(ranks) - 1, POINTS).astype(np.int64))]
    expected = found.distribution.ppf((ranks - 0.5) / n)
    table = pd.DataFrame({"expected": expected, "found": tail[ranks - 1]})
    both = np.concatenate([expected, tail[ranks - 1]])
    ends = float(both.min()), float(both.max())
    scale, marks = alt.Scale(type="log", nice=False), None
    if ends[0] <= 0:
        middle = float(np.median(np.abs(tail)))
        scale, marks = alt.Scale(type="symlog", constant=middle, nice=False), _powers(*ends, middle)
    x = alt.X("expected:Q", axis=_axis("quantile of the fit", marks), scale=scale)
    y = alt.Y("found:Q", axis=_axis("quantile of the values", marks), scale=scale)
    diagonal = alt.Chart(pd.DataFrame({"expected": ends, "found": ends})).mark_line(color=MUTED, strokeWidth=1)
    dots = alt.Chart(table).mark_circle(size=12, color=COLORS[0], opacity=0.8)
    return alt.layer(diagonal.encode(x=x, y=y), dots.encode(x=x, y=y)).properties(width=SIDE, height=SIDE)


def stability(found: TailFit) -> Any:
    """Hill's tail index over the number of largest values (see `sizes`) that it is taken from, with its interval."""
    table = hill_path(sizes(found))
    x = alt.X("k:Q", axis=_axis("largest values k"), scale=alt.Scale(type="log", nice=False))
    axis = _axis("tail index (Hill)")
    top = min(float(table["high"].to_numpy().max()), 3 * float(np.median(table["index"].to_numpy())))
    y = alt.Y("low:Q", axis=axis, scale=alt.Scale(domain=[0.0, top], nice=False))
    base = alt.Chart(table).encode(x=x)
    layers: list[Any] = [
        base.mark_area(opacity=0.2, color=COLORS[2], clip=True).encode(y=y, y2="high:Q"),
        base.mark_line(strokeWidth=1.5, color=COLORS[2], clip=True).encode(y=alt.Y("index:Q", axis=axis)),
    ]
    if found.xmin is not None:
        rule = alt.Chart(pd.DataFrame({"k": [found.n_tail]})).mark_rule(color=MUTED, strokeDash=[4, 3])
        layers.append(rule.encode(x=x))
    return alt.layer(*layers).properties(width=SIDE, height=SIDE)


def _ranks(n: int) -> np.ndarray:
    """Ranks 1..n, at most `POINTS`, dense at 1."""
    return np.unique(np.round(np.geomspace(1, n, POINTS)).astype(np.int64))


def _powers(low: float, high: float, middle: float) -> list[float]:
    """Zero and powers of ten of either sign, for an axis that is linear about 0 and logarithmic beyond `middle`."""
    most = int(np.floor(np.log10(max(-low, high))))
    least = min(int(np.ceil(np.log10(middle))), most)
    powers = [10.0**i for i in range(least, most + 1, -(-(most - least + 1) // 3))]
    return [x for x in (*(-p for p in powers[::-1]), 0.0, *powers) if low <= x <= high]


def _axis(title: str, marks: list[float] | None = None) -> alt.Axis:
    """An axis; its marks where given."""
    at = {"tickCount": 5} if marks is None else {"values": marks, "labelExpr": PLAIN, "labelOverlap": True}
    return alt.Axis(title=title, grid=False, **at, **AXIS)


def _colors(count: int) -> list[str]:
    """The fit's colour first."""
    return [COLORS[i % len(COLORS)] for i in range(count)]
