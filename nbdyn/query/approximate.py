"""Answers of `... approximately within 5%`: estimates from a random sample of steps, with a 95 % interval of each row.

The sample is doubled until each interval is narrow enough, or it is clear that half of the steps would not do: then the
exact answer is given. `nbdyn.query.sampling` has the estimator and its source.
"""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from nbdyn.query.approximate_plan import FEW_STEPS, design_of, interval_columns, seed_of
from nbdyn.query.cell_plan import CellPlan
from nbdyn.query.cell_sources import Question, question
from nbdyn.query.evaluate import Array
from nbdyn.query.ranked import bins, check_rows, how_many, labels_of, lists_of, run_cells
from nbdyn.query.reduce.matrix import counted, measured
from nbdyn.query.reduce.members import PLACES, Members
from nbdyn.query.reduce.ranking import largest
from nbdyn.query.sampling import Design, Stratum, totals
from nbdyn.query.source import Source
from nbdyn.query.tree import Group, Measure, Top

LAST_SHARE = 0.75
"""A sample is not made larger than this share of the steps: all of them cost little more."""


@dataclass(frozen=True)
class Estimates:
    """Values with their 95 % intervals, (members, targets) each; `error` is half a width relative to the value."""

    value: Array
    low: Array
    high: Array
    error: Array


