"""Events over cells: `every share(|grad| > explode) > 10%`, found without reading where recorded norms decide."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nbdyn.query.cell_plan import CellPlan, explodes, plan_cells
from nbdyn.query.cell_sources import question
from nbdyn.query.evaluate import Array
from nbdyn.query.explode import Thresholds, thresholds
from nbdyn.query.reads import Read
from nbdyn.query.reduce.matrix import measured
from nbdyn.query.reduce.measures import condition_of
from nbdyn.query.source import Source
from nbdyn.query.tree import Exceeds, Measure, Measured, Scope, Selector, Show
from nbdyn.store.index.exponents import above
from nbdyn.store.index.read import open_index

_COMPARE = {">": np.greater, ">=": np.greater_equal, "<": np.less, "<=": np.less_equal, "=": np.equal,
            "!=": np.not_equal}  # fmt: skip


@dataclass(frozen=True)
class ExceedsPlan:
    """The event, bound: what its value is made of, and which steps' cells must be read.

    Attributes:
        cells: the plan of the measure by steps.
        event: the event.
        low, high: (steps,) between which the value of each step lies, by norms and the index; equal where known.
        undecided: steps whose cells must be read.
    """

    cells: CellPlan
    event: Exceeds
    low: Array
    high: Array
    undecided: Array

    @property
    def reads(self) -> tuple[Read, ...]:
        """What is read of cells: nothing where the bounds decide."""
        if not len(self.undecided):
            return ()
        share = len(self.undecided) / max(1, len(self.low))
        return tuple(
            replace(read, rows=int(read.rows * share), bytes=int(read.bytes * share), seconds=read.cost * share,
                    how=f"{read.how}; {len(self.undecided)} of {len(self.low)} steps, norms decide the others")
            for read in self.cells.reads
        )  # fmt: skip


def plan_exceeds(event: Exceeds, scope: Scope, source: Source) -> ExceedsPlan:
    """The plan of an event over cells.

    Raises:
        QueryError: if the measure cannot be taken of steps.
        NotRecorded: if its cells are not recorded.
    """
    selector = event.selector or Selector("all")
    start, stop, _ = source.range(scope, rows=source.steps + (event.measure.quantity == "w"))
    # The step before the scope tells whether its first one is a rising edge.
    wider = Scope("steps", max(0, start - 1), stop - 1, scope.position)
    plan = plan_cells(Show((Measured(event.measure, selector),), ("step",), wider), source)
    low, high = _bounds(plan, source)
    value = event.value.value
    decided = _decided(event.operator, low, high, value)
    undecided = np.flatnonzero(~decided) + plan.start
    undecided = undecided[np.isin(undecided, source.store.factors.steps)] if plan.measure.quantity != "w" else undecided
    return ExceedsPlan(plan, event, low, high, undecided)


def _decided(operator: str, low: Array, high: Array, value: float) -> Array:
    """Where both bounds are on one side of the number."""
    same = low == high
    if operator in (">", "<="):
        return same | (high <= value) | (low > value)
    if operator in (">=", "<"):
        return same | (high < value) | (low >= value)
    return same | (high < value) | (low > value)


def _bounds(plan: CellPlan, source: Source) -> tuple[Array, Array]:
    """Between what the measure of each step lies, from the norms of its gradient and the index of exponents.

    Of n numbers whose squares sum to s, at most s / threshold^2 are larger than the threshold (Markov), and none is
    larger than sqrt(s).
    """
    count = plan.stop - plan.start
    low, high = np.full(count, -np.inf), np.full(count, np.inf)
    measure = plan.measure
    whole = _whole_tensors(plan, source)
    if measure.quantity != "grad" or whole is None or not (measure.magnitude or measure.aggregate in ("share", "norm")):
        return low, high
    limits = thresholds(source, plan.start, plan.stop)
    norms = np.where(np.isnan(limits.norms), np.inf, limits.norms)[:, whole] * (1 + 1e-5)
    size = limits.sizes[whole].sum()
    match measure.aggregate:
        case "share" if condition_of(measure).is_beyond:
            return _share_bounds(plan, source, limits, whole, norms)
        case "max":
            return np.zeros(count), np.sqrt((norms**2).sum(1))
        case "sum":
            return np.zeros(count), np.sqrt((norms**2).sum(1) * size)
        case "mean":
            return np.zeros(count), np.sqrt((norms**2).sum(1) / size)
        case _:
            return low, high


def _share_bounds(
    plan: CellPlan, source: Source, limits: Thresholds, whole: Array, norms: Array
) -> tuple[Array, Array]:
    measure, sizes = plan.measure, limits.sizes[whole]
    assert measure.condition is not None
    limit = limits.limits[:, whole] if explodes(measure) else np.full(norms.shape, float(measure.condition[1]))
    with np.errstate(all="ignore"):
        most = np.where(limit > 0, np.minimum(sizes, (norms / limit) ** 2), sizes)
    most = np.where(np.isnan(most), sizes, most)
    least = np.zeros_like(most)
    index = open_index(source.store) if _has_exponent(measure) else None
    found = None if index is None else index.exponents(plan.start, plan.stop)
    if found is not None:
        counts = found[:, whole]
        fewest, greatest = above(np.maximum(counts, 0), float(measure.condition[1]))
        known = (counts >= 0).all(-1)
        least, most = np.where(known, fewest, least), np.where(known, np.minimum(greatest, most), most)
    total = sizes.sum()
    return np.floor(least.sum(1)) / total, np.maximum(np.floor(most.sum(1) + 1e-9), least.sum(1)) / total


def _has_exponent(measure: Measure) -> bool:
    """Whether the index of exponents tells of a share's threshold: of |x| >= 0 and negative ones it does not."""
    assert measure.condition is not None
    operator, threshold = measure.condition
    return not isinstance(threshold, str) and (threshold > 0 or (threshold == 0 and operator == ">"))


