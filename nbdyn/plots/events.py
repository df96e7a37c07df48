"""The picture of `last ... before`: a strip of samples for each event."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from nbdyn.plots.grids import colour, written
from nbdyn.plots.panels import AXIS, MAX_ROWS

STRIPS = 40
"""Events in one picture, at most."""


def events(frame: Any) -> tuple[Any, list[str]]:
    """A strip for each event: samples from the farthest to the nearest before it, coloured by loss, wrong ones ringed.

    The class of a sample is written into its place where there is room.

    Args:
        frame: as `last` gives it: event, event_step, before, ..., class, loss, correct.
    """
    numbers = frame["event"].unique()
    room = min(STRIPS, max(1, MAX_ROWS // int(frame["before"].max())))
    kept = frame[frame["event"].isin(numbers[:room])]
    notes = [f"the first {kept['event'].nunique()} of {len(numbers)} events"] if len(kept) < len(frame) else []
    most = MAX_ROWS // max(1, kept["event"].nunique())
    if kept["before"].max() > most:
        notes.append(f"the nearest {most} samples")
        kept = kept[kept["before"] <= most]
    words = "step " + kept["event_step"].astype(str)
    if "weight" in kept:
        words = kept["weight"].astype(str) + ", " + words
    if words.groupby(kept["event"]).first().duplicated().any():
        words = kept["event"].astype(str) + ": " + words
    table = pd.DataFrame({"event": words, "before": kept["before"], "value": kept["loss"]})
    classes = kept["class"].to_numpy()
    table["class"] = np.where(classes < 0, "", classes.astype(str))
    table["wrong"] = (kept["correct"] == 0).to_numpy()
    return _strips(table, len(table["before"].unique())), notes


def _strips(table: Any, length: int) -> Any:
    width = float(np.clip(640 / length, 3, 22))
    x_axis = alt.Axis(title="samples before the event (1 is the nearest)", labelAngle=0, labelOverlap=True, **AXIS)
    axis: dict[str, Any] = AXIS | {"labelLimit": 240}
    base = alt.Chart(table).encode(
        x=alt.X("before:O", sort="descending", axis=x_axis),
        y=alt.Y("event:N", sort=None, axis=alt.Axis(title=None, **axis)),
    )
    shade = colour(table["value"].to_numpy(np.float64), "loss", int(np.clip(22 * table["event"].nunique(), 44, 110)))
    layers = [base.mark_rect().encode(color=shade)]
    if width >= 10:
        layers.append(written(base, table["value"].to_numpy(np.float64), "class:N"))
    if table["wrong"].any():
        ring = base.transform_filter("datum.wrong").mark_rect(fillOpacity=0, stroke="#c8553d", strokeWidth=1.2)
        layers.append(ring)
    return alt.layer(*layers, view=alt.ViewBackground(stroke=None)).properties(
        width=alt.Step(width), height=alt.Step(22)
    )
