"""Which per-sample cells of some captured calls are written out into the sparse array `gradients`, and their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nbdyn.cells import WriteOut
from nbdyn.store import closed
from nbdyn.store.factors import Block
from nbdyn.store.journal import Entry
from nbdyn.store.names import select
from nbdyn.store.projection import is_projected
from nbdyn.store.sites import Site
from nbdyn.store.streams import values_of

if TYPE_CHECKING:
    from nbdyn.store.store import Store

TILE_BYTES = 64_000_000


@dataclass(frozen=True)
class CellTable:
    """Cells of visits: columns of equal length, in no order.

    Attributes:
        step, position, parameter: where, int64; `position` is that of the visit in its step.
        sample: id of the sample, int64.
        value: the contribution.
    """

    step: np.ndarray
    position: np.ndarray
    sample: np.ndarray
    parameter: np.ndarray
    value: np.ndarray

    def __len__(self) -> int:
        return len(self.step)

    @staticmethod
    def of(block: Block, rows: np.ndarray, parameters: np.ndarray, values: np.ndarray) -> CellTable:
        """Cells of a block's visits, by their row in it."""
        return CellTable(block.step[rows], block.position[rows], block.sample[rows], parameters, values)

    def take(self, places: np.ndarray) -> CellTable:
        """Some of the cells."""
        return CellTable(*(getattr(self, name)[places] for name in _COLUMNS))

    @staticmethod
    def join(tables: Sequence[CellTable]) -> CellTable:
        """Several tables as one."""
        if not tables:
            none = np.empty(0, np.int64)
            return CellTable(none, none, none, none, np.empty(0, np.float32))
        return CellTable(*(np.concatenate([getattr(t, name) for t in tables]) for name in _COLUMNS))


_COLUMNS = ("step", "position", "sample", "parameter", "value")


def chosen_cells(
    blocks: Sequence[Block],
    sites: Sequence[Site],
    cells: WriteOut,
    tensors: list[dict[str, Any]],
    steps: np.ndarray | None,
) -> CellTable:
    """The cells to write out of all calls of some steps.

    Args:
        blocks: every captured call of these steps.
        sites: the run's sites.
        cells: what is asked for.
        tensors: the run's table of parameter tensors.
        steps: the steps around events, sorted; None where no event is asked for.

    Returns:
        The top cells of each tensor and step, ordered by |c| where they are the tensor's only ones (ties by parameter,
        position), united with those that the selectors, the threshold and the events choose.
    """
    found = []
    if cells.top:
        found.append(_top(blocks, sites, cells.top, tensors))
    if cells.selects:
        found.append(_selected(blocks, sites, cells, tensors, steps))
    table = CellTable.join(found)
    # A cell that both have is written once.
    order = np.lexsort((table.parameter, table.position, table.step))
    t = table.take(order)
    kept = np.ones(len(t), dtype=bool)
    kept[1:] = (np.diff(t.step) != 0) | (np.diff(t.position) != 0) | (np.diff(t.parameter) != 0)
    return t.take(np.nonzero(kept)[0])


def _top(blocks: Sequence[Block], sites: Sequence[Site], k: int, tensors: list[dict[str, Any]]) -> CellTable:
    firsts = np.array([t["first"] for t in tensors], dtype=np.int64)

    def owner(parameter: Any) -> Any:
        return np.searchsorted(firsts, parameter, side="right") - 1

    users: dict[int, set[tuple[int, int]]] = {}
    for block in blocks:
        for first, _ in sites[block.site].runs:
            users.setdefault(int(owner(first)), set()).add((block.site, block.call))
    shared = {tensor for tensor, calls in users.items() if len(calls) > 1}
    found = []
    for block in blocks:
        rows, parameters, values = closed.top_per_step(sites[block.site], block, k)
        alone = ~np.isin(owner(parameters), list(shared))
        found.append(CellTable.of(block, rows[alone], parameters[alone], values[alone]))
    table = CellTable.join(found)
    # Accumulated batches are blocks of their own: the top of their tops is the step's.
    table = _largest(table, owner(table.parameter), k)
    return CellTable.join([table, *(_top_of_shared(blocks, sites, tensors[tensor], k) for tensor in sorted(shared))])