def _whole_tensors(plan: CellPlan, source: Source) -> Array | None:
    """Which tensors the plan's parameters are, if they are whole ones."""
    firsts = np.array([t["first"] for t in source.tensors], dtype=np.int64)
    sizes = np.array([t["size"] for t in source.tensors], dtype=np.int64)
    met = np.bincount(np.searchsorted(firsts, plan.indices, side="right") - 1, minlength=len(firsts))
    return np.flatnonzero(met) if ((met == 0) | (met == sizes)).all() else None


def truth_of(plan: ExceedsPlan, source: Source) -> tuple[Array, Array, list[str]]:
    """Whether the event's comparison holds at each step from `plan.cells.start` on, the values known, and notes.

    Values are NaN at steps that the bounds decided. A step that was not captured, and that they do not decide, counts
    as false, and a note says so.
    """
    count = plan.cells.stop - plan.cells.start
    compare, value = _COMPARE[plan.event.operator], plan.event.value.value
    truth = compare(plan.low, value) & compare(plan.high, value)
    values = np.full(count, np.nan)
    same = plan.low == plan.high
    values[same] = plan.low[same]
    notes: list[str] = []
    open_steps = ~_decided(plan.event.operator, plan.low, plan.high, value)
    for run in np.split(plan.undecided, np.flatnonzero(np.diff(plan.undecided) > 1) + 1):
        if len(run):
            part = replace(plan.cells, start=int(run[0]), stop=int(run[-1]) + 1, index=None)
            asked = question(part, source)
            steps = asked.members.labels["step"].to_numpy() - plan.cells.start
            values[steps] = measured(asked.cells, asked.members, asked.targets)[:, 0]
            notes += asked.notes
    known = ~np.isnan(values) & open_steps
    truth[known] = compare(values[known], value)
    missing = int((open_steps & np.isnan(values)).sum())
    if missing:
        notes.append(f"{missing} of {count} steps cannot be told: not captured by sample; they count as false")
    return truth, values, list(dict.fromkeys(notes))
