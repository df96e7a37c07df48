"""Which picture fits an answer of the language."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from nbdyn.errors import NbdynError
from nbdyn.plots.events import events
from nbdyn.plots.grids import MAPS, heat_map, reduce_blocks, weight_maps
from nbdyn.plots.groups import groups
from nbdyn.plots.labels import label, label_groups, values_of
from nbdyn.plots.panels import AXIS, COLORS, PLAIN, decimate, heading, lines, numbers, panel, stack, titled
from nbdyn.plots.ranking import BARS, bars, ranking
from nbdyn.query.words import PLURALS
from nbdyn.schema import PROVENANCE

_ONE_NUMBER = "One number has no picture; `per epoch`, `per class, layer` or `per step` gives more of them."
_ERRORS = ("n", "w_step", "loss_se", "acc_low", "acc_high")
"""Columns of `compare` that say how sure its values are."""
SERIES = 12
"""Lines over epochs in one panel, at most; more are a heat map."""


def picture(frame: pd.DataFrame) -> Any | None:
    """The picture of an answer, by what its columns are; None for what is drawn over steps.

    A ranking is bars, panels of bars, a heat map (list by rank), or a map of the weights; `group` is a count of each
    group; `last` a strip for each event; values over two labels a heat map, over epochs lines, over weights maps,
    over one other label bars; `compare ... at step` points with their intervals.

    Raises:
        NbdynError: for what has no picture: no rows, one number, `explain`, values over three labels.
    """
    origin = frame.attrs.get(PROVENANCE, {})
    if origin.get("what") in ("explain", "estimate"):
        raise NbdynError(f"There is no picture of {origin['what']}: ask the statement after it and draw its answer.")
    if frame.empty:
        note = f" ({origin['note']})" if origin.get("note") else ""
        raise NbdynError(f"There is nothing to draw: the answer has no rows{note}.")
    columns = set(map(str, frame.columns))
    if {"event", "event_step", "before", "loss", "correct", "class"} <= columns:
        return _titled(frame, *events(frame))
    if {"group", "low", "high"} <= columns and values_of(frame):
        return _titled(frame, *groups(frame))
    if "rank" in columns and values_of(frame):
        return _titled(frame, *ranking(frame))
    if {"run", "step", "n"} <= columns:
        names = [name for name in values_of(frame) if name not in _ERRORS]
        once = len(frame["run"].unique()) == len(frame)
        return _titled(frame, _compared(frame, names), []) if once else lines(frame, names, "step", "run")
    if {"step", "parameter", "tensor", "value"} <= columns and len(frame["step"].unique()) == 1:
        return _at_one_step(frame)
    return None if "step" in columns else _labelled(frame)


def _at_one_step(frame: pd.DataFrame) -> Any:
    """Values of parameters at one step, over their numbers."""
    if len(frame) == 1:
        raise NbdynError(_ONE_NUMBER)
    return lines(frame, ["value"], "parameter", "tensor" if len(frame["tensor"].unique()) > 1 else None)


def _titled(frame: pd.DataFrame, chart: Any, notes: list[str]) -> Any:
    title, subtitle = heading(frame)
    return titled(chart, title, [subtitle, *notes] if notes else subtitle)


def _labelled(frame: pd.DataFrame) -> Any | None:
    """The picture of values over no step; None where there are none of the usual labels."""
    names, quantities = list(map(str, frame.columns)), values_of(frame)
    labels = label_groups([name for name in names if name not in quantities])
    if not quantities or (not labels and len(frame) > 1):
        return None
    several = [group for group in labels if len(frame[group].drop_duplicates()) > 1] or labels[:1]
    if not several:
        raise NbdynError(_ONE_NUMBER)
    if len(several) == 2 and ["epoch"] in several:
        other = next(group for group in several if group != ["epoch"])
        words = label(frame, other)
        if words.nunique() <= SERIES:
            return lines(frame.assign(**{_SERIES: words}), quantities, "epoch", _SERIES)
    if len(several) == 2:
        return _titled(frame, *_grids(frame, quantities[:MAPS], *several))
    if len(several) > 2:
        told = ", ".join(group[-1] for group in several)
        raise NbdynError(
            f"There is no picture of values over {len(several)} labels ({told}); choose one value of a label first, "
            f"such as df[df['{several[-1][-1]}'] == ...].dyn.plot()."
        )
    return _over_one(frame, quantities, several[0])


_SERIES = "nbdyn series"


def _over_one(frame: pd.DataFrame, quantities: list[str], group: list[str]) -> Any:
    """Values over one label: lines, maps of weights, or bars."""
    name = group[-1]
    if name == "epoch":
        return lines(frame, quantities, name)
    if name == "weight":
        return _titled(frame, *weight_maps(frame, quantities[0]))
    if pd.api.types.is_numeric_dtype(frame[name]) and len(frame) > BARS and len(group) == 1:
        tables = [decimate(frame[name].to_numpy(), numbers(frame[quantity]), 800) for quantity in quantities[:MAPS]]
        ends = [*[None] * (len(tables) - 1), name]
        panels = [
            panel(*some, color=COLORS[i % 6]) for i, some in enumerate(zip(tables, quantities, ends, strict=False))
        ]
        return stack(panels, *heading(frame))
    notes = [] if len(frame) <= BARS else [f"the {BARS} largest of {len(frame)}"]
    charts: list[Any] = []
    for i, quantity in enumerate(quantities[:MAPS]):
        some = frame if not notes else frame.nlargest(BARS, quantity)
        charts.append(bars(label(some, group), numbers(some[quantity]), quantity, width=260, color=COLORS[i % 6]))
    return _titled(frame, alt.hconcat(*charts) if len(charts) > 1 else charts[0], notes)


def _grids(frame: pd.DataFrame, quantities: list[str], one: list[str], two: list[str]) -> tuple[Any, list[str]]:
    """A heat map for each quantity; the label with more values runs to the right."""
    labels = [(group, *pd.factorize(label(frame, group))) for group in _sorted(frame, one, two)]
    (down, row, row_words), (across, column, column_words) = labels
    charts, notes = [], []
    for quantity in quantities:
        values = numbers(frame[quantity])
        table, block = reduce_blocks(pd.DataFrame({"row": row, "column": column, "value": values}))
        table = table.assign(
            row=row_words.take(table["row"].to_numpy()), column=column_words.take(table["column"].to_numpy())
        )
        charts.append(heat_map(table, quantity, "", ""))
        if block != (1, 1):
            many = [
                f"{n} {PLURALS.get(group[-1], group[-1]) if n > 1 else group[-1]}"
                for n, group in zip(block, (down, across), strict=True)
            ]
            notes = [f"the largest of each {' x '.join(many)}"]
    return (alt.vconcat(*charts).resolve_scale(color="independent") if len(charts) > 1 else charts[0]), notes


def _sorted(frame: pd.DataFrame, one: list[str], two: list[str]) -> list[list[str]]:
    return sorted([one, two], key=lambda group: len(frame[group].drop_duplicates()))


def _compared(frame: pd.DataFrame, names: list[str]) -> Any:
    """A panel for each value of `compare ... at step`: a point for each run, with its interval where there is one."""
    charts: list[Any] = []
    for i, name in enumerate(names):
        table = pd.DataFrame({"run": frame["run"].astype(str), "value": numbers(frame[name])})
        if name == "loss" and "loss_se" in frame:
            table["low"], table["high"] = frame["loss"] - frame["loss_se"], frame["loss"] + frame["loss_se"]
        elif name == "acc" and "acc_low" in frame:
            table["low"], table["high"] = frame["acc_low"], frame["acc_high"]
        x_axis = alt.Axis(title=name, tickCount=4, labelExpr=PLAIN, gridColor="#e9e9ec", **AXIS)
        scale = alt.Scale(zero=False, nice=True)
        base = alt.Chart(table).encode(y=alt.Y("run:N", sort=None, axis=alt.Axis(title=None, **AXIS)))
        layers = [base.mark_point(filled=True, size=70, color=COLORS[i % 6], opacity=1).encode(
            x=alt.X("value:Q", scale=scale, axis=x_axis))]  # fmt: skip
        if "low" in table:
            layers.append(base.mark_rule(color=COLORS[i % 6]).encode(x="low:Q", x2="high:Q"))
        charts.append(alt.layer(*layers).properties(width=180, height=alt.Step(26)))
    return alt.hconcat(*charts)