def _largest(table: CellTable, tensor: np.ndarray, k: int) -> CellTable:
    """The k cells of largest |value| of each step and tensor; NaN counts as largest."""
    size = np.where(np.isnan(table.value), np.inf, np.abs(table.value))
    order = np.lexsort((table.position, table.parameter, -size, tensor, table.step))
    step, tensor = table.step[order], tensor[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(step) != 0) | (np.diff(tensor) != 0)
    starts = np.nonzero(new)[0]
    rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    return table.take(order[rank < k])


def _top_of_shared(blocks: Sequence[Block], sites: Sequence[Site], tensor: dict[str, Any], k: int) -> CellTable:
    """The top cells of a tensor that several sites or calls use: their contributions are added first."""
    indices = np.arange(tensor["first"], tensor["first"] + tensor["size"], dtype=np.int64)
    found = []
    for parts in _by_step(blocks):
        candidates = [_largest_of(tile, k) for tile in _tiles(parts, sites, indices)]
        found += [_largest(t, np.zeros(len(t), np.int64), k) for t in [CellTable.join(candidates)]]
    return CellTable.join(found)


def _selected(
    blocks: Sequence[Block],
    sites: Sequence[Site],
    cells: WriteOut,
    tensors: list[dict[str, Any]],
    steps: np.ndarray | None,
) -> CellTable:
    """All cells other than zeros that the selectors name, above the threshold, around the events."""
    picks = [select(text, tensors).indices for text in cells.of or ("all",)]
    indices = np.unique(np.concatenate(picks))
    found = []
    for parts in _by_step(blocks):
        if cells.around is not None and (steps is None or int(parts[0].step[0]) not in steps):
            continue
        for tile in _tiles(parts, sites, indices):
            size = np.abs(tile.values)
            chosen = ~(size <= (cells.above or 0.0))  # so that NaN is chosen
            found.append(tile.table(*np.nonzero(chosen)))
    return CellTable.join(found)


@dataclass(frozen=True)
class _Tile:
    """Summed contributions of one step's visits, (visits, parameters)."""

    step: int
    position: np.ndarray
    sample: np.ndarray
    parameter: np.ndarray
    values: np.ndarray

    def table(self, rows: np.ndarray, columns: np.ndarray) -> CellTable:
        step = np.full(len(rows), self.step, np.int64)
        values = self.values[rows, columns]
        return CellTable(step, self.position[rows], self.sample[rows], self.parameter[columns], values)


def _largest_of(tile: _Tile, k: int) -> CellTable:
    """At least the k largest cells of a tile, zeros left out, with every tie of the last."""
    size = np.where(np.isnan(tile.values), np.inf, np.abs(tile.values))
    flat = size.reshape(-1)
    least = np.partition(flat, len(flat) - k)[len(flat) - k] if len(flat) > k else 0.0
    return tile.table(*np.nonzero((size >= least) & (size > 0)))


