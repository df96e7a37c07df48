"""Damaged, foreign and newer runs: a clear error, nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import nbdyn
from nbdyn.__main__ import main
from nbdyn.errors import CorruptRun, Incompatible, NbdynError
from nbdyn.store import backend, verify
from tests import problems


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 24 steps, weights at every step."""
    folder = tmp_path_factory.mktemp("whole")
    model = problems.mlp(12, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_fn = nn.CrossEntropyLoss()
    with nbdyn.record(folder / "run", model, optimizer, loss_fn, weights="every") as rec:
        problems.train(rec, model, optimizer, loss_fn, DataLoader(problems.data(), 20), epochs=4)
    return folder / "run"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def _metadata(path: Path, **entries: Any) -> None:
    with backend.tiledb().Group(str(path), "w", ctx=backend.context()) as group:
        for key, value in entries.items():
            group.meta[key] = value


def _config(path: Path) -> dict[str, Any]:
    return nbdyn.open(path).config


def test_a_whole_run_is_whole(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.verify(str(whole)).empty
    assert main(["verify", str(whole)]) == 0
    assert "is whole: 24 steps" in capsys.readouterr().out
    assert main(["gc", str(whole)]) == 0
    assert "nothing to remove" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("array", "attribute"), [("weights", "a0"), ("visits", "a1"), ("steps", "a3"), ("scalars", "a0")]
)
def test_a_truncated_file_is_named(copy: Path, array: str, attribute: str, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (copy / array / "__fragments").glob(f"*/{attribute}.tdb"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
    with pytest.raises(CorruptRun, match=rf"cannot read .*run/{array}.*python -m nbdyn verify"):
        run = nbdyn.open(copy)
        assert run.weights["all"].shape
        assert len(run.visits) and len(run.steps)
    assert main(["verify", str(copy)]) == 1
    assert main(["doctor", str(copy)]) == 0
    assert f"run/{array}" in capsys.readouterr().out


def test_a_flipped_bit_is_found_where_checksums_protect(copy: Path) -> None:
    for file in (copy / "visits" / "__fragments").glob("*/a0.tdb"):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    assert verify.verify(str(copy))["array"].tolist() == ["visits"]


def test_missing_weights_are_found(copy: Path) -> None:
    shutil.rmtree(copy / "weights" / "__fragments")
    shutil.rmtree(copy / "weights" / "__commits")
    (copy / "weights" / "__fragments").mkdir()
    (copy / "weights" / "__commits").mkdir()
    assert "the row is missing" in " ".join(verify.verify(str(copy))["problem"])


def test_a_newer_schema_says_how_to_upgrade(copy: Path) -> None:
    _metadata(copy, schema=99)
    with pytest.raises(Incompatible, match=r"written by a newer nbdyn \(schema 99.*pip install --upgrade nbdyn"):
        nbdyn.open(copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: "not json",
        lambda c: json.dumps([]),
        lambda c: json.dumps({**c, "parameters": 10**15}),
        lambda c: json.dumps({**c, "tensors": [{**c["tensors"][0], "shape": [10**9, 10**9]}]}),
        lambda c: json.dumps({**c, "tensors": [{**c["tensors"][0], "name": 3}]}),
        lambda c: json.dumps({**c, "weights": "sometimes"}),
    ],
)
def test_hostile_metadata_is_refused_before_anything_is_allocated(copy: Path, change: Any) -> None:
    _metadata(copy, config=change(_config(copy)))
    with pytest.raises(CorruptRun, match=r"the metadata of .* is damaged"):
        nbdyn.open(copy)


def test_names_are_escaped_where_html_is_made(copy: Path) -> None:
    config = _config(copy)
    _metadata(copy, config=json.dumps({**config, "model": "<script>alert(1)</script>"}))
    html = nbdyn.open(copy)._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_runs_lists_damaged_ones_with_their_problem(copy: Path) -> None:
    shutil.copytree(copy, copy.parent / "newer")
    _metadata(copy.parent / "newer", schema=99)
    (copy.parent / "notes.txt").write_text("not a run")
    (copy.parent / "folder").mkdir()
    table = nbdyn.runs(copy.parent).set_index("run")
    assert table["status"].to_dict() == {"newer": "corrupt", "run": "complete"}
    assert "newer nbdyn" in table.loc["newer", "problem"]
    assert table.loc["run", "steps"] == 24 and table.loc["run", "epochs"] == 4


def test_other_places_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(NbdynError, match="nothing is there"):
        nbdyn.open(tmp_path / "none")
    backend.tiledb().Group.create(str(tmp_path / "group"), ctx=backend.context())
    with pytest.raises(CorruptRun, match="no run of nbdyn, or its creation was cut short"):
        nbdyn.open(tmp_path / "group")
    with pytest.raises(NbdynError, match=r"no folder .*missing"):
        nbdyn.runs(tmp_path / "missing")


def test_plain_tiledb_reads_a_run(whole: Path) -> None:
    run = nbdyn.open(whole)
    tiledb = backend.tiledb()
    with tiledb.open(str(whole / "weights"), ctx=backend.context()) as array:
        bits = array[3, :]["bits"]
    assert np.array_equal(bits.view("f4"), run.weights.row(3))
    with tiledb.open(str(whole / "steps"), ctx=backend.context()) as array:
        assert np.array_equal(array[0:24]["loss"], run.steps["loss"])
