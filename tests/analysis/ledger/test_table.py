"""The ledger as people read it: the frame, HTML, Markdown and the picture, from entries that need no runs."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import pandas as pd
import pytest

from nbdyn.analysis.ledger import figures, table
from nbdyn.analysis.ledger.records import Hypothesis, hypotheses
from nbdyn.errors import NbdynError
from nbdyn.statistics.testing import benjamini_hochberg, holm

TIME = "2026-01-02T03:04:05.678+00:00"


class Book:
    """Entries as the ledger writes them, without hashes."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def declare(self, name: str, kind: str = "confirmatory", version: int = 1, level: float = 0.05, **more: Any) -> int:
        entry = {
            "event": "declared", "name": name, "version": version, "claim": "c", "measure": {"text": "mean(loss)"},
            "test": "> 0, t over runs", "runs": "a-*", "level": level, "found": [], "kind": kind,
            "reasons": [] if kind == "confirmatory" else ["data of a-0 was asked for before"], **more,
        }  # fmt: skip
        return self._add(entry)

    def test(self, of: int, p: float | None, event: str = "tested", kind: str = "", effect: float = 0.5) -> int:
        declared = self.entries[of]
        kind = kind or declared["kind"]
        numbers = {"effect": effect, "low": effect - 0.4, "high": effect + 0.4, "d": 2 * effect, "p": p, "least": 0.0}
        if p is None:
            numbers |= {"low": None, "high": None, "d": None}
        entry = {
            "event": event, "name": declared["name"], "version": declared["version"], "declaration": of, "kind": kind,
            "reasons": [] if kind == "confirmatory" else ["seen"], "n_runs": 5, "pairing": "", "values": [], **numbers,
        }  # fmt: skip
        return self._add(entry)

    def _add(self, entry: dict[str, Any]) -> int:
        self.entries.append(entry | {"n": len(self.entries), "time": TIME})
        return len(self.entries) - 1

    @property
    def found(self) -> list[Hypothesis]:
        return hypotheses(self.entries)

    def frame(self) -> pd.DataFrame:
        return table.frame(self.found, "runs")


@pytest.fixture
def book() -> Book:
    """Three confirmatory hypotheses, two of them tested, and two exploratory ones."""
    book = Book()
    places = [book.declare("one"), book.declare("two", level=0.01), book.declare("three")]
    places += [book.declare("look", "exploratory"), book.declare("see", "exploratory")]
    for place, p in zip(places, [0.01, 0.004, None, 0.02, 0.3], strict=True):
        if p is not None:
            book.test(place, p)
    return book


def test_the_frame(book: Book):
    frame = book.frame().set_index("name")
    assert frame.index.tolist() == ["one", "two", "three", "look", "see"]
    assert frame["kind"].tolist() == ["confirmatory"] * 3 + ["exploratory"] * 2
    # by hand: the untested third counts as p = 1
    assert frame["p_holm"].tolist() == pytest.approx([0.02, 0.012, np.nan, 0.04, 0.3], nan_ok=True)
    assert frame["p_bh"].tolist() == pytest.approx([0.015, 0.012, np.nan, 0.04, 0.3], nan_ok=True)
    assert frame["p_anytime"].tolist() == pytest.approx([0.02, 0.024, np.nan, 0.04, 1.0], nan_ok=True)
    verdicts = ["supported", "not supported", "not tested", "suggested", "not suggested"]
    assert frame["verdict"].tolist() == verdicts
    assert frame.loc["one", ["n", "effect", "low", "high", "d"]].tolist() == pytest.approx([5, 0.5, 0.1, 0.9, 1.0])
    assert frame["tested"].isna().tolist() == [False, False, True, False, False]
    assert str(frame["declared"].dtype).startswith("datetime64[") and frame["n"].dtype == "Int64"
    assert "further declarations can turn them back" in frame.reset_index().attrs["nbdyn"]["note"]


def test_families_are_holm_and_benjamini_hochberg_of_their_own():
    book, rng = Book(), np.random.default_rng(0)
    p = rng.random(12) ** 3
    for number, value in enumerate(p):
        book.test(book.declare(f"h{number}", "confirmatory" if number % 3 else "exploratory"), value)
    frame = book.frame().set_index("name")
    for kind in ("confirmatory", "exploratory"):
        mine = frame[frame["kind"] == kind]
        assert mine["p_holm"].to_numpy() == pytest.approx(holm(mine["p"]))
        assert mine["p_bh"].to_numpy() == pytest.approx(benjamini_hochberg(mine["p"]))


