"""Per-sample gradients from factors: the visits and parameters asked for, computed a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from nbdyn.store import closed
from nbdyn.store.factors import Block
from nbdyn.store.sites import Site

if TYPE_CHECKING:
    from nbdyn.store.store import Store

READ_BYTES = 64_000_000
"""Factors are read for so many steps at a time as have about this size."""
_PLACES = 2**32
"""step * _PLACES + position is the key of a visit."""


@dataclass(frozen=True)
class Asked:
    """What was asked for, looked up in the run.

    Attributes:
        text: the parameters in words.
        indices: global parameter indices, (k,) int64.
        captured: steps whose factors are stored, sorted.
        written: steps of which there are only written-out cells, sorted.
        computed: which of the parameters have factors, (k,) bool; of others there are only written-out cells.
        samples: sample ids, sorted; None for all.
        left_out: tensors that "all" leaves out, and why.
    """

    text: str
    indices: np.ndarray
    captured: np.ndarray
    written: np.ndarray
    computed: np.ndarray
    samples: np.ndarray | None
    left_out: dict[str, str]

    @property
    def steps(self) -> np.ndarray:
        """All steps, sorted."""
        return np.union1d(self.captured, self.written)

    @property
    def only_written(self) -> bool:
        """Whether something asked for has no factors."""
        return bool(len(self.written)) or not self.computed.all()


@dataclass(frozen=True)
class Piece:
    """Cells of some visits, (visits, parameters): of whole steps and a range of the parameters asked for."""

    step: np.ndarray
    position: np.ndarray
    sample: np.ndarray
    columns: slice
    values: np.ndarray


@dataclass(frozen=True)
class _Needs:
    """What of a site was asked for.

    Attributes:
        number: of the site.
        site: the site, perhaps narrowed to what has to be read.
        columns: the units to read by slot, None for all.
        where: of each run of its parameters, the places among the parameters asked for.
        indices: which parameters of the (narrowed) site these are.
    """

    number: int
    site: Site
    columns: dict[str, np.ndarray] | None
    where: list[np.ndarray]
    indices: list[np.ndarray]


@dataclass(frozen=True)
class _Part:
    """Visits of one call of a site, and what of it was asked for."""

    needs: _Needs
    block: Block

    def at(self, steps: slice) -> _Part:
        """Its visits at some steps."""
        rows = slice(*np.searchsorted(self.block.step, [steps.start, steps.stop]).tolist())
        b = self.block
        tensors = {slot: x[rows] for slot, x in b.tensors.items()}
        return replace(
            self, block=Block(b.site, b.call, b.step[rows], b.position[rows], b.sample[rows], b.factor[rows], tensors)
        )


class Reader:
    """Computes cells from factors.

    Args:
        store: the run.
        asked: what of it; steps and parameters without factors are left out.
    """

    def __init__(self, store: Store, asked: Asked) -> None:
        self._factors, self._asked = store.factors, asked
        self._dtype = np.dtype(store.config["row_dtype"])

    def pieces(self, max_bytes: int) -> Iterator[Piece]:
        """All cells in pieces of at most `max_bytes`: whole steps; one that is larger is cut by parameters."""
        width, size = max(1, len(self._asked.indices)), self._dtype.itemsize
        for steps, parts in self._read():
            key, sample = _visits_of(parts)
            bounds = np.searchsorted(key, np.append(steps, steps[-1] + 1) * _PLACES)
            start = 0
            while start < len(steps):
                fitting = np.searchsorted(bounds, bounds[start] + max_bytes // (width * size), side="right") - 1
                stop = max(start + 1, int(fitting))
                rows = slice(bounds[start], bounds[stop])
                start = stop
                if rows.stop > rows.start:
                    columns = max(1, max_bytes // (size * int(rows.stop - rows.start)))
                    for first in range(0, width, columns):
                        some = slice(first, min(first + columns, len(self._asked.indices)))
                        yield self._piece(parts, key[rows], sample[rows], some)

    def totals(self, out: np.ndarray, per_step: bool, scales: np.ndarray | None) -> None:
        """Add the sums over visits into `out`: (steps, k) with a row for each captured step, or (1, k) for all.

        `scales`: a number for each captured step to multiply its sum by; None for none.
        """
        captured = self._asked.captured
        for _, parts in self._read():
            for part in parts:
                for step in np.unique(part.block.step).tolist():
                    row = int(np.searchsorted(captured, step))
                    some = part.at(slice(step, step + 1))
                    indices = np.concatenate(some.needs.indices)
                    added = sum_over_visits(some.needs.site, some.block, indices)
                    scaled = added if scales is None else added * scales[row].astype(added.dtype)
                    out[row if per_step else 0, np.concatenate(some.needs.where)] += scaled

    def _needs(self) -> list[_Needs]:
        """What is needed of each site that holds any of the parameters."""
        kept = np.nonzero(self._asked.computed)[0]
        indices, found = self._asked.indices, []
        kept = kept if (np.diff(indices[kept]) > 0).all() else kept[np.argsort(indices[kept], kind="stable")]
        for number, site in enumerate(self._factors.sites):
            ends = [np.searchsorted(indices[kept], [first, first + size]) for first, size in site.runs]
            where = [kept[start:stop] for start, stop in ends if stop > start]
            if where:
                narrow, columns, places = closed.narrowed(site, indices[np.concatenate(where)])
                cuts = np.cumsum([len(some) for some in where])[:-1]
                found.append(_Needs(number, narrow, columns, where, np.split(places, cuts)))
        return found

    def _read(self) -> Iterator[tuple[np.ndarray, list[_Part]]]:
        """So many steps at a time as fit, and all that was captured of them."""
        every = self._needs()
        count = 1
        for run in _consecutive(self._asked.captured, self._factors.steps):
            start = 0
            while start < len(run):
                steps = run[start : start + count]
                ends = int(steps[0]), int(steps[-1]) + 1
                options = {"samples": self._asked.samples, "max_bytes": 16 * READ_BYTES}
                parts = [
                    _Part(needs, block)
                    for needs in every
                    for block in self._factors.blocks(needs.number, *ends, columns=needs.columns, **options)
                ]
                start += len(steps)
                if parts:
                    yield steps, parts
                size = sum(x.nbytes for part in parts for x in part.block.tensors.values())
                count = max(1, min(4 * count, count * READ_BYTES // max(1, size)))

    def _piece(self, parts: list[_Part], key: np.ndarray, sample: np.ndarray, columns: slice) -> Piece:
        values = np.zeros((len(key), columns.stop - columns.start), self._dtype)
        steps = slice(int(key[0] // _PLACES), int(key[-1] // _PLACES) + 1)
        for part in (part.at(steps) for part in parts):
            rows = np.searchsorted(key, _key(part.block))
            for where, indices in zip(part.needs.where, part.needs.indices, strict=True):
                chosen = np.nonzero((where >= columns.start) & (where < columns.stop))[0]
                if len(rows) and len(chosen):
                    found = closed.cells(part.needs.site, part.block, indices[chosen])
                    _add(values, rows, where[chosen] - columns.start, found)
        return Piece(key // _PLACES, key % _PLACES, sample, columns, values)


def sum_over_visits(site: Site, block: Block, indices: np.ndarray) -> np.ndarray:
    """The sum over the visits, (k,): of whole tensors by one product, of a few parameters from their cells."""
    if 4 * len(indices) < site.size:
        return closed.cells(site, block, indices).sum(axis=0)
    return closed.total(site, block)[closed.places(site, indices)]


def _key(block: Block) -> np.ndarray:
    return block.step * _PLACES + block.position


def _visits_of(parts: list[_Part]) -> tuple[np.ndarray, np.ndarray]:
    """Keys of all visits of some parts, sorted, and their samples."""
    key, first = np.unique(np.concatenate([_key(part.block) for part in parts]), return_index=True)
    return key, np.concatenate([part.block.sample for part in parts])[first]


def _consecutive(steps: np.ndarray, captured: np.ndarray) -> list[np.ndarray]:
    """The steps in pieces between which no captured step was left out: each can be read as one range."""
    places = np.searchsorted(captured, steps)
    return np.split(steps, np.nonzero(np.diff(places) > 1)[0] + 1) if len(steps) else []


def _add(values: np.ndarray, rows: np.ndarray, columns: np.ndarray, found: np.ndarray) -> None:
    """values[rows, columns] += found, in place and at once where both are consecutive."""
    consecutive = [len(x) == x[-1] - x[0] + 1 and (np.diff(x) == 1).all() for x in (rows, columns)]
    if all(consecutive):
        values[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] += found
    else:
        values[np.ix_(rows, columns)] += found
