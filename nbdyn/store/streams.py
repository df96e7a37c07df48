"""Streams: compressed arrays of rows that grow at their end, one for each slot of each call of a site."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nbdyn.errors import CorruptRun
from nbdyn.store import layout
from nbdyn.store.backend import basename, context, join, object_type, reading, tiledb
from nbdyn.store.journal import DTYPES

FACTORS, ROWS = "factors", "rows"
"""Groups of the run: streams, and the distinct rows of those that hold rows of the data set."""
SLOTS: dict[str, tuple[str, ...]] = {
    "linear": ("a", "d"), "conv": ("a", "d"), "embedding": ("ids", "d"), "dense": ("g",),
}  # fmt: skip
"""The tensors of a call by the form of its site; "p", the places of the visits, may come with any."""
SEQUENCES = (("linear", "a"), ("linear", "d"), ("embedding", "ids"), ("embedding", "d"))
"""Slots whose visits are sequences: a visit is as many rows as it has positions, which may vary."""
REFERENCE = np.dtype(np.uint64)
"""A stream of rows of the data set holds numbers of rows of this type, one a visit."""

MAX_ROW_BYTES = 2**31
"""A visit's part of one slot has at most so many bytes: more is no recorder's, but a damaged or hostile number."""
PIECE_BYTES = 32_000_000
"""Rows among which some are picked are read in pieces of about this size."""
GAP_BYTES = 8192
"""Selected rows nearer than this are read as one range: a range of its own costs as much as copying so many bytes."""
GAP_COLUMNS = 16


@dataclass(frozen=True)
class Stream:
    """What one array of factors holds.

    Attributes:
        number: its name in the group FACTORS.
        site, call, slot: whose it is. (An input that several sites share is stored once, as that of the first.)
        form: of the site.
        dtype: key of journal.DTYPES.
        shape: of a row before it was flattened: of a visit, or of one position of a visit that is a sequence.
        data: whether its rows lie in ROWS, each distinct one once, and the stream holds their numbers.
    """

    number: int
    site: int
    call: int
    slot: str
    form: str
    dtype: str
    shape: tuple[int, ...]
    data: bool

    @property
    def columns(self) -> int:
        """Cells of a row."""
        return math.prod(self.shape)

    @property
    def is_sequence(self) -> bool:
        """Whether a visit has several rows."""
        return (self.form, self.slot) in SEQUENCES

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of content."""
        return self.columns * self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of a cell of content."""
        return DTYPES[self.dtype].itemsize

    @property
    def uri(self) -> str:
        """The array, within the run."""
        return f"{FACTORS}/{self.number}"

    @property
    def rows_uri(self) -> str:
        """The array of its distinct rows, within the run."""
        return f"{ROWS}/{self.number}"

    @property
    def keys_uri(self) -> str:
        """The array of what tells these rows apart, within the run; see `nbdyn.store.distinct`."""
        return f"{ROWS}/{self.number}-keys"

    @staticmethod
    def from_json(number: int, entry: Any) -> Stream:
        """What `create` wrote, checked.

        Raises:
            ValueError: if it is something else.
        """
        shape = tuple(entry["shape"])
        stream = Stream(
            number, entry["site"], entry["call"], entry["slot"], entry["form"], entry["dtype"], shape, entry["data"]
        )
        numbers = (stream.site, stream.call, *stream.shape)
        if not all(isinstance(n, int) and 0 <= n < 2**40 for n in numbers) or min(stream.shape, default=1) < 1:
            raise ValueError(f"numbers {numbers}")
        if stream.slot not in (*SLOTS.get(stream.form, ()), "p") or stream.dtype not in DTYPES:
            raise ValueError(f"slot {stream.slot!r} of form {stream.form!r} as {stream.dtype!r}")
        if not isinstance(stream.data, bool) or stream.row_bytes > MAX_ROW_BYTES:
            raise ValueError(f"rows of {stream.row_bytes:,} bytes")
        return stream


def create(uri: str, ctx: Any, stream: Stream, timestamp: int) -> None:
    """Create the arrays of a new stream. They count once `timestamp` is committed."""
    use = "units" if stream.form == "linear" and stream.slot != "p" else "whole"
    itemsize = stream.itemsize
    if stream.data:
        _create(uri, ctx, stream.keys_uri, layout.bits_schema(ctx, 3, 8, "whole"))
        use_of_rows = "data" if use == "units" else use
        _create(uri, ctx, stream.rows_uri, layout.bits_schema(ctx, stream.columns, itemsize, use_of_rows))
        schema = layout.bits_schema(ctx, 1, REFERENCE.itemsize, "whole")
    else:
        schema = layout.bits_schema(ctx, stream.columns, itemsize, use)
    _create(uri, ctx, stream.uri, schema)
    entry = {name: value for name, value in asdict(stream).items() if name != "number"}
    with tiledb().open(join(uri, stream.uri), "w", ctx=ctx, timestamp=timestamp) as array:
        array.meta["stream"] = json.dumps(entry)


def _create(uri: str, ctx: Any, name: str, schema: Any) -> None:
    group = join(uri, name.split("/")[0])
    if object_type(group) is None:
        tiledb().Group.create(group, ctx=ctx)
    tiledb().Array.create(join(uri, name), schema, ctx=ctx)
    layout.add_members(group, ctx, [basename(name)])


def arrays(uri: str, count: int) -> list[str]:
    """The arrays of the first `count` streams, within the run, whether or not they are there."""
    vfs, found = tiledb().VFS(ctx=context(uri)), []
    for number in range(count):
        found.append(f"{FACTORS}/{number}")
        found += [name for name in (f"{ROWS}/{number}", f"{ROWS}/{number}-keys") if vfs.is_dir(join(uri, name))]
    return found


def load(uri: str, number: int, timestamp: int) -> Stream | None:
    """A stream's description as of a timestamp; None if it was created later.

    Raises:
        CorruptRun: if it is missing or no stream.
    """
    path = join(uri, FACTORS, str(number))
    with reading(path), tiledb().open(path, ctx=context(uri), timestamp=(0, timestamp)) as array:
        text, schema = array.meta.get("stream"), array.schema
    if text is None:
        return None
    try:
        stream = Stream.from_json(number, json.loads(text))
        size = REFERENCE.itemsize if stream.data else stream.itemsize
        check_schema(schema, 1 if stream.data else stream.columns, size)
        if stream.data:
            rows = join(uri, stream.rows_uri)
            with reading(rows):
                check_schema(tiledb().ArraySchema.load(rows, ctx=context(uri)), stream.columns, stream.itemsize)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptRun(f"the metadata of {path} is damaged ({error}); restore the run from a copy.") from error
    return stream


def check_schema(schema: Any, columns: int, itemsize: int) -> None:
    """Raise ValueError unless an array has so many columns of unsigned bits: buffers are allocated by these numbers."""
    fits = not schema.sparse and schema.nattr == 1 and schema.attr(0).name == "bits" and schema.domain.ndim == 2
    if not fits or schema.attr(0).dtype != np.dtype(f"u{itemsize}") or schema.domain.dim(1).size != columns:
        raise ValueError(f"not an array of {columns} columns of {itemsize} bytes")


def length(array: Any) -> int:
    """How many rows an open array has."""
    extent = array.nonempty_domain()
    return 0 if extent is None else int(extent[0][1]) + 1


def read_rows(array: Any, firsts: np.ndarray, counts: np.ndarray, columns: np.ndarray | None = None) -> np.ndarray:
    """Ranges of rows of an open array, one after the other.

    Memory: twice the result and a few PIECE_BYTES; rows between ranges are not read where the gap is large.

    Args:
        array: an array of `bits_schema`.
        firsts: (n,) first row of each range, ascending.
        counts: (n,) rows of each; they must not overlap.
        columns: column numbers, at least one, in any order; None for all.

    Returns:
        (sum of counts, columns), unsigned bits.

    Raises:
        CorruptRun: if the ranges do not ascend or lie outside: a table of calls that no recorder wrote.
        TileDBError: if the files cannot be read.
    """
    width = int(array.schema.domain.dim(1).size)
    ends = firsts + counts
    if len(firsts) and (firsts[0] < 0 or (firsts[1:] < ends[:-1]).any() or ends[-1] > length(array)):
        raise CorruptRun(f"the calls of {array.uri} lie outside it or out of order; restore the run from a copy.")
    wanted, pick = _column_ranges(columns, width)
    cells = sum(stop - start + 1 for start, stop in wanted)
    blocks = []
    for starts, stops, inside in _pieces(firsts, ends, cells * array.schema.attr(0).dtype.itemsize):
        block = _read(array, starts, stops, wanted).reshape(-1, cells)
        block = block if inside is None else block[inside]
        blocks.append(block if pick is None else np.take(block, pick, axis=1))
    if not blocks:
        return np.empty((0, cells if pick is None else len(pick)), array.schema.attr(0).dtype)
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)


def read_visits(array: Any, firsts: np.ndarray, height: int, columns: np.ndarray | None = None) -> np.ndarray:
    """The `height` rows of each visit by the first of them, in any order, (V * height, columns); see `read_rows`."""
    if (firsts[1:] > firsts[:-1]).all():
        return read_rows(array, firsts, np.full(len(firsts), height), columns)
    unique, back = np.unique(firsts, return_inverse=True)
    bits = read_rows(array, unique, np.full(len(unique), height), columns)
    return bits[expand(back.reshape(-1) * height, np.full(len(back), height))]


def _read(array: Any, starts: np.ndarray, stops: np.ndarray, columns: list[tuple[int, int]]) -> np.ndarray:
    t = tiledb()
    if len(starts) == 1 and len(columns) == 1:
        return array[int(starts[0]) : int(stops[0]), columns[0][0] : columns[0][1] + 1]["bits"]
    subarray = t.Subarray(array, array.ctx)
    subarray.add_ranges([list(zip(starts.tolist(), (stops - 1).tolist(), strict=True)), columns])
    return np.asarray(array.read_subarray(subarray)["bits"])


def _column_ranges(columns: np.ndarray | None, width: int) -> tuple[list[tuple[int, int]], np.ndarray | None]:
    """Inclusive ranges that hold the columns, and where each lies in them; None where it is as asked for."""
    if columns is None:
        return [(0, width - 1)], None
    unique = np.unique(columns)
    cuts = np.nonzero(np.diff(unique) > GAP_COLUMNS)[0]
    starts, stops = unique[np.r_[0, cuts + 1]], unique[np.r_[cuts, len(unique) - 1]]
    offsets = np.cumsum(stops - starts + 1) - (stops - starts + 1)
    owner = np.searchsorted(starts, columns, side="right") - 1
    pick = offsets[owner] + columns - starts[owner]
    ranges = list(zip(starts.tolist(), stops.tolist(), strict=True))
    return ranges, None if np.array_equal(pick, np.arange(int((stops - starts + 1).sum()))) else pick


def _pieces(
    firsts: np.ndarray, ends: np.ndarray, row_bytes: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """What to read at a time: starts and stops of ranges, near ones merged, and the wanted rows among them or None."""
    if not len(firsts):
        return
    most = max(1, PIECE_BYTES // row_bytes)
    apart = firsts[1:] - ends[:-1] > GAP_BYTES // row_bytes
    cuts = np.nonzero(apart | (firsts[1:] // most != firsts[:-1] // most))[0]
    begin, finish = np.r_[0, cuts + 1], np.r_[cuts, len(firsts) - 1]  # first and last range of each merged one
    starts, stops = firsts[begin], ends[finish]
    piece = (np.cumsum(stops - starts) - 1) // most
    bounds = np.r_[0, np.nonzero(np.diff(piece))[0] + 1, len(piece)]
    for a, b in itertools.pairwise(bounds):
        some = slice(begin[a], finish[b - 1] + 1)
        read, wanted = stops[a:b] - starts[a:b], ends[some] - firsts[some]
        if wanted.sum() == read.sum():
            yield starts[a:b], stops[a:b], None
            continue
        owner = np.searchsorted(starts[a:b], firsts[some], side="right") - 1
        before = np.cumsum(read) - read
        yield starts[a:b], stops[a:b], expand(before[owner] + firsts[some] - starts[a:b][owner], wanted)


def expand(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers of all ranges, one after the other.

    >>> expand(np.array([10, 0]), np.array([2, 3]))
    array([10, 11,  0,  1,  2])
    """
    return np.repeat(firsts - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))


def values_of(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Bits as the numbers that readers get: float16 and bfloat16 widened exactly to float32, int32 to int64."""
    if dtype == "bf2":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    values = bits.view(DTYPES[dtype])
    return values.astype({"f2": np.float32, "i4": np.int64}.get(dtype, values.dtype), copy=False)


def value_dtype(dtype: str) -> np.dtype:
    """The type of what `values_of` gives."""
    return values_of(np.empty(0, f"u{DTYPES[dtype].itemsize}"), dtype).dtype
