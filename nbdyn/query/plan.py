"""From a tree to a plan: which arrays, steps and columns a statement reads, checked against the run."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbdyn.errors import NotRecorded
from nbdyn.query.approximate_plan import approximated
from nbdyn.query.cell_plan import CellPlan, plan_cells
from nbdyn.query.cell_rows import CellRowsPlan, plan_cell_rows
from nbdyn.query.evaluate import fields, has_aggregate, with_means
from nbdyn.query.exceeding import plan_exceeds
from nbdyn.query.reads import Read
from nbdyn.query.source import Source
from nbdyn.query.tree import (
    Becomes,
    Compare,
    Crosses,
    Exceeds,
    Expression,
    Group,
    Last,
    Measure,
    Measured,
    RunName,
    Show,
    Table,
    Top,
    Weights,
)
from nbdyn.query.words import FIELDS, VISIT_FIELDS
from nbdyn.store import Store

EVENT_COLUMNS = ("event", "event_step", "before", "step", "position", "epoch", "sample", "class", "loss", "correct")
"""Columns of `last ... before ...`."""

_BYTES = {"step": 4, "position": 4, "sample": 8, "class": 4, "loss": 4, "correct": 1}
"""Stored size of a visit's columns; anything else is a float64."""


@dataclass(frozen=True)
class ShowPlan:
    """`show`: a table, the group keys (none: one row a row), labelled expressions and a filter, all bound."""

    table: str
    keys: tuple[str, ...]
    grouped: bool
    items: tuple[tuple[str, Expression], ...]
    where: Expression | None
    start: int
    stop: int
    reads: tuple[Read, ...]
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class WeightsPlan:
    """`show w of ...`: quantity "w" or "dw", parameters, and a filter."""

    quantity: str
    indices: Any
    where: Expression | None
    start: int
    stop: int
    reads: tuple[Read, ...]
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LastPlan:
    """`last`: the bound event; `indices` of a weight event, `exceeds` of an event over cells, else `condition`."""

    statement: Last
    condition: Expression | None
    indices: Any
    start: int
    stop: int
    reads: tuple[Read, ...]
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()
    exceeds: Any = None


