"""The ledger: declare a hypothesis before its data is seen, test it once, replicate it on further runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from nbdyn.analysis.ledger import chain as _chain
from nbdyn.analysis.ledger import looks, table
from nbdyn.analysis.ledger.chain import Chain
from nbdyn.analysis.ledger.language import Lca, Measure, Test, check_name, parse_cell, parse_measure, parse_test
from nbdyn.analysis.ledger.looks import Known
from nbdyn.analysis.ledger.measures import Function, Opened, as_entry
from nbdyn.analysis.ledger.records import (
    CONFIRMATORY,
    DECLARED,
    EXPLORATORY,
    TESTED,
    Hypothesis,
    Outcome,
    hypotheses,
)
from nbdyn.analysis.ledger.trial import check_apart, check_enough, choose, decide, entry_of, key_of, say_no_new
from nbdyn.errors import Incompatible, UnknownName, did_you_mean
from nbdyn.settings import say
from nbdyn.store import Store
from nbdyn.store.backend import join, normalize
from nbdyn.store.provenance import package_version

AMENDED = "amended after"
"""How the reasons begin that a change gives."""
Asked = str | Callable[[Any], Any]
"""A measure as it is given: a text, or a function from a run to a number."""


class Ledger:
    """The hypotheses of a folder of runs, in `hypotheses.jsonl` beside them. `nbdyn.ledger(folder)` opens it.

    Everything is read from the file each time, so that several processes may use one ledger.

    Args:
        folder: the folder of runs; it need not be there yet.
        opened: what a measure in Python is given for a run.

    Raises:
        Incompatible: for an object store.
        Tampered: if an entry was changed, moved or removed, as far as chain and logbooks tell.
    """

    def __init__(self, folder: str | os.PathLike[str], opened: Opened = lambda store: store) -> None:
        looks.check_local(os.fspath(folder))
        self.folder = normalize(folder)
        self.path = join(self.folder, _chain.FILE)
        self._opened = opened
        self.verify()

    def verify(self) -> int:
        """Check every entry, and what the logbooks of all runs say of them; the number of entries.

        An append that was cut short, and runs that are known to another ledger, are said.

        Raises:
            Tampered: names the entry.
        """
        chain, doubts = self._checked()
        for sentence in doubts:
            say(sentence)
        if chain.torn:
            say(f"{self.path}: the last append was cut short ({len(chain.torn)} bytes); the next one removes them.")
        return len(chain.entries)

    def _checked(self) -> tuple[Chain, list[str]]:
        """The chain, and what the logbooks of runs leave in doubt."""
        books = looks.logbooks(self.folder)
        chain = _chain.read(self.path)
        return chain, looks.check_anchors(books, chain, self.path)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Every entry as it was written, in order."""
        return list(_chain.read(self.path).entries)

    @property
    def hypotheses(self) -> list[Hypothesis]:
        """Every version of every hypothesis, in the order of declarations."""
        return hypotheses(_chain.read(self.path).entries)

    def __len__(self) -> int:
        return len(self.hypotheses)

    def __getitem__(self, name: str) -> Hypothesis:
        """The latest version of a hypothesis.

        Raises:
            UnknownName: with the nearest name.
        """
        found = _latest(self.hypotheses, name)
        if found is None:
            names = dict.fromkeys(one.name for one in self.hypotheses)
            raise UnknownName(f'no hypothesis is called "{name}"; {did_you_mean(name, names)}')
        return found

    # Declaring ----------------------------------------------------------------------------------------------------

    def declare(
        self, name: str, claim: str, measure: Asked, test: str, runs: str | os.PathLike[str], level: float = 0.05
    ) -> Hypothesis:
        """Write down a hypothesis; no data is read but what the logbooks say of looks at it.

        The same again changes nothing. Anything else under the same name is an amendment: the earlier version stays,
        and the new one is exploratory if data of its runs, or an outcome, was seen.

        Args:
            name: letters, digits, "-", "_" and ".".
            claim: in words.
            measure: one number a run: a text (`nbdyn.analysis.ledger.language` says which), or a function of a run.
            test: such as "> 0, t over runs".
            runs: the pattern of the runs' names in the folder: "resnet-*", or with the folder before it.
            level: of the test, 0 < level <= 0.5.

        Raises:
            QueryError: if measure or test cannot be read, with a caret.
            Incompatible: for runs of another folder, or a level out of range.
            Tampered: if the ledger was changed.
        """
        check_name(name)
        if not claim.strip():
            raise Incompatible("the claim is missing: say in words what you expect.")
        if not 0 < level <= 0.5:
            raise Incompatible(f"level={level} is not in 0..0.5; give one such as 0.05.")
        parsed, tested = _measure(measure), parse_test(test)
        frozen = {
            "claim": claim.strip(),
            "measure": as_entry(parsed),
            "test": str(tested),
            "runs": self._names(runs),
            "level": float(level),
        }
        stores = looks.stores(self.folder, frozen["runs"])
        others = self._others(tested)
        check_apart(stores, others)
        found = [looks.known(store) for store in (*stores, *others)]

        def make(chain: Chain) -> dict[str, Any] | None:
            before = _last_declaration(chain, name)
            if before is not None and {key: before[key] for key in frozen} == frozen:
                return None
            reasons = _seen(found, parsed) + self._amended(before, chain, found)
            return {
                "event": DECLARED, "name": name, "version": 1 if before is None else before["version"] + 1, **frozen,
                "found": [one.as_entry() for one in found], "kind": EXPLORATORY if reasons else CONFIRMATORY,
                "reasons": reasons, "nbdyn": package_version(),
            }  # fmt: skip

        self._append(make, [*stores, *others])
        return self[name]

    def _amended(self, before: dict[str, Any] | None, chain: Chain, found: Sequence[Known]) -> list[str]:
        """Why a change of an earlier version makes the new one exploratory."""
        if before is None:
            return []
        version = f"version {before['version']}"
        earlier = [reason for reason in before["reasons"] if reason.startswith(AMENDED)]  # two changes wash nothing off
        if any(entry.get("declaration") == before["n"] for entry in chain.entries):
            return [*earlier, f"{AMENDED} {version} was tested"]
        stores = [*looks.stores(self.folder, before["runs"]), *self._others(parse_test(before["test"]))]
        now = {one.key: one for one in [*found, *map(looks.known, stores)]}
        if any(one.looks for one in now.values()):
            return [*earlier, f"{AMENDED} data of runs of {version} was seen"]
        gone = [run["run"] for run in before["found"] if (run["run"], run["created"]) not in now]
        return [*earlier, *([f"{AMENDED} {', '.join(gone)} of {version} was taken away"] if gone else [])]

    # Testing ------------------------------------------------------------------------------------------------------

    def test(self, name: str, measure: Asked | None = None) -> Hypothesis:
        """Test a declared hypothesis; if it is tested, replicate it, on runs that were recorded since alone.

        The first outcome stays. With no new runs nothing is computed.

        Args:
            name: of the hypothesis; its latest version is taken.
            measure: the function again, if the measure is one: its source must be the same.

        Raises:
            UnknownName: if it was not declared.
            Incompatible: with fewer than two runs (or than the test says), one that is still being recorded, two that
                are copies, or a value that is not finite. Nothing is then kept.
            NotRecorded: if a run does not hold what is measured.
            Tampered: if the ledger was changed.
        """
        one = self[name]
        parsed, tested = _same_measure(one, measure), parse_test(one.test)
        done = set[tuple[str, str]]().union(*(outcome.keys for outcome in _outcomes(one)))
        groups = [looks.stores(self.folder, one.runs), self._others(tested)]
        looks.check_distinct(groups)
        fresh = [[store for store in group if key_of(store) not in done] for group in groups]
        wanted = 2 if tested.count is None else tested.count
        if one.outcome is not None and any(len(group) < wanted for group in fresh[: 1 + (tested.runs is not None)]):
            say_no_new(one, fresh, wanted)
            return one
        chosen = [choose(group, tested.count) for group in fresh]
        check_enough(one, chosen, wanted, tested)
        known = [looks.known(store) for group in (groups if one.outcome is None else chosen) for store in group]
        keys = {store_key for group in chosen for store_key in map(key_of, group)}
        reasons = _reasons(one, known, tested, keys)
        entry = entry_of(one, chosen, decide(one, tested, parsed, chosen, self._opened), reasons)

        def make(chain: Chain) -> dict[str, Any] | None:
            now = next(h for h in hypotheses(chain.entries) if h.entry == one.entry)
            again = entry["event"] == TESTED and now.outcome is not None  # by another process, meanwhile
            return None if again or any(outcome.keys & keys for outcome in _outcomes(now)) else entry

        self._append(make, [store for group in chosen for store in group])
        return self[name]

    # Both ---------------------------------------------------------------------------------------------------------

    def run_cell(self, name: str, body: str, runs: str | os.PathLike[str], level: float = 0.05) -> Hypothesis:
        """What `%%hypothesis` does: the first time the cell declares, the next time it tests, then it replicates.

        Raises:
            QueryError: if the cell cannot be read; and what `declare` and `test` raise.
        """
        cell = parse_cell(body)
        before = self._count()
        declared = self.declare(name, cell.claim, cell.measure, cell.test, runs, level)
        return declared if self._count() > before else self.test(name)

    def _count(self) -> int:
        return len(_chain.read(self.path).entries)

    def _append(self, make: Callable[[Chain], dict[str, Any] | None], stores: Sequence[Store]) -> None:
        torn = _chain.read(self.path).torn
        chain, added = _chain.append(self.path, make)
        if added:
            if torn:
                say(f"{self.path}: removed {len(torn)} bytes of an append that was cut short.")
            failed = looks.anchor(list(stores), chain)
            if failed:
                say(f"the logbook of {', '.join(failed)} cannot be written: it will not miss what is cut off here.")

    def _names(self, runs: str | os.PathLike[str]) -> str:
        """The pattern of names, of a pattern with or without the folder."""
        text = os.fspath(runs)
        if "/" not in text.rstrip("/") and text.strip():
            return text.rstrip("/")
        folder, names = looks.split_pattern(text)
        if os.path.realpath(folder) != os.path.realpath(self.folder):
            raise Incompatible(
                f'"{text}" is in another folder than this ledger, {self.folder}: open the one beside it.'
            )
        return names

    def _others(self, tested: Test) -> list[Store]:
        return [] if tested.runs is None else looks.stores(self.folder, self._names(tested.runs))

    # Showing ------------------------------------------------------------------------------------------------------

    def frame(self) -> pd.DataFrame:
        """The table; see `nbdyn.analysis.ledger.table.frame` for its columns. Checks the ledger first."""
        chain, doubts = self._checked()
        return table.frame(hypotheses(chain.entries), self.folder, doubts)

    def markdown(self) -> str:
        """The table and every hypothesis in Markdown, to paste into a paper's appendix. Checks the ledger first."""
        chain, doubts = self._checked()
        return table.markdown(hypotheses(chain.entries), chain.hashes[-1] if chain.hashes else "", doubts)

    def plot(self) -> Any:
        """Effects with intervals, confirmatory and exploratory apart.

        Raises:
            NbdynError: if nothing is tested yet.
        """
        from nbdyn.analysis.ledger import figures

        return figures.forest(self.hypotheses)

    def __repr__(self) -> str:
        found = self.hypotheses
        done = sum(one.outcome is not None for one in found)
        return f"<Ledger of {self.folder}: {len(found)} hypotheses, {done} tested>"


