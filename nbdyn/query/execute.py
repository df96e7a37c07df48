"""A statement of text to a frame: parse, plan, read, say where it came from, and log it with the run."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pandas as pd

from nbdyn.errors import NbdynError, QueryError, UnknownName
from nbdyn.query.approximate import run_approximately
from nbdyn.query.cell_plan import CellPlan
from nbdyn.query.cell_rows import CellRowsPlan
from nbdyn.query.comparison import compare
from nbdyn.query.events import find_condition
from nbdyn.query.history import last
from nbdyn.query.language import parse
from nbdyn.query.plan import ComparePlan, LastPlan, Plan, RankPlan, ShowPlan, WeightsPlan, make_plan
from nbdyn.query.ranked import run_cells
from nbdyn.query.ranked_fields import run_rank
from nbdyn.query.rows import show, show_weights
from nbdyn.query.runs import open_run
from nbdyn.query.saved import unfold
from nbdyn.query.show_cells import show_cells
from nbdyn.query.source import Names, Source
from nbdyn.query.tokens import caret
from nbdyn.query.tree import Estimate, Explain, From, Last, Named, Plain, RunName, Statement
from nbdyn.schema import PROVENANCE
from nbdyn.store import Store
from nbdyn.store.provenance import with_provenance

Resolve = Callable[[str], Store]


def execute(text: str, store: Store, resolve: Resolve | None = None, names: Names | None = None) -> pd.DataFrame:
    """Run one statement of the language.

    Args:
        text: the statement; see docs/query.md.
        store: the run that is asked.
        resolve: gives the store of a run's name in `compare`; by default a path, or a run beside this one.
        names: gives what a name stands for in `sample in hot`: a frame, a column, numbers.

    Returns:
        A tidy frame. `attrs["nbdyn"]` is a dict of strings: run, uri, query (in its normal form), what, steps,
        version, name (of `as name`), and note where there is something to know about the answer. The statement is
        written to the logbook of every run that it read.

    Raises:
        QueryError: where the statement is wrong, with a caret under the place.
        UnknownName: for a parameter or run that does not exist.
        NotRecorded: where the run does not hold what is asked.
    """
    whole, text = unfold(text, store)
    tree = whole.statement if isinstance(whole, Named) else whole
    if isinstance(tree, Explain | Estimate):
        frame = _explain(tree, text, store, resolve, names)
    else:
        source, plan = _plan(tree, text, store, resolve, names)
        frame, notes = _run(plan, source)
        stores = [run.store for run in plan.sources] if isinstance(plan, ComparePlan) else [store]
        notes = [*plan.notes, *notes, *_log(str(tree), stores)]
        frame = _with_origin(frame.reset_index(drop=True), tree, plan, stores, notes)
    if isinstance(whole, Named):
        frame.attrs[PROVENANCE]["name"] = whole.name
    return frame


def explain(text: str, store: Store, resolve: Resolve | None = None, names: Names | None = None) -> pd.DataFrame:
    """What a statement would read: one row an array, with its steps (inclusive), rows, bytes, seconds, how it is had.

    Bytes are those before compression; seconds are reckoned from them and from the work. Nothing is logged.

    Args:
        text: the statement, with or without `explain` before it.
        store: the run that is asked.
        resolve: as for `execute`.
        names: as for `execute`.
    """
    tree, text = unfold(text, store)
    tree = tree.statement if isinstance(tree, Named) else tree
    return _explain(tree if isinstance(tree, Explain | Estimate) else Explain(tree), text, store, resolve, names)


def rising_edges(condition: str, store: Store) -> np.ndarray:
    """The steps at which a condition on the columns of `run.steps` begins to hold, (n,) int64. Nothing is logged.

    Args:
        condition: as in `last 50 samples before loss > 5`.
        store: the run.

    Raises:
        QueryError: if it is no such condition, with a caret under the place.
    """
    text = f"last 1 samples before every {condition}"
    tree = parse(text)
    if isinstance(tree, Last):
        source, plan = _plan(tree, text, store, None, None)
        if isinstance(plan, LastPlan) and plan.condition is not None:
            return find_condition(plan, source).steps
    raise QueryError(f'"{condition}" is no condition on the columns of run.steps, such as "loss > 5".')


def _explain(
    tree: Explain | Estimate, text: str, store: Store, resolve: Resolve | None, names: Names | None
) -> pd.DataFrame:
    _, plan = _plan(tree.statement, text, store, resolve, names)
    frame = pd.DataFrame([asdict(read) | {"seconds": read.cost} for read in plan.reads], columns=_EXPLAINED)
    stores = [run.store for run in plan.sources] if isinstance(plan, ComparePlan) else [store]
    notes = [*plan.notes, f"result columns: {', '.join(plan.columns)}"]
    if isinstance(tree, Estimate):
        frame = frame[["rows", "bytes", "seconds"]].sum().to_frame().T.astype({"rows": "int64", "bytes": "int64"})
    else:
        frame["columns"] = [", ".join(names) for names in frame["columns"]]
        frame["stop"] -= 1
        frame = frame.rename(columns={"start": "first_step", "stop": "last_step"})
    return _with_origin(frame, tree, plan, stores, notes)


_EXPLAINED = ["run", "array", "columns", "start", "stop", "rows", "bytes", "seconds", "how"]


def _plan(tree: Plain, text: str, store: Store, resolve: Resolve | None, names: Names | None) -> tuple[Source, Plan]:
    def named(run: RunName) -> Store:
        try:
            return resolve(run.name) if resolve is not None else open_run(run.name, store)
        except UnknownName as error:
            raise UnknownName(caret(text, run.position, str(error))) from None

    assert not isinstance(tree, From), "unfold() replaces it"
    source = Source(store, text, names)
    return source, make_plan(tree, source, named)


def _run(plan: Plan, source: Source) -> tuple[pd.DataFrame, list[str]]:
    match plan:
        case ShowPlan():
            return show(plan, source)
        case WeightsPlan():
            return show_weights(plan, source)
        case CellRowsPlan():
            return show_cells(plan, source)
        case LastPlan():
            return last(plan, source)
        case ComparePlan():
            return compare(plan)
        case CellPlan():
            return (run_cells if plan.statement.within is None else run_approximately)(plan, source)
        case RankPlan():
            return run_rank(plan, source)


def _log(text: str, stores: list[Store]) -> list[str]:
    """Write the statement to the runs' logbooks; a place that cannot be written is a note, no failure."""
    notes: list[str] = []
    for store in {store.uri: store for store in stores}.values():
        try:
            store.write_note(step=store.steps_committed, kind="statement", text=text)
        except (NbdynError, OSError, RuntimeError) as error:
            notes.append(f"not logged with {store.name}: {str(error).splitlines()[0]}")
    return notes


def _with_origin(
    frame: pd.DataFrame, tree: Statement, plan: Plan, stores: list[Store], notes: list[str]
) -> pd.DataFrame:
    """The frame with where it came from in its attributes."""
    verb = type(tree).__name__.lower()
    what = {"last": "samples before an event: visits of the steps before event_step"}.get(verb, verb)
    frame = with_provenance(frame, stores[0], what, query=str(tree))
    spans = plan.ranges if isinstance(plan, ComparePlan) else ((plan.start, plan.stop),)
    first, stop = min(start for start, _ in spans), max(stop for _, stop in spans)
    origin: dict[str, str] = frame.attrs[PROVENANCE]
    origin["run"] = ", ".join(store.name for store in stores)
    origin["uri"] = ", ".join(store.uri for store in stores)
    origin["steps"] = f"{first}..{stop - 1}" if stop > first else "none"
    if notes:
        origin["note"] = "; ".join(notes)
    return frame
