"""What was captured of single samples, read in blocks of bounded memory, from compressed arrays and the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from nbdyn.errors import Incompatible
from nbdyn.store import calls
from nbdyn.store.calls import CALL, FACTOR, LENGTH, POSITION, SITE, SIZE, STEP, STREAM, Calls
from nbdyn.store.fetch import Fetch, Moved
from nbdyn.store.names import ascending
from nbdyn.store.projection import expand, is_projected
from nbdyn.store.sites import Site
from nbdyn.store.streams import SLOTS

if TYPE_CHECKING:
    from nbdyn.store.store import Store
    from nbdyn.store.warm import Warm

T = TypeVar("T")

MAX_BYTES = 64_000_000
SPAN_VISITS = 2**18
"""Visits whose places and samples are looked up at a time (10 MB)."""
VISIT_BYTES = 40
"""Of a visit in a block beside its tensors."""


@dataclass
class Block:
    """Consecutive visits of one site and one shape, sorted by (step, batch, place in the batch).

    Attributes:
        site: number of the site.
        call: the how-manieth call of the site with its batch; contributions of several calls add up.
        step, position, sample: (V,) int64.
        factor: (V,) float64; contribution = factor * what the form gives.
        tensors: slot -> (V, ...), see `nbdyn.store.sites.Site`: float32, float64 or int64.
    """

    site: int
    call: int
    step: np.ndarray
    position: np.ndarray
    sample: np.ndarray
    factor: np.ndarray
    tensors: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.step)

    def take(self, which: np.ndarray | slice) -> Block:
        """Some of the visits, by a mask, their places or a slice (which copies nothing)."""
        tensors = {slot: tensor[which] for slot, tensor in self.tensors.items()}
        columns = (self.step[which], self.position[which], self.sample[which], self.factor[which])
        return Block(self.site, self.call, *columns, tensors)


@dataclass
class Visits:
    """Visits to read: `call` is a row of the table of calls, `offset` the place within the call; all (V,) int64."""

    call: np.ndarray
    offset: np.ndarray
    step: np.ndarray
    position: np.ndarray
    sample: np.ndarray

    def take(self, which: np.ndarray | slice) -> Visits:
        """Some of them."""
        return Visits(*(column[which] for column in (self.call, self.offset, self.step, self.position, self.sample)))


class Factors:
    """The per-sample captures of a run, as of the store's last refresh. `store.factors` is one.

    A run that captured nothing has no sites and no steps.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._loaded: Calls | None = None
        self._of_site: list[np.ndarray] = []

    def _calls(self) -> Calls:
        if self._loaded is None:
            found = calls.load(self._store)
            order = np.argsort(found.table[:, SITE], kind="stable")
            ends = np.searchsorted(found.table[order, SITE], np.arange(1, len(found.sites.known)))
            self._of_site = np.split(order, ends)
            self._loaded = found
        return self._loaded

    @property
    def sites(self) -> list[Site]:
        """Where the network uses its parameters, in the order of their numbers."""
        return self._calls().sites.known

    @property
    def batch_only(self) -> dict[str, str]:
        """Tensor name -> why its gradients were recorded by batch only, not by sample."""
        return self._calls().sites.batch_only

    @property
    def steps(self) -> np.ndarray:
        """The captured steps, sorted (n,) int64."""
        return np.unique(self._calls().table[:, STEP])

    @cached_property
    def warm(self) -> Warm:
        """Blocks that stay in memory; see `nbdyn.store.warm.Warm`."""
        from nbdyn.store.warm import Warm

        return Warm(self)

    def calls_of(self, site: int, start: int, stop: int) -> np.ndarray:
        """Rows of the table of calls (see `nbdyn.store.calls.FIELDS`) of a site at steps start <= t < stop."""
        table = self._calls().table[self._of_site[site]]
        return table[slice(*np.searchsorted(table[:, STEP], [start, stop]).tolist())]

    def scales(self, start: int, stop: int) -> np.ndarray:
        """What p.grad was multiplied by to be the sum of contributions at steps start <= t < stop, (steps,) float64.

        1 over a GradScaler's scale; 1 without one, and where nothing was captured.
        """
        table = self._calls().table
        table = table[slice(*np.searchsorted(table[:, STEP], [start, stop]).tolist())]
        found = np.ones(stop - start)
        found[table[:, STEP] - start] = np.ascontiguousarray(table[:, FACTOR]).view(np.float64)
        return found

    def nbytes(self, site: int, start: int, stop: int) -> int:
        """Bytes that `blocks` would give: the tensors of a site's visits at steps start <= t < stop."""
        found = self._calls()
        rows = self._of_site[site]
        rows = rows[slice(*np.searchsorted(found.table[rows, STEP], [start, stop]).tolist())]
        fetch = Fetch(self._store, found, site, {})
        return int((fetch.visit_bytes(rows) * found.table[rows, SIZE]).sum()) if len(rows) else 0

    def sites_of(self, indices: np.ndarray) -> list[int]:
        """Numbers of the sites that hold any of some global parameter indices."""
        indices = ascending(indices)

        def holds(site: Site) -> bool:
            bounds = np.array(site.runs, np.int64).reshape(-1, 2)
            return bool((np.diff(np.searchsorted(indices, np.cumsum(bounds, axis=1))) > 0).any())

        return [number for number, site in enumerate(self.sites) if holds(site)]

    def blocks(
        self,
        site: int,
        start: int,
        stop: int,
        *,
        samples: np.ndarray | None = None,
        columns: dict[str, np.ndarray] | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> Iterator[Block]:
        """The visits of a site at steps start <= t < stop.

        Blocks come in windows of steps: every call, batch and shape of a window's steps comes before the next window
        begins, and a step is divided only if it alone exceeds `max_bytes`.

        Args:
            site: number of the site.
            start: first step.
            stop: end of the half-open range.
            samples: ids of the samples whose visits are wanted; None for all. Other visits are not read where that
                saves reading.
            columns: slot -> numbers of the columns (last axis) that are wanted, of "a" and "d" of Linear layers;
                others are read whole.
            max_bytes: bytes of a window. Beside them, reading takes up to 64 MB, and up to fetch.ROWS_BYTES where
                rows of the data set are picked.

        Raises:
            Incompatible: if there is no such site.
            CorruptRun: if the run is damaged.
        """
        found = self._calls()
        if not 0 <= site < len(found.sites.known):
            raise Incompatible(f"{self._store.name} has {len(found.sites.known)} per-sample sites; found site={site}.")
        known = found.sites.known[site]
        projected = is_projected(known)
        fetch = Fetch(self._store, found, site, (columns or {}) if known.form == "linear" and not projected else {})
        if projected:  # estimates are wider than what is stored of them
            max_bytes = max(1, max_bytes * int(known.options["project"]) // max(known.shape))
        for span in self._spans(site, start, stop):
            visits = self._visits(fetch, span, samples)
            for first, last in _windows(visits.step, fetch.visit_bytes(visits.call) + VISIT_BYTES, max_bytes):
                window = visits.take(slice(first, last))
                for block in self._settled(fetch, lambda window=window: list(self._window(fetch, window))):
                    if projected:
                        block.tensors = expand(known, block.tensors, columns)
                    yield block

    def visits(self, site: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Step and position of each captured visit of a site at steps start <= t < stop, call by call, (n,) each.

        Raises:
            CorruptRun: if the run is damaged.
        """
        fetch = Fetch(self._store, self._calls(), site, {})
        found = [self._visits(fetch, span, None) for span in self._spans(site, start, stop)]
        none = [np.empty(0, np.int64)]
        return np.concatenate(none + [v.step for v in found]), np.concatenate(none + [v.position for v in found])

    def _settled(self, fetch: Fetch, read: Callable[[], T]) -> T:
        """What `read` gives, once no compaction takes a segment away from under it. Calls keep their places."""
        while True:
            try:
                return read()
            except Moved:
                self._loaded = None
                fetch.update(self._calls())

    def _spans(self, site: int, start: int, stop: int) -> Iterator[np.ndarray]:
        """The site's calls at some steps, so many whole steps at a time as have about SPAN_VISITS visits."""
        found = self._calls()
        rows = self._of_site[site]
        steps = found.table[rows, STEP]
        rows = rows[np.searchsorted(steps, start) : np.searchsorted(steps, stop)]
        if not len(rows):
            return
        steps, sizes = found.table[rows, STEP], found.table[rows, SIZE]
        # Visits are looked up by ranges of steps, also of those between that were not captured.
        most = np.bincount(np.unique(steps, return_inverse=True)[1], sizes).max()
        part = (steps - steps[0]) // max(1, int(SPAN_VISITS // most))
        yield from np.split(rows, np.nonzero(np.diff(part))[0] + 1)

    def _visits(self, fetch: Fetch, rows: np.ndarray, samples: np.ndarray | None) -> Visits:
        """The visits of some calls, those of some samples alone if they are given."""
        table = self._calls().table[rows]
        sizes = table[:, SIZE]
        owner = np.repeat(np.arange(len(rows)), sizes)
        offset = np.arange(len(owner)) - (np.cumsum(sizes) - sizes)[owner]
        position = table[owner, POSITION] + offset
        self._settled(fetch, lambda: fetch.fill_positions(rows, owner, position))
        step = table[owner, STEP]
        visits = Visits(rows[owner], offset, step, position, self._store.sample_ids(step, position))
        return visits if samples is None else visits.take(np.isin(visits.sample, samples))

    def _window(self, fetch: Fetch, visits: Visits) -> Iterator[Block]:
        table = self._calls().table
        _, first, which = calls.kinds_of(table, visits.call, [CALL, LENGTH, STREAM, STREAM + 2])
        for number in np.argsort(first):
            some = visits.take(which == number) if len(first) > 1 else visits
            fetch.check(int(some.call[0]))
            site, call = int(table[some.call[0], SITE]), int(table[some.call[0], CALL])
            factor = np.ascontiguousarray(table[some.call, FACTOR]).view(np.float64)
            slots = SLOTS[self.sites[site].form]
            tensors = {slot: fetch.tensor(place, slot, some.call, some.offset) for place, slot in enumerate(slots)}
            yield Block(site, call, some.step, some.position, some.sample, factor, tensors)


def _windows(step: np.ndarray, nbytes: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of visits of at most so many bytes, of whole steps unless one alone has more.

    >>> list(_windows(np.array([0, 0, 1, 1, 2, 2, 2]), np.full(7, 10), 45))
    [(0, 4), (4, 7)]
    >>> list(_windows(np.array([0, 0, 1, 1, 2, 2, 2]), np.full(7, 10), 25))
    [(0, 2), (2, 4), (4, 6), (6, 7)]
    """
    ends = np.cumsum(nbytes)
    start = 0
    while start < len(step):
        limit = most + (ends[start - 1] if start else 0)
        stop = int(np.searchsorted(ends, limit, side="right"))
        if stop < len(step):
            whole = int(np.searchsorted(step, step[stop]))
            stop = whole if whole > start else max(stop, start + 1)
        yield start, stop
        start = stop
