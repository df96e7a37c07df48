"""Hypotheses as they stand: what the entries of a ledger add up to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from nbdyn.analysis.ledger.family import judge

CONFIRMATORY, EXPLORATORY = "confirmatory", "exploratory"
TESTED, REPLICATED, DECLARED = "tested", "replicated", "declared"


@dataclass(frozen=True)
class Outcome:
    """A test that was made.

    Attributes:
        event: "tested" for the first, "replicated" for those on further runs.
        time: when, UTC.
        kind: "confirmatory" or "exploratory".
        reasons: why it is exploratory.
        n: runs (pairs; of two groups both).
        effect: mean less the value of the null, or difference of means, in the unit of the measure.
        low: lower end of its two-sided interval at the hypothesis' level, by Student's or Welch's t.
        high: upper end.
        d: Cohen's d.
        p: of this test alone; NaN where runs did not differ.
        least: the smallest p that the test could give with so many runs.
        values: of each run: run, created, steps, value; with the second group's below the first's.
        pairing: how runs were paired, "" where not.
        entry: its number in the ledger.
    """

    event: str
    time: str
    kind: str
    reasons: tuple[str, ...]
    n: int
    effect: float
    low: float
    high: float
    d: float
    p: float
    least: float
    values: tuple[dict[str, Any], ...]
    pairing: str
    entry: int

    @property
    def runs(self) -> pd.DataFrame:
        """One row a run: group (0 or 1), run, created, steps, value."""
        return pd.DataFrame(list(self.values), columns=["group", "run", "created", "steps", "value"])

    @property
    def keys(self) -> set[tuple[str, str]]:
        """Identities of the runs."""
        return {(value["run"], value["created"]) for value in self.values}


@dataclass(frozen=True)
class Hypothesis:
    """A declaration, its test and its replications.

    Attributes:
        name: the name.
        version: 1, or more after changes.
        claim: what is expected, in words.
        measure: one number a run, in its normal form.
        source: of a measure in Python; "" else.
        sha256: of the source.
        test: in its normal form.
        runs: the pattern of the runs' names.
        level: of the test.
        declared: when, UTC.
        found: runs that were there at the declaration, with the looks at them; both groups.
        declared_kind: the kind at the declaration.
        declared_reasons: why it was exploratory then.
        entry: its number in the ledger.
        outcome: the first test, None before it.
        replications: tests on further runs.
        amended: whether a later version took its place.
        corrected: whether that was before any data was seen, so that only the later one counts.
        p_holm: adjusted over the family of its kind, as the ledger is now (`nbdyn.analysis.ledger.family`); or NaN.
        p_bh: the same by Benjamini and Hochberg.
        p_anytime: the same, valid for who declares in view of outcomes.
        family: hypotheses in the family.
    """

    name: str
    version: int
    claim: str
    measure: str
    source: str
    sha256: str
    test: str
    runs: str
    level: float
    declared: str
    found: tuple[dict[str, Any], ...]
    declared_kind: str
    declared_reasons: tuple[str, ...]
    entry: int
    outcome: Outcome | None = None
    replications: tuple[Outcome, ...] = ()
    amended: bool = False
    corrected: bool = False
    p_holm: float = math.nan
    p_bh: float = math.nan
    p_anytime: float = math.nan
    family: int = field(default=0)

    @property
    def kind(self) -> str:
        """Confirmatory: declared before anybody asked for the data of its runs, as far as logbooks know."""
        return self.declared_kind if self.outcome is None else self.outcome.kind

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is exploratory."""
        return self.declared_reasons if self.outcome is None else self.outcome.reasons

    @property
    def withdrawn(self) -> bool:
        """Whether it was replaced before it was tested. Unless `corrected`, it still counts in the family."""
        return self.amended and self.outcome is None

    @property
    def state(self) -> str:
        """One of declared, tested, replicated n/m (at its level, of confirmatory ones); withdrawn; with "amended"."""
        if self.withdrawn:
            return "withdrawn"
        if self.outcome is None:
            return DECLARED
        planned = [again for again in self.replications if again.kind == CONFIRMATORY]
        came = sum(agrees(again, self.level, self.outcome) for again in planned)
        state = f"{REPLICATED} {came}/{len(planned)}" if planned else TESTED
        extra = len(self.replications) - len(planned)
        return state + (f" (+{extra} exploratory)" if extra else "") + (", amended" if self.amended else "")

    @property
    def verdict(self) -> str:
        """In words, by the Holm-adjusted p; of exploratory ones never "supported"."""
        if self.withdrawn:
            return ""
        if self.outcome is None:
            return "not tested"
        if math.isnan(self.outcome.p):
            return "none: the runs do not differ"
        if self.kind == EXPLORATORY:
            return "suggested" if self.p_holm <= self.level else "not suggested"
        return "supported" if self.p_holm <= self.level else "not supported"

    def __repr__(self) -> str:
        from nbdyn.analysis.ledger.table import describe

        return "\n".join(f"{key}: {value}" for key, value in describe(self))

    def _repr_html_(self) -> str:
        from nbdyn.analysis.ledger.table import as_html

        return as_html(self)


