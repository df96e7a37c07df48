"""`compare`: measures on two tiny runs, and runs by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from query_problems import VISIT_LOSS, WEIGHTS, MemoryStore
from scipy.stats import binomtest

from nbdyn.errors import QueryError, UnknownName
from nbdyn.query import execute, explain
from nbdyn.store import backend

LOSS_B = np.array([4.0, 3.0, 2.5, 2.0, 1.5, 1.0])


@pytest.fixture
def runs() -> dict[str, MemoryStore]:
    """Two runs; `b` has snapshots only."""
    return {"tiny": MemoryStore(), "b": MemoryStore("b", weights="snapshots", loss=LOSS_B)}


def ask(text: str, runs: dict[str, MemoryStore]):
    return execute(text, runs["tiny"], runs.__getitem__)


def test_question_three(runs: dict[str, MemoryStore]):
    frame = ask("compare tiny, b by progress(loss), dist(w,init), acc, loss at step 5", runs)
    measures = ["progress(loss)", "dist(w, init)", "acc", "loss"]
    assert list(frame.columns) == ["run", "step", *measures, "loss_se", "acc_low", "acc_high", "n", "w_step"]
    assert list(frame["run"]) == ["tiny", "b"] and list(frame["step"]) == [5, 5]
    # Lmin = 0.5 is of `tiny`: (2 - 0.5) / 1.5 and (4 - 1) / 3.5
    np.testing.assert_allclose(frame["progress(loss)"], [1.0, 3 / 3.5])
    assert list(frame["w_step"]) == [5, 3]
    expected = [np.linalg.norm(np.float64(WEIGHTS[t]) - np.float64(WEIGHTS[0])) for t in (5, 3)]
    np.testing.assert_allclose(frame["dist(w, init)"], expected)
    np.testing.assert_allclose(frame["loss_se"], VISIT_LOSS[5].std(ddof=1) / np.sqrt(2))
    interval = binomtest(2, 2).proportion_ci(method="wilson")
    np.testing.assert_allclose(frame["acc_low"], interval.low)
    np.testing.assert_allclose(frame["acc_high"], interval.high)
    assert list(frame["n"]) == [2, 2]
    note = frame.attrs["nbdyn"]["note"]
    assert "Lmin = 0.5, over all steps of all compared runs" in note and "nearest earlier" in note
    assert frame.attrs["nbdyn"]["run"] == "tiny, b"
    assert [store.notes[0][2] for store in runs.values()] == [frame.attrs["nbdyn"]["query"]] * 2


def test_one_row_a_step_over_a_scope(runs: dict[str, MemoryStore]):
    frame = ask("compare tiny, b by loss, |grad|, lr during epoch 0", runs)
    assert frame[["run", "step"]].to_numpy().tolist() == [[run, step] for run in ("tiny", "b") for step in (0, 1, 2)]
    assert list(frame["|grad|"]) == [5, 2, 50] * 2
    assert list(frame["loss"])[3:] == [4.0, 3.0, 2.5]
    assert len(ask("compare tiny, b by lr", runs)) == 12


@pytest.mark.parametrize("chunk", [1, 10**6])
def test_distances_in_chunks(runs: dict[str, MemoryStore], chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nbdyn.query.rows.CHUNK_BYTES", chunk)
    frame = ask("compare tiny, b by dist(w, init)", runs)
    steps = [0, 1, 2, 3, 4, 5, 0, 0, 0, 3, 3, 3]
    assert list(frame["w_step"]) == steps
    expected = np.linalg.norm(np.float64(WEIGHTS[steps]) - np.float64(WEIGHTS[0]), axis=1)
    np.testing.assert_allclose(frame["dist(w, init)"], expected)


def test_the_final_weights_can_be_compared(runs: dict[str, MemoryStore]):
    assert list(ask("compare tiny, b by dist(w, init) at step 6", runs)["w_step"]) == [6, 6]


def test_beyond_the_end(runs: dict[str, MemoryStore]):
    for text in ("compare tiny, b by loss at step 6", "compare tiny, b by loss during steps 2..6"):
        with pytest.raises(QueryError, match="step 6 is not recorded; the last step of tiny is 5"):
            ask(text, runs)


def test_no_progress_is_nan_and_told(runs: dict[str, MemoryStore]):
    runs["b"].loss = np.full(6, 0.5)
    frame = ask("compare tiny, b by progress(loss) at step 3", runs)
    assert np.isnan(frame["progress(loss)"][1])
    assert "never came below its first loss" in frame.attrs["nbdyn"]["note"]


def test_different_beginnings_are_told(runs: dict[str, MemoryStore]):
    runs["b"].weights.rows = WEIGHTS + 1
    assert "start from different weights" in ask("compare tiny, b by dist(w, init)", runs).attrs["nbdyn"]["note"]


def test_explain_names_each_run(runs: dict[str, MemoryStore]):
    frame = explain("compare tiny, b by dist(w, init) at step 5", runs["tiny"], runs.__getitem__)
    assert list(frame["run"]) == ["tiny", "tiny", "b", "b"]
    assert list(frame["how"]) == ["stored", "stored", "stored", "stored; nearest earlier snapshot"]
    assert not runs["b"].weights.reads


def test_an_unknown_run_names_its_neighbour(tmp_path: Path):
    store = MemoryStore()
    store.uri = str(tmp_path / "tiny")
    backend.tiledb().group_create(str(tmp_path / "tiny-2"))
    (tmp_path / "data").mkdir()
    with pytest.raises(UnknownName) as caught:
        execute("compare tiny, tiny-3 by loss", store)
    assert str(caught.value) == (
        'no run "tiny-3" here or beside tiny; did you mean "tiny-2"?\n  compare tiny, tiny-3 by loss\n                ^'
    )
