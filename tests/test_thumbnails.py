"""Thumbnails: the right pixels in the right places, whatever the data are; text is escaped, nothing is fetched."""

from __future__ import annotations

import re
import struct
import zlib

import numpy as np
import pandas as pd
import pytest

from nbdyn.datasets import digits
from nbdyn.errors import NbdynError
from nbdyn.thumbnails import thumbnails


def pixels(png: bytes) -> np.ndarray:
    """A PNG of 8 bits with filter 0, decoded here by hand: (H, W, channels)."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, body, head = 8, b"", b""
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert int.from_bytes(png[at + 8 + size : at + 12 + size], "big") == zlib.crc32(kind + data)
        head, body = (data if kind == b"IHDR" else head), body + (data if kind == b"IDAT" else b"")
        at += 12 + size
    wide, high, depth, color = struct.unpack(">IIBB", head[:10])
    channels = {0: 1, 2: 3}[color]
    rows = np.frombuffer(zlib.decompress(body), np.uint8).reshape(high, 1 + wide * channels)
    assert depth == 8 and not rows[:, 0].any()
    return rows[:, 1:].reshape(high, wide, channels)


def frame(*samples: int) -> pd.DataFrame:
    return pd.DataFrame({"rank": np.arange(1, len(samples) + 1), "sample": samples, "loss": 0.5})


RAW = np.random.default_rng(0).integers(0, 256, (9, 5, 4), dtype=np.uint8)


class Pairs:
    """A data set of (image, target) pairs."""

    def __init__(self, images: object, targets: object = None) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> object:
        return self.images[i], 0  # type: ignore[index]


@pytest.mark.parametrize(
    "data",
    [RAW, Pairs(RAW), RAW[:, None], RAW[..., None], (RAW, np.zeros(9)), lambda ids: (RAW[ids], np.zeros(len(ids)))],
    ids=["array", "pairs", "channel first", "channel last", "two arrays", "function"],
)
def test_bytes_come_back_in_their_places(data: object):
    shown = thumbnails(frame(3, 0, 8), data, columns=2)
    sheet = pixels(shown.png)
    assert sheet.shape == (10, 8, 1)
    np.testing.assert_array_equal(sheet[:5, :4, 0], RAW[3])
    np.testing.assert_array_equal(sheet[:5, 4:, 0], RAW[0])
    np.testing.assert_array_equal(sheet[5:, :4, 0], RAW[8])
    assert not sheet[5:, 4:].any()
    assert shown.captions[1] == "#2 sample 0\nloss 0.5" and repr(shown) == "<thumbnails of 3 samples>"


def test_rows_of_numbers_that_are_squares_are_pictures():
    images, labels = digits()
    sheet = pixels(thumbnails(frame(5, 7), (images, labels)).png)
    both = images[[5, 7]].reshape(2, 8, 8)
    expected = np.round(255 * (both - both.min()) / np.ptp(both)).astype(np.uint8)
    np.testing.assert_array_equal(sheet[:, :, 0], np.concatenate(list(expected), axis=1))


def test_tensors_and_colours():
    torch = pytest.importorskip("torch")
    images = torch.rand(4, 3, 6, 6) - 0.5
    data = torch.utils.data.TensorDataset(images, torch.zeros(4))
    sheet = pixels(thumbnails(frame(2, 1), data).png)
    assert sheet.shape == (6, 12, 3)
    two = images[[2, 1]].numpy().astype(np.float64)
    expected = np.round(255 * (two[0] - two.min()) / (two.max() - two.min()))
    np.testing.assert_array_equal(sheet[:, :6], expected.transpose(1, 2, 0))
    subset = torch.utils.data.Subset(data, [3, 2])
    np.testing.assert_array_equal(pixels(thumbnails(frame(1), subset).png), pixels(thumbnails(frame(2), data).png))
    assert pixels(thumbnails(frame(0), torch.full((1, 5, 5), torch.nan)).png).max() == 0


def test_tokens_and_strings_are_rows_of_text():
    tokens = np.arange(200).reshape(2, 100)
    shown = thumbnails(frame(1), tokens)
    assert shown.png is None and "100 101 102" in shown.html and "131 ..." in shown.html
    told = thumbnails(frame(0), Pairs(["<script>alert('x')</script> & co"])).html
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; co" in told and "<script" not in told


def test_labels_are_escaped_and_nothing_is_fetched():
    wicked = pd.DataFrame({"layer": ["'><img src=x onerror=alert(1)>"], "rank": [1], "sample": [0], "loss": [1.0]})
    told = thumbnails(wicked, RAW).html
    assert "<img" not in told and told.count("<script") == 0
    assert re.findall(r"url\((.{5})", told) == ["data:"] and "http" not in told


def test_at_most_200_and_a_note():
    images = np.zeros((500, 4, 4), np.uint8)
    shown = thumbnails(pd.DataFrame({"sample": np.arange(300)}), images)
    assert len(shown.captions) == 200 and shown.note == "the first 200 of 300 rows" and shown.note in shown.html
    # lists for each weight: a sample is shown once, the one in the most rows first
    often = pd.DataFrame({"sample": [*np.arange(250), *[77] * 30, *[3] * 20]})
    shown = thumbnails(often, images)
    assert shown.captions[:2] == ("sample 77\nin 31 rows", "sample 3\nin 21 rows")
    assert shown.note == "200 of 250 samples: those of the most rows"


def test_unknown_samples_are_left_out():
    assert thumbnails(frame(-1, 2), RAW).captions == ("#2 sample 2\nloss 0.5",)


@pytest.mark.parametrize(
    ("table", "data", "words"),
    [
        (pd.DataFrame({"step": [1]}), RAW, "need a column 'sample'; the columns are step"),
        (frame(9), RAW, "data has 9 samples, and the frame names sample 9: is it another set"),
        (frame(-1), RAW, "no rows with a known sample"),
        (frame(0), 7, "data is a int; give a data set"),
        (frame(0), np.zeros((2, 7)), r"float64 of shape \(7,\), which is no picture"),
        (frame(0), np.zeros((2, 3, 4, 5, 6)), r"shape \(3, 4, 5, 6\), which is no picture"),
        (frame(0), [{"a": 1}], "no picture"),
    ],
)
def test_what_is_no_picture_is_said(table: pd.DataFrame, data: object, words: str):
    with pytest.raises(NbdynError, match=words):
        thumbnails(table, data)
    with pytest.raises(NbdynError, match="at least 1, not 0"):
        thumbnails(frame(0), RAW, columns=0)


def test_the_accessor_and_a_run_show_them():
    answer = frame(2)
    assert answer.dyn.thumbnails(RAW).html == thumbnails(answer, RAW).html
    assert answer.set_index("sample").dyn.thumbnails(RAW).png == thumbnails(answer, RAW).png
