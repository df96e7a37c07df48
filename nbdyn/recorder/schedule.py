"""Which samples each step of a rerun visits: the recorded ones, in another order, or with some left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nbdyn.errors import Incompatible, NotRecorded
from nbdyn.recorder.replay import Plan
from nbdyn.store import Store

NAMED = 5
"""So many ids are named in a message, at most."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """The batches of some steps.

    Attributes:
        start: the first step, as the recorded run counts.
        batches: ids of each step's samples, empty where no step is taken.
        epochs: the recorded epoch of each step, (n,) int64.
        left_out: how many samples each batch lost, (n,) int64.
        first_changed: the first step whose batch is not the recorded one, None if there is none.
        notes: what the user should know.
    """

    start: int
    batches: list[np.ndarray]
    epochs: np.ndarray
    left_out: np.ndarray
    first_changed: int | None
    notes: tuple[str, ...]

    @property
    def omitted(self) -> list[int]:
        """The steps that are not taken."""
        return [self.start + place for place, batch in enumerate(self.batches) if not len(batch)]


def schedule(
    store: Store, plan: Plan, stop: int, without: np.ndarray | None, order: int | np.ndarray | None
) -> Schedule:
    """The batches of steps plan.start..stop-1, reordered first, then with the samples in `without` taken out.

    Args:
        store: the run.
        plan: what was recorded of these steps.
        stop: end of the half-open range.
        without: ids of samples to take out of every batch, (k,); None for none.
        order: a seed, to permute the visits of each epoch (as far as it lies in the range); or the ids of all
            visits in their new order, (visits,); None for the recorded order. Batch sizes stay as recorded.

    Raises:
        NotRecorded: if the samples of a step are unknown, or none of those to leave out is visited.
        Incompatible: if `order` has another length, or no sample is left at all.
    """
    steps = range(plan.start, stop)
    recorded = [np.empty(0, np.int64) if plan.skipped[step - plan.start] else plan.samples(step) for step in steps]
    sizes = np.array([len(batch) for batch in recorded], dtype=np.int64)
    visits = np.concatenate(recorded)
    epochs = store.read_steps(plan.start, stop, ("epoch",))["epoch"].astype(np.int64)
    ordered = visits if order is None else _reordered(visits, np.repeat(epochs, sizes), order)
    out = np.zeros(len(visits), bool) if without is None else np.isin(ordered, without)
    owner = np.repeat(np.arange(len(steps)), sizes)
    left_out = np.bincount(owner[out], minlength=len(steps))
    notes: list[str] = []
    if without is not None and len(without):
        notes += _check_without(store, visits, ordered, without, f"{plan.start}..{stop - 1}")
    skipped, emptied = int(plan.skipped.sum()), int(((left_out == sizes) & (sizes > 0)).sum())
    if skipped:
        notes.append(f"not taken: {skipped} of the steps, which GradScaler skipped in the first run, too")
    if emptied:
        notes.append(f"not taken: {emptied} of the steps, as all samples of their batch were left out")
    changed = np.flatnonzero(out | (ordered != visits))
    batches = np.split(ordered[~out], np.cumsum(sizes - left_out)[:-1])
    first = steps[int(owner[changed[0]])] if len(changed) else None
    return Schedule(plan.start, batches, epochs, left_out, first, tuple(notes))


def _reordered(visits: np.ndarray, epochs: np.ndarray, order: int | np.ndarray) -> np.ndarray:
    """Ids of the visits in another order."""
    if isinstance(order, np.ndarray):
        if len(order) != len(visits):
            raise Incompatible(
                f"order= holds {len(order):,} samples, the steps to rerun {len(visits):,} visits; give one id for each "
                "visit, or a seed, such as order=0."
            )
        return order
    rng = np.random.default_rng(order)
    found = visits.copy()
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        found[inside] = rng.permutation(visits[inside])
    return found


def _check_without(store: Store, visits: np.ndarray, ordered: np.ndarray, without: np.ndarray, where: str) -> list[str]:
    """What there is to say of the samples left out.

    Raises:
        NotRecorded: if none of them is visited.
        Incompatible: if no others are.
    """
    absent = np.setdiff1d(without, ordered)
    if len(absent) == len(np.unique(without)):
        example = f"; sample {visits[0]} is" if len(visits) else ""
        raise NotRecorded(
            f"no sample of without= ({_named(absent)}) is visited at steps {where} of {store.name}{example}. "
            "run.visits lists them all."
        )
    if np.isin(ordered, without).all():
        raise Incompatible(f"without= holds every sample that steps {where} visit; leave some to train on.")
    return (
        [f"not visited in these steps: {len(absent)} of the samples in without= ({_named(absent)})"]
        if len(absent)
        else []
    )


def _named(ids: np.ndarray) -> str:
    return ", ".join(map(str, ids[:NAMED].tolist())) + (", ..." if len(ids) > NAMED else "")


def sample_ids(ids: Any, argument: str) -> np.ndarray:
    """Sample ids as the user gave them, (n,) int64.

    Raises:
        Incompatible: if they are no sequence of whole numbers from 0.
    """
    values = np.asarray(ids)
    if values.ndim == 1 and not values.size:
        return np.empty(0, np.int64)
    if values.ndim != 1 or values.dtype.kind not in "iu" or values.min() < 0:
        raise Incompatible(
            f"{argument}= is a {type(ids).__name__} that is no sequence of sample ids (whole numbers from 0); give a "
            f'list, an array, or the column of a frame: {argument}=frame["sample"].'
        )
    return values.astype(np.int64)


def id_ranges(ids: np.ndarray) -> str:
    """Ids as text, sorted, consecutive ones as a range; `ids_of_ranges` reads it.

    >>> id_ranges(np.array([12, 3, 11, 10]))
    '3,10-12'
    """
    ids = np.unique(ids)
    pieces = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1) if len(ids) else []
    return ",".join(str(piece[0]) if len(piece) == 1 else f"{piece[0]}-{piece[-1]}" for piece in pieces)


def ids_of_ranges(text: str) -> np.ndarray:
    """The ids in a text that `id_ranges` wrote, (n,) int64.

    >>> ids_of_ranges("3,10-12").tolist()
    [3, 10, 11, 12]
    """
    ends = [(piece.split("-")[0], piece.split("-")[-1]) for piece in text.split(",") if piece]
    return np.concatenate([np.empty(0, np.int64), *(np.arange(int(a), int(b) + 1) for a, b in ends)])
