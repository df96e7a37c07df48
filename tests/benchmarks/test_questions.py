"""All systems give the same answers to the five questions, and wrong answers are told from right ones."""

from __future__ import annotations

import numpy as np
import pytest

import nbdyn
from tests.benchmarks import questions
from tests.benchmarks.rivals import SYSTEMS, missing
from tests.benchmarks.rivals.arrays import grouped
from tests.benchmarks.rivals.asked import QUESTIONS, check, choose
from tests.benchmarks.rivals.training import SIZES, prepare

SMALL = SIZES["small"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A folder with the runs of every system that can run here, and what is asked of them."""
    folder = tmp_path_factory.mktemp("questions")
    prepare(SMALL, folder)
    asked = choose(SMALL, folder)
    for name in SYSTEMS.keys() - missing().keys():
        questions.record(name, SMALL, folder)
    return folder, asked


@pytest.fixture(scope="module")
def answers(recorded):
    """Question -> system -> answer."""
    folder, asked = recorded
    names = [name for name in SYSTEMS if name not in missing()]
    return {q: {name: questions.ask(name, q, asked, SMALL, folder, 1)[1] for name in names} for q in QUESTIONS}


@pytest.mark.parametrize("question", QUESTIONS)
def test_all_systems_agree(recorded, answers, question):
    questions.agree(answers[question], question, recorded[1], SMALL)


def test_every_forced_explosion_is_an_event(answers):
    assert answers[4]["replay"][0]["event_step"].unique().tolist() == list(SMALL.explosions)


def test_the_training_recorded_is_the_same_bit_for_bit(recorded):
    folder, asked = recorded
    plain = np.load(folder / "replay" / "a" / "weights.npy")
    for name in {"h5py", "zarr", "TileDB cells"} - missing().keys():
        reader = SYSTEMS[name].reader((folder / name.replace(" ", "-") / "a",) * 2, SMALL)
        np.testing.assert_array_equal(reader.weights(0, asked.step), plain[asked.step])
        np.testing.assert_array_equal(reader.trajectory(asked.parameter), plain[:, asked.parameter])
    recorded_by_us = nbdyn.open(folder / "nbdyn" / "a").weights
    for step in (0, asked.step, SMALL.steps):
        np.testing.assert_array_equal(recorded_by_us.row(step), plain[step])


def test_bytes_with_and_without_weights(recorded):
    folder, _ = recorded
    for name in SYSTEMS.keys() - missing().keys():
        everything, rest = questions.n_bytes(name, folder)
        assert 0 < rest < everything


@pytest.mark.parametrize(
    ("question", "change"),
    [
        (1, lambda frame: frame.assign(value=frame["value"] * 1.001)),
        (1, lambda frame: frame.iloc[1:]),
        (1, lambda frame: frame.assign(sample=np.roll(frame["sample"], 1))),
        (2, lambda frame: frame.assign(parameter=frame["parameter"] + 1)),
        (2, lambda frame: frame.assign(value=frame["value"] * 1.001)),
        (3, lambda frame: frame.assign(distance=frame["distance"] + 1e-3)),
        (4, lambda frame: frame.iloc[:-50]),
        (5, lambda frame: frame.assign(sample=np.roll(frame["sample"], 1))),
    ],
)
def test_a_wrong_answer_is_found(recorded, answers, question, change):
    asked, right = recorded[1], answers[question]["replay"]
    check(question, right, right, asked, SMALL)
    with pytest.raises(AssertionError, match=f"question {question}"):
        check(question, right, (change(right[0]), *right[1:]), asked, SMALL)


def test_groups_are_as_wide_in_the_logarithm():
    assert grouped(np.array([0.0, 1.0, 2.1, 4.1, 7.9, 16.0]), 4).tolist() == [0, 1, 2, 3, 3, 4]


def test_the_table_has_a_line_for_every_system():
    results = {
        "record": {questions.PLAIN: [1.0, 2.0], "nbdyn": [2.0, 4.0], "replay": [1.0, 2.0]},
        "bytes": {"nbdyn": (2_000_000, 1_000_000), "replay": (1_000_000, 0)},
        "answers": {"nbdyn": {1: [[0.2, 0.1, 0.1]]}, "replay": {1: [[4.0, 2.0, 2.0]]}},
    }
    lines = questions.table(results, [1]).splitlines()
    assert "| nbdyn | 3.00 | 2.0 | 2.0 | 1.0 |" in lines
    assert "| best other / nbdyn | 20.0 / 20.0 |" in lines


def test_choose_finds_a_weight_that_comes_to_zero(recorded):
    folder, asked = recorded
    weights = np.load(folder / "replay" / "a" / "weights.npy")[:, asked.parameter]
    near = np.abs(weights) <= asked.within
    assert not near[0] and near.any()
