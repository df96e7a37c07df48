"""The table of captured calls: those in compressed arrays, then those still in the journal; checked, in order."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from nbdyn.errors import CorruptRun
from nbdyn.store import projection, streams
from nbdyn.store.backend import context, join, reading, tiledb
from nbdyn.store.journal import Entry, Journal, JournalSegment
from nbdyn.store.sites import Site

if TYPE_CHECKING:
    from nbdyn.store.store import Store

ARRAY = "calls"
FIELDS = (
    "step", "batch", "position", "size", "site", "call", "factor", "length",
    "stream_0", "row_0", "stream_1", "row_1", "stream_p", "row_p",
)  # fmt: skip
"""Columns of the table, int64. `factor`: the bits of the float64. `length`: positions of a visit, 1 where visits are no
sequences. Then, for the first and second slot of the site's form (see streams.SLOTS) and for "p", the stream and its
row where the call begins; stream -1 for none. In memory, calls of the journal have instead of a stream the number
JOURNALED - kind, and instead of a row the place of the entry in its segment."""
STEP, BATCH, POSITION, SIZE, SITE, CALL, FACTOR, LENGTH, STREAM = range(9)
JOURNALED = -2
NONE = -1
_LARGEST = 2**40


@dataclass(frozen=True)
class Kind:
    """What a slot of a call in the journal holds: key of DTYPES and shape of a visit's part, its length left out."""

    dtype: str
    shape: tuple[int, ...]


@dataclass
class Sites:
    """The sites of a run, numbered in the order in which they were met."""

    parameters: int
    known: list[Site] = field(default_factory=list)
    batch_only: dict[str, str] = field(default_factory=dict)
    _numbers: dict[str, int] = field(default_factory=dict)

    def add(self, entries: Any, batch_only: Any) -> np.ndarray:
        """Take a table of sites as it was written; the number of each, (n,).

        Raises:
            CorruptRun: if it is not what a recorder writes.
        """
        if not isinstance(entries, list) or not isinstance(batch_only, dict):
            raise CorruptRun("the table of per-sample sites is damaged; restore the run from a copy.")
        numbers = np.empty(len(entries), np.int64)
        for place, entry in enumerate(entries):
            content = json.dumps(entry, sort_keys=True)
            if content not in self._numbers:
                self._numbers[content] = len(self.known)
                self.known.append(Site.from_json(entry, self.parameters))
            numbers[place] = self._numbers[content]
        self.batch_only |= {str(name): str(reason) for name, reason in batch_only.items()}
        return numbers


@dataclass
class Calls:
    """All captured calls of a run, sorted by (step, batch, site, call).

    Attributes:
        table: (n, len(FIELDS)) int64.
        segment: (n,) the journal's segment that holds a call; 0 for compacted ones.
        compacted: the segment up to which the journal was compacted.
        sites: the sites.
        kinds: of the journal's slots.
        streams: those looked at so far.
    """

    table: np.ndarray
    segment: np.ndarray
    compacted: int
    sites: Sites
    kinds: list[Kind]
    streams: dict[int, streams.Stream] = field(default_factory=dict)


def load(store: Store) -> Calls:
    """The calls of all committed steps.

    A compaction may go on meanwhile: what it takes out of the journal is then found in the arrays.

    Raises:
        CorruptRun: if they are damaged.
    """
    while True:
        compacted = store.read_compacted()
        try:
            calls = _load(store, compacted)
        except CorruptRun:
            if store.read_compacted() == compacted:
                raise
            continue
        if store.read_compacted() == compacted:
            return calls


def _load(store: Store, compacted: int) -> Calls:
    sites = Sites(store.parameters)
    table = read_table(store, compacted, sites) if compacted else np.empty((0, len(FIELDS)), np.int64)
    if (table[:, STREAM::2] < NONE).any() or (np.diff(table[:, STEP]) < 0).any():
        raise CorruptRun(f"the table of calls of {store.uri} is damaged; restore the run from a copy.")
    table = table[table[:, STEP] < store.steps_committed]  # a compaction may have gone further than this snapshot
    tables, segments = [table], [np.zeros(len(table), np.int64)]
    journal, kinds = Journal(store), {}
    for segment in journal.segments(after=compacted):
        found = journal.read(segment)
        number(found, sites)
        rows = [journal_row(place, entry, sites, kinds) for place, entry in enumerate(found.entries) if entry.nbytes]
        table = as_table(rows)
        tables.append(table[in_order(table)])
        segments.append(np.full(len(table), segment, np.int64))
    table, segment = np.concatenate(tables), np.concatenate(segments)
    check(store, table, len(sites.known))
    return Calls(table, segment, compacted, sites, list(kinds))


