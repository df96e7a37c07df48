"""Reading a run's indexes: arrays in, NumPy arrays out; None where they do not cover what is asked."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from nbdyn.errors import Incompatible, did_you_mean
from nbdyn.schema import SUMMARY
from nbdyn.store.backend import context, join, tiledb
from nbdyn.store.index.entry import NAMES, ZONE_PARAMETERS, ZONE_ROWS, IndexEntry, Span, damaged, read_entry
from nbdyn.store.index.events import Events
from nbdyn.store.index.zones import Zones

if TYPE_CHECKING:
    from nbdyn.store.store import Store

EPOCH_FIELDS = ("sum_grad", "sum_abs_grad", "sum_sq_grad", "sum_g", "sum_abs_g", "sum_sq_g")
CLASS_FIELDS = ("sum_g", "sum_abs_g")
CHECK_BYTES = 64_000_000
EVENT_GAP = 64
"""Parameters nearer than this are read as one range of events."""
READ_GAP = 16_384
"""Parameters nearer than this are read as one range: a tile holds as many."""


def open_index(store: Store) -> Index | None:
    """The indexes of a run; None if it has none, or those of another version.

    Raises:
        CorruptRun: if the entry that speaks of them is damaged.
    """
    entry = read_entry(store.uri)
    return None if entry is None else Index(store, entry)


class Index:
    """The indexes of a run, as of their last build; `open_index` gives one.

    Every method gives None where the index was left out (`left_out` says why) or does not reach as far as the run, and
    raises CorruptRun where its files are damaged. Numbers are exact to `relative_error`, counts and zones wholly.

    >>> # index = open_index(store)
    >>> # index.epochs("sum_abs_g", 0, 4)        -> (parameters,) float64: sum |g| over epochs 0 to 4
    >>> # index.exponents(0, 1000)               -> (1000, tensors, 64) int32
    """

    def __init__(self, store: Store, entry: IndexEntry) -> None:
        self._store, self._entry = store, entry

    @property
    def steps(self) -> int:
        """Steps 0..steps-1 are covered."""
        return self._entry.steps

    @property
    def spans(self) -> tuple[Span, ...]:
        """Epochs and the steps that they had; an epoch in which training was resumed may have several."""
        return self._entry.spans

    @property
    def own(self) -> bool:
        """Whether the fields in g are of samples' own gradients; else of contributions, for the scale is unknown."""
        return self._entry.own

    @property
    def left_out(self) -> dict[str, str]:
        """Name of an index ("grad": the fields of batch gradients) -> why it was not built."""
        return dict(self._entry.left_out)

    @property
    def relative_error(self) -> float:
        """Of sums of |.| and squares; of signed sums relative to the sum of |.|."""
        return self._entry.relative_error

    def epochs(self, field: str, first: int, last: int, indices: np.ndarray | None = None) -> np.ndarray | None:
        """Sums over the captured steps of the epochs first..last, both included.

        Args:
            field: one of EPOCH_FIELDS. In grad: over steps, of the batch gradient p.grad as backward left it. In g:
                over visits, of single samples' gradients.
            first: an epoch.
            last: an epoch.
            indices: global parameter indices (k,); None for all.

        Returns:
            (k,) float64; NaN for parameters of which no sample's gradients were recorded.

        Raises:
            Incompatible: if there is no such field.
            CorruptRun: if the index is damaged.
        """
        _check_field(field, EPOCH_FIELDS)
        spans = self._spans(first, last)
        if spans is None or not self._entry.has("epochs") or ("grad" in self.left_out and field.endswith("grad")):
            return None
        is_square = field.startswith("sum_sq")
        out = np.zeros(self._store.parameters if indices is None else len(indices))
        with self._open("epochs") as array:
            for span in spans:
                values = _columns(array, (span,), field.replace("sum_sq", "norm"), indices)
                out += np.square(values, dtype=np.float64) if is_square else values
        return out

    def classes(self, field: str, first: int, last: int, indices: np.ndarray | None = None) -> np.ndarray | None:
        """`epochs` by the class of the visits, (classes, k) float64, for one of CLASS_FIELDS.

        Visits of no class are in no row.

        Raises:
            Incompatible: if there is no such field.
            CorruptRun: if the index is damaged.
        """
        _check_field(field, CLASS_FIELDS)
        spans = self._spans(first, last)
        if spans is None or not self._entry.has("classes"):
            return None
        out = np.zeros((self._entry.classes, self._store.parameters if indices is None else len(indices)))
        with self._open("classes") as array:
            for span in spans:
                for label in range(self._entry.classes):
                    out[label] += _columns(array, (span, label), field, indices)
        return out

    def exponents(self, start: int, stop: int) -> np.ndarray | None:
        """Histograms of the batch gradient of steps start <= t < stop by binary exponent.

        Returns:
            (steps, tensors, 64) int32, see `nbdyn.store.index.exponents` for the bins and for what they say of a
            threshold; -1 at steps that were not captured and for tensors of which no sample's gradients were.

        Raises:
            CorruptRun: if the index is damaged.
        """
        if not self._entry.has("exponents") or not 0 <= start <= stop <= self.steps:
            return None
        if start == stop:
            return np.empty((0, len(self._store.config["tensors"]), 64), np.int32)
        with self._open("exponents") as array:
            return array[start:stop, :, :]["count"]

    def zones(self, level: int = 0) -> Zones | None:
        """Zones of the weights at one level; None beyond the last level.

        Block b of level k begins with row b * 16^(k + 1) of `store.weights.steps`. Rows stored since the last build
        are not covered: `zone_rows` says how many are.

        Raises:
            CorruptRun: if the index is damaged.
        """
        blocks = -(-self._entry.rows // ZONE_ROWS ** (level + 1))
        if not self._entry.has("zones") or level < 0 or blocks < 1 or (level and ZONE_ROWS**level >= self._entry.rows):
            return None
        with self._open("zones") as array:
            found = array[level, 0:blocks, :]
        shape = (blocks, -(-self._store.parameters // ZONE_PARAMETERS))
        return Zones(*(found[name].reshape(shape) for name in ("low", "high", "nearest", "crossings")))

    def events(self, start: int, stop: int, indices: np.ndarray | None = None) -> Events | None:
        """Sign changes and exact zeros of weights[t], start <= t < stop; kinds are those of `nbdyn.store.index.events`.

        Args:
            start: first step.
            stop: end of the half-open range; at most the number of steps + 1, for the weights after the last one.
            indices: global parameter indices (k,); None for all.

        Raises:
            CorruptRun: if the index is damaged.
        """
        if not self._entry.has("events") or not 0 <= start <= stop <= self.zone_rows:
            return None
        if start == stop or (indices is not None and not len(indices)):
            return Events(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8))
        wanted = np.arange(self._store.parameters) if indices is None else np.unique(indices)
        pieces = np.split(wanted, np.nonzero(np.diff(wanted) > EVENT_GAP)[0] + 1)
        with self._open("events") as array:
            ranges = [slice(int(piece[0]), int(piece[-1])) for piece in pieces]
            found = array.query(order="U").multi_index[ranges, start : stop - 1]
        step, parameter = (np.asarray(found[name]).astype(np.int64) for name in ("step", "parameter"))
        kept = np.ones(len(step), bool) if indices is None else np.isin(parameter, wanted)
        order = np.nonzero(kept)[0][np.lexsort((parameter[kept], step[kept]))]
        return Events(step[order], parameter[order], np.asarray(found["kind"])[order])

    @property
    def zone_rows(self) -> int:
        """How many stored rows of weights zones and events cover."""
        return self._entry.rows

    def check(self) -> None:
        """Read every byte of the indexes, so that their checksums are compared.

        Raises:
            CorruptRun: if they are damaged.
        """
        self.events(0, self.zone_rows)
        for name in NAMES:
            if name == "events" or not self._entry.has(name):
                continue
            with self._open(name) as array:
                ends, width = array.nonempty_domain(), array.nattr
                if ends is None:
                    raise damaged(self._store.uri, f"{name} is empty")
                _read_all(array, [(int(first), int(last) + 1) for first, last in ends], 8 * width)

    def _spans(self, first: int, last: int) -> list[int] | None:
        """Rows of the spans of some epochs; None unless the index has all of their steps."""
        committed = self._store.steps_committed
        newer = self._store.read_steps(self.steps, committed, ("epoch",))["epoch"] if committed > self.steps else ()
        if any(first <= int(epoch) <= last for epoch in np.unique(newer)):
            return None
        spans = [place for place, span in enumerate(self.spans) if first <= span.epoch <= last]
        known = {span.epoch for span in self.spans}
        return spans if first <= last and first in known and last in known else None

    def _open(self, name: str) -> AbstractContextManager[Any]:
        return _opened(self._store.uri, name, self._entry.timestamp)

    def __repr__(self) -> str:
        there = ", ".join(name for name in NAMES if self._entry.has(name))
        return f"indexes of {self._store.name}: {there}; steps 0..{self.steps - 1}"


@contextlib.contextmanager
def _opened(uri: str, name: str, timestamp: int) -> Iterator[Any]:
    """An array of the indexes; failures of TileDB inside become CorruptRun."""
    ctx = context(uri)
    try:
        path = join(uri, SUMMARY, name)
        with tiledb().scope_ctx(ctx), tiledb().open(path, ctx=ctx, timestamp=(0, timestamp)) as array:
            yield array
    except tiledb().TileDBError as error:
        raise damaged(uri, str(error).split("\n")[0]) from error


def _check_field(field: str, known: tuple[str, ...]) -> None:
    if field not in known:
        raise Incompatible(f"the indexes have no field {field!r}; {did_you_mean(field, known)}")


def _read_all(array: Any, ends: list[tuple[int, int]], cell_bytes: int) -> None:
    """Read a dense array within some bounds, about CHECK_BYTES at a time."""
    inner = cell_bytes * math.prod(stop - start for start, stop in ends[1:])
    if inner > CHECK_BYTES and len(ends) == 3:
        for place in range(*ends[0]):
            rows = max(1, CHECK_BYTES * (ends[1][1] - ends[1][0]) // inner)
            for start in range(*ends[1], rows):
                array[place, start : min(start + rows, ends[1][1]), slice(*ends[2])]
        return
    rows = max(1, CHECK_BYTES // inner)
    for start in range(*ends[0], rows):
        array[(slice(start, min(start + rows, ends[0][1])), *(slice(*bounds) for bounds in ends[1:]))]


def _columns(array: Any, row: tuple[int, ...], attribute: str, indices: np.ndarray | None) -> np.ndarray:
    """An attribute of some parameters in one row, (k,) float32: near ones are read together."""
    query = array.query(attrs=[attribute])
    if indices is None:
        return np.ravel(query[(*row, slice(None))][attribute])
    unique, back = np.unique(indices, return_inverse=True)
    parts = []
    for piece in np.split(unique, np.nonzero(np.diff(unique) > READ_GAP)[0] + 1) if len(unique) else ():
        first = int(piece[0])
        parts.append(np.ravel(query[(*row, slice(first, int(piece[-1]) + 1))][attribute])[piece - first])
    return np.concatenate(parts)[back] if parts else np.empty(0, np.float32)