def _by_step(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """The parts of the blocks that belong to each step, in order."""
    for step in np.unique(np.concatenate([block.step for block in blocks])) if blocks else ():
        yield [part for block in blocks if len((part := block.take(block.step == step)).step)]


def _tiles(parts: Sequence[Block], sites: Sequence[Site], indices: np.ndarray) -> Iterator[_Tile]:
    """The cells of one step, contributions of all its calls added, in tiles of bounded memory."""
    position = np.unique(np.concatenate([part.position for part in parts]))
    sample = np.empty(len(position), np.int64)
    for part in parts:
        sample[np.searchsorted(position, part.position)] = part.sample
    width = max(1, TILE_BYTES // (8 * len(position)))
    for start in range(0, len(indices), width):
        some = indices[start : start + width]
        values = np.zeros((len(position), len(some)), np.float32)
        for part in parts:
            mine = np.intersect1d(sites[part.site].indices(), some)
            if len(mine):
                found = closed.cells(sites[part.site], part, mine)
                values = values.astype(np.promote_types(values.dtype, found.dtype), copy=False)
                values[np.ix_(np.searchsorted(position, part.position), np.searchsorted(some, mine))] += found
        yield _Tile(int(parts[0].step[0]), position, sample, some, values)


# From the journal ------------------------------------------------------------------------------------------------

EdgesOf = Callable[[str, "Store"], np.ndarray]
"""The steps of a run at which a condition begins to hold: `nbdyn.query.execute.rising_edges`, two floors up."""
GROUP_BYTES = 32_000_000
"""Calls are looked at for so many steps at a time as have about this size."""


def cells_of(
    store: Store, edges_of: EdgesOf
) -> Callable[[list[Entry], list[Site]], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None]:
    """What `nbdyn.store.compact.compact` asks for the cells to write out, as the run's metadata wants them.

    Args:
        store: the run.
        edges_of: gives the steps at which a condition begins to hold.
    """
    cells = wanted(store)
    tensors = store.config["tensors"]
    around = None
    if cells.around is not None:
        around = np.unique(edges_of(cells.around, store)[:, None] + np.arange(-cells.before, cells.after + 1))

    def chosen(entries: list[Entry], sites: list[Site]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
        if not cells.top and not cells.selects:
            return None
        exact = [entry for entry in entries if not is_projected(sites[entry.site])]
        tables = [
            chosen_cells(_blocks(store, group), sites, cells, tensors, around) for group in _groups(exact) if group
        ]
        table = CellTable.join(tables)
        return table.step, table.parameter, table.sample, table.value

    return chosen


def wanted(store: Store) -> WriteOut:
    """Which cells the run's metadata wants written out; none where per-sample gradients are not recorded."""
    options = (store.config.get("per_sample") or {}).get("cells")
    return WriteOut(top=0) if options is None else WriteOut.from_json(options)


def _groups(entries: list[Entry]) -> Iterator[list[Entry]]:
    """Entries of some whole steps each; they are in the order of steps."""
    group: list[Entry] = []
    nbytes = 0
    for entry in entries:
        if group and nbytes >= GROUP_BYTES and entry.step != group[-1].step:
            yield group
            group, nbytes = [], 0
        group.append(entry)
        nbytes += entry.nbytes
    yield group


def _blocks(store: Store, entries: list[Entry]) -> list[Block]:
    """Entries as blocks, those of one site, call and shape together."""
    kinds: dict[Any, list[Entry]] = {}
    for entry in entries:
        shapes = tuple((slot, array.shape[1:]) for slot, array in entry.tensors.items() if slot != "p")
        kinds.setdefault((entry.site, entry.call, shapes), []).append(entry)
    return [_block(store, some) for some in kinds.values()]


def _block(store: Store, entries: list[Entry]) -> Block:
    sizes = [entry.size for entry in entries]
    step = np.repeat(np.array([entry.step for entry in entries], np.int64), sizes)
    places = [np.arange(entry.position, entry.position + entry.size) for entry in entries]
    position = np.concatenate([e.tensors.get("p", place) for e, place in zip(entries, places, strict=True)])
    factor = np.repeat(np.array([entry.factor for entry in entries]), sizes)
    tensors = {
        slot: np.concatenate([values_of(entry.tensors[slot], entry.dtypes[slot]) for entry in entries])
        for slot in entries[0].tensors
        if slot != "p"
    }
    position = position.astype(np.int64)
    sample = store.sample_ids(step, position)
    return Block(entries[0].site, entries[0].call, step, position, sample, factor, tensors)
