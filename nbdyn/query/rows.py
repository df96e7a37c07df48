"""Rows of `show`: columns as recorded, groups, and weights in chunks of steps."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from nbdyn.errors import QueryError
from nbdyn.query.evaluate import Array, aggregator, evaluate, fields, walk
from nbdyn.query.plan import ShowPlan, WeightsPlan
from nbdyn.query.reads import MAX_ROWS
from nbdyn.query.source import Source
from nbdyn.query.tree import Aggregate
from nbdyn.store.trajectory import trajectory_chunks

if TYPE_CHECKING:
    from nbdyn.store import Store

CHUNK_BYTES = 32 * 2**20
"""Weights read at once, about."""


def show(plan: ShowPlan, source: Source) -> tuple[pd.DataFrame, list[str]]:
    """The frame of `show` and its notes."""
    frame = source.read(plan.table, plan.start, plan.stop)
    columns = source.columns(frame)
    if plan.where is not None:
        keep = np.broadcast_to(evaluate(plan.where, columns), (len(frame),)).astype(bool)
        frame = frame.loc[keep].reset_index(drop=True)
        columns = {name: values[keep] for name, values in columns.items()}
    if not plan.items:
        return frame, []
    if not plan.grouped:
        return _plain(plan, columns, len(frame)), []
    return _grouped(plan, columns, len(frame))


def _plain(plan: ShowPlan, columns: dict[str, Array], count: int) -> pd.DataFrame:
    result = {key: columns[key] for key in plan.keys}
    for label, node in plan.items:
        result[label] = np.broadcast_to(evaluate(node, columns), (count,))
    return pd.DataFrame(result)


def _grouped(plan: ShowPlan, columns: dict[str, Array], count: int) -> tuple[pd.DataFrame, list[str]]:
    notes: list[str] = []
    if "sample" in plan.keys:
        known = columns["sample"] >= 0
        if not known.all():
            notes.append(f"{int((~known).sum())} of {count} visits left out: their sample is unknown")
        columns = {name: values[known] for name, values in columns.items()}
        count = int(known.sum())
    if "class" in plan.keys:
        known = columns["class"] >= 0
        notes += [f"{int((~known).sum())} visits left out: they have no class"] if not known.all() else []
        columns = {name: values[known] for name, values in columns.items()}
        count = int(known.sum())
    notes += _left_out(plan, columns, count)
    if plan.keys:
        keys = pd.MultiIndex.from_arrays([columns[key] for key in plan.keys])
        groups, found = keys.factorize(sort=True)
        result = {key: np.asarray(found.get_level_values(place)) for place, key in enumerate(plan.keys)}
        number = len(found)
    else:
        groups, result, number = np.zeros(count, dtype=np.int64), {}, 1
    aggregate = aggregator(columns, groups, number)
    for label, node in plan.items:
        result[label] = np.broadcast_to(evaluate(node, result, aggregate), (number,))
    return pd.DataFrame(result), notes


def _left_out(plan: ShowPlan, columns: dict[str, Array], count: int) -> list[str]:
    """Say which fields have NaN that the aggregates leave out."""
    aggregates = [part for _, node in plan.items for part in walk(node) if isinstance(part, Aggregate)]
    names = {name for part in aggregates if part.argument is not None for name in fields(part.argument)}
    missing = {name: int(np.isnan(columns[name]).sum()) for name in sorted(names) if columns[name].dtype.kind == "f"}
    told = ", ".join(f"{name} at {number} of {count} rows" for name, number in missing.items() if number)
    return [f"NaN left out: {told}"] if told else []


def chunks(store: Store, indices: Array, start: int, stop: int, overlap: int = 0) -> Iterator[tuple[Array, Array]]:
    """Stored rows of some parameters in pieces that stay small in memory.

    Args:
        store: the run.
        indices: global parameter indices, (k,).
        start: first step.
        stop: end of the half-open range.
        overlap: how many rows of a piece are given again at the head of the next one.

    Yields:
        Steps (n,) and values (n, k).
    """
    steps = np.asarray(store.weights.steps)
    steps = steps[(steps >= start) & (steps < stop)]
    height = max(overlap + 1, CHUNK_BYTES // (8 * max(1, len(indices))))
    for begin in range(0, max(1, len(steps) - overlap), height - overlap):
        piece = steps[begin : begin + height]
        if len(piece):
            yield store.weights.read(indices, int(piece[0]), int(piece[-1]) + 1)


def every_row(
    store: Store, indices: Array, start: int, stop: int, residuals: dict[int, float]
) -> Iterator[tuple[Array, Array]]:
    """`chunks` of the weights of every step, with an overlap of one row, rebuilt where they are not stored.

    Args:
        store: the run.
        indices: global parameter indices, (k,).
        start: first step.
        stop: end of the half-open range.
        residuals: is filled with stored step -> max |rebuilt - stored|.

    Raises:
        NotRecorded: if a step can be neither read nor rebuilt.
    """
    if store.config["weights"] == "every":
        yield from chunks(store, indices, start, stop, overlap=1)
    else:
        yield from trajectory_chunks(store, indices, start, stop, overlap=1, residuals=residuals)


def rebuilt_note(residuals: dict[int, float]) -> list[str]:
    """What is to be said of weights that were rebuilt."""
    if not residuals:
        return []
    worst = max(residuals.values())
    return [
        f"weights between snapshots rebuilt from gradients; off by at most {worst:.2g} at {len(residuals)} snapshots"
    ]


def show_weights(plan: WeightsPlan, source: Source) -> tuple[pd.DataFrame, list[str]]:
    """The tidy frame of `show w of ...` or `show dw of ...`."""
    changes = plan.quantity == "dw"
    if plan.where is None and sum(read.rows for read in plan.reads) > MAX_ROWS:
        raise _too_many(sum(read.rows for read in plan.reads))
    tensors = source.tensor_names(plan.indices)
    pieces: list[pd.DataFrame] = []
    rows = 0
    residuals: dict[int, float] = {}
    if changes:
        rows_of = every_row(source.store, plan.indices, plan.start, plan.stop + 1, residuals)
    else:
        rows_of = chunks(source.store, plan.indices, plan.start, plan.stop)
    for steps, values in rows_of:
        if changes:
            values, steps = np.diff(values, axis=0), steps[:-1]
        piece = pd.DataFrame({
            "step": np.repeat(steps, len(plan.indices)),
            "parameter": np.tile(plan.indices, len(steps)),
            "tensor": np.tile(tensors, len(steps)),
            "value": values.reshape(-1),
        })  # fmt: skip
        if plan.where is not None:
            condition = evaluate(plan.where, {name: piece[name].to_numpy() for name in piece.columns})
            piece = piece.loc[np.broadcast_to(condition, (len(piece),)).astype(bool)]
        pieces.append(piece)
        rows += len(piece)
        if rows > MAX_ROWS:
            raise _too_many(rows)
    if not pieces:
        return pd.DataFrame({name: [] for name in plan.columns}), ["no weights are stored at these steps"]
    notes = rebuilt_note(residuals) if changes else _snapshots(plan, source)
    return pd.concat(pieces, ignore_index=True), notes


def _snapshots(plan: WeightsPlan, source: Source) -> list[str]:
    steps = source.store.weights.steps
    stored = int(np.count_nonzero((steps >= plan.start) & (steps < plan.stop)))
    if stored == plan.stop - plan.start:
        return []
    return [f"weights are stored at {stored} of these {plan.stop - plan.start} steps"]


def _too_many(rows: int) -> QueryError:
    return QueryError(
        f"this would be {rows:,} rows or more, and a result has at most {MAX_ROWS:,}; name fewer parameters or "
        'steps, add where, or read an array: run.weights["fc1.weight", 0:100].'
    )
