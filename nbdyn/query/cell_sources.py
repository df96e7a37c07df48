"""For a plan over cells: its members, its targets, and what reads its cells."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from nbdyn.errors import NotRecorded
from nbdyn.query.cell_plan import OF_STEPS, CellPlan, explodes
from nbdyn.query.evaluate import Array
from nbdyn.query.explode import thresholds
from nbdyn.query.layers import table_of
from nbdyn.query.reduce.linear import divided
from nbdyn.query.reduce.matrix import Cells
from nbdyn.query.reduce.members import PLACES, Members, members_of
from nbdyn.query.reduce.steps import pieces_of
from nbdyn.query.reduce.targets import Targets, targets_of
from nbdyn.query.reduce.units import unit_pieces
from nbdyn.query.source import Source
from nbdyn.query.tree import Measure
from nbdyn.store.attribution import Attribution, coefficients
from nbdyn.store.calls import LENGTH


@dataclass(frozen=True)
class Question:
    """What `reduce` is asked: cells, members of visits, targets of parameters, and notes for the answer."""

    cells: Cells
    members: Members
    targets: Targets
    notes: tuple[str, ...]


def question(plan: CellPlan, source: Source) -> Question:
    """The question of a plan.

    Raises:
        NotRecorded: if the run does not hold what is needed.
    """
    targets = targets_of(plan.indices, plan.parameters, table_of(plan.layers) if plan.layers else source.tensors)
    if plan.attributes:
        return _displacement(plan, source, targets)
    measure = plan.measure
    if measure.quantity == "g" or plan.layers:
        return _of_visits(plan, source, targets)
    if measure.aggregate in ("net", "path"):
        measure = Measure("sum", "dw", magnitude=measure.aggregate == "path", absolute=measure.aggregate == "net")
    rows = source.index.iloc[plan.start : plan.stop].reset_index(names="step")
    rows["step"] = np.arange(plan.start, plan.start + len(rows))
    if measure.quantity == "w" and plan.stop > source.steps:  # the final weights follow the last step
        last = rows.iloc[-1:].assign(step=source.steps) if len(rows) else rows
        rows = pd.concat([rows, last], ignore_index=True)
    if measure.quantity == "grad":
        rows, note = captured_of(rows, source)
    else:
        note = ""
    members = members_of(rows, tuple(kind for kind in plan.visits if kind in OF_STEPS))
    cells = Cells(source.store, measure, pieces_of(measure.quantity, source.store), _threshold(plan, source))
    return Question(cells, members, targets, (note,) if note else ())


def _of_visits(plan: CellPlan, source: Source, targets: Targets) -> Question:
    visits = source.read("visits", plan.start, plan.stop)
    if "class" in plan.visits and not (visits["class"].to_numpy() >= 0).any():
        raise NotRecorded(
            f"{source.name} holds no classes of these visits: they are the targets of classification losses, and runs "
            "of an older nbdyn have none. Group by sample, or record again."
        )
    visits, note = captured_of(visits, source)
    scale, unscaled = scales_of(visits["step"].to_numpy(), source, plan.measure.quantity)
    kinds = tuple(kind for kind in plan.visits if kind not in ("token", "position"))
    tokens = {"token", "position"} & set(plan.visits)
    members = members_of(visits, ("sample",) if "token" in tokens else kinds, where=plan.where,
                         columns=source.columns(visits), scale=scale)  # fmt: skip
    if tokens:
        members = _by_token(members, plan, source)
    notes = (*members.notes, *filter(None, (note, unscaled)))
    pieces = unit_pieces(source.store, plan.layers, plan.measure) if plan.layers else None
    cells = Cells(source.store, plan.measure, pieces, _threshold(plan, source))
    return Question(cells, members, targets, notes)


def captured_of(rows: pd.DataFrame, source: Source) -> tuple[pd.DataFrame, str]:
    """The rows of captured steps, of visits those of captured samples, and a note about the others."""
    steps = rows["step"].to_numpy()
    captured = np.isin(steps, source.store.factors.steps)
    fraction = (source.store.config.get("per_sample") or {}).get("fraction", 1.0)
    if fraction < 1.0 and captured.any():
        return _of_fraction(rows.loc[captured], fraction, source)
    if captured.all():
        return rows, ""
    if not captured.any():
        raise NotRecorded(
            f"{source.name} holds no per-sample gradients of these steps; "
            f"{len(source.store.factors.steps)} of its {source.steps} steps have them."
        )
    left, total = len(np.unique(steps[~captured])), len(np.unique(steps))
    return rows.loc[captured].reset_index(drop=True), f"{left} of {total} steps left out: not captured by sample"


def _of_fraction(rows: pd.DataFrame, fraction: float, source: Source) -> tuple[pd.DataFrame, str]:
    """The visits of the samples that were captured, where a share of them was."""
    held = f"per-sample gradients of a share of {fraction} of the samples only (fraction=)"
    if "position" not in rows:
        raise NotRecorded(
            f"the gradient of a batch comes from all of its samples, and {source.name} holds {held}; ask for what "
            "those samples did: by sum |g|."
        )
    factors, steps = source.store.factors, rows["step"].to_numpy().astype(np.int64)
    start, stop = int(steps[0]), int(steps[-1]) + 1
    visits = [factors.visits(site, start, stop) for site in range(len(factors.sites))]
    keys = np.concatenate([step * PLACES + position for step, position in visits])
    captured = np.isin(steps * PLACES + rows["position"].to_numpy(), keys)
    note = f"{int((~captured).sum())} visits left out: {source.name} holds {held}"
    return rows.loc[captured].reset_index(drop=True), note


def scales_of(steps: Array, source: Source, quantity: str = "g") -> tuple[Array | None, str]:
    """What contributions are multiplied by to be the samples' own gradients, (V,), or a note that it is unknown.

    Nothing (None) for act, which no loss scales.
    """
    if quantity == "act":
        return None, ""
    scale = source.store.read_steps(0, source.steps, ("scale",))["scale"][steps]
    if np.isnan(scale).any():
        what = {"g": "g is the contribution to the batch gradient", "err": "err is of the batch's loss"}[quantity]
        return None, f"{what}: the scale of the loss is unknown"
    return scale, ""


def _by_token(members: Members, plan: CellPlan, source: Source) -> Members:
    """Members of single positions of sequences."""
    factors = source.store.factors
    parts, rest = divided(source.store, plan.indices, plan.start, plan.stop, tokens=True)
    if len(rest):
        every = divided(source.store, np.arange(source.parameters), plan.start, plan.stop, tokens=True)[0]
        have = ", ".join(factors.sites[part.site].name for part in every) or "none"
        raise NotRecorded(
            "positions are told apart in linear layers that are stored in factors and called once a batch; of "
            f"{source.name} these are: {have}. Name one: top 5 tokens of fc1 by sum |g|."
        )
    lengths = [
        factors.calls_of(number, plan.start, plan.stop)[:, LENGTH].max(initial=0)
        for number in (part.site for part in parts)
    ]
    length = int(max(lengths, default=0))
    kind = "token" if "token" in plan.visits else "position"
    token = np.arange(length)
    if kind == "position":
        labels = pd.DataFrame({"token": token})
    else:
        samples = members.labels["sample"].to_numpy()
        labels = pd.DataFrame({"sample": np.repeat(samples, length), "token": np.tile(token, len(samples))})
    return Members(members.key, members.code, labels, members.scale, kind, length, members.notes)


def _threshold(plan: CellPlan, source: Source) -> Callable[[Array, Array], Array | float]:
    """What a share compares cells with."""
    measure = plan.measure
    if measure.condition is None:
        return lambda keys, indices: 0.0
    if not explodes(measure):
        value = float(measure.condition[1])
        return lambda keys, indices: value
    limits = thresholds(source, plan.start, plan.stop)
    return lambda keys, indices: limits.of(keys // PLACES, indices)


def _displacement(plan: CellPlan, source: Source, targets: Targets) -> Question:
    """The displacement of weights, divided among visits by what each step's gradient did to it."""
    store = source.store
    one = len(store.config["optimizer"]["order"]) == 1 and store.config["optimizer"]["name"] == "SGD"
    # Under SGD the weights of a tensor share their coefficients; tensors do unless some had no gradient at a step.
    firsts = np.array([t["first"] for t in source.tensors], dtype=np.int64)
    owners = np.searchsorted(firsts, plan.indices, side="right")
    some = plan.indices[np.flatnonzero(np.diff(owners, prepend=-1))] if one else plan.indices
    found = coefficients(store, some, plan.start, plan.stop)
    if found.coefficients.ndim == 2 and len(some) < len(plan.indices):
        found = coefficients(store, plan.indices, plan.start, plan.stop)
    start, stop = int(found.steps[0]), int(found.steps[-1]) + 1
    visits, note = captured_of(source.read("visits", start, stop), source)
    steps = visits["step"].to_numpy()
    at = np.minimum(np.searchsorted(found.steps, steps), len(found.steps) - 1)
    known = found.steps[at] == steps
    scale = np.where(known, found.coefficients[at], 0.0) if found.coefficients.ndim == 1 else None
    members = members_of(visits, plan.visits, where=plan.where, columns=source.columns(visits), scale=scale)
    measure = Measure("sum", "g", magnitude=plan.measure.aggregate == "path", absolute=plan.measure.aggregate == "net")
    pieces = None if scale is not None else _weighted(source, found, plan.indices)
    notes = [*members.notes, f"attribution: {found.kind}"]
    notes += [note] if note else []
    if len(found.moved) == len(plan.indices) and len(found.moved) == 1:
        notes.append(f"w moved by {found.moved[0]:.4g}, of which visits explain {found.explained[0]:.4g}")
    return Question(Cells(store, measure, pieces), members, targets, tuple(notes))


def _weighted(source: Source, found: Attribution, parameters: Array):
    """Cells of visits, each times the coefficient of its step and parameter; the columns are of `parameters`."""
    from nbdyn.query.reduce.general import visit_pieces

    def pieces(indices: Array, members: Members):
        for key, some, values in visit_pieces(source.store, indices, members):
            row = np.searchsorted(found.steps, key // PLACES)
            column = np.searchsorted(parameters, some)
            yield key, some, values * found.coefficients[np.ix_(row, column)]

    return pieces
