"""The envelope keeps every extreme, whatever the cuts, in constant memory."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbdyn.store.envelope import Envelope


def brute_force(steps: np.ndarray, values: np.ndarray, origin: int, width: int) -> list[tuple]:
    """One tuple a bin that holds values: first, last, low, high, mean, nan_count."""
    rows = []
    for index in np.unique((steps - origin) // width):
        inside = (steps - origin) // width == index
        finite = values[inside & np.isfinite(values)]
        low, high, mean = (finite.min(), finite.max(), finite.mean()) if finite.size else (np.nan,) * 3
        rows.append((steps[inside].min(), steps[inside].max(), low, high, mean, inside.sum() - finite.size))
    return rows


def columns(envelope: Envelope) -> np.ndarray:
    return np.array(
        [envelope.first, envelope.last, envelope.low, envelope.high, envelope.mean, envelope.nan_count], dtype=float
    ).T


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.one_of(st.floats(-1e6, 1e6), st.sampled_from([np.nan, np.inf, -np.inf]))),
        min_size=1,
        max_size=300,
    ),
    st.lists(st.integers(1, 60), min_size=1, max_size=20),
    st.sampled_from([2, 4, 16, 800]),
    st.integers(0, 10**9),
)
def test_any_cut_equals_brute_force(series, cuts, bins, start):
    steps = start + np.cumsum([gap for gap, _ in series])
    values = np.array([value for _, value in series])
    envelope, at, turn = Envelope(bins), 0, 0
    while at < len(steps):
        n = cuts[turn % len(cuts)]
        envelope.add(steps[at : at + n], values[at : at + n])
        at, turn = at + n, turn + 1
    assert envelope.origin == steps[0]
    expected = np.array(brute_force(steps, values, envelope.origin, envelope.width), dtype=float)
    got = columns(envelope)
    exact = [0, 1, 2, 3, 5]
    np.testing.assert_array_equal(got[:, exact], expected[:, exact])
    np.testing.assert_allclose(got[:, 4], expected[:, 4], rtol=1e-9, atol=1e-6)
    assert len(got) <= bins
    assert envelope.size == len(series)


def test_a_spike_in_a_million_steps_survives():
    values = np.random.default_rng(0).normal(size=1_000_000)
    values[123_457] = 1e4
    envelope = Envelope()
    for at in range(0, values.size, 7_919):
        envelope.add(np.arange(at, min(at + 7_919, values.size)), values[at : at + 7_919])
    assert envelope.high.max() == 1e4
    assert envelope.low.min() == values.min()
    assert len(envelope.low) <= 800
    assert envelope.first[0] == 0 and envelope.last[-1] == 999_999


def test_gaps_leave_no_empty_rows():
    envelope = Envelope(bins=100)
    envelope.add([0, 50, 100], [1.0, 2.0, 3.0])
    assert envelope.first.tolist() == [0, 50, 100]
    assert envelope.width == 2 and envelope.final == 3.0


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="even number of bins"):
        Envelope(bins=7)
    envelope = Envelope()
    with pytest.raises(ValueError, match="one length"):
        envelope.add([1, 2], [1.0])
    envelope.add([10], [1.0])
    with pytest.raises(ValueError, match="step 9 lies before step 10"):
        envelope.add([9], [1.0])
