"""What `run.noise` was asked for: steps, coordinates, and how what was read is laid out by layer."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbdyn.analysis.noise.kinds import Kind
from nbdyn.analysis.noise.sampled import Sample
from nbdyn.errors import Incompatible, NotRecorded
from nbdyn.store import Store

BATCH = 100
"""Samples of a mini-batch, where none are given."""


@dataclass(frozen=True)
class Request:
    """What `run.noise` was asked for; see there."""

    kind: Kind
    steps: Any
    batch: int | None
    coordinates: int
    subset: int | None
    seed: int
    progress: bool

    @property
    def of_batch(self) -> int:
        """Samples of a mini-batch."""
        return BATCH if self.batch is None else self.batch


def places(store: Store, steps: Any, default: Sequence[int], last: int) -> list[int]:
    """Steps asked for, ascending; negative ones count from the end."""
    found = default if steps is None else whole_numbers(steps, "steps")
    found = [step + last + 1 if step < 0 else step for step in found]
    for step in found:
        if not 0 <= step <= last:
            raise NotRecorded(f"{store.name} has 0..{last} to choose from; step {step} is not there.")
    return sorted(set(found))


def whole_numbers(given: Any, name: str) -> tuple[int, ...]:
    """A whole number or several, as given for an argument of this name.

    Raises:
        Incompatible: if there is none, or something else.

    >>> whole_numbers(3, "batch"), whole_numbers([1, 10], "batch")
    ((3,), (1, 10))
    """
    try:
        found = tuple(operator.index(number) for number in np.atleast_1d(np.asarray(given)).tolist())
    except (TypeError, ValueError):
        found = ()
    if not found:
        raise Incompatible(f"{name}={given!r}: give one or several, as whole numbers.")
    return found


def window(steps: Any) -> tuple[int, int]:
    """The half-open window asked for.

    Raises:
        Incompatible: if it is no pair of whole numbers.
    """
    try:
        start, stop = map(operator.index, steps)
    except (TypeError, ValueError):
        raise Incompatible(f"steps={steps!r}: of a path a pair (first, last + 1), such as (500, 1500).") from None
    return start, stop


def by_layer(
    step: int, values: np.ndarray, chosen: dict[str, np.ndarray], layers: dict[str, np.ndarray], known: np.ndarray
) -> list[Sample]:
    """The columns of each layer that are known, (columns,) bool; layers without any are left out."""
    found = []
    for layer, columns in zip(chosen, np.split(np.arange(len(known)), _ends(chosen)), strict=True):
        kept = columns[known[columns]]
        if len(kept):
            parameters = chosen[layer][known[columns]]
            found.append(Sample(step, step + 1, layer, values[:, kept], parameters, len(layers[layer])))
    return found


def _ends(chosen: dict[str, np.ndarray]) -> np.ndarray:
    """Where the columns of each layer but the last end."""
    return np.cumsum([len(indices) for indices in chosen.values()])[:-1]
