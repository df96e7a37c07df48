"""`last N samples before ...`: events and the visits before them, counted by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from query_problems import MemoryStore

from nbdyn.errors import NotRecorded, QueryError, UnknownName
from nbdyn.query import execute
from nbdyn.query.events import crossing, rising

COLUMNS = ["event", "event_step", "before", "step", "position", "epoch", "sample", "class", "loss", "correct"]


def moments(frame: pd.DataFrame) -> list[int]:
    """The step of each event."""
    return frame.drop_duplicates("event")["event_step"].tolist()


def note(frame: pd.DataFrame) -> str:
    return frame.attrs["nbdyn"].get("note", "")


@pytest.mark.parametrize(
    ("event", "steps"),
    [
        ("fc1.weight[0,0] becomes 0", [2]),
        ("every fc1.weight[0,0] becomes 0 exactly", [2, 5]),
        ("every fc1.weight[0,0] becomes 0 within 0.11", [2]),
        ("every fc1.weight[0,0] becomes 0.2 within 0.15", [1, 6]),
        ("every fc1.weight[0,0] crosses 0", [2, 5]),
        ("every fc1.weight[0,1] crosses 0", [1, 2, 6]),
        ("fc1.weight[1,1] becomes 0 within 1e-6", [1]),
        ("fc1.bias[0] becomes 0", [4]),
        ("every fc1.bias[1] crosses 2.5", [3]),
        ("every fc1.bias[1] crosses 3", [3]),
        ("every fc1.bias[1] becomes 6", [6]),
        ("every fc1.weight[0,0] becomes 0 during steps 3..6", [5]),
        ("every fc1.weight[0,0] becomes 0 during epoch 0", [2]),
        ("every fc1.bias[1] becomes 6 during epoch 1", [6]),
        ("every fc1.weight[0,1] crosses 0 at step 2", [2]),
        ("loss > 5", [2]),
        ("every loss < 1.8 and |grad| < 100", [1, 3, 5]),
        ("every |grad| > 4", [2]),
        ("nan(loss)", [4]),
        ("skipped", [2]),
        ("not loss > 1.2", [3]),
        ("every acc = 50%", [1, 3]),
    ],
)
@pytest.mark.parametrize("chunk", [1, 10**6])
def test_events(store: MemoryStore, event: str, steps: list[int], chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nbdyn.query.rows.CHUNK_BYTES", chunk)
    # An event at step 0 has no samples before it, so it is seen in the note only.
    assert moments(execute(f"last 1 samples before {event}", store)) == steps


def test_the_samples_before_in_order(store: MemoryStore):
    frame = execute("last 3 samples before every fc1.weight[0,0] becomes 0", store)
    assert list(frame.columns) == COLUMNS
    assert frame[["event", "event_step", "before", "step", "position", "sample"]].to_numpy().tolist() == [
        [0, 2, 3, 0, 1, 1],
        [0, 2, 2, 1, 0, 2],
        [0, 2, 1, 1, 1, 3],
        [1, 5, 3, 3, 1, 0],
        [1, 5, 2, 4, 0, 1],
        [1, 5, 1, 4, 1, 2],
    ]
    assert frame["loss"].tolist()[:3] == [3.0, 1.0, 2.0]
    assert frame["correct"].tolist()[:3] == [0, 1, 0]
    assert note(frame) == ""


def test_a_short_history_is_told(store: MemoryStore):
    frame = execute("last 50 samples before loss > 5", store)
    assert list(frame["before"]) == [4, 3, 2, 1]
    assert note(frame) == "event 0 at step 2: only 4 of 50 samples before it"


def test_an_event_at_the_first_step_counts_and_has_no_history(store: MemoryStore):
    frame = execute("last 2 samples before every loss > 1.6", store)
    assert moments(frame) == [2]
    assert list(frame["event"]) == [1, 1]
    assert note(frame) == "event 0 at step 0: only 0 of 2 samples before it"


def test_exact_is_in_the_type_of_the_weights(store: MemoryStore):
    assert "event 0 at step 0" in note(execute("last 1 samples before fc1.weight[1,0] becomes 0.1 exactly", store))


def test_several_parameters_are_separate_events(store: MemoryStore):
    frame = execute("last 1 samples before every fc1.* crosses 0", store)
    assert list(frame.columns) == [*COLUMNS[:2], "parameter", "weight", *COLUMNS[2:]]
    assert frame[["event_step", "parameter", "weight"]].to_numpy().tolist() == [
        [1, 1, "fc1.weight[0,1]"],
        [2, 0, "fc1.weight[0,0]"],
        [2, 1, "fc1.weight[0,1]"],
        [4, 4, "fc1.bias[0]"],
        [5, 0, "fc1.weight[0,0]"],
        [6, 1, "fc1.weight[0,1]"],
    ]
    firsts = execute("last 1 samples before fc1.* crosses 0", store)
    assert firsts[["event_step", "parameter"]].to_numpy().tolist() == [[1, 1], [2, 0], [4, 4]]


@pytest.mark.parametrize(
    ("event", "told"),
    [
        ("fc1.weight[0,0] becomes 0.45", "no step in 0..6 where fc1.weight[0,0] becomes 0.45 exactly; "
                                         "nearest |w - 0.45| = 0.05 at step 0"),
        ("fc1.weight crosses -7", "no step in 0..6 where fc1.weight crosses -7; "
                                  "nearest |w - -7| of fc1.weight[0,1] = 6 at step 1"),
        ("loss > 7", "no step in 0..5 where loss > 7; nearest loss = 6 at step 2"),
        ("loss > 7 and skipped", "no step in 0..5 where loss > 7 and skipped"),
        ("loss > 7 at step 4", "no step in 4..4 where loss > 7; its value is NaN throughout"),
        ("fc1.weight[1,0] becomes 0.1 within 0.01 during epoch 1",
         "no step in 3..6 where fc1.weight[1,0] becomes 0.1 within 0.01 newly: it held at step 2 already, "
         "before the scope"),
    ],
)  # fmt: skip
def test_no_event_says_how_near_it_came(store: MemoryStore, event: str, told: str):
    frame = execute(f"last 5 samples before {event}", store)
    assert len(frame) == 0 and list(frame.columns)[-9:][-1] == "correct"
    assert note(frame).startswith(told)


def test_nan_weights_never_fire_quietly(store: MemoryStore):
    frame = execute("last 1 samples before fc1.weight[0,1] becomes 5", store)
    assert note(frame).endswith("it is NaN at some steps, first at step 3; NaN never fires")
    frame = execute("last 1 samples before fc1.weight becomes 5", store)
    assert note(frame).endswith("1 of 4 parameters are NaN at some steps, first at step 3; NaN never fires")


def test_snapshots_cannot_answer():
    with pytest.raises(NotRecorded) as caught:
        execute("last 5 samples before fc1.weight[0,0] becomes 0", MemoryStore(weights="snapshots"))
    assert str(caught.value) == (
        '"becomes" needs the weights of every step; tiny holds snapshots, one every 3 steps, and no per-sample '
        'gradients to rebuild those between from. Record with per_sample=True or weights="every", or train again '
        "between two snapshots: run.replay(t0, t1, model, loss_fn, data)."
    )


def test_samples_that_nobody_recorded(store: MemoryStore, monkeypatch: pytest.MonkeyPatch):
    steps = store.read_steps(0, 6) | {"batch_size": np.zeros(6, int)}
    monkeypatch.setattr(
        store, "read_steps", lambda start, stop: {name: values[start:stop] for name, values in steps.items()}
    )
    with pytest.raises(NotRecorded, match="does not know its samples"):
        execute("last 5 samples before loss > 5", store)


def test_too_many_events_are_refused(store: MemoryStore, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nbdyn.query.events.MAX_ROWS", 10)
    with pytest.raises(QueryError, match="6 events with 3 samples each"):
        execute("last 3 samples before every all crosses 0", store)


def test_the_name_of_a_step_field_is_no_parameter(store: MemoryStore):
    with pytest.raises(UnknownName, match='no parameter tensor "loss"'):
        execute("last 3 samples before loss becomes 0", store)


@pytest.mark.parametrize("rows", [1, 4, 10**6])
def test_blocks_of_visits_give_the_same_answer(store: MemoryStore, rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nbdyn.query.history.BLOCK_ROWS", rows)
    frame = execute("last 3 samples before every fc1.weight[0,1] crosses 0", store)
    assert frame.groupby("event")["sample"].agg(list).tolist() == [[0, 1], [1, 2, 3], [2, 3, 4]]


# Against the definition, step by step -----------------------------------------------------------------------------


@given(st.lists(st.booleans(), max_size=12))
def test_rising(truth: list[bool]):
    expected = [value and (t == 0 or not truth[t - 1]) for t, value in enumerate(truth)]
    assert rising(np.array(truth, dtype=bool)).tolist() == expected


@given(st.lists(st.sampled_from([-1.0, 0.0, 1.0, float("nan")]), max_size=12))
def test_crossing(distance: list[float]):
    def crosses(before: float, after: float) -> bool:
        return before * after < 0 or (after == 0 and before in (-1.0, 1.0))

    expected = [t > 0 and crosses(distance[t - 1], distance[t]) for t in range(len(distance))]
    assert crossing(np.array(distance)).tolist() == expected
