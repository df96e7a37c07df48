"""Cells that a step has once, whatever its samples: batch gradients, weights and their changes, in pieces of steps."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from nbdyn.query.evaluate import Array
from nbdyn.query.reduce.general import PIECE_BYTES, Piece
from nbdyn.query.reduce.matrix import Cells, measured
from nbdyn.query.reduce.members import PLACES, Members, members_of
from nbdyn.query.reduce.targets import targets_of
from nbdyn.query.tree import Measure
from nbdyn.store import Store, frames
from nbdyn.store.trajectory import trajectory_chunks

BATCH = Measure("sum", "g")


def grad_pieces(store: Store, indices: Array, members: Members) -> Iterator[Piece]:
    """The batch gradients p.grad of the members' steps: contributions summed over each step's visits.

    Raises:
        NotRecorded: if they were not captured by sample.
    """
    steps = np.unique(members.key // PLACES)
    targets = targets_of(indices, "weight", store.config["tensors"])
    height = max(1, PIECE_BYTES // (8 * max(1, len(indices))))
    for first in range(0, len(steps), height):
        some = steps[first : first + height]
        visits = frames.visits(store, int(some[0]), int(some[-1]) + 1)
        visits = visits.loc[np.isin(visits["step"].to_numpy(), some)].reset_index(drop=True)
        batches = members_of(visits, ("batch",))
        values = measured(Cells(store, BATCH), batches, targets, np.float32)
        yield batches.labels["step"].to_numpy() * PLACES, indices, values


def weight_pieces(store: Store, indices: Array, members: Members, *, changes: bool) -> Iterator[Piece]:
    """weights[t], or weights[t + 1] - weights[t], of the members' steps, rebuilt between snapshots.

    Raises:
        NotRecorded: if they can be neither read nor rebuilt.
    """
    start, stop = members.steps
    for steps, values in trajectory_chunks(store, indices, start, stop + changes, overlap=int(changes)):
        if changes:
            values, steps = np.diff(values.astype(np.float64), axis=0), steps[:-1]
        if len(steps):
            yield steps.astype(np.int64) * PLACES, indices, values


def pieces_of(quantity: str, store: Store) -> Callable[[Array, Members], Iterator[Piece]] | None:
    """What reads the cells of a quantity; None for g, whose cells are those of visits."""
    match quantity:
        case "grad":
            return lambda indices, members: grad_pieces(store, indices, members)
        case "w" | "dw":
            return lambda indices, members: weight_pieces(store, indices, members, changes=quantity == "dw")
        case _:
            return None