@dataclass(frozen=True)
class ComparePlan:
    """`compare`: the runs and the steps of each."""

    statement: Compare
    sources: tuple[Source, ...]
    ranges: tuple[tuple[int, int], ...]
    reads: tuple[Read, ...]
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class RankPlan:
    """`top` and `group` by recorded fields: the plan of the values, and what is ranked."""

    statement: Top | Group
    values: ShowPlan
    columns: tuple[str, ...]

    @property
    def reads(self) -> tuple[Read, ...]:
        """What the values are read from."""
        return self.values.reads

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes of the values."""
        return self.values.notes

    @property
    def start(self) -> int:
        """First step."""
        return self.values.start

    @property
    def stop(self) -> int:
        """End of the steps."""
        return self.values.stop


Plan = ShowPlan | WeightsPlan | CellRowsPlan | LastPlan | ComparePlan | CellPlan | RankPlan


def make_plan(
    statement: Show | Top | Group | Last | Compare, source: Source, resolve: Callable[[RunName], Store]
) -> Plan:
    """What a statement reads.

    Args:
        statement: the tree.
        source: the run that is asked.
        resolve: gives a store for a run's name in `compare`.

    Raises:
        QueryError: where a name or a step does not exist.
        NotRecorded: where the run does not hold what is asked.
    """
    match statement:
        case Show((Measured(),)) | Top(by=Measure()) | Group(by=Measure()):
            return approximated(plan_cells(statement, source), source)
        case Top() | Group():
            return _plan_rank(statement, source)
        case Show():
            plan = _plan_weights if _asks_weights(statement, source) else _plan_show
            return plan(statement, source)
        case Last():
            return _plan_last(statement, source)
        case Compare():
            return _plan_compare(statement, source, resolve)


def _plan_rank(statement: Top | Group, source: Source) -> RankPlan:
    """`top 20 samples by mean(loss)`: the rows of `show mean(loss) per sample`, ranked."""
    assert not isinstance(statement.by, Measure)
    kinds = [statement.what, *([statement.per] if isinstance(statement, Top) and statement.per else [])]
    units = {"sample": "sample", "class": "class", "batch": "step", "epoch": "epoch", "tensor": "tensor"}
    for kind in kinds:
        if kind not in units:
            raise source.error(
                f"recorded fields are ranked by {', '.join(units)}; of {kind}s ask for cells: by sum |g|.",
                statement.position,
            )
    per = tuple(units[kind] for kind in reversed(kinds))
    values = _plan_show(Show((statement.by,), per, statement.scope, statement.where), source)
    label = values.items[0][0]
    if isinstance(statement, Group):
        return RankPlan(statement, values, (*per, label, "group", "low", "high"))
    return RankPlan(statement, values, (*per[:-1], "rank", per[-1], label))


def _asks_weights(statement: Show, source: Source) -> bool:
    for item in statement.items:
        if isinstance(item, Weights):
            if len(statement.items) > 1 or statement.per:
                what = "weights" if item.quantity in ("w", "dw") else "cells"
                each = "a step and parameter" if what == "weights" else "a cell"
                raise source.error(f"{what} come as a frame of their own (one row {each}): "
                                   "ask for them alone, without per.", item.selector.position)  # fmt: skip
            return True
        if isinstance(item, Table) and (len(statement.items) > 1 or statement.per):
            message = f'"{item.name}" is a whole table: ask for it alone, or for fields: show mean(loss) per sample.'
            raise source.error(message, item.position)
    return False


def _plan_weights(statement: Show, source: Source) -> WeightsPlan | CellRowsPlan:
    item = statement.items[0]
    assert isinstance(item, Weights)
    if item.quantity not in ("w", "dw"):
        return plan_cell_rows(statement, source)
    selection = source.select(item.selector)
    changes = item.quantity == "dw"
    if changes:
        require_every_step("dw of ...", source)
    rows = source.steps + (not changes)
    start, stop, note = source.range(statement.scope, rows=rows)
    where = None if statement.where is None else source.bind(statement.where, "weights", condition=True)
    reads = (read_weights(source, start, stop + changes, len(selection.indices), rebuilt=changes),)
    columns = ("step", "parameter", "tensor", "value")
    return WeightsPlan(item.quantity, selection.indices, where, start, stop, reads, columns, _notes(note))


def require_every_step(what: str, source: Source) -> None:
    """Raise NotRecorded where the weights of every step are neither stored nor can be rebuilt from gradients."""
    config = source.store.config
    if config["weights"] == "every" or config.get("per_sample") is not None:
        return
    raise NotRecorded(
        f'"{what}" needs the weights of every step; {source.name} holds snapshots, one every '
        f"{config.get('every', '?')} steps, and no per-sample gradients to rebuild those between from. Record with "
        'per_sample=True or weights="every", or train again between two snapshots: '
        "run.replay(t0, t1, model, loss_fn, data)."
    )


def read_weights(
    source: Source, start: int, stop: int, count: int, how: str = "stored", *, rebuilt: bool = False
) -> Read:
    """The reading of `count` parameters at the stored steps of a range, or at every step, some of them rebuilt."""
    steps = source.store.weights.steps
    rows = int(np.count_nonzero((steps >= start) & (steps < stop)))
    size = np.dtype(source.store.config.get("row_dtype", "float32")).itemsize
    missing = max(0, stop - start - rows) if rebuilt else 0
    if missing:
        how = f"{rows} rows stored, {missing} rebuilt from factors"
        seconds = 0.02 + missing * (1e-4 + count * 1e-6)
        return Read(source.name, "weights", ("value",), start, stop, (rows + missing) * count,
                    (rows + missing) * count * size, how, seconds)  # fmt: skip
    return Read(source.name, "weights", ("value",), start, stop, rows * count, rows * count * size, how)


def read_table(source: Source, table: str, start: int, stop: int, columns: tuple[str, ...]) -> Read:
    """The reading of a table's columns."""
    array = {"samples": "visits", "norms": "scalars"}.get(table, table)
    if array == "visits":
        rows = int(source.index["batch_size"].to_numpy()[start:stop].sum())
        columns = tuple(name for name in VISIT_FIELDS if name in _BYTES)
    else:
        rows = (stop - start) * (len(source.tensors) if table == "norms" else 1)
    size = rows * sum(_BYTES[name] if array == "visits" else 8 for name in columns)
    return Read(source.name, array, columns, start, stop, rows, size)


