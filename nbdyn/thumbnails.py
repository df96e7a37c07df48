"""Thumbnails: the samples of a result as small pictures, or as rows of tokens."""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from nbdyn.errors import NbdynError

MOST = 200
"""Samples in one result, at most."""
_SIDE = 64
"""Points at which the longer side of a picture is shown, at least."""
_TOKENS = 32
"""Tokens of a sample that are shown."""


@dataclass(frozen=True)
class Thumbnails:
    """Samples as pictures; a notebook shows them.

    Attributes:
        html: the pictures with their captions; one PNG inside, nothing is fetched.
        png: the same pictures, without captions, as the bytes of a PNG file; None for tokens.
        captions: one for each sample.
        note: what was left out; "" if nothing.
    """

    html: str
    png: bytes | None
    captions: tuple[str, ...]
    note: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"<thumbnails of {len(self.captions)} samples>"


def thumbnails(frame: pd.DataFrame, data: Any, columns: int = 10) -> Thumbnails:
    """The samples of a frame as small pictures with rank, class, loss or value below them.

    Images are arrays (H, W), (1, H, W), (3, H, W), (H, W, 1), (H, W, 3), or (n,) with n a square of at least 16 (8 x 8
    digits as 64 numbers). Bytes (uint8) are shown as they are, other numbers from the least to the greatest of all
    pictures shown. Whole numbers of shape (n,), other than bytes, are tokens and give a row of text, as strings do.

    Args:
        frame: any frame with a column "sample". Where it has more than 200 rows and samples come back (a list for each
            weight), each sample is shown once, those of the most rows first.
        data: the data set that was recorded: of (image, target) pairs, a pair of arrays (images, targets), an array
            of images (N, ...), or a function of ids that gives one of the two.
        columns: pictures in a row.

    Raises:
        NbdynError: if there is no column "sample", a sample is not in `data`, or samples are no pictures.
    """
    if "sample" not in frame.columns:
        told = ", ".join(map(str, frame.columns[:12])) or "none"
        raise NbdynError(f"Thumbnails need a column 'sample'; the columns are {told}.")
    if columns < 1 or columns != int(columns):
        raise NbdynError(f"columns is a number of pictures in a row, at least 1, not {columns}.")
    known: Any = frame[frame["sample"] >= 0]
    if known.empty:
        raise NbdynError("There are no samples to show: the frame has no rows with a known sample.")
    shown, captions, note = _chosen(known)
    items = _items(data, shown["sample"].to_numpy(np.int64))
    texts = _texts(items)
    if texts is not None:
        return Thumbnails(_rows_html(texts, captions, note), None, tuple(captions), note)
    pixels = _pixels([_image(item) for item in items])
    sprite, wide = _sprite(pixels, columns), min(columns, len(pixels))
    return Thumbnails(_sprite_html(sprite, pixels.shape[1:3], wide, captions, note), sprite, tuple(captions), note)


def _chosen(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str], str]:
    """The rows that are shown, their captions, and what was left out."""
    if len(frame) > MOST and frame["sample"].duplicated().any():
        counts = frame["sample"].value_counts()
        rows = pd.DataFrame({"sample": counts.index[:MOST]})
        captions = [f"sample {s}\nin {c:,} rows" for s, c in counts.head(MOST).items()]
        left = f"{MOST} of {len(counts):,} samples: those of the most rows" if len(counts) > MOST else ""
        return rows, captions, left
    rows = frame.head(MOST)
    left = f"the first {MOST} of {len(frame):,} rows" if len(frame) > MOST else ""
    return rows, _captions(rows), left


def _captions(rows: Any) -> list[str]:
    parts: list[Any] = []
    head = "sample " + rows["sample"].astype(str)
    if "rank" in rows:
        head = "#" + rows["rank"].astype(str) + " " + head
    elif "before" in rows:
        head = rows["before"].astype(str) + " before, " + head
    parts.append(head)
    for name in ("layer", "unit", "weight", "class"):
        if name in rows:
            parts.append(rows[name].astype(str) if name in ("layer", "weight") else f"{name} " + rows[name].astype(str))
    last = "loss" if "loss" in rows else str(rows.columns[-1])
    if last not in _PLACES and pd.api.types.is_numeric_dtype(rows[last]):
        parts.append(last + " " + rows[last].map("{:.3g}".format))
    return ["\n".join(row) for row in zip(*parts, strict=True)]


_PLACES = ("sample", "rank", "class", "position", "step", "epoch", "unit", "parameter", "token")
"""Columns that are no value to write under a picture."""


# The samples of what the user gave -------------------------------------------------------------------------------


def _items(data: Any, ids: np.ndarray) -> list[Any]:
    """The inputs of some samples."""
    found: Any
    if not hasattr(data, "__getitem__") and callable(data):
        found = data(ids)
        return list(found[0] if isinstance(found, tuple) else found)
    pair = isinstance(data, (tuple, list)) and len(data) == 2 and not np.isscalar(data[0])
    if pair and hasattr(data[0], "shape") and len(data[0]) == len(data[1]):
        data = data[0]
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise NbdynError(
            f"data is a {type(data).__name__}; give a data set of (image, target) pairs, a pair (images, targets), "
            "an array of images, or a function of ids."
        )
    if ids.max() >= len(data):
        raise NbdynError(
            f"data has {len(data):,} samples, and the frame names sample {ids.max():,}: is it another set?"
        )
    found = [data[int(i)] for i in ids]
    return [item[0] if isinstance(item, (tuple, list)) and len(item) else item for item in found]


