"""Answers about cells: `top`, `group` and `show MEASURE of` as frames."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from nbdyn.errors import QueryError
from nbdyn.query.cell_plan import OF_VISITS, CellPlan
from nbdyn.query.cell_sources import Question, question
from nbdyn.query.evaluate import Array
from nbdyn.query.reads import MAX_ROWS
from nbdyn.query.reduce.matrix import measured
from nbdyn.query.reduce.members import COLUMN
from nbdyn.query.reduce.ranking import Ranking, largest, ranking_of, top_members, top_targets
from nbdyn.query.reduce.targets import Targets, targets_of
from nbdyn.query.source import Source
from nbdyn.query.tree import Group, Top

UNITS_AT_ONCE = 10_000_000
"""Values of units that are made in one pass over the factors; more are made a few members or units at a time."""


def run_cells(plan: CellPlan, source: Source) -> tuple[pd.DataFrame, list[str]]:
    """The frame of a plan over cells, and its notes.

    Raises:
        QueryError: if it would have more rows than a result may have.
        NotRecorded: if the run does not hold what is needed.
    """
    if plan.index is not None:
        return _indexed(plan, source), [f"from the index, rounded to {plan.index.relative_error:.0e}"]
    asked = question(plan, source)
    # Cells of units are read whole for any question: all at once, where there is room.
    at_once = bool(plan.layers) and asked.members.count * asked.targets.count <= UNITS_AT_ONCE
    if isinstance(plan.statement, Top) and _lists_are_apart(plan) and not at_once:
        frame = _ranked(plan, plan.statement, asked)
    else:
        frame = _finish(plan, _matrix(asked), asked.members.labels, asked.targets)
    return frame, [*asked.notes, *dict.fromkeys(asked.cells.notes)]


def _indexed(plan: CellPlan, source: Source) -> pd.DataFrame:
    values, members, targets = _from_index(plan, source)
    statement = plan.statement
    if not isinstance(statement, Top) or not _lists_are_apart(plan):
        return _finish(plan, values, members, targets)
    ranks_members = statement.what in OF_VISITS
    k = how_many(statement, len(members) if ranks_members else targets.count)
    return _long(plan, ranking_of(values if ranks_members else values.T, k), members, targets, ranks_members)


def _lists_are_apart(plan: CellPlan) -> bool:
    """Whether one side of the question is ranked and the other has the lists."""
    statement = plan.statement
    assert isinstance(statement, Top)
    return statement.per is None or (statement.per in OF_VISITS) != (statement.what in OF_VISITS)


def _ranked(plan: CellPlan, statement: Top, asked: Question) -> pd.DataFrame:
    members, targets = asked.members, asked.targets
    ranks_members = statement.what in OF_VISITS
    k = how_many(statement, members.count if ranks_members else targets.count)
    lists = targets.count if ranks_members else members.count
    check_rows(lists * min(k, members.count if ranks_members else targets.count))
    ranking = (top_members if ranks_members else top_targets)(asked.cells, members, targets, k)
    return _long(plan, ranking, members.labels, targets, ranks_members)


def how_many(statement: Top, members: int) -> int:
    """The length of a list: as many as asked for, or a share of all members, rounded up."""
    return math.ceil(statement.count / 100 * members) if statement.percent else int(statement.count)


def check_rows(rows: int) -> None:
    """Refuse a result that would fill the memory.

    Raises:
        QueryError: if it is too long.
    """
    if rows > MAX_ROWS:
        raise QueryError(
            f"this would be {rows:,} rows, and a result has at most {MAX_ROWS:,}; ask for fewer, or name fewer "
            "parameters: of fc1.weight[0:100,:]."
        )


def _long(
    plan: CellPlan, ranking: Ranking, labels: pd.DataFrame, targets: Targets, ranks_members: bool
) -> pd.DataFrame:
    """A row for each place of each list."""
    there = ranking.numbers >= 0
    row, place = np.nonzero(there) if not there.all() else np.divmod(np.arange(there.size), there.shape[1])
    found = ranking.numbers[there].astype(np.int64)
    member, target = (found, row) if ranks_members else (row, found)
    columns = labels_of(labels, targets, member, target)
    columns |= {"rank": place + 1, str(plan.measure): ranking.values[there]}
    return pd.DataFrame({name: columns[name] for name in plan.columns}, copy=False)


def labels_of(members: pd.DataFrame, targets: Targets, member: Array, target: Array) -> dict[str, Any]:
    """The columns that name some members and targets."""
    labels = targets.labels(target)
    columns: dict[str, Any] = {name: labels[name].array for name in labels.columns}
    return columns | {name: members[name].to_numpy()[member] for name in members.columns}


def _matrix(asked: Question) -> Array:
    check_rows(asked.members.count * asked.targets.count)
    return measured(asked.cells, asked.members, asked.targets)


def _from_index(plan: CellPlan, source: Source) -> tuple[Array, pd.DataFrame, Targets]:
    """Values (members, targets), labels of the members, and the targets, from the index."""
    epochs = source.index["epoch"].to_numpy()[plan.start : plan.stop]
    index, numbers = plan.index, np.unique(epochs)
    assert index is not None
    first, last = int(numbers[0]), int(numbers[-1])
    if plan.visits == ("class",):
        sums, labels = index.classes(plan.field, first, last, plan.indices), None
    elif plan.visits == ("epoch",):
        sums = np.stack([np.asarray(index.epochs(plan.field, int(n), int(n), plan.indices)) for n in numbers])
        labels = pd.DataFrame({"epoch": numbers})
    else:
        sums, labels = np.asarray(index.epochs(plan.field, first, last, plan.indices))[None], pd.DataFrame(index=[0])
    assert sums is not None
    if labels is None:
        met = np.flatnonzero(np.bincount(_classes(plan, source), minlength=len(sums)))
        sums, labels = sums[met], pd.DataFrame({"class": met})
    targets = targets_of(plan.indices, plan.parameters, source.tensors)
    if targets.count < len(plan.indices):
        order = np.argsort(targets.code, kind="stable")
        starts = np.searchsorted(targets.code[order], np.arange(targets.count))
        sums = np.add.reduceat(sums[:, order], starts, axis=1)
    values = np.sqrt(sums) if plan.measure.aggregate == "norm" else sums
    return np.abs(values) if plan.measure.absolute else values, labels, targets


def _classes(plan: CellPlan, source: Source) -> Array:
    found = source.read("visits", plan.start, plan.stop)["class"].to_numpy()
    return found[found >= 0]


def _finish(plan: CellPlan, values: Array, members: pd.DataFrame, targets: Targets) -> pd.DataFrame:
    """The frame of a matrix (members, targets) as the statement asks for it."""
    check_rows(values.size)
    member, target = np.divmod(np.arange(values.size), max(1, values.shape[1]))
    flat, measure, statement = values.reshape(-1), str(plan.measure), plan.statement
    columns: dict[str, Any] = {}
    if isinstance(statement, Top):
        code, table = lists_of(statement, members, targets, member, target)
        order = np.argsort(code, kind="stable")
        lists = np.split(order, np.flatnonzero(np.diff(code[order])) + 1) if len(order) else []
        best = [some[largest(flat[some], how_many(statement, len(some)))] for some in lists]
        chosen = np.concatenate(best) if best else np.empty(0, np.int64)
        columns["rank"] = np.concatenate([np.arange(1, 1 + len(some)) for some in best]) if best else chosen
        columns |= {name: table[name].to_numpy()[code[chosen]] for name in table.columns}
    else:
        chosen = np.arange(len(flat))
    columns |= labels_of(members, targets, member[chosen], target[chosen])
    columns[measure] = flat[chosen]
    if isinstance(statement, Group):
        columns |= bins(flat[chosen], statement.into)
    return pd.DataFrame({name: columns[name] for name in plan.columns if name in columns})


def lists_of(
    statement: Top, members: pd.DataFrame, targets: Targets, member: Array, target: Array
) -> tuple[Array, pd.DataFrame]:
    """The list that each place of the flat matrix belongs to, and the labels of the lists."""
    if statement.per is None:
        return np.zeros(len(member), np.int64), pd.DataFrame(index=[0])
    if statement.per in OF_VISITS:
        name = COLUMN[statement.per]
        code, found = pd.factorize(members[name], sort=True)
        return code[member], pd.DataFrame({name: found})
    coarse = targets.within(statement.per)
    return coarse.code[targets.firsts][target], coarse.labels(np.arange(coarse.count))


def bins(values: Array, into: int) -> dict[str, Array]:
    """Groups of equal width on a logarithmic scale between the smallest and the largest magnitude, the largest last.

    Zeros are group 0, NaN and Inf group -1; of negative values the groups are those of their magnitude, negative.

    Returns:
        group (n,) int64, and the bounds low <= |value| < high of each value's group; the last group has its high end.

    >>> found = bins(np.array([0.0, 1.0, 3.0, 100.0]), 2)
    >>> found["group"].tolist(), found["low"].tolist()
    ([0, 1, 1, 2], [0.0, 1.0, 1.0, 10.0])
    """
    size = np.abs(values)
    usual = np.isfinite(size) & (size > 0)
    group, low, high = np.zeros(len(values), np.int64), np.zeros(len(values)), np.zeros(len(values))
    if usual.any():
        ends = np.geomspace(size[usual].min(), size[usual].max(), into + 1)
        place = np.clip(np.searchsorted(ends, size[usual], side="right"), 1, into)
        group[usual], low[usual], high[usual] = place * np.sign(values[usual]).astype(int), ends[place - 1], ends[place]
    group[~np.isfinite(size)], low[~np.isfinite(size)], high[~np.isfinite(size)] = -1, np.nan, np.nan
    return {"group": group, "low": low, "high": high}
