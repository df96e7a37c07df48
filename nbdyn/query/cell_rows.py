"""Plans of `show g of`, `show grad of`, `show act of` and `show err of`: the cells themselves, a row each."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nbdyn.errors import QueryError
from nbdyn.query.cell_plan import with_factors
from nbdyn.query.evaluate import Array, fields
from nbdyn.query.layers import Layer, cells_at_least, has_calls, has_places, layers_of, read_sites
from nbdyn.query.reads import MAX_ROWS, Read
from nbdyn.query.source import Source
from nbdyn.query.tree import Expression, Selector, Show, Weights
from nbdyn.query.words import OF_UNITS, VISIT_FIELDS
from nbdyn.store.names import ascending

OF_VISIT = ("step", "position", "epoch", "sample", "class")
"""The columns that tell of which visit a cell is."""


@dataclass(frozen=True)
class CellRowsPlan:
    """`show g of ...` and its like, bound to a run.

    Attributes:
        quantity: g, grad, act or err.
        indices: global parameter indices of g and grad, (k,) ascending.
        layers: of act and err.
        where: a bound condition on rows; None for all.
        start, stop: steps, half-open.
        reads: what is read.
        columns: of the result.
        notes: what is to be known.
    """

    quantity: str
    indices: Array
    layers: tuple[Layer, ...]
    where: Expression | None
    start: int
    stop: int
    reads: tuple[Read, ...]
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def where_visits(self) -> bool:
        """Whether the condition speaks of visits alone, so that the others need not be read."""
        return self.where is not None and set(fields(self.where)) <= set(VISIT_FIELDS)


def plan_cell_rows(statement: Show, source: Source) -> CellRowsPlan:
    """The plan of a statement whose only item is cells of g, grad, act or err.

    Raises:
        QueryError: where a name or a step does not exist, or the rows are certainly too many.
        NotRecorded: if the run has no such cells.
        UnknownName: for a parameter or layer that does not exist.
    """
    item = statement.items[0]
    assert isinstance(item, Weights)
    start, stop, note = source.range(statement.scope)
    where = None if statement.where is None else source.bind(statement.where, item.quantity, condition=True)
    visits = int(source.index["batch_size"].to_numpy()[start:stop].sum())
    table = Read(source.name, "visits", OF_VISIT, start, stop, visits, 22 * visits)
    if item.quantity in OF_UNITS:
        layers, without = layers_of(item.quantity, item.selector, source)
        sites = [number for layer in layers for number in layer.sites]
        if where is None:
            check_rows(cells_at_least(layers, source.store, start, stop))
        reads = (table, *read_sites(sites, source, start, stop))
        columns, notes = _unit_columns(layers, source, start, stop), tuple(filter(None, (note, without)))
        return CellRowsPlan(item.quantity, np.empty(0, np.int64), layers, where, start, stop, reads, columns, notes)
    indices, without = _parameters(item.quantity, item.selector, source)
    reads = read_sites(source.store.factors.sites_of(indices), source, start, stop)
    if item.quantity == "grad":
        captured = source.store.factors.steps
        if where is None:
            check_rows(int(np.count_nonzero((captured >= start) & (captured < stop))) * len(indices))
        columns = ("step", "parameter", "tensor", "value")
    else:
        columns, reads = (*OF_VISIT, "parameter", "tensor", "value"), (table, *reads)
    notes = tuple(filter(None, (note, without)))
    return CellRowsPlan(item.quantity, indices, (), where, start, stop, reads, columns, notes)


def _parameters(quantity: str, selector: Selector, source: Source) -> tuple[Array, str]:
    """The parameters asked for, and a note about those that `all` leaves out."""
    indices = ascending(source.select(selector).indices)
    if selector.text != "all":
        return indices, ""
    found = with_factors(indices, quantity, source)
    left = len(indices) - len(found)
    return found, f"{left:,} parameters left out: of them no samples' gradients are recorded" if left else ""


def _unit_columns(layers: tuple[Layer, ...], source: Source, start: int, stop: int) -> tuple[str, ...]:
    call = ("call",) if has_calls(layers, source.store, start, stop) else ()
    place = ("place",) if has_places(layers, source.store, start, stop) else ()
    return (*OF_VISIT, "layer", *call, *place, "unit", "value")


def check_rows(rows: int) -> None:
    """Refuse a result that would fill the memory.

    Raises:
        QueryError: if it is too long.
    """
    if rows > MAX_ROWS:
        raise QueryError(
            f"this would be {rows:,} rows or more, and a result has at most {MAX_ROWS:,}; name fewer parameters, "
            "layers or steps (of fc1.weight[3,:] at step 7), or add where: where sample = 17."
        )