def read_table(store: Store, compacted: int, sites: Sites) -> np.ndarray:
    """The compacted calls as of a segment, (n, len(FIELDS)); the sites that stand beside them are added to `sites`."""
    uri = join(store.uri, ARRAY)
    with reading(uri), tiledb().open(uri, ctx=context(store.uri), timestamp=(0, compacted)) as array:
        entries, count = dict(array.meta), streams.length(array)
        if array.schema.domain.dim(1).size != len(FIELDS) or array.schema.attr(0).dtype != np.int64:
            raise CorruptRun(f"{uri} is no table of calls; restore the run from a copy.")
        table = array[0:count, :]["value"] if count else np.empty((0, len(FIELDS)), np.int64)
    try:
        sites.add(json.loads(entries["sites"]), json.loads(entries["batch_only"]))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CorruptRun(f"the table of per-sample sites of {uri} is damaged ({error}).") from error
    return table


def count_streams(run: str, compacted: int) -> int:
    """How many streams there are as of a segment."""
    uri = join(run, ARRAY)
    with reading(uri), tiledb().open(uri, ctx=context(run), timestamp=(0, compacted)) as array:
        count = array.meta.get("streams")
    if not isinstance(count, (int, np.integer)) or count < 0:
        raise CorruptRun(f"the metadata of {uri} is damaged (streams {count!r}); restore the run from a copy.")
    return int(count)


def number(segment: JournalSegment, sites: Sites) -> None:
    """Give the sites of a segment's entries the numbers that they have in the run.

    Raises:
        CorruptRun: if an entry is of no known site, or its tensors are not what the site's form has.
    """
    numbers = sites.add(segment.sites, segment.batch_only)
    for entry in segment.entries:
        whole = (entry.step, entry.batch, entry.position, entry.size, entry.site, entry.call)
        if not all(type(n) is int and 0 <= n < 2**31 for n in whole) or entry.site >= len(numbers):
            raise CorruptRun(f"the journal holds a call with the numbers {whole}: no recorder wrote that.")
        entry.site = int(numbers[entry.site])
        shapes = {slot: tensor.shape[1:] for slot, tensor in entry.tensors.items()}
        if any(len(tensor) != entry.size for tensor in entry.tensors.values()):
            raise CorruptRun(f"a journaled call of step {entry.step} has tensors of differing lengths.")
        check_shapes(sites.known[entry.site], shapes, entry.dtypes)


def check_shapes(site: Site, shapes: dict[str, tuple[int, ...]], dtypes: dict[str, str]) -> None:
    """Raise CorruptRun unless the slots of a call have the shapes (of one visit) and types that its site asks for."""
    slots = [slot for slot in shapes if slot != "p"]
    fits = slots == list(streams.SLOTS[site.form]) and shapes.get("p", ()) == ()
    fits = fits and all((dtype[0] == "i") == (slot in ("ids", "p")) for slot, dtype in dtypes.items())
    try:
        fits = fits and _SHAPES[site.form](site, *(shapes[slot] for slot in slots))
    except (TypeError, ValueError, IndexError):  # the site itself has no such shape or options
        fits = False
    if not fits:
        raise CorruptRun(
            f"a call of {site.name} has tensors of shapes {shapes}, types {dtypes}: none of a {site.form}."
        )


def _linear(site: Site, a: tuple[int, ...], d: tuple[int, ...]) -> bool:
    widths = projection.stored_width if projection.is_projected(site) else projection.width
    return len(a) == len(d) == 2 and a[0] == d[0] and (a[1], d[1]) == (widths(site, "a"), widths(site, "d"))


def _conv(site: Site, a: tuple[int, ...], d: tuple[int, ...]) -> bool:
    groups = site.options.get("groups", 1)
    outputs, inputs = site.shape[0], site.shape[1] * groups
    if site.options.get("transposed"):
        inputs, outputs = site.shape[0], site.shape[1] * groups
    return len(a) == len(d) == len(site.shape) - 1 and (a[0], d[0]) == (inputs, outputs)


