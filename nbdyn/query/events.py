"""Events in a run: the steps at which a weight or a condition becomes true, found chunk by chunk."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nbdyn.errors import QueryError
from nbdyn.query.evaluate import Array, evaluate
from nbdyn.query.exceeding import truth_of
from nbdyn.query.plan import LastPlan
from nbdyn.query.rows import MAX_ROWS, every_row, rebuilt_note
from nbdyn.query.source import Source
from nbdyn.query.tree import Becomes, Comparison, Crosses, number_text
from nbdyn.store.index.events import ARRIVED, SIGN, ZERO
from nbdyn.store.index.read import open_index
from nbdyn.store.names import locate

FEW = 64
"""Of so few weights the rows are read sooner than the index."""


@dataclass
class Found:
    """Events in order of step: their steps, their parameters (global indices; empty for conditions), notes."""

    steps: Array
    parameters: Array
    notes: list[str]


def rising(truth: Array) -> Array:
    """Where a condition turns from false to true, along the first axis; true at the first row counts.

    >>> rising(np.array([True, True, False, True])).tolist()
    [True, False, False, True]
    """
    before = np.zeros_like(truth)
    before[1:] = truth[:-1]
    return truth & ~before


def crossing(distance: Array) -> Array:
    """Where a signed distance changes sign or arrives at 0, along the first axis; the first row never does.

    >>> crossing(np.array([1.0, -1.0, 0.0, 0.0, 2.0])).tolist()
    [False, True, True, False, False]
    """
    side = np.sign(distance)
    result = np.zeros(side.shape, dtype=bool)
    before, after = side[:-1], side[1:]
    arrives = (after == 0) & (before != 0) & ~np.isnan(before)
    result[1:] = arrives | (before * after < 0)
    return result


def find_condition(plan: LastPlan, source: Source) -> Found:
    """Events of a condition on the values of one step."""
    assert plan.condition is not None
    before = max(0, plan.start - 1)
    frame = source.read("steps", before, plan.stop)
    columns = source.columns(frame)
    truth = np.broadcast_to(evaluate(plan.condition, columns), (len(frame),)).astype(bool)
    at = np.flatnonzero(rising(truth)) + before
    at = at[at >= plan.start]
    notes: list[str] = []
    if not len(at):
        notes.append(_no_step(plan, f"where {plan.statement.event}"))
        inside = slice(plan.start - before, None)
        notes[0] += _already(truth, before, plan) or _nearest_value(plan, columns, inside)
    at = at if plan.statement.every else at[:1]
    check_rows(len(at), plan.statement.count)
    return Found(at, np.empty(0, dtype=np.int64), notes)


def find_exceeding(plan: LastPlan, source: Source) -> Found:
    """Events of a comparison over the cells of one step."""
    truth, values, notes = truth_of(plan.exceeds, source)
    before = plan.exceeds.cells.start
    at = np.flatnonzero(rising(truth)) + before
    at = at[at >= plan.start]
    if not len(at):
        note = _no_step(plan, f"where {plan.statement.event}") + _already(truth, before, plan)
        if not np.isnan(values).all():
            place = int(np.nanargmax(values))
            note += f"; the largest value that was needed is {values[place]:.4g} at step {before + place}"
        notes.append(note)
    at = at if plan.statement.every else at[:1]
    check_rows(len(at), plan.statement.count)
    return Found(at, np.empty(0, dtype=np.int64), notes)


def _no_step(plan: LastPlan, what: str) -> str:
    return f"no step in {plan.start}..{plan.stop - 1} {what}" if plan.stop > plan.start else "no step recorded yet"


def _already(truth: Array, before: int, plan: LastPlan) -> str:
    """Say so where the condition held when the scope began, so that it cannot turn true there."""
    if before < plan.start < plan.stop and len(truth) and truth[0].any():
        return f" newly: it held at step {before} already, before the scope"
    return ""


def _nearest_value(plan: LastPlan, columns: dict[str, Array], inside: slice) -> str:
    """The closest approach of a single comparison."""
    node = plan.condition
    if not isinstance(node, Comparison) or plan.stop <= plan.start:
        return ""
    shape = columns["step"][inside].shape
    left, right = (np.broadcast_to(evaluate(side, columns), columns["step"].shape)[inside].astype(float)
                   for side in (node.left, node.right))  # fmt: skip
    gap = np.abs(left - right)
    if shape[0] == 0 or np.isnan(gap).all():
        return "; its value is NaN throughout"
    place = int(np.nanargmin(gap))
    told = plan.statement.event.left if isinstance(plan.statement.event, Comparison) else node.left
    return f"; nearest {told} = {left[place]:.4g} at step {columns['step'][inside][place]}"


class _Scan:
    """One pass over the weights of some parameters."""

    def __init__(self, plan: LastPlan) -> None:
        event = plan.statement.event
        assert isinstance(event, Becomes | Crosses)
        self.plan = plan
        self.event = event
        self.open = np.ones(len(plan.indices), dtype=bool)
        self.steps: list[Array] = []
        self.places: list[Array] = []
        self.found = 0
        self.nearest = (np.inf, 0, 0)
        self.nan = np.zeros(len(plan.indices), dtype=np.int64)
        self.first_nan: int | None = None
        self.began_true = False

    def take(self, steps: Array, values: Array, first: bool) -> None:
        """Look at rows of steps; the head row was seen before unless `first`."""
        distance = self._distance(values)
        if isinstance(self.event, Crosses):
            edges = crossing(distance)
        else:
            truth = distance == 0 if self.event.within is None else np.abs(distance) <= self.event.within
            edges = rising(truth)
            self.began_true |= first and len(steps) > 0 and steps[0] < self.plan.start and bool(truth[0].any())
        # The head row is there to know what was before: of it only the run's own first step can be an event.
        fresh = steps >= self.plan.start
        if not first:
            fresh[:1] = False
        rows, places = np.nonzero(edges & fresh[:, None])
        if not self.plan.statement.every:
            rows, places = self._firsts(rows, places)
        self.steps.append(steps[rows])
        self.places.append(places)
        self.found += len(rows)
        check_rows(self.found, self.plan.statement.count)
        self._watch(steps, distance, fresh)

    def _distance(self, values: Array) -> Array:
        """The difference w - v; v in the weights' type where equality is asked, so that `becomes 0.1` can happen."""
        if isinstance(self.event, Becomes) and self.event.within is None:
            return values.astype(np.float64) - np.float64(values.dtype.type(self.event.value))
        return values.astype(np.float64) - self.event.value

    def _firsts(self, rows: Array, places: Array) -> tuple[Array, Array]:
        """Only the first event of each parameter that has none yet."""
        keep = self.open[places]
        rows, places = rows[keep], places[keep]
        _, first = np.unique(places, return_index=True)
        first.sort()
        self.open[places] = False
        return rows[first], places[first]

    def _watch(self, steps: Array, distance: Array, fresh: Array) -> None:
        """Remember the closest approach and the NaN."""
        distance, steps = np.abs(distance[fresh]), steps[fresh]
        if not distance.size:
            return
        missing = np.isnan(distance)
        if missing.any():
            self.nan += missing.sum(axis=0)
            if self.first_nan is None:
                self.first_nan = int(steps[missing.any(axis=1)][0])
        if not missing.all():
            row, place = np.unravel_index(np.nanargmin(distance), distance.shape)
            if distance[row, place] < self.nearest[0]:
                self.nearest = (float(distance[row, place]), int(steps[row]), int(place))

    @property
    def done(self) -> bool:
        """Whether nothing more can be found."""
        return not self.plan.statement.every and not self.open.any()


