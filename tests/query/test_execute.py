"""Answers on a run that can be checked with the eye: `show`, `explain`, provenance and the log."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from query_problems import ACCURACY, LOSS, WEIGHTS, MemoryStore

from nbdyn.errors import NotRecorded, QueryError, UnknownName
from nbdyn.query import execute, explain


def note(frame: pd.DataFrame) -> str:
    return frame.attrs["nbdyn"].get("note", "")


# Steps ------------------------------------------------------------------------------------------------------------


def test_fields_as_recorded(store: MemoryStore):
    frame = execute("show loss, acc, |grad|, `val loss`, `mean`, lr, lr_1", store)
    assert list(frame.columns) == ["step", "loss", "acc", "|grad|", "`val loss`", "`mean`", "lr", "lr_1"]
    np.testing.assert_array_equal(frame["loss"], LOSS)
    np.testing.assert_array_equal(frame["acc"], ACCURACY)
    np.testing.assert_array_equal(frame["|grad|"], [5, 2, 50, 1, np.nan, 0])
    np.testing.assert_array_equal(frame["`val loss`"], np.arange(6) * 10)


@pytest.mark.parametrize(
    ("scope", "steps"),
    [
        ("", [0, 1, 2, 3, 4, 5]),
        ("over all", [0, 1, 2, 3, 4, 5]),
        ("at step 2", [2]),
        ("during steps 1..3", [1, 2, 3]),
        ("during epoch 1", [3, 4, 5]),
        ("during epochs 0..1", [0, 1, 2, 3, 4, 5]),
        ("during steps 4..99", [4, 5]),
        ("where loss > 1.5", [0, 2]),
        ("where not loss > 1.5", [1, 3, 4, 5]),
        ("where skipped", [2]),
        ("where nan(loss) or acc = 100% and epoch = 1", [4, 5]),
        ("where |grad| / 5 = 1", [0]),
        ("where inf(1 / |grad|)", [5]),
    ],
)
def test_scopes_are_inclusive_and_conditions_hold(store: MemoryStore, scope: str, steps: list[int]):
    assert list(execute(f"show loss {scope}", store)["step"]) == steps


def test_only_the_needed_steps_are_read(store: MemoryStore):
    execute("show loss at step 3", store)
    assert store.steps_read == [(3, 4)]
    execute("show w of fc1.bias during steps 2..3", store)
    assert store.weights.reads == [(2, 4)]


def test_arithmetic(store: MemoryStore):
    frame = execute("show sqrt(loss - 2) * 2, log2(batch_size), |1 - loss|, -loss at step 2", store)
    np.testing.assert_allclose(frame.iloc[0, 1:].astype(float), [4.0, 1.0, 5.0, -6.0])


def test_aggregates_per_epoch(store: MemoryStore):
    frame = execute("show loss, max(loss) - min(loss), count, count(loss), share(loss > 1.4), first(acc), last acc, "
                    "sum(batch_size) per epoch", store)  # fmt: skip
    assert list(frame["epoch"]) == [0, 1]
    expected = [[9.5 / 3, 4.5, 3, 3, 1.0, 0.0, 0.0, 6], [0.75, 0.5, 3, 2, 0.0, 0.5, 1.0, 6]]
    np.testing.assert_allclose(frame.iloc[:, 1:], expected)
    assert note(frame) == "NaN left out: loss at 1 of 6 rows"


def test_an_aggregate_without_per_is_over_the_scope(store: MemoryStore):
    frame = execute("show max(loss), count during epoch 0", store)
    assert frame.shape == (1, 2) and list(frame.iloc[0]) == [6.0, 3]


# Visits, samples, norms -------------------------------------------------------------------------------------------


def test_whole_tables(store: MemoryStore):
    visits = execute("show visits where sample = 1", store)
    assert list(visits["step"]) == [0, 4] and list(visits["position"]) == [1, 0]
    samples = execute("show samples where times_seen = 2 and forgotten = 0", store)
    assert list(samples["sample"]) == [0, 1, 2, 3, 4, 5]


def test_per_sample_from_visits(store: MemoryStore):
    frame = execute("show count, loss, share(correct = 1), last(step) per sample during epoch 0", store)
    assert list(frame["sample"]) == [0, 1, 2, 3, 4, 5]
    assert list(frame["loss"]) == [1, 3, 1, 2, 5, 7]
    assert list(frame["share(correct = 1)"]) == [0, 0, 1, 0, 0, 0]
    assert list(frame["last(step)"]) == [0, 0, 1, 1, 2, 2]


def test_fields_of_samples(store: MemoryStore):
    frame = execute("show first_learned, mean_loss per sample where first_learned > 2", store)
    assert list(frame["sample"]) == [1, 3, 4, 5]
    assert list(frame["first_learned"]) == [4, 5, 5, 3]


def test_an_aggregate_per_step_is_over_the_visits(store: MemoryStore):
    assert list(execute("show max(loss), share(correct = 0) per step at step 1", store).iloc[0]) == [1, 2.0, 0.5]


def test_unknown_samples_and_classes_are_left_out(store: MemoryStore, monkeypatch: pytest.MonkeyPatch):
    visits = store.read_visits(0, 6) | {
        "sample": np.array([-1] * 2 + [7] * 10),
        "correct": np.array([-1] * 6 + [1] * 6),
    }
    monkeypatch.setattr(store, "read_visits", lambda start, stop: visits)
    frame = execute("show count, share(correct = 1) per sample", store)
    assert frame.iloc[0].tolist() == [7, 10, 1.0]
    assert "2 of 12 visits left out: their sample is unknown" in note(frame)
    assert "correct at 4 of 10 rows" in note(frame)


def test_per_tensor(store: MemoryStore):
    frame = execute("show max(|grad|), |w| per tensor", store)
    assert list(frame["tensor"]) == ["fc1.bias", "fc1.weight"]
    np.testing.assert_array_equal(frame.iloc[:, 1:], [[40, 2], [30, 2]])
    pairs = execute("show |grad| per tensor, step at step 0", store)
    assert list(pairs.columns) == ["tensor", "step", "|grad|"] and list(pairs["|grad|"]) == [3, 4]


# Weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_tidy(store: MemoryStore):
    frame = execute("show w of fc1.* at step 6", store)
    assert list(frame.columns) == ["step", "parameter", "tensor", "value"]
    assert frame["value"].dtype == np.float32
    np.testing.assert_array_equal(frame["value"], WEIGHTS[6])
    assert list(frame["tensor"]) == ["fc1.weight"] * 4 + ["fc1.bias"] * 2


@pytest.mark.parametrize("chunk", [1, 100, 10**6])
def test_changes_across_chunks(store: MemoryStore, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nbdyn.query.rows.CHUNK_BYTES", chunk)
    frame = execute("show dw of fc1.bias[1]", store)
    assert list(frame["step"]) == [0, 1, 2, 3, 4, 5] and set(frame["value"]) == {1.0}
    whole = execute("show w of all where value = 0", store)
    assert list(zip(whole["step"], whole["parameter"], strict=True)) == [(0, 5), (2, 0), (3, 0), (4, 4), (5, 0)]


def test_the_final_weights_belong_to_the_last_epoch(store: MemoryStore):
    assert list(execute("show w of fc1.bias[1] during epoch 1", store)["step"]) == [3, 4, 5, 6]
    assert list(execute("show w of fc1.bias[1] during epoch 0", store)["step"]) == [0, 1, 2]


def test_snapshots_are_told():
    store = MemoryStore(weights="snapshots")
    frame = execute("show w of fc1.bias[1]", store)
    assert list(frame["step"]) == [0, 3, 6]
    assert note(frame) == "weights are stored at 3 of these 7 steps"
    with pytest.raises(NotRecorded, match='weights="every"'):
        execute("show dw of fc1.bias[1]", store)


def test_a_result_that_fills_the_memory_is_refused(store: MemoryStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nbdyn.query.rows.MAX_ROWS", 10)
    with pytest.raises(QueryError, match="42 rows"):
        execute("show w of all", store)
    with pytest.raises(QueryError, match="23 rows"):
        execute("show w of all where value > -9 during steps 3..6", store)


# Where it came from -----------------------------------------------------------------------------------------------


def test_provenance_is_a_dict_of_strings(store: MemoryStore):
    origin = execute("show  loss during epoch 1", store).attrs["nbdyn"]
    assert {name: origin[name] for name in ("run", "uri", "query", "steps")} == {
        "run": "tiny", "uri": "mem/tiny", "query": "show loss during epoch 1", "steps": "3..5",
    }  # fmt: skip
    assert all(isinstance(value, str) for value in origin.values())


def test_statements_are_logged(store: MemoryStore):
    execute("show  loss", store)
    explain("show acc", store)
    assert store.notes == [(6, "statement", "show loss")]


def test_a_read_only_place_still_answers():
    frame = execute("show loss", MemoryStore(writable=False))
    assert len(frame) == 6
    assert note(frame) == "not logged with tiny: read-only file system"


def test_explain(store: MemoryStore):
    frame = execute("explain show w of fc1.bias during steps 2..3", store)
    assert frame.to_dict("records") == [
        {"run": "tiny", "array": "weights", "columns": "value", "first_step": 2, "last_step": 3, "rows": 4, "bytes": 16,
         "seconds": pytest.approx(0.005, rel=1e-3), "how": "stored"},
    ]  # fmt: skip
    assert not store.weights.reads
    assert "step, parameter, tensor, value" in note(frame)
    events = explain("last 4 samples before fc1.bias[1] becomes 3", store)
    assert list(events["array"]) == ["weights", "visits"] and list(events["rows"]) == [7, 4]


def test_a_run_without_steps():
    store = MemoryStore()
    store.steps_committed = 0
    assert execute("show loss, acc", store).shape == (0, 3)
    assert execute("show max(loss)", store).shape == (1, 1)
    with pytest.raises(QueryError, match="tiny has no step yet"):
        execute("show loss at step 0", store)


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("show los", 'unknown field "los" of steps; did you mean "loss"?\n  show los\n       ^'),
        ("show loss, forgotten", 'unknown field "forgotten" of steps; ask show ... per sample.\n'
                                 "  show loss, forgotten\n             ^"),
        ("show forgoten per sample",
         'unknown field "forgoten" of visits; did you mean "forgotten" (show ... per sample)?\n'
                                     "  show forgoten per sample\n       ^"),
        ("show grad", "grad has one value a parameter; its norm is |grad|, its values: show w of fc1.*.\n"
                      "  show grad\n       ^"),
        ("show loss where lr", '"lr" is a number; a condition compares it: lr > 0.\n  show loss where lr\n'
                               "                  ^"),
        ("show loss at step 6", "step 6 is not recorded; the last step of tiny is 5.\n  show loss at step 6\n"
                                "            ^"),
        ("show loss during epoch 2", "epoch 2 is not recorded; tiny has epochs 0..1.\n  show loss during epoch 2\n"
                                     "            ^"),
        ("show tensor per tensor", "tensor is a name, no number; every result per tensor has it as a column.\n"
                                   "  show tensor per tensor\n       ^"),
        ("show w of fc1.weight, loss", "weights come as a frame of their own (one row a step and parameter): ask for "
                                       "them alone, without per.\n  show w of fc1.weight, loss\n            ^"),
        ("show samples during epoch 1", "the fields of samples speak of the whole run; for some steps take them of the "
                                        "visits: show count, mean(loss), share(correct = 1) per sample.\n"
                                        "  show samples during epoch 1\n               ^"),
    ],
)  # fmt: skip
def test_messages(store: MemoryStore, text: str, message: str):
    with pytest.raises(QueryError) as caught:
        execute(text, store)
    assert str(caught.value) == message


def test_an_unknown_parameter_has_a_caret(store: MemoryStore):
    with pytest.raises(UnknownName) as caught:
        execute("show w of fc1.wieght", store)
    assert str(caught.value) == (
        'no parameter tensor "fc1.wieght"; did you mean "fc1.weight"?\n  show w of fc1.wieght\n            ^'
    )
