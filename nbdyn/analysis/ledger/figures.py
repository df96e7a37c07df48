"""The ledger as a picture: effects with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from nbdyn.analysis.ledger.records import CONFIRMATORY, EXPLORATORY, Hypothesis
from nbdyn.errors import NbdynError
from nbdyn.plots import AXIS, COLORS, MUTED, titled

ROW = 22
"""Points of a test."""


def forest(found: Sequence[Hypothesis]) -> Any:
    """Cohen's d of every test with the interval of its effect in the same unit; replications below their test.

    Measures have different units, so effects are drawn in standard deviations over runs: the interval is that of the
    effect, divided by the effect and multiplied by d.

    Raises:
        NbdynError: if no test has an effect to draw.
    """
    table = _points(found)
    if table.empty:
        raise NbdynError("There is nothing to draw: no hypothesis of this ledger is tested. Run its cell again.")
    charts = [_of_kind(table.query("kind == @kind"), kind) for kind in (CONFIRMATORY, EXPLORATORY)]
    charts = [chart for chart in charts if chart is not None]
    whole = alt.vconcat(*charts, spacing=20).resolve_scale(x="shared") if len(charts) > 1 else charts[0]
    return titled(whole, "hypotheses: effect in standard deviations over runs, with its interval")


def _points(found: Sequence[Hypothesis]) -> pd.DataFrame:
    rows = []
    for one in found:
        tests = [one.outcome, *one.replications] if one.outcome is not None else []
        for number, done in enumerate(tests):
            label = one.name + (f" v{one.version}" if one.version > 1 else "")
            label = label if not number else f"{label}, replication {number}"
            unit = done.d / done.effect if done.effect else float("nan")
            rows.append({
                "label": label, "kind": done.kind, "d": done.d, "low": done.low * unit, "high": done.high * unit,
                "verdict": one.verdict if not number else f"p = {done.p:.3g}", "n": done.n,
            })  # fmt: skip
    columns = ["label", "kind", "d", "low", "high", "verdict", "n"]
    return pd.DataFrame(rows, columns=columns).dropna(subset=["d", "low", "high"])


def _of_kind(table: pd.DataFrame, kind: str) -> Any:
    if table.empty:
        return None
    color = COLORS[0] if kind == CONFIRMATORY else COLORS[3]
    y = alt.Y("label:N", sort=None, axis=alt.Axis(title=None, grid=False, labelLimit=260, **AXIS))
    x = alt.X("d:Q", axis=alt.Axis(title="Cohen's d", **AXIS))
    base = alt.Chart(table)
    zero = alt.Chart(pd.DataFrame({"x": [0]})).mark_rule(color=MUTED, strokeDash=[3, 3]).encode(x="x:Q")
    lines = base.mark_rule(color=color, strokeWidth=2).encode(x=alt.X("low:Q"), x2="high:Q", y=y)
    points = base.mark_point(color=color, filled=True, size=60, opacity=1).encode(x=x, y=y)
    words = base.mark_text(align="left", dy=-9, fontSize=9, color=MUTED).encode(x="d:Q", y=y, text="verdict:N")
    chart = (zero + lines + points + words).properties(width=520, height=max(50, (ROW + 8) * len(table)))
    return chart.properties(title=alt.TitleParams(kind, anchor="start", fontSize=11, color=MUTED))
