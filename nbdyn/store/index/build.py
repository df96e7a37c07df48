"""Building a run's indexes: one pass over factors and weights; nothing counts before the entry that is written last."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nbdyn.errors import CorruptRun, NbdynError
from nbdyn.settings import format_size
from nbdyn.store.backend import context, is_local, tiledb
from nbdyn.store.index import entry as entries
from nbdyn.store.index.entry import NAMES, ZONE_ROWS, IndexEntry
from nbdyn.store.index.events import MOST, Collector
from nbdyn.store.index.gather import Advance, Found, gather
from nbdyn.store.index.plan import Group, Plan, plan_of
from nbdyn.store.index.read import Index
from nbdyn.store.index.sums import Histograms
from nbdyn.store.index.zones import Zones, levels_of
from nbdyn.store.lock import WriterLock
from nbdyn.store.metadata import remove_torn, write_metadata
from nbdyn.store.store import Store

if TYPE_CHECKING:
    from tqdm import tqdm

WRITE_BYTES = 64_000_000
"""Sums of several spans are written together, about so many bytes."""
PROGRESS_SECONDS = 1.0
"""Builds that take longer show a bar."""


@dataclass(frozen=True)
class Summary:
    """What a build did.

    Attributes:
        steps: steps that the indexes cover now.
        first: the first of them that this build covered; equal to `steps` where nothing was to be done.
        sizes: name of an index -> its bytes on disk.
        left_out: name of an index, or "grad" (the batch gradients in `epochs`) -> why it is not there.
        seconds: wall time.
    """

    steps: int
    first: int
    sizes: dict[str, int]
    left_out: dict[str, str]
    seconds: float

    def __str__(self) -> str:
        there = ", ".join(f"{name} {format_size(size)}" for name, size in self.sizes.items()) or "none"
        lines = [f"indexes of steps 0..{self.steps - 1}: {there}"]
        lines[0] += f" ({self.seconds:.1f} s)" if self.first < self.steps else "; they are up to date"
        lines += [f"without {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join(lines)


def build(run: Store | str | os.PathLike[str], *, progress: bool = True, locked: bool = False) -> Summary:
    """Build the indexes of a run, or what they lack of it.

    Steps that were committed since the last build are added; indexes that are damaged, of another version, or whose
    kind no longer fits (a new class, say) are built anew. A build that is killed leaves the former indexes, or none.

    Cost: one read of the factors and one of the weights; see `nbdyn.store.index.gather.gather`.

    Args:
        run: a path, or a store.
        progress: whether a bar is shown if it takes long.
        locked: whether the caller holds the run's lock. Otherwise it is taken.

    Raises:
        RunBusy: if a live writer holds the run.
        CorruptRun: if what was captured is damaged.
        NbdynError: if the place cannot be written, or the disk is full.
    """
    store = run if isinstance(run, Store) else Store(run)
    if locked:
        return _build(store, progress)
    try:
        lock = WriterLock(store.uri)
    except OSError as error:
        raise NbdynError(f"cannot write to {store.uri}: {error}.") from error
    try:
        if not is_local(store.uri):
            write_metadata(store.uri, context(store.uri), writer=lock.lease())
        store.refresh()  # a writer may have gone on until just now
        return _build(store, progress)
    finally:
        if not is_local(store.uri):
            write_metadata(store.uri, context(store.uri), writer="{}")
        lock.release()


def _build(store: Store, progress: bool) -> Summary:
    began = time.perf_counter()
    if not store.steps_committed:
        raise NbdynError(f"{store.name} holds no steps yet; build its indexes when it does.")
    try:
        remove_torn(store.uri)
        before = _usable(store)
        first = before.steps if before is not None else 0
        if before is None or not _up_to_date(store, before):
            plan = plan_of(store, first)
            if before is not None and not _continues(before, plan):
                before, first, plan = None, 0, plan_of(store, 0)
            before = _add(store, before, plan, progress)
        else:
            first = store.steps_committed
    except tiledb().TileDBError as error:
        raise NbdynError(f"cannot build the indexes of {store.uri}: {error}. The run itself is as it was.") from error
    left_out = {name: why for name, why in before.left_out.items() if name in (*NAMES, "grad")}
    return Summary(before.steps, first, entries.sizes(store.uri), left_out, time.perf_counter() - began)


def _usable(store: Store) -> IndexEntry | None:
    """The indexes that are there, if they are whole."""
    try:
        entry = entries.read_entry(store.uri)
        if entry is not None:
            Index(store, entry).check()
    except CorruptRun:  # it is built anew, as the message of this error tells to
        return None
    return entry if entry is None or entry.steps <= store.steps_committed else None


def _up_to_date(store: Store, entry: IndexEntry) -> bool:
    return entry.steps == store.steps_committed and entry.rows == len(store.weights.steps)


def _continues(entry: IndexEntry, plan: Plan) -> bool:
    """Whether what a plan gives can be added to what is there."""
    kinds = (entry.own, entry.classes) == (plan.own, plan.classes)
    return kinds and all(entry.has(n) == (n not in plan.left_out) for n in ("epochs", "classes", "exponents", "grad"))


def _add(store: Store, before: IndexEntry | None, plan: Plan, progress: bool) -> IndexEntry:
    """Write what a plan gives; the entry that makes it count."""
    from tqdm.auto import tqdm

    uri, names = store.uri, [name for name in NAMES if name not in plan.left_out]
    if before is None:
        entries.drop(uri)
        entries.create(uri, store.parameters, len(store.config["tensors"]), names)
    else:
        entries.clean(uri)
    rows = len(store.weights.steps)
    after = IndexEntry(
        timestamp=1 if before is None else before.timestamp + 1,
        steps=plan.stop,
        spans=(() if before is None else before.spans) + plan.spans,
        own=plan.own,
        classes=plan.classes,
        rows=rows,
        events=0,
        left_out=plan.left_out,
    )
    total = plan.visits + rows * max(
        1, len(plan.groups)
    )  # rows of weights beside visits, so that the bar moves there too
    bar: tqdm[Any] = tqdm(
        total=total, desc=f"indexing {store.name}", unit="visits", unit_scale=True, leave=False,
        delay=PROGRESS_SECONDS, disable=not progress,
    )  # fmt: skip
    with bar:
        if plan.captured.size or plan.spans:
            _write_gradients(store, plan, after, bar.update)
        after = _write_weights(store, before, after, lambda count: bar.update(count * max(1, len(plan.groups))))
    entries.commit(uri, after)
    return after


# Gradients --------------------------------------------------------------------------------------------------------


def _write_gradients(store: Store, plan: Plan, after: IndexEntry, advance: Advance) -> None:
    histograms = Histograms(store, plan)
    for number, group in enumerate(plan.groups):
        first, waiting = len(after.spans) - len(plan.spans), []
        most = max(1, WRITE_BYTES // (group.size * 4 * (6 + 2 * plan.classes)))
        for found in gather(store, plan, number, histograms, advance):
            waiting.append(found)
            if len(waiting) == most:
                _write_sums(store, after, group, first, waiting)
                first, waiting = first + len(waiting), []
        _write_sums(store, after, group, first, waiting)
        if "exponents" not in plan.left_out:
            with entries.open_to_write(store.uri, "exponents", after.timestamp) as array:
                for tensor, counts in histograms.finished(number).items():
                    array[plan.start : plan.stop, tensor : tensor + 1, :] = counts[:, None, :]


def _write_sums(store: Store, after: IndexEntry, group: Group, first: int, found: list[Found]) -> None:
    """Write the sums of consecutive spans of a group."""
    spans = slice(first, first + len(found))
    if not found:
        return
    of_epoch = {name: np.stack([sums[name] for sums, _ in found]) for name in found[0][0]}
    of_class = {name: np.stack([sums[name] for _, sums in found]) for name in found[0][1]}
    start = 0
    for place, size in group.runs:
        run, where = slice(start, start + size), slice(place, place + size)
        start += size
        with entries.open_to_write(store.uri, "epochs", after.timestamp) as array:
            array[spans, where] = {name: np.ascontiguousarray(x[:, run]) for name, x in of_epoch.items()}
        if after.classes:
            with entries.open_to_write(store.uri, "classes", after.timestamp) as array:
                array[spans, 0 : after.classes, where] = {
                    name: np.ascontiguousarray(x[:, :, run]) for name, x in of_class.items()
                }


# Weights ----------------------------------------------------------------------------------------------------------


def _write_weights(store: Store, before: IndexEntry | None, after: IndexEntry, advance: Advance) -> IndexEntry:
    """Write zones and events; the entry as it is with these."""
    known = None if before is None else _known_zones(store, before)
    if before is not None and not before.has("events"):
        after = replace(after, left_out=after.left_out | {"events": before.left_out["events"]})
    if not after.has("events"):
        _write_zones(store, after, levels_of(store, known, None, advance))
        return after
    rows, count = (0, 0) if before is None else (before.rows, before.events)
    events = Collector(store.uri, after.timestamp, rows, count)
    _write_zones(store, after, levels_of(store, known, events.take, advance))
    events.flush()
    if events.count > MOST:
        entries.remove(store.uri, "events")
        return replace(after, left_out=after.left_out | {"events": f"there are more than {MOST:,}"})
    return replace(after, events=events.count)


def _known_zones(store: Store, before: IndexEntry) -> Zones | None:
    """The blocks of level 0 of which every row, and the row after, was there at the last build."""
    found = Index(store, before).zones()
    whole = max(0, before.rows - 1) // ZONE_ROWS
    return None if found is None else Zones(*(values[:whole] for values in found.columns().values()))


def _write_zones(store: Store, after: IndexEntry, levels: list[Zones]) -> None:
    with entries.open_to_write(store.uri, "zones", after.timestamp) as array:
        for number, level in enumerate(levels):
            blocks, zones = level.low.shape
            array[number : number + 1, 0:blocks, 0:zones] = {name: x[None] for name, x in level.columns().items()}
