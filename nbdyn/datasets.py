"""Small data sets to train on: digits comes with nbdyn, MNIST and Fashion-MNIST are fetched once and checked."""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import math
import os
import struct
import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Literal

import numpy as np
from numpy.typing import NDArray

from nbdyn.errors import NbdynError, UnknownName, did_you_mean
from nbdyn.settings import say

Split = Literal["train", "test"]

_SPLITS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}
_KINDS = {"images": ("idx3", (28, 28)), "labels": ("idx1", ())}
_IDX_UINT8 = 0x08  # the third byte of an IDX file: its values are unsigned bytes


@dataclass(frozen=True)
class _Source:
    """Where one data set of four IDX files comes from, and the SHA-256 of each file's decompressed bytes."""

    title: str
    folders: tuple[str, ...]  # below NBDYN_DATA, in the order they are looked into
    mirrors: tuple[str, ...]
    sha256: dict[str, str]


_MNIST = _Source(
    title="MNIST",
    folders=("mnist", "MNIST/raw", "."),
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    sha256={
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
)

# The two sets name their files alike, so the folder NBDYN_DATA itself is MNIST's alone.
_FASHION_MNIST = _Source(
    title="Fashion-MNIST",
    folders=("fashion_mnist", "fashion-mnist", "FashionMNIST/raw"),
    mirrors=(
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
    sha256={
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
)


def digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Handwritten digits, 8 x 8 pixels, embedded in nbdyn: nothing is downloaded.

    The 1,797 test digits of the UCI "Optical Recognition of Handwritten Digits" set (E. Alpaydin and C. Kaynak, 1998,
    licence CC BY 4.0), as scikit-learn distributes them and in the same order.

    Returns:
        Images of shape (1797, 64), one row a digit, scaled from 0..16 to 0..1; labels of shape (1797,), 0 to 9.

    >>> images, labels = digits()
    >>> images.shape, float(images.max()), labels[:4].tolist()
    ((1797, 64), 1.0, [0, 1, 2, 3])
    """
    packed = resources.files("nbdyn").joinpath("data", "digits.npz").read_bytes()
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        return arrays["images"].astype(np.float32) / np.float32(16), arrays["labels"].astype(np.int64)


def mnist(split: Split = "train") -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """MNIST: 28 x 28 handwritten digits, 60,000 to train on and 10,000 to test on.

    The files (IDX, gzipped or not) are taken from the folder that the environment variable NBDYN_DATA names, or its
    subfolders `mnist` or `MNIST/raw`; else they are downloaded once (11 MB) and cached. Either way the decompressed
    bytes are checked against their SHA-256.

    Args:
        split: "train" or "test".

    Returns:
        Images of shape (n, 28, 28), 0 to 255; labels of shape (n,), 0 to 9.

    Raises:
        UnknownName: if there is no such split.
        NbdynError: if a file is damaged, or cannot be downloaded; the message names the files and NBDYN_DATA.
    """
    return _load(_MNIST, split)


def fashion_mnist(split: Split = "train") -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017): 28 x 28 pictures of clothes, in MNIST's format and sizes.

    Found, downloaded (31 MB) and checked as `mnist` is; the subfolders of NBDYN_DATA are `fashion_mnist`,
    `fashion-mnist` and `FashionMNIST/raw`. The checksums of the decompressed bytes are those that several public
    projects state alike; they have not been computed from the publisher's files by nbdyn's own authors.

    Args:
        split: "train" or "test".

    Returns:
        Images of shape (n, 28, 28), 0 to 255; labels of shape (n,), 0 to 9 (T-shirt, trouser, pullover, dress, coat,
        sandal, shirt, sneaker, bag, ankle boot).

    Raises:
        UnknownName: if there is no such split.
        NbdynError: if a file is damaged, or cannot be downloaded; the message names the files and NBDYN_DATA.
    """
    return _load(_FASHION_MNIST, split)


def _load(source: _Source, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    if split not in _SPLITS:
        raise UnknownName(f'{source.title} has no split "{split}"; {did_you_mean(split, _SPLITS)}')
    prefix, n_rows = _SPLITS[split]
    arrays: dict[str, NDArray[np.uint8]] = {}
    for kind, (suffix, row_shape) in _KINDS.items():
        name = f"{prefix}-{kind}-{suffix}-ubyte"
        path = _local_file(source, name)
        if path is not None:
            arrays[kind] = _read_idx(path, (n_rows, *row_shape), source.sha256[name])
        else:
            arrays[kind] = _fetch(source, name, (n_rows, *row_shape))
    return arrays["images"], arrays["labels"].astype(np.int64)


def _local_file(source: _Source, name: str) -> Path | None:
    """The file in the folder that NBDYN_DATA names, raw or gzipped; None where it is not there."""
    root = os.environ.get("NBDYN_DATA")
    if not root:
        return None
    if not Path(root).is_dir():
        raise NbdynError(f'NBDYN_DATA names "{root}", which is no folder; name one that exists, or unset it.')
    candidates = (Path(root) / folder / (name + end) for folder in source.folders for end in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _fetch(source: _Source, name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A file from the cache, downloaded first where it is not there; checked at every read."""
    import pooch

    path = Path(pooch.os_cache("nbdyn")) / source.folders[0] / f"{name}.gz"
    if not path.is_file():
        _download(source, path)
    try:
        return _read_idx(path, shape, source.sha256[name])
    except NbdynError:
        path.unlink()  # or every later call would find the same damaged file
        raise


def _download(source: _Source, path: Path) -> None:
    """Download a file from the first mirror that gives it."""
    import pooch

    say(f"downloading {source.title}, {path.name}, to {path.parent}")
    failures: list[str] = []
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.WARNING)  # pooch asks for a hash of the .gz; ours is of the decompressed bytes
    try:
        for mirror in source.mirrors:
            try:
                pooch.retrieve(mirror + path.name, known_hash=None, fname=path.name, path=path.parent)
                return
            except (OSError, ValueError) as error:
                failures.append(f"{mirror}: {type(error).__name__}")
    finally:
        logger.setLevel(level)
    raise NbdynError(_advice(source, failures))


def _advice(source: _Source, failures: list[str]) -> str:
    names = ", ".join(f"{name}.gz" for name in source.sha256)
    return (
        f"{source.title} could not be downloaded ({'; '.join(failures)}). Without a network, put {names} (or the same "
        f'files without .gz) into a folder, in its subfolder "{source.folders[0]}", and set the environment variable '
        "NBDYN_DATA to that folder. nbdyn.datasets.digits() needs no download."
    )


def _read_idx(path: Path, shape: tuple[int, ...], sha256: str) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes, refused unless shape and checksum are the expected ones.

    No size is taken from the file: at most one byte more than the expected ones is ever read or decompressed.
    """
    header = struct.pack(f">HBB{len(shape)}I", 0, _IDX_UINT8, len(shape), *shape)
    n_bytes = len(header) + math.prod(shape)
    try:
        with path.open("rb") as file:
            blob = _decompressed(file).read(n_bytes + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise NbdynError(f"{path} is a damaged gzip file ({error}); delete it and fetch it again.") from error
    if not blob.startswith(header):
        raise NbdynError(
            f"{path} does not start as an IDX file of unsigned bytes and shape {shape} does; it is another file."
        )
    if len(blob) != n_bytes:
        found = "more" if len(blob) > n_bytes else f"{len(blob):,}"
        raise NbdynError(f"{path} should hold {n_bytes:,} bytes (decompressed) and holds {found}; fetch it again.")
    digest = hashlib.sha256(blob).hexdigest()
    if digest != sha256:
        raise NbdynError(
            f"{path} has the right shape but other contents: its decompressed bytes have the SHA-256 {digest}, "
            f"expected is {sha256}; fetch it again."
        )
    return np.frombuffer(blob, dtype=np.uint8, offset=len(header)).reshape(shape).copy()


def _decompressed(file: IO[bytes]) -> IO[bytes]:
    """The file itself, or a reader that decompresses it; told by its first bytes, not by its name."""
    is_gzip = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if is_gzip else file  # pyright: ignore[reportReturnType]
