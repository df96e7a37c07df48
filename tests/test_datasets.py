"""The data sets: right bytes in, or a clear refusal."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import struct
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pooch
import pytest

from nbdyn import datasets
from nbdyn.errors import NbdynError, UnknownName

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx(values: np.ndarray) -> bytes:
    """An IDX file of unsigned bytes."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """MNIST made of five images: sizes and checksums that the module expects are changed to fit."""
    rng = np.random.default_rng(0)
    files = {IMAGES: idx(rng.integers(0, 256, (5, 28, 28))), LABELS: idx(rng.integers(0, 10, 5))}
    checksums = {name: hashlib.sha256(blob).hexdigest() for name, blob in files.items()}
    monkeypatch.setattr(datasets, "_SPLITS", {"train": ("train", 5)})
    monkeypatch.setattr(datasets, "_MNIST", replace(datasets._MNIST, sha256=checksums))
    monkeypatch.delenv("NBDYN_DATA", raising=False)
    return files


@pytest.fixture
def folder(tmp_path: Path, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder named by NBDYN_DATA that holds the tiny MNIST, one file gzipped and one not."""
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / f"{IMAGES}.gz").write_bytes(gzip.compress(tiny[IMAGES]))
    (tmp_path / "mnist" / LABELS).write_bytes(tiny[LABELS])
    monkeypatch.setenv("NBDYN_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def mirror(tmp_path: Path, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[str]]]:
    """A web server on this machine as the only mirror, an empty cache, and the list of paths asked for."""
    served, asked = tmp_path / "served", list[str]()
    served.mkdir()
    for name, blob in tiny.items():
        (served / f"{name}.gz").write_bytes(gzip.compress(blob))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(served), **kwargs)

        def log_request(self, *args):
            asked.append(self.path)

        def log_message(self, *args):
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    monkeypatch.setattr(datasets, "_MNIST", replace(datasets._MNIST, mirrors=(address + "missing/", address)))
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    yield served, asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_digits_are_scikit_learns():
    images, labels = datasets.digits()
    assert images.shape == (1797, 64) and images.dtype == np.float32
    assert labels.shape == (1797,) and labels.dtype == np.int64
    pixels = (images * 16).astype(np.uint8)
    assert (pixels / np.float32(16) == images).all()
    # the checksum of scikit-learn 1.9.1's load_digits().data, as bytes
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    assert digest == "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3"
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.mark.parametrize("subfolder", ["mnist", "MNIST/raw", "."])
def test_files_of_the_named_folder_come_first(tmp_path, tiny, monkeypatch, subfolder):
    (tmp_path / subfolder).mkdir(parents=True, exist_ok=True)
    for name, blob in tiny.items():
        (tmp_path / subfolder / f"{name}.gz").write_bytes(gzip.compress(blob))
    monkeypatch.setenv("NBDYN_DATA", str(tmp_path))
    images, labels = datasets.mnist()
    assert idx(images) == tiny[IMAGES] and images.dtype == np.uint8
    assert idx(labels) == tiny[LABELS] and labels.dtype == np.int64
    images[0] = 0  # the user's own array, not a read-only view


def test_gzip_is_told_by_its_bytes_not_by_its_name(folder, tiny):
    (folder / "mnist" / LABELS).write_bytes(gzip.compress(tiny[LABELS]))
    assert idx(datasets.mnist()[1]) == tiny[LABELS]


def change_one_byte(blob: bytes) -> bytes:
    return blob[:-1] + bytes([blob[-1] ^ 1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda blob: blob[:-3], "holds 3,933"),
        (lambda blob: blob + b"\0" * 100, "holds more"),
        (lambda blob: b"\0\0\x0d" + blob[3:], "does not start as an IDX file"),
        (lambda blob: blob[:4] + struct.pack(">3I", 2**32 - 1, 2**32 - 1, 28) + blob[16:], "does not start as"),
        (lambda blob: b"", "does not start as"),
        (change_one_byte, "other contents"),
    ],
    ids=["short", "long", "magic", "hostile sizes", "empty", "checksum"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["raw", "gzip"])
def test_damaged_files_are_refused(folder, tiny, damage, message, packed):
    blob = damage(tiny[IMAGES])
    path = folder / "mnist" / f"{IMAGES}.gz"
    path.write_bytes(gzip.compress(blob) if packed else blob)
    with pytest.raises(NbdynError, match=message) as caught:
        datasets.mnist()
    assert str(path) in str(caught.value)
    assert path.exists()  # the user's file is the user's


@pytest.mark.parametrize("damage", [lambda blob: blob[: len(blob) // 2], lambda blob: blob[:30] + b"\xff" * 50])
def test_damaged_gzip_is_refused(folder, tiny, damage):
    (folder / "mnist" / f"{IMAGES}.gz").write_bytes(damage(gzip.compress(tiny[IMAGES])))
    with pytest.raises(NbdynError, match="damaged gzip file"):
        datasets.mnist()


def test_a_gzip_bomb_is_not_unpacked(folder):
    header = struct.pack(">HBB3I", 0, 8, 3, 5, 28, 28)
    (folder / "mnist" / f"{IMAGES}.gz").write_bytes(gzip.compress(header + b"\0" * 50_000_000))
    with pytest.raises(NbdynError, match="holds more"):
        datasets.mnist()


def test_downloads_once_from_the_first_mirror_that_answers(mirror, tiny, capsys):
    _, asked = mirror
    for _ in range(2):
        images, labels = datasets.mnist()
        assert idx(images) == tiny[IMAGES] and idx(labels) == tiny[LABELS]
    assert asked.count(f"/{IMAGES}.gz") == 1 and asked.count(f"/missing/{IMAGES}.gz") == 1
    assert f"nbdyn: downloading MNIST, {IMAGES}.gz" in capsys.readouterr().out


def test_a_damaged_download_does_not_stay_in_the_cache(mirror, tiny):
    served, _ = mirror
    good = (served / f"{IMAGES}.gz").read_bytes()
    (served / f"{IMAGES}.gz").write_bytes(gzip.compress(change_one_byte(tiny[IMAGES])))
    with pytest.raises(NbdynError, match="other contents"):
        datasets.mnist()
    (served / f"{IMAGES}.gz").write_bytes(good)
    assert idx(datasets.mnist()[0]) == tiny[IMAGES]


def test_without_a_network_the_message_names_files_and_folder(mirror, monkeypatch):
    monkeypatch.setattr(datasets, "_MNIST", replace(datasets._MNIST, mirrors=("http://127.0.0.1:9/",)))
    with pytest.raises(NbdynError) as caught:
        datasets.mnist()
    for needed in ("NBDYN_DATA", f"{IMAGES}.gz", f"{LABELS}.gz", '"mnist"', "http://127.0.0.1:9/: ConnectionError"):
        assert needed in str(caught.value)


def test_unknown_split_names_the_nearest(monkeypatch):
    with pytest.raises(UnknownName, match='no split "tets"; did you mean "test"'):
        datasets.mnist("tets")  # pyright: ignore[reportArgumentType]


def test_a_named_folder_that_is_none_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("NBDYN_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(NbdynError, match="which is no folder"):
        datasets.fashion_mnist()


def test_an_empty_folder_leads_to_a_download(mirror, tiny, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("NBDYN_DATA", str(tmp_path / "empty"))
    assert idx(datasets.mnist()[0]) == tiny[IMAGES]