def _embedding(site: Site, ids: tuple[int, ...], d: tuple[int, ...]) -> bool:
    return len(ids) == 1 and len(d) == 2 and ids[0] == d[0] and d[1] == site.shape[1]


def _dense(site: Site, g: tuple[int, ...]) -> bool:
    return g == (site.size,)


_SHAPES: dict[str, Any] = {"linear": _linear, "conv": _conv, "embedding": _embedding, "dense": _dense}


def split_shape(form: str, slot: str, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Positions of a visit and the shape of each, from a visit's shape.

    >>> split_shape("linear", "a", (7, 30)), split_shape("conv", "a", (3, 8, 8))
    ((7, (30,)), (1, (3, 8, 8)))
    """
    return (shape[0], shape[1:]) if (form, slot) in streams.SEQUENCES else (1, shape)


def row_of(entry: Entry, site: Site, places: dict[str, tuple[int, int]]) -> list[int]:
    """A call's row of the table; `places`: slot -> stream and row."""
    slots = streams.SLOTS[site.form]
    length, _ = split_shape(site.form, slots[0], entry.tensors[slots[0]].shape[1:])
    head = [entry.step, entry.batch, entry.position, entry.size, entry.site, entry.call]
    bits = int(np.float64(entry.factor).view(np.int64))
    return [
        *head,
        bits,
        length,
        *(x for slot in (*slots, "")[:2] for x in places.get(slot, (NONE, 0))),
        *places.get("p", (NONE, 0)),
    ]


def journal_row(place: int, entry: Entry, sites: Sites, kinds: dict[Kind, int]) -> list[int]:
    """The row of a call in the journal; new kinds of slots are numbered in `kinds`."""
    site, places = sites.known[entry.site], {}
    for slot, tensor in entry.tensors.items():
        kind = Kind(entry.dtypes[slot], split_shape(site.form, slot, tensor.shape[1:])[1])
        places[slot] = JOURNALED - kinds.setdefault(kind, len(kinds)), place
    return row_of(entry, site, places)


def as_table(rows: list[list[int]]) -> np.ndarray:
    """Rows as a table."""
    return np.array(rows, np.int64).reshape(-1, len(FIELDS))


def in_order(table: np.ndarray) -> np.ndarray:
    """The order of (step, batch, site, call)."""
    return np.lexsort(table[:, [CALL, SITE, BATCH, STEP]].T)


def kinds_of(table: np.ndarray, calls: np.ndarray, columns: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct values of some columns among visits.

    Args:
        table: the calls.
        calls: (V,) the row of each visit's call, ascending.
        columns: columns of the table.

    Returns:
        The distinct rows (k, columns), the first visit of each (k,), and which one each visit has (V,).
    """
    new = np.r_[True, np.diff(calls) != 0][: len(calls)]
    starts = np.nonzero(new)[0]
    distinct, first, back = np.unique(table[calls[starts]][:, columns], axis=0, return_index=True, return_inverse=True)
    return distinct, starts[first], back.reshape(-1)[np.cumsum(new) - 1]


def check(store: Store, table: np.ndarray, sites: int) -> None:
    """Raise CorruptRun unless the numbers by which memory is allocated and arrays are indexed are sound."""
    sizes = store.read_steps(0, store.steps_committed, ("batch_size",))["batch_size"].astype(np.int64)
    step, size, position = table[:, STEP], table[:, SIZE], table[:, POSITION]
    limits = {STEP: len(sizes), BATCH: 2**31, POSITION: 2**31, SIZE: 2**31, SITE: sites, CALL: 2**31, LENGTH: 2**31}
    sound = all(((table[:, k] >= (k in (SIZE, LENGTH))) & (table[:, k] < most)).all() for k, most in limits.items())
    sound = sound and (position + size <= sizes[step]).all() and (np.diff(step) >= 0).all()
    places = table[:, STREAM:]
    if not (sound and (places[:, 1::2] >= 0).all() and (np.abs(places) < _LARGEST).all()):
        raise CorruptRun(f"the table of calls of {store.uri} is damaged; restore the run from a copy.")
