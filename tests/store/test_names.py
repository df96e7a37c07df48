"""Selectors of parameters against NumPy, odd names, and rows of weights by steps: corners of `test_selectors.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

import nbdyn
from nbdyn.errors import Incompatible, NbdynError, NotRecorded, UnknownName
from nbdyn.store.names import locate, select
from tests import problems


def table(**shapes: tuple[int, ...]) -> list[dict[str, Any]]:
    """A table of tensors; `__` in a name stands for a dot."""
    tensors, first = [], 0
    for key, shape in shapes.items():
        name, size = key.replace("__", "."), int(np.prod(shape))
        tensors.append({"name": name, "layer": name.rpartition(".")[0], "shape": shape, "first": first, "size": size})
        first += size
    return tensors


INDICES = st.one_of(
    st.integers(-4, 4).map(str),
    st.tuples(*[st.one_of(st.just(""), st.integers(-6, 6).map(str))] * 2).map(":".join),
)


@given(st.lists(INDICES, min_size=1, max_size=3), st.sampled_from(["", " "]))
def test_an_index_means_what_it_means_to_numpy(parts: list[str], space: str) -> None:
    tensors = table(first=(5,), block=(3, 4))
    numbers = 5 + np.arange(12).reshape(3, 4)
    text = f"block[{(space + ',' + space).join(parts)}]"
    key = tuple(slice(*[int(e) if e else None for e in p.split(":")]) if ":" in p else int(p) for p in parts)
    try:
        expected = numbers[key]
    except IndexError:
        with pytest.raises(Incompatible, match=r"lies outside block, whose shape is \[3, 4\]"):
            select(text, tensors)
        return
    selection = select(text, tensors)
    assert selection.shape == expected.shape
    np.testing.assert_array_equal(selection.indices, expected.reshape(-1))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("fc1", "fc1.weight fc1.bias"),
        ("fc?.bias", "fc1.bias fc2.bias fc3.bias"),
        ("fc[12].bias", "fc1.bias fc2.bias"),
        ("fc[!1].weight", "fc2.weight fc3.weight"),
        ("*.w*", "fc1.weight fc2.weight fc3.weight"),
        ("*", "fc1.weight fc1.bias fc2.weight fc2.bias fc3.weight fc3.bias scale"),
        ("all", "fc1.weight fc1.bias fc2.weight fc2.bias fc3.weight fc3.bias scale"),
        ("  fc3.bias  ", "fc3.bias"),
        ("`fc3.bias`", "fc3.bias"),
        ("`fc2`", "fc2.weight fc2.bias"),
        ("scale", "scale"),
    ],
)
def test_globs_and_layers(text: str, names: str) -> None:
    shapes = {f"fc{i}__{kind}": (i, 2) if kind == "weight" else (i,) for i in (1, 2, 3) for kind in ("weight", "bias")}
    assert list(select(text, table(**shapes, scale=())).names) == names.split()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'no parameter tensor ""; known: fc1.weight, scale'),
        ("  ", 'no parameter tensor ""'),
        ("``", 'no parameter tensor ""'),
        ("[1,2]", 'no parameter tensor ""'),
        ("fc1.wieght[0,0]", 'no parameter tensor "fc1.wieght"; did you mean "fc1.weight"?'),
        ("FC1.WEIGHT", 'no parameter tensor "FC1.WEIGHT"'),
        ("fc9.*", 'no parameter tensor "fc9.*"'),
        ("`fc1.weight", None),
        ("fc1.weight[0,0", 'no parameter tensor "fc1.weight[0,0"'),
        ("fc1.weight[]", '"[]" is no index of fc1.weight'),
        ("fc1.weight[0,,0]", "is no index of fc1.weight"),
        ("fc1.weight[0:2:1]", "is no index of fc1.weight"),
        ("fc1.weight[0.5]", "is no index of fc1.weight"),
        ("fc1.weight[None]", "is no index of fc1.weight"),
        ("fc1.weight[...]", "is no index of fc1.weight"),
        ("`fc1.weight`x", '"[x]" is no index of fc1.weight'),
        ("fc1.weight[2]", '"[2]" lies outside fc1.weight, whose shape is [2, 3]'),
        ("fc1.weight[-3]", "lies outside fc1.weight"),
        ("fc1.weight[99999999999999999999]", "lies outside fc1.weight"),
        ("scale[0]", '"[0]" lies outside scale, whose shape is []'),
        ("all[0]", "matches 2 tensors; an index needs one: fc1.weight, scale"),
    ],
)
def test_wrong_selectors(text: str, message: str | None) -> None:
    tensors = table(fc1__weight=(2, 3), scale=())
    if message is None:  # a forgotten closing quote does no harm
        assert select(text, tensors).names == ("fc1.weight",)
        return
    with pytest.raises(UnknownName if message.startswith("no ") else Incompatible) as error:
        select(text, tensors)
    assert message in str(error.value)


def test_names_with_brackets_spaces_and_stars() -> None:
    tensors = [
        {"name": name, "layer": "", "shape": (2,), "first": 2 * place, "size": 2}
        for place, name in enumerate(["w[1]", "w", "two words", "all", "a*", "ab"])
    ]
    for text, indices in {
        "w[1]": [0, 1],  # a whole name comes first
        "`w[1]`": [0, 1],
        "`w[1]`[1]": [1],
        "`w`[1]": [3],
        "w[0]": [2],
        "two words[1]": [5],
        "all": [6, 7],
        "a*": [8, 9],
        "a*[1]": [9],
        "a?": [8, 9, 10, 11],
    }.items():
        assert select(text, tensors).indices.tolist() == indices, text


def test_tensors_without_elements_and_without_axes() -> None:
    tensors = table(empty__weight=(0, 3), scale=(), last=(2,), tail=(0,))
    assert select("all", tensors).indices.tolist() == [0, 1, 2]
    assert select("empty", tensors).shape == (0, 3)
    assert locate(np.array([0, 2]), tensors)[1] == ["scale", "last[1]"]
    assert locate(np.array([], dtype=np.int64), tensors)[1] == []


# Rows by steps ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> tuple[nbdyn.Run, np.ndarray]:
    """24 steps, rows at 0, 5, 10, 15, 20, 24; and all rows as they were."""
    model = problems.mlp(12, 8, 4)
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss()
    with nbdyn.record(tmp_path_factory.mktemp("w") / "run", model, optimizer, loss_fn, snapshot_every=5) as rec:
        seen = problems.train(rec, model, optimizer, loss_fn, DataLoader(problems.data(), 20), 4)
    return nbdyn.open(rec), np.stack([*(before.numpy() for before, *_ in seen), problems.flat(model).numpy()])


@given(
    start=st.one_of(st.none(), st.integers(-30, 30)),
    stop=st.one_of(st.none(), st.integers(-30, 30)),
    stride=st.sampled_from([None, 1, 2, 5, 10, -1, -4, -5]),
)
def test_a_slice_takes_the_stored_rows_among_its_steps(
    start: int | None, stop: int | None, stride: int | None, snapshots: tuple[nbdyn.Run, np.ndarray]
) -> None:
    run, rows = snapshots
    wanted = [step for step in range(25)[start:stop:stride] if step in (0, 5, 10, 15, 20, 24)]
    np.testing.assert_array_equal(run.weights["0.weight", start:stop:stride], rows[wanted, :96].reshape(-1, 8, 12))
    frame = run.weights.frame(7, slice(start, stop, stride))
    assert frame["step"].tolist() == wanted
    np.testing.assert_array_equal(frame["value"], rows[wanted, 7])


def test_single_steps(snapshots: tuple[nbdyn.Run, np.ndarray]) -> None:
    run, rows = snapshots
    np.testing.assert_array_equal(run.weights["all", 10], rows[10])
    np.testing.assert_array_equal(run.weights["all", -1], rows[24])
    np.testing.assert_array_equal(run.weights["0.bias[2]", np.int64(24)], rows[24, 98])
    with pytest.raises(NotRecorded, match=r"not weights\[12\]; the nearest is weights\[10\]. Type run\.replay\(12"):
        run.weights["all", 12]
    for beyond in (25, -26):
        with pytest.raises(NotRecorded, match=r"holds weights of steps 0\.\.24"):
            run.weights["all", beyond]


@pytest.mark.parametrize(
    "key",
    [
        1.5,
        None,
        ["0.weight"],
        ("0.weight", 1.5),
        ("0.weight", "3"),
        ("0.weight", [1, 2]),
        ("0.weight", 1, 2),
        ("0.weight", slice(0, 1.5)),
        ("0.weight", slice(0, 9, 0)),
        slice(0, 3),
        140,
        -1,
        True and ("all", None),
    ],
)
def test_a_wrong_key_is_said(key: Any, snapshots: tuple[nbdyn.Run, np.ndarray]) -> None:
    with pytest.raises(NbdynError, match=r"selects no weights|neither a step nor a slice|indices go from 0 to 139"):
        snapshots[0].weights[key]


def test_reading_indices_outside_the_model(snapshots: tuple[nbdyn.Run, np.ndarray]) -> None:
    for indices in ([140], [-1], [0, 10**12]):
        with pytest.raises(Incompatible, match="go from 0 to 139"):
            snapshots[0].weights.read(np.array(indices))
    steps, values = snapshots[0].weights.read(np.array([], dtype=np.int64))
    assert len(steps) == 6 and values.shape == (6, 0)


def test_float64_rows_come_back_as_they_were(tmp_path: Path) -> None:
    model = problems.mlp(12, 8, 4).double()
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss()
    rows = []
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn, weights="every") as rec:
        for x, y in rec.watch(DataLoader(problems.data(), 20)):
            rows.append(problems.flat(model).numpy())
            optimizer.zero_grad()
            loss_fn(model(x.double()), y).backward()
            optimizer.step()
    weights = nbdyn.open(rec).weights
    assert weights["all"].dtype == np.float64
    np.testing.assert_array_equal(weights["all", :-1], np.stack(rows))
    np.testing.assert_array_equal(weights.row(6), problems.flat(model).numpy())