def test_an_empty_ledger_is_an_empty_frame():
    frame = Book().frame()
    assert len(frame) == 0 and list(frame.columns) == list(table.COLUMNS)
    assert "State of the ledger: `empty`" in table.markdown([], "")


def test_a_verdict_turns_back_when_more_is_declared(book: Book):
    assert book.frame()["verdict"][0] == "supported"
    for number in range(4):
        book.declare(f"more-{number}")
    assert book.frame()["verdict"][0] == "not supported"


def test_states_of_replication():
    book = Book()
    place = book.declare("one")
    book.test(place, 0.01)
    assert book.found[0].state == "tested"
    book.test(place, 0.2, "replicated")
    book.test(place, 0.01, "replicated")
    book.test(place, 0.01, "replicated", effect=-0.5)  # the other way round: none
    assert book.found[0].state == "replicated 1/3"
    book.test(place, 0.001, "replicated", "exploratory")
    assert book.found[0].state == "replicated 1/3 (+1 exploratory)" and book.found[0].p_holm == 0.01


def test_a_test_that_turns_exploratory_leaves_its_place_in_the_family():
    book = Book()
    one, two = book.declare("one"), book.declare("two")
    book.test(one, 0.02)
    book.test(two, 0.001, kind="exploratory")
    first, second = book.found
    assert (first.p_holm, first.family) == (pytest.approx(0.04), 2)
    assert (second.p_holm, second.family, second.verdict) == (0.001, 1, "suggested")


def test_html_and_markdown_escape_what_users_write(book: Book):
    evil = "<script>alert(1)</script> | *a* `b` [c](d)\n# é 深"
    place = book.declare(
        "evil", claim=evil, measure={"text": "f (Python, 12)", "source": "def f(run):\n    return 1\n"}
    )
    book.test(place, 0.5)
    one = book.found[-1]
    shown = one._repr_html_()
    assert "<script>" not in shown and html.escape(evil) in shown
    text = table.markdown(book.found, "ab12")
    assert "<script>" not in text.replace("\\<script\\>", "") and "\n# é" not in text
    assert "\\<script\\>alert(1)\\</script\\> \\| \\*a\\* \\`b\\` \\[c\\](d) \\# é 深" in text
    assert "    def f(run):\n        return 1" in text and "`ab12`" in text
    rows = [line for line in text.splitlines() if line.startswith("| evil")]
    assert len(rows) == 1 and rows[0].count("|") == 14


def test_what_is_said_of_a_hypothesis(book: Book):
    said = dict(table.describe(book.found[1]))
    assert said["test"] == "> 0, t over runs, level 0.01"
    assert said["outcome"] == "effect 0.5, 99 % interval 0.1 .. 0.9, d 1, n = 5, p = 0.004"
    assert said["verdict"].startswith("not supported; over 3 confirmatory hypotheses now: p 0.012 (Holm)")
    assert "next" in dict(table.describe(book.found[2]))
    assert (
        "data of a-0 was asked for before" not in said["kind"] and "seen" in dict(table.describe(book.found[3]))["kind"]
    )
    assert repr(book.found[1]).splitlines()[0] == "hypothesis: two"


def test_a_test_that_cannot_reach_its_level_says_so(book: Book):
    place = book.declare("small")
    book.entries[book.test(place, 0.0625)]["least"] = 0.0625
    assert "this test cannot give p below 0.062, whatever the data" in dict(table.describe(book.found[-1]))["outcome"]


def test_the_picture_has_a_row_for_each_test(book: Book):
    place = book.declare("flat")
    book.test(place, None, effect=0.3)  # no interval: left out
    book.test(0, 0.03, "replicated", effect=0.4)
    chart = figures.forest(book.found).to_dict()
    data = {row["label"]: row for rows in chart["datasets"].values() for row in rows if "label" in row}
    assert set(data) == {"one", "one, replication 1", "two", "look", "see"}
    assert (data["one"]["d"], data["one"]["low"], data["one"]["high"]) == pytest.approx((1.0, 0.2, 1.8))
    with pytest.raises(NbdynError, match="no hypothesis of this ledger is tested"):
        figures.forest(Book().found)