def find_weight(plan: LastPlan, source: Source) -> Found:
    """Events of weights, per parameter, in order of step and parameter."""
    indexed = _from_index(plan, source) if len(plan.indices) > FEW else None
    if indexed is not None:
        return indexed
    scan = _Scan(plan)
    first = True
    residuals: dict[int, float] = {}
    for steps, values in every_row(source.store, plan.indices, max(0, plan.start - 1), plan.stop, residuals):
        scan.take(steps, values, first)
        first = False
        if scan.done:
            break
    steps = np.concatenate(scan.steps) if scan.steps else np.empty(0, dtype=np.int64)
    places = np.concatenate(scan.places) if scan.places else np.empty(0, dtype=np.int64)
    order = np.lexsort((places, steps))
    notes = [*_weight_notes(scan, plan, source), *rebuilt_note(residuals)]
    return Found(steps[order], plan.indices[places[order]], notes)


def _from_index(plan: LastPlan, source: Source) -> Found | None:
    """Events around 0 from the run's index; None where it has none, so that the weights must be looked at."""
    event = plan.statement.event
    exact = isinstance(event, Crosses) or (isinstance(event, Becomes) and event.within is None)
    if not exact or not isinstance(event, Crosses | Becomes) or event.value != 0:
        return None
    index = open_index(source.store)
    found = index.events(plan.start, plan.stop, plan.indices) if index is not None else None
    if found is None:
        return None
    kept = np.isin(found.kind, (SIGN, ARRIVED) if isinstance(event, Crosses) else (ARRIVED, ZERO))
    steps, parameters = found.step[kept], found.parameter[kept]
    if not len(steps):
        return None
    if not plan.statement.every:
        first = np.sort(np.unique(parameters, return_index=True)[1])
        steps, parameters = steps[first], parameters[first]
    check_rows(len(steps), plan.statement.count)
    return Found(steps, parameters, [])


def _weight_notes(scan: _Scan, plan: LastPlan, source: Source) -> list[str]:
    notes: list[str] = []
    value = f" - {number_text(scan.event.value)}" if scan.event.value else ""
    if not scan.found:
        note = _no_step(plan, f"where {scan.event}")
        if scan.began_true:
            note += f" newly: it held at step {plan.start - 1} already, before the scope"
        elif np.isfinite(scan.nearest[0]):
            gap, step, place = scan.nearest
            label = locate(plan.indices[[place]], source.tensors)[1][0]
            what = f"|w{value}|" + (f" of {label}" if len(plan.indices) > 1 else "")
            note += f"; nearest {what} = {gap:.4g} at step {step}"
        notes.append(note)
    if scan.nan.any():
        many = f"{np.count_nonzero(scan.nan)} of {len(plan.indices)} parameters are" if len(scan.nan) > 1 else "it is"
        notes.append(f"{many} NaN at some steps, first at step {scan.first_nan}; NaN never fires")
    return notes


def check_rows(events: int, count: int) -> None:
    """Refuse a result that would fill the memory.

    Raises:
        QueryError: if `events` with `count` samples each are more rows than a result may have.
    """
    if events * count > MAX_ROWS:
        raise QueryError(
            f"{events:,} events with {count} samples each are more than the {MAX_ROWS:,} rows a result may have; "
            "name fewer parameters, fewer samples, or a scope, or take only the first event of each."
        )
