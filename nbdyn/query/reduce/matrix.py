"""The measure of every member and target as a matrix: by products where they are exact, else from cells."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from nbdyn.errors import NotRecorded
from nbdyn.query.evaluate import Array
from nbdyn.query.reduce import general, linear
from nbdyn.query.reduce.batches import reduce_batches
from nbdyn.query.reduce.general import Piece
from nbdyn.query.reduce.linear import FEW
from nbdyn.query.reduce.measures import CELLS, EXCEED, LARGEST, MAX, MAX_ABS, condition_of, finished, operations
from nbdyn.query.reduce.members import PLACES, Members, members_of
from nbdyn.query.reduce.targets import Targets
from nbdyn.query.tree import Measure
from nbdyn.query.words import OF_UNITS
from nbdyn.store import Store, frames


@dataclass
class Cells:
    """Where the cells of a question come from.

    Attributes:
        store: the run.
        measure: what is made of them.
        pieces: parameters and members -> cells of a quantity that has one value a step; None for those of visits.
        threshold: of `share`; see `general.reduced`.
        notes: filled while cells are read.
    """

    store: Store
    measure: Measure
    pieces: Callable[[Array, Members], Iterator[Piece]] | None = None
    threshold: Callable[[Array, Array], Array | float] = lambda keys, indices: 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def counts(self) -> bool:
        """Whether cells are counted as they are read: a mean leaves NaN out, and of units a visit has any number."""
        return self.measure.aggregate in ("mean", "var") or self.measure.quantity in OF_UNITS


def measured(cells: Cells, members: Members, targets: Targets, dtype: type = np.float64) -> Array:
    """The measure, (members, targets) of a dtype.

    Cost: one product a member and layer where `linear.divided` finds layers with one position a visit, otherwise the
    time that all cells take. Memory: two or three such matrices, and factors up to `nbdyn.options.cache`.
    """
    names = (*operations(cells.measure), *([CELLS] if cells.counts else []))
    shape = members.count, targets.count
    out = {name: np.full(shape, -np.inf if name in LARGEST else 0.0, dtype) for name in names}
    rest = np.arange(len(targets.indices))
    if cells.pieces is None and members.count:
        parts = products(cells, members, targets)
        for part, rows in parts:
            _of_part(part, rows, names, members, targets, out)
        rest = without(rest, *(places for part, _ in parts for places in (part.weight, part.bias)))
    if cells.measure.quantity == "grad" and members.count:
        rest = without(rest, _of_batches(cells, members, targets, names, out))
    if len(rest) and members.by_token:
        raise NotRecorded(
            "cells of single positions are products of finite factors, added up; these are not. Ask per unit or per "
            "layer, and for steps before a NaN or Inf."
        )
    if len(rest) and members.count:
        _of_rest(cells, members, targets, rest, names, out)
    if cells.counts:
        return np.where(out[CELLS] > 0, finished(cells.measure, out, lambda: out[CELLS]), np.nan)
    return finished(cells.measure, out, lambda: counted(members, targets))


def without(places: Array, *taken: Array) -> Array:
    """The places that are not among some others, (n,); both are small whole numbers, and `places` ascend."""
    keep = np.ones(int(places[-1]) + 1 if len(places) else 0, dtype=bool)
    for some in taken:
        keep[some.reshape(-1)] = False
    return places[keep[places]]


def counted(members: Members, targets: Targets) -> Array:
    """Cells of each member and target."""
    if members.by_token:
        raise TypeError("cells of tokens are counted by their rows")
    return np.bincount(members.code, minlength=members.count)[:, None] * targets.sizes[None, :]


def products(cells: Cells, members: Members, targets: Targets) -> list[tuple[linear.Part, linear.Rows]]:
    """The linear parts whose cells are finite products, with their factors."""
    store = cells.store
    start, stop = members.steps
    warm = all(store.factors.warm.holds(site, start, stop) for site in store.factors.sites_of(targets.indices))
    small = len(targets.indices) <= FEW and not members.by_token
    if (small and not warm) or EXCEED in operations(cells.measure):
        return []
    found: list[tuple[linear.Part, linear.Rows]] = []
    for part in linear.divided(store, targets.indices, start, stop, tokens=bool(members.by_token))[0]:
        by_weight = targets.kind == "weight"
        whole = by_weight or not part.weight.size or (_same_along_inputs(targets.code[part.weight]))
        if not whole or (by_weight and {MAX, MAX_ABS} & set(operations(cells.measure))):
            continue
        rows = linear.Rows(store, part, members, double=cells.measure.aggregate == "var")
        if rows.is_finite:
            found.append((part, rows))
    return found


def _of_batches(
    cells: Cells, members: Members, targets: Targets, names: tuple[str, ...], out: dict[str, Array]
) -> Array:
    """Bring the batch gradients of linear parts into `out`; returns the places of their parameters."""
    store = cells.store
    steps = np.unique(members.key // PLACES)
    visits = frames.visits(store, int(steps[0]), int(steps[-1]) + 1)
    batches = members_of(visits.loc[np.isin(visits["step"].to_numpy(), steps)], ("batch",))
    taken = [np.empty(0, np.int64)]
    if len(targets.indices) > FEW and batches.count == len(steps):
        for part in linear.divided(store, targets.indices, *members.steps, tokens=False)[0]:
            if part.weight.size == 0:
                continue
            rows = linear.Rows(store, part, batches)
            missing = reduce_batches(part, rows, steps, members, targets, names, cells.threshold, out,
                                     condition_of(cells.measure))  # fmt: skip
            cells.notes += _of_missing(missing, cells.measure)
            taken += [part.weight.reshape(-1), part.bias]
    return np.concatenate(taken)


def _of_missing(cells: int, measure: Measure) -> list[str]:
    """What is said of cells that are NaN."""
    if not cells:
        return []
    if measure.condition is None:
        return [f"{cells:,} cells are NaN and left out"]
    does = "are beyond the threshold" if condition_of(measure).is_beyond else "do not fulfil the condition"
    return [f"{cells:,} cells are NaN: they {does}"]


def _same_along_inputs(code: Array) -> bool:
    return bool((code == code[:, :1]).all())


def _of_part(
    part: linear.Part,
    rows: linear.Rows,
    names: tuple[str, ...],
    members: Members,
    targets: Targets,
    out: dict[str, Array],
) -> None:
    for name in names:
        if name == CELLS:
            held = targets.code[np.concatenate([part.weight.reshape(-1), part.bias])]
            visits = np.bincount(members.code, minlength=members.count)
            out[CELLS] += visits[:, None] * np.bincount(held, minlength=targets.count)[None, :]
        elif targets.kind == "weight":
            linear.of_weights(rows, part, name, out[name])
        else:
            linear.of_targets(rows, part, name, targets.code, out[name])


def _of_rest(
    cells: Cells, members: Members, targets: Targets, rest: Array, names: tuple[str, ...], out: dict[str, Array]
) -> None:
    indices = targets.indices[rest]
    if cells.pieces is None:
        pieces = general.visit_pieces(cells.store, indices, members)
    else:
        pieces = cells.pieces(indices, members)
    found, missing = general.reduced(pieces, members, targets, names, cells.threshold, condition_of(cells.measure))
    cells.notes += _of_missing(missing, cells.measure)
    for name in names:
        (np.maximum if name in LARGEST else np.add)(out[name], found[name], out=out[name])
