"""Cells of units: what a layer got, and the loss's gradient at its output, in pieces of bounded memory."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from nbdyn.query.evaluate import Array
from nbdyn.query.layers import SLOT, Layer, by_unit, scale_of
from nbdyn.query.reduce.general import PIECE_BYTES, Piece
from nbdyn.query.reduce.measures import SUM_SQ, operations
from nbdyn.query.reduce.members import PLACES, Members
from nbdyn.query.tree import Measure
from nbdyn.store import Store
from nbdyn.store.factors import Block


def unit_pieces(store: Store, layers: Sequence[Layer], measure: Measure) -> Callable[[Array, Members], Iterator[Piece]]:
    """What reads the cells of units: a row for each place of each call of a visit, a column for each unit.

    The members' scale multiplies err. Cells that are squared come in float64: a variance is the mean of the squares
    less the square of the mean.

    Args:
        store: the run.
        layers: whose units are numbered through.
        measure: of act or err.
    """

    def pieces(indices: Array, members: Members) -> Iterator[Piece]:
        start, stop = members.steps
        for layer in layers:
            units = indices[(indices >= layer.first) & (indices < layer.first + layer.units)]
            for number in layer.sites if len(units) else ():
                for block in store.factors.warm.blocks(number, start, stop):
                    yield from _of_block(store, block, units, layer.first, members, measure)

    return pieces


def _of_block(
    store: Store, block: Block, units: Array, first: int, members: Members, measure: Measure
) -> Iterator[Piece]:
    row = members.rows_of(block.step, block.position)
    there = np.flatnonzero(row >= 0)
    cells = by_unit(store.factors.sites[block.site], block.tensors[SLOT[measure.quantity]])
    _, places, width = cells.shape
    scale = scale_of(block, None)
    if members.scale is not None:
        scale = scale_of(block, np.where(row >= 0, members.scale[row], 1.0))
    scaled = measure.quantity == "err" and not (scale[there] == 1.0).all()
    key = block.step * PLACES + block.position
    height = max(1, PIECE_BYTES // (8 * max(1, places * width)))
    for begin in range(0, len(there), height):
        some = there[begin : begin + height]
        values = cells[some] if len(units) == width else cells[some][:, :, units - first]
        if scaled:
            values = (values * scale[some][:, None, None]).astype(values.dtype)
        if SUM_SQ in operations(measure):
            values = values.astype(np.float64)
        yield np.repeat(key[some], places), units, values.reshape(-1, len(units))
