"""The TileDB schemas of a run's arrays, and the creation of an empty run."""

from __future__ import annotations

from typing import Any

import numpy as np

from nbdyn.schema import ARRAYS, SCHEMA_VERSION
from nbdyn.store.backend import join, tiledb
from nbdyn.store.metadata import write_metadata

MAX_STEP = 2**31
"""Steps are uint32 dimensions; the domain ends here so that tile extents fit."""
MAX_COLUMNS = 2**16
MAX_POSITIONS = 2**31
MAX_ROWS = 2**40
TILE_BYTES = 65_536
"""Size of a tile of weights (one weight's trajectory reads one per `row_extent` steps) and of factors.

Smaller tiles cost more in TileDB's bookkeeping than they save: with 32 KB writing and reading took 1.25 times as long.
"""


def create(uri: str, config: dict[str, Any], ctx: Any) -> None:
    """Create an empty run: its arrays first, the group's metadata last, so that a cut-short creation is no run.

    Args:
        uri: where; must not hold a TileDB object.
        config: the run's metadata, JSON-able; needs "parameters", "row_dtype" and "row_extent".
        ctx: the writer's TileDB context.
    """
    t = tiledb()
    extent, width = config["row_extent"], config["parameters"]
    schemas = {
        "weights": _weights(ctx, extent, width, config["row_dtype"], checked=config["weights"] == "snapshots"),
        "state": _state(ctx),
        "scalars": _scalars(ctx),
        "visits": _visits(ctx),
        "notes": _notes(ctx),
        "steps": _steps(ctx),
    }
    t.Group.create(uri, ctx=ctx)
    for name in ARRAYS:
        t.Array.create(join(uri, name), schemas[name], ctx=ctx)
    add_members(uri, ctx, list(ARRAYS))
    write_metadata(uri, ctx, config=config, status="recording", schema=SCHEMA_VERSION)


def row_extent(row_bytes: int, every_step: bool) -> int:
    """Steps per tile of `weights`: the padding of a partly filled tile stays small beside what a step writes.

    A dense fragment is padded to whole tiles, so snapshots have rows of their own; rows of every step share
    tiles (16 steps up to 1 MB a row, 4 up to 8 MB), for that makes one weight's trajectory fast to read.

    >>> row_extent(340_000, every_step=True), row_extent(340_000, every_step=False)
    (16, 1)
    """
    if not every_step:
        return 1
    return 16 if row_bytes <= 2**20 else 4 if row_bytes <= 2**23 else 1


def _dim(ctx: Any, name: str, size: int, tile: int, dtype: Any = np.uint32, filters: Any = None) -> Any:
    return tiledb().Dim(name, domain=(0, size - 1), tile=min(tile, size), dtype=dtype, filters=filters, ctx=ctx)


def _packed(ctx: Any) -> Any:
    """Byte shuffle, zstd and a checksum: for the small arrays, where it costs the writer nothing to speak of."""
    t = tiledb()
    return _filters(ctx, t.ByteShuffleFilter(ctx=ctx), t.ZstdFilter(1, ctx=ctx), t.ChecksumMD5Filter(ctx=ctx))


def _checksum(ctx: Any) -> Any:
    return _filters(ctx, tiledb().ChecksumMD5Filter(ctx=ctx))


def _filters(ctx: Any, *filters: Any) -> Any:
    """A list of filters. All in our context: TileDB's default one, made where none is given, takes Ctrl-C."""
    return tiledb().FilterList(list(filters), ctx=ctx)


def _schema(ctx: Any, dims: list[Any], attrs: list[Any], **options: Any) -> Any:
    t = tiledb()
    return t.ArraySchema(t.Domain(*dims, ctx=ctx), attrs=attrs, ctx=ctx, **options)


def _attr(ctx: Any, name: str, dtype: Any, **options: Any) -> Any:
    return tiledb().Attr(name, dtype=dtype, ctx=ctx, **options)


