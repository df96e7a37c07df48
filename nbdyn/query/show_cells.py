"""Rows of `show g of`, `show grad of`, `show act of` and `show err of`: read in pieces, and filtered as they come."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from nbdyn.query.cell_rows import OF_VISIT, CellRowsPlan, check_rows
from nbdyn.query.cell_sources import captured_of, scales_of
from nbdyn.query.evaluate import Array, evaluate
from nbdyn.query.layers import SLOT, Layer, by_unit, scale_of
from nbdyn.query.reduce.members import PLACES, members_of
from nbdyn.query.reduce.steps import grad_pieces
from nbdyn.query.source import Source
from nbdyn.store.factors import Block
from nbdyn.store.gradients import Gradients

PIECE_CELLS = 2_000_000
"""Cells that are looked at at once (150 MB with their columns)."""

Piece = dict[str, Array]
"""Columns of some rows; `row`: of which row of the visits (or steps) each is."""


def show_cells(plan: CellRowsPlan, source: Source) -> tuple[pd.DataFrame, list[str]]:
    """The frame of a plan and its notes, by step and position; of g the cells other than 0.

    Raises:
        QueryError: if it has more rows than a result may have.
        NotRecorded: if the run does not hold the steps.
    """
    if plan.quantity == "grad":
        rows = source.index.iloc[plan.start : plan.stop]
        visits, note = captured_of(rows.assign(step=np.arange(plan.start, plan.start + len(rows))), source)
        return _collected(plan, visits, _grad_pieces(plan, visits, source), source), [note] if note else []
    visits, note = captured_of(source.read("visits", plan.start, plan.stop), source)
    scale, unscaled = scales_of(visits["step"].to_numpy(), source, plan.quantity)
    whole = len(visits)
    if plan.where_visits and plan.where is not None:
        keep = np.broadcast_to(evaluate(plan.where, source.columns(visits)), (whole,)).astype(bool)
        visits, scale = visits.loc[keep].reset_index(drop=True), None if scale is None else scale[keep]
    samples = np.unique(visits["sample"].to_numpy()) if 2 * len(visits) < whole else None
    if samples is not None and (samples < 0).any():  # visits of unknown samples cannot be asked for by sample
        samples = None
    pieces = (_unit_pieces if plan.layers else _g_pieces)(plan, visits, scale, samples, source)
    return _collected(plan, visits, pieces, source), list(filter(None, (note, unscaled)))


def _collected(plan: CellRowsPlan, visits: pd.DataFrame, pieces: Iterator[Piece], source: Source) -> pd.DataFrame:
    """The pieces as one frame, without the rows of which the condition does not hold."""
    columns = source.columns(visits)
    found: list[Piece] = []
    rows = 0
    for piece in pieces:
        if plan.where is not None and not plan.where_visits:
            known = {name: values[piece["row"]] for name, values in columns.items()}
            condition = evaluate(plan.where, known | piece)
            keep = np.broadcast_to(condition, piece["row"].shape).astype(bool)
            piece = {name: values[keep] for name, values in piece.items()}
        rows += len(piece["row"])
        check_rows(rows)
        found.append(piece)
    names = [name for name in found[0] if name != "row"] if found else []
    row = np.concatenate([piece.pop("row") for piece in found]) if found else np.empty(0, np.int64)
    cells = {name: np.concatenate([piece.pop(name) for piece in found]) for name in names}
    order = None if (np.diff(row) >= 0).all() else np.argsort(row, kind="stable")
    if order is not None:
        row, cells = row[order], {name: values[order] for name, values in cells.items()}
    return pd.DataFrame({name: _column(name, plan, visits, row, cells, source) for name in plan.columns}, copy=False)


def _column(
    name: str, plan: CellRowsPlan, visits: pd.DataFrame, row: Array, cells: dict[str, Array], source: Source
) -> Array:
    if name in OF_VISIT:
        return visits[name].to_numpy()[row]
    if name == "tensor":
        return source.tensor_names(cells["parameter"]) if cells else np.empty(0, object)
    if name == "layer":
        layers = np.array([layer.name for layer in plan.layers], dtype=object)
        return layers[cells["layer"]] if cells else np.empty(0, object)
    return cells[name] if cells else np.empty(0, np.float64 if name == "value" else np.int64)


def _rows_of(visits: pd.DataFrame, step: Array, position: Array) -> Array:
    """The row of each of some visits, -1 for those that are not among them."""
    return members_of(visits, ()).rows_of(step, position)


def _grad_pieces(plan: CellRowsPlan, steps: pd.DataFrame, source: Source) -> Iterator[Piece]:
    height = max(1, PIECE_CELLS // max(1, len(plan.indices)))
    for first in range(0, len(steps), height):
        some = steps.iloc[first : first + height]
        for key, parameters, values in grad_pieces(source.store, plan.indices, members_of(some, ("batch",))):
            row = np.searchsorted(steps["step"].to_numpy(), key // PLACES)
            yield {"row": np.repeat(row, len(parameters)), "parameter": np.tile(parameters, len(row)),
                   "value": values.reshape(-1)}  # fmt: skip


def _g_pieces(
    plan: CellRowsPlan, visits: pd.DataFrame, scale: Array | None, samples: Array | None, source: Source
) -> Iterator[Piece]:
    steps = np.unique(visits["step"].to_numpy())
    if not len(steps):
        return
    asked = (steps, plan.indices) if samples is None else (steps, plan.indices, samples)
    for block in Gradients(source.store)[asked].blocks(4 * PIECE_CELLS):
        row = _rows_of(visits, block.visits["step"].to_numpy(), block.visits["position"].to_numpy())
        place, column = np.nonzero((block.values != 0) & (row >= 0)[:, None])
        row, value = row[place], block.values[place, column]
        if scale is not None:
            value = (value * scale[row]).astype(value.dtype)
        yield {"row": row, "parameter": block.parameters[column], "value": value}


def _unit_pieces(
    plan: CellRowsPlan, visits: pd.DataFrame, scale: Array | None, samples: Array | None, source: Source
) -> Iterator[Piece]:
    if not len(visits):
        return
    factors = source.store.factors
    start, stop = int(visits["step"].iloc[0]), int(visits["step"].iloc[-1]) + 1
    for number, layer in enumerate(plan.layers):
        for site in layer.sites:
            if samples is None or factors.warm.holds(site, start, stop):
                blocks = factors.warm.blocks(site, start, stop)
            else:
                blocks = factors.blocks(site, start, stop, samples=samples)
            for block in blocks:
                yield from _of_block(plan, visits, scale, block, number, layer, source)


def _of_block(
    plan: CellRowsPlan, visits: pd.DataFrame, scale: Array | None, block: Block, number: int, layer: Layer,
    source: Source,
) -> Iterator[Piece]:  # fmt: skip
    row = _rows_of(visits, block.step, block.position)
    there = np.flatnonzero(row >= 0)
    cells = by_unit(source.store.factors.sites[block.site], block.tensors[SLOT[plan.quantity]])
    _, places, units = cells.shape
    assert units <= layer.units, f"{layer.name} has {units} units, not {layer.units}"
    height = max(1, PIECE_CELLS // max(1, places * units))
    for first in range(0, len(there), height):
        some = there[first : first + height]
        values = cells[some]
        if plan.quantity == "err":
            factor = scale_of(block, None)[some] * (1.0 if scale is None else scale[row[some]])
            values = (values * factor[:, None, None]).astype(values.dtype)
        visit, place, unit = (axis.reshape(-1) for axis in np.indices(values.shape))
        yield {"row": row[some][visit], "layer": np.full(len(visit), number), "call": np.full(len(visit), block.call),
               "place": place, "unit": unit, "value": values.reshape(-1)}  # fmt: skip
