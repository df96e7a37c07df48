"""Opening a run whose metadata nobody should believe, and places that are no run."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import nbdyn
from nbdyn.errors import CorruptRun, Incompatible, NbdynError
from nbdyn.store import Store, backend, verify
from tests import problems


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    model = problems.mlp(12, 8, 4)
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss()
    with nbdyn.record(folder / "run", model, optimizer, loss_fn, weights="every") as rec:
        problems.train(rec, model, optimizer, loss_fn, DataLoader(problems.data(), 20), 1)
    return folder / "run"


@pytest.fixture
def path(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def write(path: Path, **entries: Any) -> None:
    with backend.tiledb().Group(str(path), "w", ctx=backend.context(str(path))) as group:
        for key, value in entries.items():
            group.meta[key] = value


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads(json.dumps(Store(path).config))
    result = change(config)
    write(path, config=json.dumps(config if result is None else result))


def set_tensor(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda config: config["tensors"][0].update(fields)


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda c: [c],
    "no tensors": lambda c: c.pop("tensors") and None,
    "tensors are text": lambda c: c.update(tensors="fc1"),
    "a tensor is text": lambda c: c.update(tensors=["fc1"]),
    "shape of text": set_tensor(shape="812"),
    "shape of fractions": set_tensor(shape=[8.0, 12.0]),
    "negative shape": set_tensor(shape=[-8, -12]),
    "huge shape": set_tensor(shape=[10**9, 10**9], size=10**18),
    "wrong first": set_tensor(first=1),
    "wrong size": set_tensor(size=95),
    "size of text": set_tensor(size="96"),
    "no layer": lambda c: c["tensors"][0].pop("layer") and None,
    "name of a number": set_tensor(name=7),
    "two of a name": set_tensor(name="0.bias"),
    "true parameters": lambda c: c.update(parameters=True),
    "more parameters": lambda c: c.update(parameters=c["parameters"] + 1),
    "unknown weights": lambda c: c.update(weights="often"),
    "unknown bits": lambda c: c.update(row_dtype="O"),
    "every 0": lambda c: c.update(every=0),
    "every of text": lambda c: c.update(every="50"),
    "extent 0": lambda c: c.update(row_extent=0),
    "seams of text": lambda c: c.update(seams=["end"]),
    "no seams": lambda c: c.pop("seams") is None and None,
    "optimizer of text": lambda c: c.update(optimizer="SGD"),
    "no name of the optimizer": lambda c: c["optimizer"].pop("name") and None,
    "layers of text": lambda c: c.update(layers=["fc1"]),
    "no model": lambda c: c.pop("model") and None,
    "created is a number": lambda c: c.update(created=0),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_hostile_metadata(change: Callable[[dict[str, Any]], Any], path: Path) -> None:
    changed(path, change)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptRun, match=r"the metadata of .*run is damaged"):
            nbdyn.open(path)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    table = nbdyn.runs(path.parent)
    assert table["status"].tolist() == ["corrupt"] and "damaged" in table["problem"][0]
    assert verify.verify(str(path))["array"].tolist() == ["run"]


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", "NaN", 12, b"\xff\xfe"])
def test_metadata_that_is_no_json(text: Any, path: Path) -> None:
    write(path, config=text)
    with pytest.raises(CorruptRun, match=r"the metadata of .*run is damaged"):
        nbdyn.open(path)


def test_consistent_sizes_beyond_the_array(path: Path) -> None:
    """A table of tensors that is right in itself, and would make `run.weights["all"]` ask for 8 exabytes."""
    huge = 10**18

    def grow(config: dict[str, Any]) -> None:
        last = config["tensors"][-1]
        last.update(shape=[huge], size=huge)
        config["parameters"] = last["first"] + huge

    changed(path, grow)
    with pytest.raises(CorruptRun, match=r"speaks of 1,000,000,000,000,000,\d+ parameters, its array of 140"):
        nbdyn.open(path)


@pytest.mark.parametrize("schema", ["1", "newest", 1.5])
def test_a_schema_that_is_no_number(schema: Any, path: Path) -> None:
    write(path, schema=schema)
    with pytest.raises(CorruptRun, match=f"schema .*{schema}"):
        nbdyn.open(path)


def test_a_newer_schema_is_said_before_anything_else_is_read(path: Path) -> None:
    """What a newer version keeps in its metadata is its own business."""
    write(path, schema=2, config="in another format")
    with pytest.raises(Incompatible, match=r"newer nbdyn \(schema 2; this one reads up to 1\).*pip install --upgrade"):
        nbdyn.open(path)


@pytest.mark.parametrize("columns", ["{", "{}", "[1]", json.dumps(["x"] * 70_000), "[" * 100_000])
def test_hostile_names_of_columns(columns: str, path: Path) -> None:
    for entry in (path / "scalars" / "__meta").iterdir():
        entry.unlink()
    with backend.tiledb().open(str(path / "scalars"), "w", timestamp=1, ctx=backend.context(str(path))) as array:
        array.meta["columns"] = columns
    with pytest.raises(CorruptRun, match=r"names of the columns of .*scalars"):
        nbdyn.open(path)


def test_names_are_text_wherever_html_is_made(path: Path) -> None:
    evil = "<img src=x onerror=alert(1)>&\"'"

    def rename(config: dict[str, Any]) -> None:
        config.update(model=evil, created=evil)
        config["optimizer"]["name"] = evil
        config["tensors"][0]["name"] = evil
        config["layers"][0]["name"] = evil

    changed(path, rename)
    write(path, status=evil)
    target = path.parent / "<b>bold<"
    path.rename(target)
    run = nbdyn.open(target)
    html = run._repr_html_()
    assert "<img" not in html and "<b>bold" not in html and html.count("&lt;img") == 4
    assert run.parameters["name"][0] == evil
    np.testing.assert_array_equal(run.weights[f"`{evil}`[0,0]"], run.weights[0])
    assert nbdyn.runs(target.parent)["status"].tolist() == [evil]


@pytest.mark.parametrize("array", ["weights", "state", "scalars", "visits", "notes", "steps"])
def test_a_missing_array_is_named(array: str, path: Path) -> None:
    shutil.rmtree(path / array)
    with pytest.raises(CorruptRun, match=array):
        run = nbdyn.open(path)
        run.weights["all"], run.steps, run.visits, run.notes, run.at(-1).load_into(problems.mlp(12, 8, 4))
        run.replay(0, 3, problems.mlp(12, 8, 4), nn.CrossEntropyLoss(), problems.data())
    assert len(verify.verify(str(path)))


def test_places_that_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    array = tmp_path / "array"
    backend.tiledb().from_numpy(str(array), np.arange(3), ctx=backend.context(str(array))).close()
    for place, found in (("none", "nothing is"), ("folder", "something else is"), ("array", "a TileDB array is")):
        with pytest.raises(NbdynError, match=f"no run at .*{place}: {found} there"):
            nbdyn.open(tmp_path / place)
    with pytest.raises(NbdynError, match=r"no run at .*file: something else"):
        nbdyn.open(tmp_path / "folder" / "file")
    assert nbdyn.runs(tmp_path).empty
    with pytest.raises(NbdynError, match="no folder"):
        nbdyn.runs(tmp_path / "folder" / "file")


@pytest.mark.parametrize("left", ["the group", "some arrays", "all but the metadata"])
def test_a_creation_cut_short(left: str, path: Path) -> None:
    for entry in (path / "__meta").iterdir():
        entry.unlink()
    if left != "all but the metadata":
        for entry in (path / "__group").iterdir():
            entry.unlink()
        for array in ("visits", "notes", "steps", *(("weights", "state", "scalars") if left == "the group" else ())):
            shutil.rmtree(path / array)
    with pytest.raises(CorruptRun, match="its creation was cut short; delete it and record again"):
        nbdyn.open(path)
    assert nbdyn.runs(path.parent)["status"].tolist() == ["corrupt"]
    assert len(verify.verify(str(path))) == 1


def test_every_way_to_say_a_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("HOME", str(path.parent))
    spaced = path.parent / "two words"
    spaced.symlink_to(path)
    for place in (path, str(path), f"{path}/", "run", "./run", f"file://{path}", "~/run", spaced, f"{path}/../run"):
        assert len(nbdyn.open(place)) == 6
    assert len(nbdyn.open(f"file://{path.parent}/two%20words")) == 6