def run_approximately(plan: CellPlan, source: Source) -> tuple[pd.DataFrame, list[str]]:
    """The frame of a plan that `approximated` made, and its notes.

    Cost: the sampled steps, read cluster by cluster, and the sums of each stratum (`approximate_plan.SUMS_BYTES`).

    Raises:
        QueryError: if it would have more rows than a result may have.
        NotRecorded: if the run does not hold what is needed.
    """
    if plan.exact:
        return _exact(plan, source)
    asked = question(plan, source)
    steps = np.unique(asked.members.key // PLACES)
    if len(steps) < FEW_STEPS:
        return _exact(plan, source, f"exact: fewer than {FEW_STEPS} steps")
    check_rows(asked.members.count * asked.targets.count)
    sample = _Sample(asked, steps, design_of(plan, source, steps, asked.members.count * asked.targets.count))
    within, doublings = plan.statement.within or 0.0, 0
    while True:
        sample.read(doublings)
        rows, unsure = _rows(plan, asked, sample.estimates())
        if sample.met and (rows["error"] <= within).all():
            notes = [*_notes(plan, source, sample, rows, unsure), *asked.notes, *sample.notes]
            return _answer(plan, rows), notes
        if not sample.may_reach(rows["error"].max(initial=0.0), within, doublings):
            note = f"exact: all {len(steps):,} steps read, because a sample comes within {within:.3g} no sooner"
            return _exact(plan, source, note)
        doublings += 1


def _exact(plan: CellPlan, source: Source, *note: str) -> tuple[pd.DataFrame, list[str]]:
    """The exact answer, with intervals that are points."""
    low, high = names = interval_columns(plan)
    frame, notes = run_cells(replace(plan, columns=tuple(c for c in plan.columns if c not in names)), source)
    values = frame[str(plan.measure)]
    return frame.assign(**{low: values, high: values}).reindex(columns=plan.columns), [*note, *notes]


class _Sample:
    """The sampled steps of a question and what they add up to.

    Attributes:
        size: steps read.
        steps: (N,) those to sample from.
        notes: what is to be known of the cells read.
    """

    def __init__(self, asked: Question, steps: Array, design: Design) -> None:
        self.steps, self.size, self.notes = steps, 0, list[str]()
        self._asked, self._design = asked, design
        members = asked.members
        self._starts = np.searchsorted(members.key, np.append(steps, steps[-1] + 1)[design.starts] * PLACES)
        place = np.repeat(np.arange(len(self._starts) - 1), np.diff(self._starts))
        self._stratum = np.empty(len(design.starts) - 1, np.int64)
        for number, units in enumerate(design.strata):
            self._stratum[units] = number
        self._sums = [
            Stratum.empty(np.unique(members.code[self._stratum[place] == number]), len(units), asked.targets.count)
            for number, units in enumerate(design.strata)
        ]
        self._held = _met(members, place)
        self._seen = np.zeros(members.count, np.int64)

    def read(self, doublings: int) -> None:
        """Read on, in the order of steps, until the sample was doubled so many times."""
        new = [units[s.read :] for units, s in zip(self._design.drawn(doublings), self._sums, strict=True)]
        for place in np.sort(np.concatenate(new)).tolist():
            here = slice(int(self._starts[place]), int(self._starts[place + 1]))
            members, numbers = _at(self._asked.members, here)
            self._sums[self._stratum[place]].add(numbers, self._totals(members))
            self._seen[numbers] += 1
        self.size = self._design.steps(doublings)

    def _totals(self, members: Members) -> Array:
        """The totals of one cluster from which the measure is had, (members, targets)."""
        cells, targets = self._asked.cells, self._asked.targets
        basic = replace(cells, measure=_basic(cells.measure), notes=[])
        found = measured(basic, members, targets)
        if basic.notes:
            self.notes = ["NaN cells are left out"]
        match cells.measure.aggregate:
            case "norm":
                return np.square(found)
            case "share":
                return found * counted(members, targets)
            case _:
                return found

    @property
    def met(self) -> bool:
        """Whether of each member two clusters were read, or all that it has."""
        return bool((self._seen >= np.minimum(2, self._held)).all())

    def may_reach(self, error: float, within: float, doublings: int) -> bool:
        """Whether a larger sample, up to LAST_SHARE of the steps, should bring an error down as far as needed.

        The variance of a total goes with 1 / n - 1 / N.
        """
        count, size = len(self._stratum), self._design.size(doublings)
        sizes = [self._design.size(doublings + more) for more in range(1, 40)]
        last = max((size for size in sizes if size <= LAST_SHARE * count), default=0)
        if last <= size:
            return False
        left = np.sqrt((1 / last - 1 / count) / (1 / size - 1 / count))
        return not self.met or bool(error * left <= within)

    def estimates(self) -> Estimates:
        """The measure as estimated now."""
        asked, measure = self._asked, self._asked.cells.measure
        with np.errstate(all="ignore"):
            value, half = totals(self._sums, asked.members.count)
            if measure.aggregate in ("mean", "share"):
                cells = counted(asked.members, asked.targets)
                value, half = value / cells, half / cells
            if measure.aggregate == "norm":
                # The delta method (Cochran 1977, section 6.3's first term): d sqrt(Q) = dQ / (2 sqrt(Q)).
                value = np.sqrt(value)
                half = np.where(half > 0, half / (2 * value), half)
            error = np.where(half == 0, 0.0, half / np.abs(value))
        low, high = _interval(measure, value, half)
        return Estimates(np.abs(value) if measure.absolute else value, low, high, error)


def _met(members: Members, place: Array) -> Array:
    """How many clusters each member has visits in, (members,)."""
    pairs = np.unique(members.code * (int(place.max(initial=0)) + 1) + place)
    return np.bincount(pairs // (int(place.max(initial=0)) + 1), minlength=members.count)


def _at(members: Members, rows: slice) -> tuple[Members, Array]:
    """The rows of one cluster, as members of their own, and which members these are."""
    numbers, code = np.unique(members.code[rows], return_inverse=True)
    scale = None if members.scale is None else members.scale[rows]
    part = replace(members, key=members.key[rows], code=code, labels=members.labels.iloc[numbers], scale=scale)
    return part, numbers


def _basic(measure: Measure) -> Measure:
    """The measure of one cluster from which its totals are had."""
    return replace(measure, aggregate="sum" if measure.aggregate == "mean" else measure.aggregate, absolute=False)


def _interval(measure: Measure, value: Array, half: Array) -> tuple[Array, Array]:
    """The ends of the intervals: of a magnitude those of the signed value folded, of what is never negative from 0."""
    low, high = value - half, value + half
    if measure.absolute:
        inside = (low <= 0) & (high >= 0)
        low, high = np.abs(low), np.abs(high)
        low, high = np.where(inside, 0.0, np.minimum(low, high)), np.maximum(low, high)
    elif measure.magnitude or measure.aggregate in ("norm", "count", "share"):
        low = np.maximum(low, 0.0)
    return low, np.minimum(high, 1.0) if measure.aggregate == "share" else high


# The rows of the answer ---------------------------------------------------------------------------------------------


def _rows(plan: CellPlan, asked: Question, found: Estimates) -> tuple[dict[str, Any], int]:
    """Columns of the rows to return, with the places `flat`, `member`, `target`; and how many of them may not belong.

    These are the rows of `top` whose interval overlaps that of the first place after their list.
    """
    statement, flat = plan.statement, found.value.reshape(-1)
    member, target = np.divmod(np.arange(flat.size), max(1, asked.targets.count))
    columns: dict[str, Any] = {}
    unsure, chosen = 0, np.arange(flat.size)
    if isinstance(statement, Top):
        code, table = lists_of(statement, asked.members.labels, asked.targets, member, target)
        chosen, rank, rival = _best(statement, flat, code)
        columns |= {name: table[name].to_numpy()[code[chosen]] for name in table.columns} | {"rank": rank}
        high = np.append(found.high.reshape(-1), -np.inf)
        unsure = int((found.low.reshape(-1)[chosen] <= high[rival]).sum())
    columns |= labels_of(asked.members.labels, asked.targets, member[chosen], target[chosen])
    low, high = interval_columns(plan)
    for name, values in (
        (str(plan.measure), found.value),
        (low, found.low),
        (high, found.high),
        ("error", found.error),
    ):
        columns[name] = values.reshape(-1)[chosen]
    return columns, unsure


def _best(statement: Top, flat: Array, code: Array) -> tuple[Array, Array, Array]:
    """Places of the largest values of each list, their ranks, and the place that comes next in the list, or -1."""
    order = np.argsort(code, kind="stable")
    lists = np.split(order, np.flatnonzero(np.diff(code[order])) + 1) if len(order) else []
    chosen, ranks, rivals = [], [], []
    for some in lists:
        k = how_many(statement, len(some))
        best = some[largest(flat[some], k + 1)]
        chosen.append(best[:k])
        ranks.append(np.arange(1, 1 + len(best[:k])))
        rivals.append(np.full(len(best[:k]), best[k] if len(best) > k else -1))
    none = [np.empty(0, np.int64)]
    return np.concatenate(none + chosen), np.concatenate(none + ranks), np.concatenate(none + rivals)


def _answer(plan: CellPlan, rows: dict[str, Any]) -> pd.DataFrame:
    if isinstance(plan.statement, Group):
        rows = rows | bins(rows[str(plan.measure)], plan.statement.into)
    count = len(rows["error"])
    return pd.DataFrame({name: rows[name] for name in plan.columns}, index=range(count))


def _notes(plan: CellPlan, source: Source, sample: _Sample, rows: dict[str, Any], unsure: int) -> list[str]:
    notes = [
        f"approximate: {sample.size:,} of {len(sample.steps):,} steps read, 95 % intervals per row; "
        f"seed {seed_of(plan, source)}"
    ]
    count = len(rows["error"])
    if isinstance(plan.statement, Top):
        notes.append(
            "ranks and membership are those of the estimates"
            + (f": {unsure:,} of {count:,} rows have intervals that reach the next place's" if unsure else
               ", and no row's interval reaches that of the next place")
        )  # fmt: skip
    empty = int((rows[str(plan.measure)] == 0).sum())
    if empty:
        notes.append(f"{empty:,} of {count:,} rows are 0 in all steps read: cells elsewhere are not excluded")
    return notes