def _plan_show(statement: Show, source: Source) -> ShowPlan:
    if isinstance(statement.items[0], Table):
        return _plan_table(statement, statement.items[0].name, source)
    table = _table_of(statement, source)
    expressions = [item for item in statement.items if not isinstance(item, Weights | Table | Measured)]
    regroups = bool(statement.per) and set(statement.per) != set(_row_keys(table))
    grouped = regroups or any(map(has_aggregate, expressions))
    keys = statement.per or (() if grouped else _row_keys(table))
    for unit in statement.per:
        if unit not in FIELDS[table]:
            raise source.error(f"these fields are kept per {' and '.join(_row_keys(table))}, not per {unit}.", 0)
    items: list[tuple[str, Expression]] = []
    for expression in expressions:
        bound = source.bind(expression, table)
        items.append((str(expression), with_means(bound, keys) if grouped else bound))
    where = None if statement.where is None else source.bind(statement.where, table, condition=True)
    start, stop, note = source.range(statement.scope)
    _refuse_scoped_samples(table, statement, source)
    used = [bound for _, bound in items] + ([] if where is None else [where])
    names = tuple(dict.fromkeys([*keys, *(name for node in used for name in fields(node))]))
    reads = (read_table(source, table, start, stop, names),)
    columns = tuple(dict.fromkeys([*keys, *(label for label, _ in items)]))
    return ShowPlan(table, keys, grouped, tuple(items), where, start, stop, reads, columns, _notes(note))


def _plan_table(statement: Show, table: str, source: Source) -> ShowPlan:
    start, stop, note = source.range(statement.scope)
    _refuse_scoped_samples(table, statement, source)
    where = None if statement.where is None else source.bind(statement.where, table, condition=True)
    columns = tuple(FIELDS[table])
    reads = (read_table(source, table, start, stop, columns),)
    return ShowPlan(table, (), False, (), where, start, stop, reads, columns, _notes(note))


def _refuse_scoped_samples(table: str, statement: Show, source: Source) -> None:
    if table == "samples" and statement.scope.kind != "all":
        message = (
            "the fields of samples speak of the whole run; for some steps take them of the visits: "
            "show count, mean(loss), share(correct = 1) per sample."
        )
        raise source.error(message, statement.scope.position)


def _row_keys(table: str) -> tuple[str, ...]:
    """What tells the rows of a table apart."""
    return {"samples": ("sample",), "norms": ("step", "tensor"), "visits": ("step", "position")}.get(table, ("step",))


def _table_of(statement: Show, source: Source) -> str:
    """Which table the items of a statement are read from."""
    parts = [item for item in statement.items if not isinstance(item, Weights | Table | Measured)]
    aggregated = any(map(has_aggregate, parts))
    used = {name for part in [*parts, *([] if statement.where is None else [statement.where])] for name in fields(part)}
    if "tensor" in statement.per:
        return "norms"
    if "class" in statement.per:
        return "visits"
    if "sample" in statement.per:
        only_samples = (set(FIELDS["samples"]) - {"sample"}) & used
        return "samples" if only_samples and statement.per == ("sample",) and not aggregated else "visits"
    if statement.per == ("step",) and aggregated:
        return "visits"
    visits_only = set(VISIT_FIELDS) - set(source.fields("steps"))
    return "visits" if used & visits_only else "steps"