def _weights(ctx: Any, extent: int, width: int, dtype: str, checked: bool) -> Any:
    """Rows of weights as the bit patterns of `dtype`.

    Unsigned bits rather than floats: TileDB gathers minimum, maximum and sum of every float tile, which made
    writing cost three times the CPU (0.74 s against 0.20 s for 300 MB). Rows of every step are written raw, as
    compression and checksums would compete with training for the cores.
    """
    size = np.dtype(dtype).itemsize
    filters = _checksum(ctx) if checked else _filters(ctx)
    tile = max(1, TILE_BYTES // (size * extent))
    dims = [_dim(ctx, "step", MAX_STEP, extent), _dim(ctx, "parameter", width, tile)]
    return _schema(ctx, dims, [_attr(ctx, "bits", f"u{size}", filters=filters)])


def _state(ctx: Any) -> Any:
    dims = [
        _dim(ctx, "step", MAX_STEP, 2**20, filters=_packed(ctx)),
        _dim(ctx, "part", MAX_STEP, MAX_STEP, filters=_packed(ctx)),
    ]
    data = _attr(ctx, "data", np.uint8, var=True, filters=_checksum(ctx))
    return _schema(ctx, dims, [data], sparse=True)


def _scalars(ctx: Any) -> Any:
    dims = [_dim(ctx, "step", MAX_STEP, 256), _dim(ctx, "column", MAX_COLUMNS, 16)]
    return _schema(ctx, dims, [_attr(ctx, "value", np.float64, fill=np.nan, filters=_packed(ctx))])


VISIT_ATTRIBUTES: tuple[tuple[str, Any], ...] = (
    ("sample", np.int64),
    ("target", np.int32),
    ("loss", np.float32),
    ("correct", np.int8),
)
"""Attributes of `visits`. Runs of an older nbdyn have no `target`: they are read as if it were -1, and go on
without it."""


def _visits(ctx: Any) -> Any:
    # One position tile spans the whole domain: rows sorted by (step, position) are then in global order.
    dims = [
        _dim(ctx, "step", MAX_STEP, 2**20, filters=_packed(ctx)),
        _dim(ctx, "position", MAX_POSITIONS, MAX_POSITIONS, filters=_packed(ctx)),
    ]
    attrs = [_attr(ctx, name, dtype, filters=_packed(ctx)) for name, dtype in VISIT_ATTRIBUTES]
    return _schema(ctx, dims, attrs, sparse=True, capacity=16_384)


def _notes(ctx: Any) -> Any:
    dims = [
        _dim(ctx, "step", MAX_STEP, 2**20, filters=_packed(ctx)),
        _dim(ctx, "time", 2**62, 2**61, dtype=np.uint64, filters=_packed(ctx)),
    ]
    attrs = [_attr(ctx, name, np.uint8, var=True, filters=_packed(ctx)) for name in ("kind", "text")]
    return _schema(ctx, dims, attrs, sparse=True)


STEP_ATTRIBUTES: tuple[tuple[str, Any], ...] = (
    ("epoch", np.int32),
    ("source", np.int32),
    ("batch_size", np.int32),
    ("loss", np.float64),
    ("accuracy", np.float64),
    ("scale", np.float64),
    ("seconds", np.float64),
    ("batches", np.int32),
    ("skipped", np.uint8),
    ("segment", np.int32),
)


def _steps(ctx: Any) -> Any:
    attrs = [_attr(ctx, name, dtype, filters=_packed(ctx)) for name, dtype in STEP_ATTRIBUTES]
    return _schema(ctx, [_dim(ctx, "step", MAX_STEP, 1024)], attrs)


# Per-sample capture, compacted ------------------------------------------------------------------------------------

TILE_ROWS = {"units": 1024, "data": 128, "whole": 1}
"""Rows of a tile at least, by what is asked of an array of factors; the columns follow from TILE_BYTES.

"units", of Linear layers: one unit over many visits reads 16 columns of float32; a batch of 100 reads 10 times its
rows. "data", each distinct row of the data set once: batches pick rows at random, and one feature is read over all
of them; 128 columns, and 128 times the rows of a batch, but never more than all. "whole": rows are read whole.
"""


def add_members(uri: str, ctx: Any, names: list[str]) -> None:
    """Make arrays or groups in the folder of a group its members.

    Raises:
        TileDBError: if that cannot be written (a full disk); the group is then as before.
    """
    t = tiledb()
    vfs, folder = t.VFS(ctx=ctx), join(uri, "__group")
    before = set(vfs.ls(folder)) if vfs.is_dir(folder) else set()
    try:
        with t.Group(uri, "w", ctx=ctx) as group:
            for name in names:
                group.add(name, name=name, relative=True)
    except t.TileDBError:
        for path in set(vfs.ls(folder)) - before if vfs.is_dir(folder) else ():  # a torn one would hide the others
            vfs.remove_file(path)
        raise


def bits_schema(ctx: Any, columns: int, itemsize: int, use: str) -> Any:
    """Rows of bit patterns, appended: factors, rows of data. Bits for the reason that `_weights` gives.

    Byte shuffle and zstd level 1: 0.46 of the raw bytes on the factors of an MLP, at 3 ms a MB; level 3 gave 0.48,
    lz4 0.65.

    Args:
        ctx: TileDB's context.
        columns: cells of a row.
        itemsize: bytes of a cell: 1, 2, 4 or 8.
        use: key of TILE_ROWS.
    """
    wide = min(columns, max(1, TILE_BYTES // (TILE_ROWS[use] * itemsize)))
    rows = max(TILE_ROWS[use], TILE_BYTES // (wide * itemsize))
    dims = [
        _dim(ctx, "row", MAX_ROWS, rows, dtype=np.uint64),
        _dim(ctx, "column", columns, wide, dtype=np.uint64),
    ]
    return _schema(ctx, dims, [_attr(ctx, "bits", f"u{itemsize}", filters=_packed(ctx))])


def calls_schema(ctx: Any, fields: int) -> Any:
    """The table of calls: each field is compressed by itself."""
    dims = [
        _dim(ctx, "entry", MAX_ROWS, 8192, dtype=np.uint64),
        _dim(ctx, "field", fields, 1, dtype=np.uint64),
    ]
    return _schema(ctx, dims, [_attr(ctx, "value", np.int64, filters=_packed(ctx))])


def parameter_dtype(parameters: int) -> Any:
    """The type of the dimension `parameter` of `gradients`."""
    return np.uint32 if parameters < 2**31 else np.uint64


def gradients_schema(ctx: Any, parameters: int) -> Any:
    """Written-out cells c of (step, parameter, sample).

    A tile is one step: cells sorted by (step, parameter, sample) are then in global order, which is 20 times cheaper
    to write than unordered ones. Duplicates: a sample may be visited twice in a step.
    """
    t = tiledb()
    packers = t.ByteShuffleFilter(ctx=ctx), t.ZstdFilter(1, ctx=ctx), t.ChecksumMD5Filter(ctx=ctx)
    deltas = _filters(ctx, t.DeltaFilter(ctx=ctx), *packers)
    samples = 2**62
    dims = [
        _dim(ctx, "step", MAX_STEP, 1, filters=_packed(ctx)),
        _dim(ctx, "parameter", parameters, parameters, parameter_dtype(parameters), deltas),
        t.Dim("sample", domain=(-1, samples), tile=samples, dtype=np.int64, filters=_packed(ctx), ctx=ctx),
    ]
    value = _attr(ctx, "value", np.float32, filters=_packed(ctx))
    return _schema(ctx, dims, [value], sparse=True, capacity=65_536, allows_duplicates=True)


# Indexes -----------------------------------------------------------------------------------------------------------

INDEX_CLASSES = 100
"""Classes that an index tells apart, at most."""
INDEX_LEVELS = 8


def index_schemas(ctx: Any, parameters: int, tensors: int, zone_parameters: int) -> dict[str, Any]:
    """The arrays of the indexes, name -> schema; see `nbdyn.store.index.entry` for what they hold.

    Args:
        ctx: TileDB's context.
        parameters: of the model.
        tensors: of the model.
        zone_parameters: parameters of a zone.
    """

    def sums(*names: str) -> list[Any]:
        return [_attr(ctx, name, np.float32, fill=np.nan, filters=_packed(ctx)) for name in names]

    span, parameter = _dim(ctx, "span", MAX_STEP, 1), _dim(ctx, "parameter", parameters, TILE_BYTES // 4)
    zone = _dim(ctx, "zone", -(-parameters // zone_parameters), 256)
    counts = _attr(ctx, "count", np.int32, fill=-1, filters=_packed(ctx))
    steps = [_dim(ctx, "step", MAX_STEP, 256), _dim(ctx, "tensor", tensors, 1), _dim(ctx, "bin", 64, 64)]
    rows = [_dim(ctx, "level", INDEX_LEVELS, 1), _dim(ctx, "block", MAX_STEP, 64), zone]
    crossings = _attr(ctx, "crossings", np.int32, fill=-1, filters=_packed(ctx))
    where = [
        _dim(ctx, name, size, size, np.uint64, _packed(ctx))
        for name, size in (("parameter", parameters), ("step", MAX_STEP))
    ]
    kind = _attr(ctx, "kind", np.uint8, filters=_packed(ctx))
    of_epoch = ("sum_grad", "sum_abs_grad", "norm_grad", "sum_g", "sum_abs_g", "norm_g")
    return {
        "epochs": _schema(ctx, [span, parameter], sums(*of_epoch)),
        "classes": _schema(ctx, [span, _dim(ctx, "class", INDEX_CLASSES, 1), parameter], sums("sum_g", "sum_abs_g")),
        "exponents": _schema(ctx, steps, [counts]),
        "zones": _schema(ctx, rows, [*sums("low", "high", "nearest"), crossings]),
        "events": _schema(ctx, where, [kind], sparse=True, capacity=65_536, allows_duplicates=True),
    }


# Loss change allocation ---------------------------------------------------------------------------------------------


def allocation_schemas(ctx: Any, shapes: dict[str, tuple[int, ...]], attributes: dict[str, dict[str, Any]]) -> Any:
    """The arrays of an allocation, name -> schema: dense, rows of steps, or sums over all of them.

    Args:
        ctx: TileDB's context.
        shapes: name -> extent of each dimension after the step.
        attributes: name -> attribute -> type.
    """

    def schema(name: str) -> Any:
        names = _AXES[name][-len(shapes[name]) :] if shapes[name] else ()
        size = max(np.dtype(kind).itemsize for kind in attributes[name].values())
        last = max(1, TILE_BYTES // (size * LCA_ROWS))
        tiles = [1] * (len(names) - 1) + [last]
        dims = [_dim(ctx, axis, n, tile) for axis, n, tile in zip(names, shapes[name], tiles, strict=False)]
        rows = [] if name in ("parameters", "unit_groups") else [_dim(ctx, "step", MAX_STEP, LCA_ROWS)]
        attrs = [_attr(ctx, attr, kind, filters=_packed(ctx)) for attr, kind in attributes[name].items()]
        return _schema(ctx, rows + dims, attrs)

    return {name: schema(name) for name in shapes}


LCA_ROWS = 64
"""Steps of a tile."""
_AXES = {
    "steps": (),
    "tensors": ("tensor",),
    "units": ("unit",),
    "groups": ("group", "tensor"),
    "parts": ("part", "tensor"),
    "cells": ("group", "parameter"),
    "parameters": ("parameter",),
    "unit_groups": ("group", "unit"),
}
