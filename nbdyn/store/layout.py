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
TILE_BYTES = 65_536
"""Size of a weights tile: one weight's trajectory reads one tile per `row_extent` steps."""


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
    with t.Group(uri, "w", ctx=ctx) as group:
        for name in ARRAYS:
            group.add(name, name=name, relative=True)
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


def _packed() -> Any:
    """Byte shuffle, zstd and a checksum: for the small arrays, where it costs the writer nothing to speak of."""
    t = tiledb()
    return t.FilterList([t.ByteShuffleFilter(), t.ZstdFilter(1), t.ChecksumMD5Filter()])


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
    t = tiledb()
    size = np.dtype(dtype).itemsize
    filters = t.FilterList([t.ChecksumMD5Filter()]) if checked else t.FilterList([])
    tile = max(1, TILE_BYTES // (size * extent))
    dims = [_dim(ctx, "step", MAX_STEP, extent), _dim(ctx, "parameter", width, tile)]
    return _schema(ctx, dims, [_attr(ctx, "bits", f"u{size}", filters=filters)])


def _state(ctx: Any) -> Any:
    t = tiledb()
    dims = [
        _dim(ctx, "step", MAX_STEP, 2**20, filters=_packed()),
        _dim(ctx, "part", MAX_STEP, MAX_STEP, filters=_packed()),
    ]
    data = _attr(ctx, "data", np.uint8, var=True, filters=t.FilterList([t.ChecksumMD5Filter()]))
    return _schema(ctx, dims, [data], sparse=True)


def _scalars(ctx: Any) -> Any:
    dims = [_dim(ctx, "step", MAX_STEP, 256), _dim(ctx, "column", MAX_COLUMNS, 16)]
    return _schema(ctx, dims, [_attr(ctx, "value", np.float64, fill=np.nan, filters=_packed())])


def _visits(ctx: Any) -> Any:
    # One position tile spans the whole domain: rows sorted by (step, position) are then in global order.
    dims = [
        _dim(ctx, "step", MAX_STEP, 2**20, filters=_packed()),
        _dim(ctx, "position", MAX_POSITIONS, MAX_POSITIONS, filters=_packed()),
    ]
    kinds = (("sample", np.int64), ("loss", np.float32), ("correct", np.int8))
    attrs = [_attr(ctx, name, dtype, filters=_packed()) for name, dtype in kinds]
    return _schema(ctx, dims, attrs, sparse=True, capacity=16_384)


def _notes(ctx: Any) -> Any:
    dims = [
        _dim(ctx, "step", MAX_STEP, 2**20, filters=_packed()),
        _dim(ctx, "time", 2**62, 2**61, dtype=np.uint64, filters=_packed()),
    ]
    attrs = [_attr(ctx, name, np.uint8, var=True, filters=_packed()) for name in ("kind", "text")]
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
    attrs = [_attr(ctx, name, dtype, filters=_packed()) for name, dtype in STEP_ATTRIBUTES]
    return _schema(ctx, [_dim(ctx, "step", MAX_STEP, 1024)], attrs)
