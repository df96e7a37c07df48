"""One number of each run: by a statement, by a stored loss change allocation, or by a function of the user's."""

from __future__ import annotations

import hashlib
import inspect
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbdyn.analysis.ledger.language import Compared, Lca, Measure, Shown
from nbdyn.errors import Incompatible, NbdynError, NotRecorded, QueryError
from nbdyn.query import execute
from nbdyn.store import Store, frames
from nbdyn.store.names import select

Opened = Callable[[Store], Any]
"""What a function of the user's is given for a run."""
AT_ONCE = 30
"""Runs in one statement of `compare`; progress(loss) needs all in one."""


@dataclass(frozen=True)
class Function:
    """A measure in Python: a function from a run to a number.

    Its source is kept and hashed. What the source refers to (globals, imported modules) is not.
    """

    call: Callable[[Any], Any]
    name: str
    source: str

    @classmethod
    def of(cls, call: Callable[[Any], Any]) -> Function:
        """The measure of a function.

        Raises:
            Incompatible: if its source is not at hand.
        """
        try:
            source = textwrap.dedent(inspect.getsource(call))
        except (OSError, TypeError) as error:
            raise Incompatible(
                f"{call!r} has no source that could be kept; define the function in a cell or a file, with def."
            ) from error
        return cls(call, getattr(call, "__name__", type(call).__name__), source)

    @property
    def sha256(self) -> str:
        """The hash of the source."""
        return hashlib.sha256(self.source.encode(errors="surrogatepass")).hexdigest()

    def __str__(self) -> str:
        return f"{self.name} (Python, {self.sha256[:12]})"


def as_entry(measure: Measure | Function) -> dict[str, Any]:
    """What the ledger keeps of a measure; equal measures give equal entries."""
    if isinstance(measure, Function):
        return {"text": str(measure), "source": measure.source, "sha256": measure.sha256}
    return {"text": str(measure)}


def values_of(measure: Measure | Function, stores: Sequence[Store], opened: Opened) -> list[float]:
    """The measure of each run, in their order.

    Statements are logged with the runs, as always.

    Args:
        measure: the measure.
        stores: the runs.
        opened: what a function is given for a run.

    Raises:
        NotRecorded: if a run does not hold what is measured.
        QueryError: if it is more or less than one number.
        Incompatible: if a value is NaN or infinite; names the run.
    """
    match measure:
        case Lca():
            found = [_lca(measure, store) for store in stores]
        case Compared():
            found = _compared(measure, stores)
        case Shown():
            found = [_shown(measure, store) for store in stores]
        case Function():
            found = [_called(measure, store, opened) for store in stores]
    for store, value in zip(stores, found, strict=True):
        if not math.isfinite(value):
            raise Incompatible(
                f"{measure} is {value} in {store.name}. Leaving the run out would be a choice, so nothing is tested: "
                "take a measure that is finite in every run, or declare another pattern of runs."
            )
    return found


def _called(measure: Function, store: Store, opened: Opened) -> float:
    found = measure.call(opened(store))
    try:
        return float(found)
    except (TypeError, ValueError):
        kind = type(found).__name__
        raise Incompatible(f"{measure.name} gives a {kind} for {store.name}; one number is needed.") from None


def _shown(measure: Shown, store: Store) -> float:
    frame = execute(f"show {measure.text}", store)
    places = {"step", "epoch", "position", "sample", "parameter", "tensor"}
    columns = [name for name in frame.columns if name not in places] or list(frame.columns)
    if len(frame) != 1 or len(columns) != 1:
        raise QueryError(
            f'"{measure.text}" gives {len(frame)} rows for {store.name}; a hypothesis needs one number a run: '
            f"mean({measure.text.split(' ')[0]}) during epoch 3, or ... at step 500."
        )
    return float(frame[columns[0]].to_numpy()[0])


def _compared(measure: Compared, stores: Sequence[Store]) -> list[float]:
    together = len(stores) if measure.measure == "progress(loss)" else AT_ONCE
    found: list[float] = []
    for first in range(0, len(stores), together):
        found += _side_by_side(measure, stores[first : first + together])
    return found


def _side_by_side(measure: Compared, stores: Sequence[Store]) -> list[float]:
    by_name = {store.name: store for store in stores}
    names = [f"`{name}`" for name in by_name]
    names = names if len(names) > 1 else names * 2  # compare takes two at least
    text = f"compare {', '.join(names)} by {measure.measure} at step {measure.step}"
    frame = execute(text, stores[0], resolve=by_name.__getitem__)
    values = dict(zip(frame["run"], frame[measure.measure].to_numpy(np.float64), strict=True))
    missing = [name for name in by_name if name not in values]
    if missing:
        raise NotRecorded(f"{missing[0]} has no step {measure.step}; take a step that every run has.")
    return [float(values[name]) for name in by_name]


def _lca(measure: Lca, store: Store) -> float:
    from nbdyn.analysis.lca.of_run import open_allocation  # imports torch

    try:
        found = open_allocation(store, measure.allocation)
    except Incompatible as error:
        raise NotRecorded(f'{error} "{measure}" reads a stored allocation; name one of several with in NAME.') from None
    chosen = select(measure.selector, list(found.tensors))
    first, stop = _steps(measure, store)
    series = found.series("tensor")
    inside = np.asarray((series.index >= first) & (series.index < stop))
    if np.count_nonzero(inside) != stop - first:
        raise NotRecorded(
            f"the allocation of {store.name} does not cover steps {first}..{stop - 1}; compute it for all steps."
        )
    size = sum(tensor["size"] for tensor in found.tensors if tensor["name"] in chosen.names)
    if len(chosen.indices) == size:
        total = float(series.loc[inside, list(chosen.names)].to_numpy(np.float64).sum())
    else:
        places = np.flatnonzero(inside)
        cells = found.cells(measure.selector, slice(int(places[0]), int(places[-1]) + 1))
        total = float(cells.sum(dtype=np.float64))
    return total / (len(chosen.indices) * (stop - first)) if measure.aggregate == "mean" else total


def _steps(measure: Lca, store: Store) -> tuple[int, int]:
    """The steps of the scope, half-open."""
    scope = measure.scope
    if scope.kind == "all":
        return 0, store.steps_committed
    if scope.kind == "steps":
        return scope.first, scope.last + 1
    epochs = frames.steps(store)["epoch"].to_numpy()
    inside = np.flatnonzero((epochs >= scope.first) & (epochs <= scope.last))
    if not len(inside):
        raise NotRecorded(f"{store.name} has no epoch {scope.first}.")
    return int(inside[0]), int(inside[-1]) + 1


def seeds(stores: Sequence[Store]) -> list[int | None]:
    """The recorded seed of each run, None where there is none."""
    return [store.config.get("seeds", {}).get("torch") for store in stores]


def pairs(a: Sequence[Store], b: Sequence[Store]) -> tuple[list[int], str]:
    """Which of b goes with each of a, and by what: their recorded seeds, else the order of their names.

    Raises:
        NbdynError: if neither pairs them: the groups are of different size.
    """
    first, second = seeds(a), seeds(b)
    if None not in first and len(set(first)) == len(a) and sorted(map(str, first)) == sorted(map(str, second)):
        return [second.index(seed) for seed in first], "paired by the recorded seed"
    if len(a) != len(b):
        raise NbdynError(f"{len(a)} runs cannot be paired with {len(b)}, and their seeds are not the same either.")
    return list(range(len(b))), "paired by the order of names, for seeds do not pair them"
