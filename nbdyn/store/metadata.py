"""The metadata of a run's group: read past a torn entry, written whole or not at all, checked before it is believed."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import numpy as np

from nbdyn.errors import CorruptRun
from nbdyn.store.backend import basename, context, join, reading, tiledb

_FIELDS: dict[str, type] = {
    "model": str, "created": str, "row_dtype": str, "weights": str, "every": int, "row_extent": int,
    "parameters": int, "optimizer": dict, "tensors": list, "layers": list, "buffers": list, "sources": list,
    "seams": list,
}  # fmt: skip
_TENSOR_FIELDS: dict[str, type] = {
    "name": str, "layer": str, "dtype": str, "shape": list, "first": int, "size": int, "trainable": bool, "group": int,
}  # fmt: skip


def read_group(uri: str) -> tuple[dict[str, Any], set[str]]:
    """The metadata entries of a group and the names of its members.

    A writer that was killed, or met a full disk, while it wrote an entry leaves a torn file; the group is then read
    as it was before.

    Raises:
        CorruptRun: if the group cannot be read even so.
    """
    t = tiledb()
    with reading(uri):
        try:
            return _read(uri, t.Config())
        except t.TileDBError:
            files = _files(uri) + _member_files(uri)
            if not files:
                raise
            return _read(uri, t.Config({"sm.group.timestamp_end": str(max(map(_time, files)) - 1)}))


def _read(uri: str, config: Any) -> tuple[dict[str, Any], set[str]]:
    with tiledb().Group(uri, "r", ctx=context(uri), config=config) as group:
        return {key: group.meta[key] for key in group.meta}, {member.name for member in group}


def _files(uri: str) -> list[str]:
    """The files of a group's metadata, oldest first; they are named __first_last_id, in ms since 1970."""
    vfs, folder = tiledb().VFS(ctx=context(uri)), join(uri, "__meta")
    return sorted(vfs.ls(folder), key=_time) if vfs.is_dir(folder) else []


def _member_files(uri: str) -> list[str]:
    """The files that list the members of a group; they are named likewise."""
    vfs, folder = tiledb().VFS(ctx=context(uri)), join(uri, "__group")
    return list(vfs.ls(folder)) if vfs.is_dir(folder) else []


def _time(path: str) -> int:
    return int(basename(path).split("_")[2])


def write_metadata(uri: str, ctx: Any, **entries: Any) -> None:
    """Write entries of the group's metadata; anything but text and numbers is stored as JSON.

    Raises:
        TileDBError: if they cannot be written (a full disk); the metadata is then as before.
    """
    before = _files(uri)
    _outwait(before)
    try:
        with tiledb().Group(uri, "w", ctx=ctx) as group:
            for key, value in entries.items():
                group.meta[key] = value if isinstance(value, (str, int)) else json.dumps(value)
    except tiledb().TileDBError:
        for path in set(_files(uri)) - set(before):
            tiledb().VFS(ctx=ctx).remove_file(path)
        raise


def _outwait(files: list[str]) -> None:
    """Let the millisecond of the newest file pass: of two files of one millisecond, which counts is left to chance."""
    newest = _time(files[-1]) if files else 0
    while newest - 1000 < time.time_ns() // 10**6 <= newest:  # a clock that was set back is not waited for
        time.sleep(0.0005)


def compacted(uri: str, entries: dict[str, Any]) -> int:
    """The last segment whose journal was compacted, 0 for none: what the compacted arrays hold up to it counts.

    Raises:
        CorruptRun: if the entry is no such number.
    """
    value = entries.get("compacted", 0)
    if not isinstance(value, (int, np.integer)) or not 0 <= value < 2**63 - 1:
        raise CorruptRun(f"the metadata of {uri} is damaged (compacted {value!r}); restore it from a copy.")
    return int(value)


def remove_torn(uri: str) -> list[str]:
    """Remove the newest file of the group, metadata or members, if it can be read only without; its name, if so."""
    t = tiledb()
    try:
        _read(uri, t.Config())
    except t.TileDBError:
        torn = max(_files(uri) + _member_files(uri), key=_time)
        t.VFS(ctx=context(uri)).remove_file(torn)
        return [basename(torn)]
    return []


def check_config(uri: str, text: Any) -> dict[str, Any]:
    """The configuration of a run, checked before anything is allocated by its numbers.

    Raises:
        CorruptRun: if it is not what a recorder writes.
    """
    try:
        config = json.loads(text)
        _check_fields(config, _FIELDS, "configuration")
        _check_tensors(config)
        _check_rest(config)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptRun(f"the metadata of {uri} is damaged ({error}); restore it from a copy.") from error
    return config


def _check_fields(entry: Any, fields: dict[str, type], what: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"a {what} is no table")
    for key, kind in fields.items():
        value = entry.get(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{key} of the {what} is {str(value)[:40]!r}")


def _check_tensors(config: dict[str, Any]) -> None:
    end = 0
    for tensor in config["tensors"]:
        _check_fields(tensor, _TENSOR_FIELDS, "tensor")
        shape = tensor["shape"]
        if not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"shape of tensor {tensor['name']!r}")
        if tensor["first"] != end or tensor["size"] != math.prod(shape):
            raise ValueError(f"size of tensor {tensor['name']!r}")
        end += tensor["size"]
    if config["parameters"] != end or len({t["name"] for t in config["tensors"]}) != len(config["tensors"]):
        raise ValueError("the table of tensors")


def _check_rest(config: dict[str, Any]) -> None:
    if config["weights"] not in ("snapshots", "every") or config["row_dtype"] not in ("f4", "f8"):
        raise ValueError("how weights are stored")
    if config["every"] < 1 or config["row_extent"] < 1 or not all(isinstance(s, int) for s in config["seams"]):
        raise ValueError("which steps hold weights")
    for layer in config["layers"]:
        _check_fields(layer, {"name": str, "type": str}, "layer")
    _check_fields(config["optimizer"], {"name": str, "groups": list, "order": list}, "optimizer")
