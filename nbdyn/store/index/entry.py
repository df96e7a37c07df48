"""What a run's metadata says of its indexes: the entry that makes them count, and the arrays' creation and removal."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from nbdyn.errors import CorruptRun
from nbdyn.schema import SUMMARY
from nbdyn.store import leftovers
from nbdyn.store.backend import basename, context, join, tiledb
from nbdyn.store.layout import INDEX_CLASSES, MAX_STEP, add_members, index_schemas
from nbdyn.store.metadata import read_group, write_metadata

VERSION = 1
NAMES = ("epochs", "classes", "exponents", "zones", "events")
RELATIVE_ERROR = 2e-6
"""Of a sum of absolute values or squares in the indexes, and of a signed sum relative to that of the absolute values.

Products are summed in float32 over blocks of some thousand visits, blocks in float64; storing rounds to float32 (6e-8).
"""
ZONE_ROWS, ZONE_PARAMETERS = 16, 1024
"""A zone: so many stored rows of weights and the row after them, by so many parameters."""


@dataclass(frozen=True)
class Span:
    """Consecutive steps of one epoch: start <= step < stop; `captured` of them hold per-sample gradients."""

    epoch: int
    start: int
    stop: int
    captured: int


@dataclass(frozen=True)
class IndexEntry:
    """The indexes that a run has.

    Attributes:
        timestamp: the arrays count as of this build.
        steps: steps 0..steps-1 are covered.
        spans: rows of `epochs` and `classes`; an epoch has several where training was resumed in it.
        own: whether sums are of samples' own gradients g = scale * c; else of contributions c (scale unknown).
        classes: rows of `classes` a span.
        rows: stored rows of weights that `zones` and `events` cover.
        events: how many `events` there are.
        left_out: name of an index that is not there, or "grad" of `epochs` -> the reason.
        relative_error: RELATIVE_ERROR of the nbdyn that built them.
        version: VERSION of it.
    """

    timestamp: int
    steps: int
    spans: tuple[Span, ...]
    own: bool
    classes: int
    rows: int
    events: int
    left_out: dict[str, str] = field(default_factory=dict)
    relative_error: float = RELATIVE_ERROR
    version: int = VERSION

    def has(self, name: str) -> bool:
        """Whether one of NAMES is there."""
        return name not in self.left_out

    def to_json(self) -> str:
        """The text that stands in the metadata."""
        return json.dumps(asdict(self) | {"spans": [list(asdict(span).values()) for span in self.spans]})


def read_entry(uri: str) -> IndexEntry | None:
    """The indexes of a run; None for none, or for those that another version of nbdyn built.

    Raises:
        CorruptRun: if the entry is not what a build writes.
    """
    text = read_group(uri)[0].get(SUMMARY, "")
    if not text:
        return None
    try:
        found = json.loads(text)
        if found["version"] != VERSION:
            return None
        entry = IndexEntry(**found | {"spans": tuple(Span(*map(int, span)) for span in found["spans"])})
        whole = (entry.timestamp, entry.steps, entry.classes, entry.rows, entry.events)
        ends = [0, *(span.stop for span in entry.spans)]
        follow = all(span.start == end < span.stop for span, end in zip(entry.spans, ends, strict=False))
        sound = all(type(n) is int and 0 <= n < MAX_STEP for n in whole) and entry.classes <= INDEX_CLASSES
        if not (sound and follow and ends[-1] == entry.steps):
            raise ValueError("its numbers")
        if not isinstance(entry.left_out, dict):
            raise TypeError("what is left out")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(uri, str(error)) from error
    return entry


def damaged(uri: str, reason: str) -> CorruptRun:
    """The error of indexes that cannot be read."""
    return CorruptRun(f"the indexes of {uri} are damaged ({reason}); `python -m nbdyn index {uri}` builds them anew.")


def commit(uri: str, entry: IndexEntry) -> None:
    """Make the arrays count as of a build: the last thing that a build does."""
    write_metadata(uri, context(uri), **{SUMMARY: entry.to_json()})


def create(uri: str, parameters: int, tensors: int, names: list[str]) -> None:
    """Create the group and its arrays, empty."""
    ctx, group = context(uri), join(uri, SUMMARY)
    tiledb().Group.create(group, ctx=ctx)
    schemas = index_schemas(ctx, parameters, tensors, ZONE_PARAMETERS)
    for name in names:
        tiledb().Array.create(join(group, name), schemas[name], ctx=ctx)
    add_members(group, ctx, names)
    add_members(uri, ctx, [SUMMARY])


def open_to_write(uri: str, name: str, timestamp: int) -> Any:
    """One of the arrays, to be written as of a build."""
    return tiledb().open(join(uri, SUMMARY, name), "w", ctx=context(uri), timestamp=timestamp)


def remove(uri: str, name: str) -> None:
    """Remove one of the arrays."""
    with tiledb().Group(join(uri, SUMMARY), "w", ctx=context(uri)) as group:
        group.remove(name)
    tiledb().VFS(ctx=context(uri)).remove_dir(join(uri, SUMMARY, name))


def drop(uri: str) -> bool:
    """Remove the indexes, the entry first: whenever this is killed there are none, or all. True if there was any."""
    entries, members = read_group(uri)
    vfs, folder = tiledb().VFS(ctx=context(uri)), join(uri, SUMMARY)
    if entries.get(SUMMARY):
        write_metadata(uri, context(uri), **{SUMMARY: ""})
    if SUMMARY in members:
        with tiledb().Group(uri, "w", ctx=context(uri)) as group:
            group.remove(SUMMARY)
    if vfs.is_dir(folder):
        vfs.remove_dir(folder)
        return True
    return False


def clean(uri: str) -> leftovers.Removed:
    """Remove what a killed build left: all of a first one, what others appended."""
    vfs = tiledb().VFS(ctx=context(uri))
    text = read_group(uri)[0].get(SUMMARY, "")
    if not text:
        return [(SUMMARY, SUMMARY, leftovers.UNFINISHED)] if drop(uri) else []
    try:
        entry = read_entry(uri)
    except CorruptRun:
        entry = None
    if entry is None:  # what is damaged, or of another version, is for a build to replace
        return []
    names = [name for name in NAMES if vfs.is_dir(join(uri, SUMMARY, name))]
    return [found for name in names for found in leftovers.of_array(uri, join(SUMMARY, name), entry.timestamp)]


def sizes(uri: str) -> dict[str, int]:
    """Bytes on disk of each index that is there."""
    vfs = tiledb().VFS(ctx=context(uri))
    folders = {name: join(uri, SUMMARY, name) for name in NAMES}
    return {basename(path): int(vfs.dir_size(path)) for path in folders.values() if vfs.is_dir(path)}
