"""One test of a hypothesis: which runs it takes, what it finds, and what the ledger keeps of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nbdyn.analysis.ledger.decide import Decision, one_group, two_groups
from nbdyn.analysis.ledger.language import Measure, Test
from nbdyn.analysis.ledger.measures import Function, Opened, pairs, values_of
from nbdyn.analysis.ledger.records import CONFIRMATORY, EXPLORATORY, REPLICATED, TESTED, Hypothesis
from nbdyn.errors import Incompatible
from nbdyn.settings import say
from nbdyn.statistics.testing import differences
from nbdyn.store import Store
from nbdyn.store.provenance import package_version


def key_of(store: Store) -> tuple[str, str]:
    """What stays the same of a run: its name, and when it was recorded."""
    return store.name, str(store.config["created"])


def check_apart(stores: Sequence[Store], others: Sequence[Store]) -> None:
    """Raise Incompatible if a run is in both groups."""
    both = sorted({store.name for store in stores} & {store.name for store in others})
    if both:
        raise Incompatible(f"{both[0]} is in both groups of runs; give patterns that do not overlap.")


def choose(group: list[Store], count: int | None) -> list[Store]:
    """The runs that are tested, by name: all, or those recorded first."""
    if count is None:
        return group
    first = sorted(group, key=lambda store: (str(store.config["created"]), store.name))[:count]
    return sorted(first, key=lambda store: store.name)


def check_enough(one: Hypothesis, chosen: Sequence[Sequence[Store]], wanted: int, tested: Test) -> None:
    """Raise Incompatible unless the runs that are chosen are enough, and recorded."""
    check_apart(*chosen)
    patterns = [one.runs] if tested.runs is None else [one.runs, tested.runs]
    for pattern, group in zip(patterns, chosen, strict=False):
        if len(group) < wanted:
            there = (
                "no run matches" if not group else f"{len(group)} run{'s' * (len(group) > 1)} of {wanted} needed match"
            )
            raise Incompatible(
                f'{there} "{pattern}"; "{one.test}" needs {wanted}'
                f"{' at least' * (tested.count is None)}. Record further runs, then test {one.name} again."
            )
    for group in chosen:
        for store in group:
            if store.status == "recording":
                raise Incompatible(f"{store.name} is still being recorded; test {one.name} when it is done.")


def say_no_new(one: Hypothesis, fresh: Sequence[Sequence[Store]], wanted: int) -> None:
    """Say why nothing is tested again."""
    new = ", ".join(store.name for group in fresh for store in group) or "none"
    say(f"{one.name} is tested; the outcome stays. A replication needs {wanted} new runs or more; new: {new}.")


def decide(
    one: Hypothesis, tested: Test, measure: Measure | Function, chosen: Sequence[list[Store]], opened: Opened
) -> tuple[Decision, list[float], str]:
    """The decision, the value of each run of both groups, and how they were paired."""
    a, b = chosen
    order, pairing = pairs(a, b) if tested.paired else (list(range(len(b))), "")
    values = values_of(measure, [*a, *b], opened)
    x, y = values[: len(a)], values[len(a) :]
    if tested.value is not None:
        found = one_group(x, tested.value, tested.relation, tested.method, one.level)
    elif tested.paired:
        paired = differences(x, [y[place] for place in order])
        found = one_group(paired, 0.0, tested.relation, tested.method, one.level)
    else:
        found = two_groups(x, y, tested.relation, tested.method, one.level)
    return found, values, pairing


def entry_of(
    one: Hypothesis, chosen: Sequence[Sequence[Store]], done: tuple[Decision, list[float], str], reasons: list[str]
) -> dict[str, Any]:
    """What the ledger keeps of a test."""
    found, values, pairing = done
    placed = [(group, store) for group, stores in enumerate(chosen) for store in stores]
    numbers = {name: _finite(getattr(found, name)) for name in ("effect", "low", "high", "d", "p", "least")}
    return {
        "event": TESTED if one.outcome is None else REPLICATED, "name": one.name, "version": one.version,
        "declaration": one.entry, "kind": EXPLORATORY if reasons else CONFIRMATORY, "reasons": reasons,
        "n_runs": found.n, **numbers, "pairing": pairing, "nbdyn": package_version(),
        "values": [
            {"group": group, "run": store.name, "created": str(store.config["created"]),
             "steps": store.steps_committed, "value": value}
            for (group, store), value in zip(placed, values, strict=True)
        ],
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