def _texts(items: Sequence[Any]) -> list[str] | None:
    """Samples as text, if they are tokens or strings."""
    if all(isinstance(item, str) for item in items):
        return [item[:400] for item in items]
    arrays = [np.asarray(item) for item in items]
    if not all(a.ndim == 1 and np.issubdtype(a.dtype, np.integer) and a.dtype != np.uint8 for a in arrays):
        return None
    return [" ".join(map(str, a[:_TOKENS])) + (" ..." if a.size > _TOKENS else "") for a in arrays]


def _side_of(size: int) -> int:
    """The side of a square picture of so many pixels; 0 if it is none."""
    side = math.isqrt(size)
    return side if side * side == size and side >= 4 else 0


def _image(item: Any) -> np.ndarray:
    """A sample as (H, W, 1 or 3)."""
    image: Any = np.asarray(item)
    side = _side_of(image.size) if image.ndim == 1 else 0
    if side:
        image = image.reshape(side, side)
    if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[2] not in (1, 3):
        image = image.transpose(1, 2, 0)
    if image.ndim == 3 and image.shape[2] == 4:
        image = image[:, :, :3]  # without transparency
    image = image[:, :, None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[2] not in (1, 3) or not image.size or image.dtype.kind not in "buif":
        raise NbdynError(
            f"A sample is {image.dtype} of shape {np.asarray(item).shape}, which is no picture; shown are (H, W), "
            "(1, H, W), (3, H, W), (H, W, 1), (H, W, 3), a square as one row such as 64 = 8 x 8, and rows of token ids."
        )
    return image


def _pixels(images: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures as bytes on one scale, (n, H, W, 1 or 3); smaller ones are padded at the right and below."""
    high, wide, channels = (max(image.shape[i] for image in images) for i in range(3))
    raw = all(image.dtype == np.uint8 for image in images)
    finite = [image[np.isfinite(image)] for image in images]
    low = 0.0 if raw else min((float(some.min()) for some in finite if some.size), default=0.0)
    top = 255.0 if raw else max((float(some.max()) for some in finite if some.size), default=1.0)
    result = np.zeros((len(images), high, wide, channels), np.uint8)
    for place, image in zip(result, images, strict=True):
        scaled = (np.nan_to_num(image.astype(np.float64), nan=low, posinf=top, neginf=low) - low) / ((top - low) or 1)
        place[: image.shape[0], : image.shape[1]] = np.round(255 * scaled)
    return result


# The page --------------------------------------------------------------------------------------------------------


def _sprite(pixels: np.ndarray, columns: int) -> bytes:
    """All pictures in rows of `columns`, one PNG."""
    n, high, wide, channels = pixels.shape
    across = min(columns, n)
    down = -(-n // across)
    sheet = np.zeros((down * across, high, wide, channels), np.uint8)
    sheet[:n] = pixels
    return _png(sheet.reshape(down, across, high, wide, channels).swapaxes(1, 2).reshape(down * high, -1, channels))


def _png(pixels: np.ndarray) -> bytes:
    """Bytes (H, W, 1 or 3) as a PNG file (PNG specification, sections 5 and 11: IHDR, IDAT, IEND; filter 0)."""
    high, wide, channels = pixels.shape
    rows = np.zeros((high, wide * channels + 1), np.uint8)  # each row begins with its filter, 0: none
    rows[:, 1:] = pixels.reshape(high, -1)
    head = struct.pack(">IIBBBBB", wide, high, 8, 0 if channels == 1 else 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _sprite_html(sprite: bytes, size: tuple[int, int], columns: int, captions: Sequence[str], note: str) -> str:
    """A grid of pieces of one picture; every page-wide name hangs on its contents, so that two do not meet."""
    zoom = max(1, _SIDE // max(size))
    high, wide = size[0] * zoom, size[1] * zoom
    name = f"nbdyn-{zlib.crc32(sprite + repr(captions).encode()):08x}"
    rows = -(-len(captions) // columns)
    uri = f"data:image/png;base64,{base64.b64encode(sprite).decode()}"
    style = (
        f".{name}{{display:grid;grid-template-columns:repeat({columns},{max(wide, 72)}px);gap:8px;font-size:10px;"
        f"line-height:1.25}}.{name} i{{display:block;width:{wide}px;height:{high}px;background-image:url({uri});"
        f"background-size:{columns * wide}px {rows * high}px;image-rendering:pixelated}}"
    )
    cells = "".join(
        f"<div><i role='img' aria-label='{_escape(caption, ', ')}' style='background-position:"
        f"-{i % columns * wide}px -{i // columns * high}px'></i>{_escape(caption)}</div>"
        for i, caption in enumerate(captions)
    )
    return f"<style>{style}</style><div class='{name}'>{cells}</div>{_note(note)}"


def _rows_html(texts: Sequence[str], captions: Sequence[str], note: str) -> str:
    """A line for each sample."""
    cells = "".join(
        f"<tr><td style='text-align:left;white-space:nowrap'>{_escape(caption, ', ')}</td>"
        f"<td style='text-align:left;font-family:monospace'>{_escape(text)}</td></tr>"
        for text, caption in zip(texts, captions, strict=True)
    )
    return f"<table>{cells}</table>{_note(note)}"


def _escape(text: str, newline: str = "<br>") -> str:
    """Text as HTML, safe between tags and inside quotes."""
    return html.escape(text, quote=True).replace("\n", newline)


def _note(note: str) -> str:
    return f"<p>{_escape(note)}</p>" if note else ""
