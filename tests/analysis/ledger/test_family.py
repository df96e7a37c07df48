"""Verdicts over a family: published numbers, and the chance of a false finding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdyn.analysis.ledger.family import judge
from nbdyn.errors import Incompatible

# Benjamini and Hochberg (1995), section 4.1: fifteen p-values of a trial; Bonferroni and Hochberg find three, BH four.
TRIAL = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528,
         0.7590, 1.0]  # fmt: skip


def test_the_example_of_benjamini_and_hochberg():
    found = judge(TRIAL, 0.05)
    assert found.supported.sum() == 3 and (found.bh <= 0.05).sum() == 4


def test_holm_by_hand_and_levels():
    found = judge([0.01, 0.04, 0.03], [0.01, 0.1, 0.05])
    assert found.holm == pytest.approx([0.03, 0.06, 0.06])
    assert found.supported.tolist() == [False, True, False]
    assert found.anytime == pytest.approx([0.02, 0.24, 0.36])


def test_what_is_not_tested_counts():
    assert judge([0.01], 0.05).holm[0] == pytest.approx(0.01)
    waiting = judge([np.nan, 0.01, np.nan, np.nan], 0.05)
    assert waiting.holm[1] == pytest.approx(0.04) and np.isnan(waiting.holm[[0, 2, 3]]).all()
    assert waiting.bh[1] == pytest.approx(0.04) and not waiting.supported[0]
    assert judge([0.6, np.nan], 0.05).bh[0] == 1.0  # as p = 1, and no less


def test_an_empty_family():
    assert len(judge([], []).holm) == 0


def test_what_is_no_p_value_is_refused():
    with pytest.raises(Incompatible, match="not a p-value"):
        judge([1.2], 0.05)


p_values = st.lists(st.floats(0, 1), min_size=1, max_size=20)


@given(p_values, st.data())
def test_tests_that_come_in_never_take_a_finding_back(p: list[float], data: st.DataObject):
    when = data.draw(st.permutations(range(len(p))))
    level = data.draw(st.floats(0.001, 0.5))
    seen, before = np.full(len(p), np.nan), np.zeros(len(p), bool)
    for place in when:
        seen[place] = p[place]
        now = judge(seen, level)
        assert (now.supported | ~before).all() and np.array_equal(np.isnan(now.anytime), np.isnan(seen))
        before = now.supported


@given(p_values)
def test_orders_of_strictness(p: list[float]):
    found = judge(p, 0.05)
    assert (found.bh <= found.holm + 1e-12).all() and (found.holm >= np.array(p)).all()
    assert (found.anytime <= 1).all()


def simulate(researchers: int, size: int, false: float = 0.0) -> np.ndarray:
    """p-values of true nulls, (researchers, size); a share of them is of false nulls."""
    rng = np.random.default_rng(0)
    p = rng.random((researchers, size))
    return np.where(rng.random(p.shape) < false, p**6, p)


def test_family_wise_error_of_nulls_is_the_level():
    """All 20 nulls are true: by Holm the error is that of Bonferroni, 1 - (1 - 0.05 / 20)^20 = 4.88 %."""
    p = simulate(4_000, 20)
    wrong = np.mean([judge(row, 0.05).supported.any() for row in p])
    assert abs(wrong - (1 - (1 - 0.05 / 20) ** 20)) < 4 * np.sqrt(0.0488 * 0.9512 / 4_000)


def test_who_declares_in_view_of_outcomes_needs_anytime():
    """One declared after the other until one is found: 1 - prod(1 - l / k) for the verdict, less than l for anytime."""
    p = simulate(400, 20)
    verdict = np.mean([any(judge(row[: k + 1], 0.05).supported[k] for k in range(20)) for row in p])
    expected = 1 - np.prod(1 - 0.05 / np.arange(1, 21))
    assert abs(verdict - expected) < 4 * np.sqrt(expected * (1 - expected) / 400) and expected > 0.15
    anytime = np.mean([(judge(row, 0.05).anytime <= 0.05).any() for row in p])
    assert anytime < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 400)