def _plan_last(statement: Last, source: Source) -> LastPlan:
    event = statement.event
    visits = Read(source.name, "visits", tuple(_BYTES), 0, source.steps, statement.count,
                  statement.count * sum(_BYTES.values()), "stored; these rows for each event")  # fmt: skip
    if isinstance(event, Exceeds):
        start, stop, note = source.range(statement.scope, rows=source.steps + (event.measure.quantity == "w"))
        exceeds = plan_exceeds(event, statement.scope, source)
        return LastPlan(
            statement, None, None, start, stop, (*exceeds.reads, visits), EVENT_COLUMNS, _notes(note), exceeds
        )
    if not isinstance(event, Becomes | Crosses):
        condition = source.bind(event, "steps", condition=True)
        start, stop, note = source.range(statement.scope)
        reads = (read_table(source, "steps", max(0, start - 1), stop, fields(condition)), visits)
        return LastPlan(statement, condition, None, start, stop, reads, EVENT_COLUMNS, _notes(note))
    selection = source.select(event.selector)
    require_every_step("becomes" if isinstance(event, Becomes) else "crosses", source)
    start, stop, note = source.range(statement.scope, rows=source.steps + 1)
    reads = (read_weights(source, max(0, start - 1), stop, len(selection.indices), rebuilt=True), visits)
    several = len(selection.indices) > 1
    columns = (*EVENT_COLUMNS[:2], "parameter", "weight", *EVENT_COLUMNS[2:]) if several else EVENT_COLUMNS
    return LastPlan(statement, None, selection.indices, start, stop, reads, columns, _notes(note))


def _plan_compare(statement: Compare, source: Source, resolve: Callable[[RunName], Store]) -> ComparePlan:
    sources = tuple(Source(resolve(name), source.text) for name in statement.runs)
    ranges: list[tuple[int, int]] = []
    notes: list[str] = []
    only_weights = set(statement.measures) == {"dist(w, init)"} and statement.scope.first == statement.scope.last
    for run in sources:
        at_end = only_weights and statement.scope.kind == "steps" and statement.scope.first == run.steps
        rows = run.steps + at_end
        start, stop, note = run.range(statement.scope, rows=rows)
        if note and statement.scope.kind == "steps":
            raise run.error(f"step {statement.scope.last} is not recorded; {note}.", statement.scope.position)
        ranges.append((start, stop))
        notes += _notes(note)
    reads = tuple(read for run, (a, b) in zip(sources, ranges, strict=True) for read in _compared(statement, run, a, b))
    return ComparePlan(statement, sources, tuple(ranges), reads, compare_columns(statement.measures), tuple(notes))


def compare_columns(measures: tuple[str, ...]) -> tuple[str, ...]:
    """Columns of `compare`: run, step, the measures, then how sure they are."""
    columns = ["run", "step", *measures]
    losses = {"loss", "progress(loss)"} & set(measures)
    columns += ["loss_se"] * bool(losses) + ["acc_low", "acc_high"] * ("acc" in measures)
    columns += ["n"] * bool(losses or "acc" in measures) + ["w_step"] * ("dist(w, init)" in measures)
    return tuple(columns)


def _compared(statement: Compare, source: Source, start: int, stop: int) -> list[Read]:
    reads: list[Read] = []
    measures = set(statement.measures)
    names = tuple(name for name in ("loss", "acc", "|grad|", "lr") if name in measures)
    if "progress(loss)" in measures:
        reads.append(read_table(source, "steps", 0, source.steps, tuple(dict.fromkeys(("loss", *names)))))
    elif names:
        reads.append(read_table(source, "steps", start, stop, names))
    if measures & {"loss", "acc", "progress(loss)"}:
        reads.append(read_table(source, "visits", start, stop, ()))
    if "dist(w, init)" in measures:
        stored = source.store.weights.steps
        first = int(stored[stored <= start].max(initial=0))
        exact = bool(np.isin(np.arange(start, stop), stored).all())
        how = "stored" if exact else "stored; nearest earlier snapshot"
        reads.append(read_weights(source, 0, 1, source.parameters))
        reads.append(read_weights(source, first, stop, source.parameters, how))
    return reads


def _notes(note: str) -> tuple[str, ...]:
    return (note,) if note else ()
