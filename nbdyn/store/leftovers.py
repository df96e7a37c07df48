"""What a killed writer or compaction left behind, none of which counts: found and removed."""

from __future__ import annotations

from typing import Any

from nbdyn.schema import ARRAYS, CAPTURE
from nbdyn.store import calls, journal, streams
from nbdyn.store.backend import basename, context, join, tiledb
from nbdyn.store.metadata import compacted, read_group

Removed = list[tuple[str, str, str]]
"""(array, file or folder, reason) of what was removed."""

NOT_COMMITTED, UNFINISHED = "not committed", "of a segment that was never finished"


def of_segments(uri: str, timestamp: int) -> Removed:
    """Remove what an unfinished segment left in the arrays that training writes, and in the journal.

    Args:
        uri: the run; its writer is dead.
        timestamp: the last committed segment.
    """
    removed = [found for name in ARRAYS for found in of_array(uri, name, None if name == "notes" else timestamp)]
    late = [number for number in journal.numbers(uri) if number > timestamp]
    journal.remove(uri, late)
    return removed + [(journal.FOLDER, f"{number:08d}.journal", UNFINISHED) for number in late]


def of_compaction(uri: str) -> Removed:
    """Remove what an unfinished compaction left: arrays, what it appended to others, the journal that it had read."""
    entries, members = read_group(uri)
    last = compacted(uri, entries)
    done = sorted(number for number in journal.numbers(uri) if number <= last)
    journal.remove(uri, done)
    removed = [(journal.FOLDER, f"{number:08d}.journal", "compacted") for number in done]
    vfs = tiledb().VFS(ctx=context(uri))
    if not last:
        there = [name for name in CAPTURE if vfs.is_dir(join(uri, name))]
        _remove_members(uri, [name for name in CAPTURE if name in members])
        for name in there:
            vfs.remove_dir(join(uri, name))
        return removed + [(name, name, UNFINISHED) for name in there]
    removed += _unfinished_streams(uri, calls.count_streams(uri, last))
    numbered = [
        join(group, name) for group in (streams.FACTORS, streams.ROWS) for name in _names(vfs, join(uri, group))
    ]
    for name in (calls.ARRAY, "gradients", *numbered):
        removed += of_array(uri, name, last)
    return removed


def _unfinished_streams(uri: str, count: int) -> Removed:
    """Remove arrays of streams that were created, but never committed."""
    vfs, removed = tiledb().VFS(ctx=context(uri)), []
    for group in (streams.FACTORS, streams.ROWS):
        with tiledb().Group(join(uri, group), ctx=context(uri)) as opened:
            members = {member.name for member in opened}
        late = [name for name in _names(vfs, join(uri, group)) if int(name.split("-")[0]) >= count]
        _remove_members(join(uri, group), [name for name in late if name in members])
        for name in late:
            vfs.remove_dir(join(uri, group, name))
            removed.append((join(group, name), name, UNFINISHED))
    return removed


def _names(vfs: Any, folder: str) -> list[str]:
    """The numbered arrays in a group's folder."""
    return sorted(name for name in map(basename, _list(vfs, folder)) if name.removesuffix("-keys").isdigit())


def _remove_members(uri: str, names: list[str]) -> None:
    if names:
        with tiledb().Group(uri, "w", ctx=context(uri)) as group:
            for name in names:
                group.remove(name)


def of_array(uri: str, name: str, timestamp: int | None) -> Removed:
    """Remove from an array what has no commit, or one later than the last segment that counts (None: all do)."""
    path = join(uri, name)
    removed = [(name, fragment, NOT_COMMITTED) for fragment in _remove_uncommitted(path)]
    late = [] if timestamp is None else _remove_late(path, timestamp)
    return removed + [(name, fragment, UNFINISHED) for fragment in late]


def _remove_uncommitted(uri: str) -> list[str]:
    """Fragment folders that no commit file names."""
    vfs = tiledb().VFS(ctx=context(uri))
    committed = set()
    for path in _list(vfs, join(uri, "__commits")):
        name = basename(path)
        if name.endswith(".wrt"):
            committed.add(name.removesuffix(".wrt"))
        elif name.endswith(".con"):  # consolidated commits list the fragments inside
            with vfs.open(path) as file:
                text = file.read().decode(errors="replace")
            committed |= {basename(line).removesuffix(".wrt") for line in text.split("\n") if line}
    removed = []
    for path in _list(vfs, join(uri, "__fragments")):
        if basename(path) not in committed:
            vfs.remove_dir(path)
            removed.append(basename(path))
    return removed


def _list(vfs: Any, uri: str) -> list[str]:
    return list(vfs.ls(uri)) if vfs.is_dir(uri) else []


def _remove_late(uri: str, timestamp: int) -> list[str]:
    """Fragments and array metadata later than a timestamp."""
    fragments = tiledb().array_fragments(uri, ctx=context(uri))
    late = [
        basename(path)
        for path, (start, _) in zip(fragments.uri, fragments.timestamp_range, strict=True)
        if start > timestamp
    ]
    if late:
        tiledb().Array.delete_fragments(uri, timestamp + 1, 2**63 - 1, ctx=context(uri))
    # Metadata files are named __first_last_id: one left behind would rival that of the segment to come.
    vfs = tiledb().VFS(ctx=context(uri))
    for path in _list(vfs, join(uri, "__meta")):
        if int(basename(path).split("_")[2]) > timestamp:
            vfs.remove_file(path)
            late.append(basename(path))
    return late
