"""The samples before an event: `last N samples before ...`."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

import numpy as np
import pandas as pd

from nbdyn.errors import NotRecorded
from nbdyn.query.evaluate import Array
from nbdyn.query.events import Found, find_condition, find_exceeding, find_weight
from nbdyn.query.plan import LastPlan
from nbdyn.query.source import Source
from nbdyn.store.names import locate

BLOCK_ROWS = 4_000_000
"""Visits held at once, about (120 MB)."""


def last(plan: LastPlan, source: Source) -> tuple[pd.DataFrame, list[str]]:
    """The frame of `last` and its notes: for each event, the nearest visits of the steps before it, in order."""
    if plan.exceeds is not None:
        found = find_exceeding(plan, source)
    else:
        found = find_condition(plan, source) if plan.indices is None else find_weight(plan, source)
    notes = list(found.notes)
    count = plan.statement.count
    size = source.index["batch_size"].to_numpy() if len(found.steps) else np.empty(0, dtype=np.int64)
    if len(found.steps) and found.steps.max() > 0 and not size.any():
        raise NotRecorded(
            f"{source.name} does not know its samples; record them with `for batch in rec.watch(loader)` "
            "or rec.batch(ids=...)."
        )
    parts = [source.read("visits", 0, 0).assign(event=np.empty(0, np.int64), before=np.empty(0, np.int64))]
    begins = _begins(found.steps, count, size)
    place = 0
    while place < len(found.steps):
        stop = _block_end(place, found.steps, begins, size)
        block = source.read("visits", int(begins[place]), int(found.steps[stop - 1]))
        parts.append(_cut(block, found.steps[place:stop], count, first_event=place))
        place = stop
    frame = pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]
    notes += _short(frame["event"].to_numpy(), found.steps, count)
    return _labelled(frame, found, plan.columns, source), notes


def _begins(moments: Array, count: int, size: Array) -> Array:
    """For each event the first step whose visits are needed: with those of the steps after it, at least `count`."""
    seen = np.concatenate([[0], np.cumsum(size)])
    return np.maximum(np.searchsorted(seen, seen[moments] - count, side="right") - 1, 0)


def _block_end(place: int, moments: Array, begins: Array, size: Array) -> int:
    """Events whose histories touch are read together, up to a size: the end of those that begin at `place`."""
    stop = place + 1
    rows = int(size[begins[place] : moments[place]].sum())
    while stop < len(moments) and begins[stop] <= moments[stop - 1] and rows <= BLOCK_ROWS:
        rows += int(size[moments[stop - 1] : moments[stop]].sum())
        stop += 1
    return stop


def _cut(block: pd.DataFrame, moments: Array, count: int, first_event: int) -> pd.DataFrame:
    """The last `count` visits before each event, out of visits sorted by (step, position)."""
    ends = np.searchsorted(block["step"].to_numpy(), moments)
    lengths = np.minimum(ends, count)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    part = block.iloc[np.repeat(ends - lengths, lengths) + within]
    events = np.repeat(np.arange(first_event, first_event + len(moments)), lengths)
    return part.assign(event=events, before=np.repeat(lengths, lengths) - within)


def _short(events: Array, moments: Array, count: int) -> list[str]:
    """Say which events have fewer samples before them than were asked for."""
    lengths = np.bincount(events, minlength=len(moments))
    short = np.flatnonzero(lengths < count)
    notes = [
        f"event {event} at step {moments[event]}: only {lengths[event]} of {count} samples before it"
        for event in short[:3]
    ]
    return notes + [f"and {len(short) - 3} more events with fewer samples before them"] * (len(short) > 3)


def _labelled(frame: pd.DataFrame, found: Found, columns: tuple[str, ...], source: Source) -> pd.DataFrame:
    """The frame with the step of each event and, where there are several parameters, which one it is."""
    events = frame["event"].to_numpy()
    frame["event_step"] = found.steps[events].astype(np.int64)
    if "parameter" in columns:
        labels = np.array(locate(found.parameters, source.tensors)[1], dtype=object)
        frame["parameter"], frame["weight"] = found.parameters[events], labels[events]
    return frame.reindex(columns=list(columns))