def _measure(measure: Asked) -> Measure | Function:
    return parse_measure(measure) if isinstance(measure, str) else Function.of(measure)


def _same_measure(one: Hypothesis, measure: Asked | None) -> Measure | Function:
    """The measure that was declared, or an error that it is another."""
    if measure is None and one.source:
        raise Incompatible(f'{one.measure} is a function: give it again, ledger.test("{one.name}", measure=...).')
    parsed = parse_measure(one.measure) if measure is None else _measure(measure)
    if as_entry(parsed) != {"text": one.measure} | ({"source": one.source, "sha256": one.sha256} if one.source else {}):
        raise Incompatible(f"{parsed} is not the measure that was declared ({one.measure}); declare it to amend.")
    return parsed


def _last_declaration(chain: Chain, name: str) -> dict[str, Any] | None:
    found = [entry for entry in chain.entries if entry["event"] == DECLARED and entry["name"] == name]
    return found[-1] if found else None


def _latest(found: Sequence[Hypothesis], name: str) -> Hypothesis | None:
    return next((one for one in reversed(found) if one.name == name), None)


def _outcomes(one: Hypothesis) -> list[Outcome]:
    return [*([one.outcome] if one.outcome is not None else []), *one.replications]


def _seen(found: Sequence[Known], measure: Measure | Function) -> list[str]:
    """What was seen of the runs before the declaration."""
    reasons = [f"data of {', '.join(run.name for run in found if run.looks)} was asked for before"]
    reasons = reasons if any(run.looks for run in found) else []
    if not isinstance(measure, Lca):
        return reasons
    there = [run.name for run in found if run.allocations]
    return [*reasons, *([f"an allocation of {', '.join(there)} was computed before"] if there else [])]


def _reasons(one: Hypothesis, known: Sequence[Known], tested: Test, taken: set[tuple[str, str]]) -> list[str]:
    """Why a test is exploratory; none: it is confirmatory.

    Args:
        one: the hypothesis.
        known: of the first test all runs that match now, of a replication those that it takes.
        tested: the test; where it fixes the number of runs, nobody can stop recording in view of the data, but for
            going on with a run that was looked at.
        taken: identities of the runs that are tested.
    """
    if tested.count is None:
        looked = ", ".join(run.name for run in known if run.looks)
    else:
        looked = ", ".join(run.name for run in known if run.early and run.key in taken)
    if one.outcome is not None:
        return [f"data of {looked} was seen before the replication"] if looked else []
    reasons = list(one.declared_reasons)
    before = {(run["run"], run["created"]): run["steps"] for run in one.found}
    now = {run.key: run.steps for run in known}
    missing = [key[0] for key in before if key not in now]
    if missing:
        reasons.append(f"{', '.join(missing)} was there at the declaration, and is missing or recorded anew")
    elif looked and now != before:
        reasons.append(f"runs were added or went on after the declaration, and data of {looked} was seen")
    return reasons