def agrees(again: Outcome, level: float, first: Outcome) -> bool:
    """Whether a replication is below the level, in the direction of the first test."""
    return again.p <= level and (again.effect >= 0) == (first.effect >= 0)


def hypotheses(entries: Iterable[dict[str, Any]]) -> list[Hypothesis]:
    """All hypotheses of a ledger in the order of their declarations, every version, with adjusted p-values.

    Args:
        entries: of the chain, in order.
    """
    found: dict[int, Hypothesis] = {}
    latest: dict[str, int] = {}
    for entry in entries:
        if entry["event"] == DECLARED:
            before = latest.get(entry["name"])
            if before is not None:
                corrected = found[before].outcome is None and entry["kind"] == CONFIRMATORY
                found[before] = replace(found[before], amended=True, corrected=corrected)
            latest[entry["name"]] = entry["n"]
            found[entry["n"]] = _declared(entry)
        else:
            place = entry["declaration"]
            outcome = _outcome(entry)
            one = found[place]
            found[place] = (
                replace(one, outcome=outcome)
                if entry["event"] == TESTED
                else replace(one, replications=(*one.replications, outcome))
            )
    return _judged(list(found.values()))


def _judged(found: Sequence[Hypothesis]) -> list[Hypothesis]:
    judged = list(found)
    declared = [place for place, one in enumerate(found) if one.declared_kind == CONFIRMATORY]
    confirmatory = [place for place in declared if not found[place].corrected]
    exploratory = [place for place, one in enumerate(found) if one.kind == EXPLORATORY and not one.withdrawn]
    for kind, places in ((CONFIRMATORY, confirmatory), (EXPLORATORY, exploratory)):
        p = [_p_of(found[place], kind) for place in places]
        order = [declared.index(place) + 1 for place in places] if kind == CONFIRMATORY else None
        adjusted = judge(p, [found[place].level for place in places], order)
        for number, place in enumerate(places):
            if found[place].kind == kind:
                holm, bh, anytime = (float(values[number]) for values in adjusted[:3])
                judged[place] = replace(found[place], p_holm=holm, p_bh=bh, p_anytime=anytime, family=len(places))
    return judged


def _p_of(one: Hypothesis, kind: str) -> float:
    """Its p in the family of a kind: NaN where it is not tested, or the test is of the other kind."""
    return math.nan if one.outcome is None or one.outcome.kind != kind else one.outcome.p


def _declared(entry: dict[str, Any]) -> Hypothesis:
    measure = entry["measure"]
    return Hypothesis(
        name=entry["name"], version=entry["version"], claim=entry["claim"], measure=measure["text"],
        source=measure.get("source", ""), sha256=measure.get("sha256", ""), test=entry["test"], runs=entry["runs"],
        level=entry["level"], declared=entry["time"], found=tuple(entry["found"]), declared_kind=entry["kind"],
        declared_reasons=tuple(entry["reasons"]), entry=entry["n"],
    )  # fmt: skip


def _outcome(entry: dict[str, Any]) -> Outcome:
    numbers = {name: _number(entry[name]) for name in ("effect", "low", "high", "d", "p", "least")}
    return Outcome(
        event=entry["event"], time=entry["time"], kind=entry["kind"], reasons=tuple(entry["reasons"]),
        n=entry["n_runs"], values=tuple(entry["values"]), pairing=entry["pairing"], entry=entry["n"], **numbers,
    )  # fmt: skip


def _number(value: float | None) -> float:
    """JSON has no NaN; the ledger writes null."""
    return math.nan if value is None else float(value)
