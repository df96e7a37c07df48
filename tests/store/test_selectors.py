"""Selectors of parameters, and reading weights by them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader

import nbdyn
from nbdyn.errors import Incompatible, NotRecorded, UnknownName
from nbdyn.store.names import locate, select
from tests import problems

TENSORS = [
    {"name": "fc1.weight", "layer": "fc1", "shape": [3, 4], "first": 0, "size": 12},
    {"name": "fc1.bias", "layer": "fc1", "shape": [3], "first": 12, "size": 3},
    {"name": "odd [name]", "layer": "odd [name]", "shape": [2, 2, 2], "first": 15, "size": 8},
    {"name": "scale", "layer": "", "shape": [], "first": 23, "size": 1},
]


@pytest.mark.parametrize(
    ("text", "indices", "shape"),
    [
        ("fc1.weight", range(12), (3, 4)),
        ("fc1.weight[1,2]", [6], ()),
        ("fc1.weight[1]", [4, 5, 6, 7], (4,)),
        ("fc1.weight[:, 0]", [0, 4, 8], (3,)),
        ("fc1.weight[-1,1:3]", [9, 10], (2,)),
        ("fc1.bias[2]", [14], ()),
        ("fc1", range(15), (15,)),
        ("fc1.*", range(15), (15,)),
        ("*.bias", [12, 13, 14], (3,)),
        ("all", range(24), (24,)),
        ("`odd [name]`", range(15, 23), (2, 2, 2)),
        ("`odd [name]`[1,1,1]", [22], ()),
        ("`fc1.weight[1,2]`", [6], ()),
        ("scale", [23], ()),
    ],
)
def test_selectors(text: str, indices: object, shape: tuple[int, ...]) -> None:
    selection = select(text, TENSORS)
    assert selection.indices.tolist() == list(indices)  # type: ignore[call-overload]
    assert selection.shape == shape


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("fc1.wieght", UnknownName, 'no parameter tensor "fc1.wieght"; did you mean "fc1.weight"?'),
        ("fc1.weight[3,0]", Incompatible, r"\[3,0\]\" lies outside fc1.weight, whose shape is \[3, 4\]"),
        ("fc1.weight[1,2,3]", Incompatible, "lies outside fc1.weight"),
        ("fc1.weight[__import__]", Incompatible, "is no index of fc1.weight; write numbers or slices"),
        ("fc1.*[0]", Incompatible, "matches 2 tensors; an index needs one"),
    ],
)
def test_wrong_selectors_say_what_to_type(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        select(text, TENSORS)


@given(st.lists(st.integers(0, 23), min_size=1))
def test_locate_is_the_inverse_of_select(indices: list[int]) -> None:
    owner, labels = locate(np.array(indices), TENSORS)
    assert [TENSORS[o]["first"] <= i for o, i in zip(owner, indices, strict=True)] == [True] * len(indices)
    for label, index in zip(labels, indices, strict=True):
        quoted = label if not label.startswith("odd") else f"`odd [name]`{label.removeprefix('odd [name]')}"
        assert select(quoted, TENSORS).indices.tolist() == [index]


def test_indices_outside_the_model_are_refused() -> None:
    with pytest.raises(Incompatible, match=r"go from 0 to 23; found 24\.\.24"):
        locate(np.array([24]), TENSORS)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[nbdyn.Run, np.ndarray]:
    model = problems.mlp(12, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_fn = nn.CrossEntropyLoss()
    with nbdyn.record(tmp_path_factory.mktemp("w") / "run", model, optimizer, loss_fn, weights="every") as rec:
        seen = problems.train(rec, model, optimizer, loss_fn, DataLoader(problems.data(), 20), epochs=4)
    rows = [before.numpy() for before, *_ in seen] + [problems.flat(model).numpy()]
    return nbdyn.open(rec), np.stack(rows)


def test_reading_by_tensor_element_index_and_step(recorded: tuple[nbdyn.Run, np.ndarray]) -> None:
    run, rows = recorded
    weights = run.weights
    first = rows[:, :96].reshape(-1, 8, 12)
    assert np.array_equal(weights["0.weight", 0:10], first[:10])
    assert np.array_equal(weights["0.weight", 5], first[5])
    assert np.array_equal(weights["0.weight", -1], first[-1])
    assert np.array_equal(weights["0.weight", ::7], first[::7])
    assert np.array_equal(weights["0.weight[3,5]"], first[:, 3, 5])
    assert np.array_equal(weights["0.weight[:,5]", 2:4], first[2:4, :, 5])
    assert np.array_equal(weights[41], rows[:, 41])
    assert np.array_equal(weights[41, 3], rows[3, 41])
    assert np.array_equal(weights[..., 7], rows[7])
    assert np.array_equal(weights["2.*", 20:], rows[20:, 104:])
    assert np.array_equal(weights.row(9), rows[9])
    assert weights["0.weight", 100:].shape == (0, 8, 12)


def test_scattered_and_repeated_indices(recorded: tuple[nbdyn.Run, np.ndarray]) -> None:
    run, rows = recorded
    indices = np.array([139, 0, 70, 70, 3])
    steps, values = run.weights.read(indices, 3, 9)
    assert steps.tolist() == list(range(3, 9))
    assert np.array_equal(values, rows[3:9][:, indices])


def test_frame_is_tidy(recorded: tuple[nbdyn.Run, np.ndarray]) -> None:
    run, rows = recorded
    frame = run.weights.frame("2.bias[1:3]", slice(4, 6))
    assert frame["step"].tolist() == [4, 4, 5, 5]
    assert frame["index"].tolist() == ["2.bias[1]", "2.bias[2]"] * 2
    assert np.array_equal(frame["value"], rows[4:6, [137, 138]].reshape(-1))
    assert frame.attrs["nbdyn"]["what"] == "weights of 2.bias[1:3]"


def test_steps_beyond_the_end_are_refused(recorded: tuple[nbdyn.Run, np.ndarray]) -> None:
    with pytest.raises(NotRecorded, match=r"holds weights of steps 0\.\.24, not 99"):
        recorded[0].weights["0.weight", 99]
    with pytest.raises(UnknownName, match=r'did you mean "0\.weight"'):
        recorded[0].weights["0.weigth"]


def test_names_complete_in_brackets(recorded: tuple[nbdyn.Run, np.ndarray], tmp_path: Path) -> None:
    assert recorded[0].weights._ipython_key_completions_() == ["0.weight", "0.bias", "2.weight", "2.bias"]
