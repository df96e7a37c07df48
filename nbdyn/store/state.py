"""Reading the `state` array: snapshots of the optimizer, random generators, buffers, changed gradients."""

from __future__ import annotations

import numpy as np

from nbdyn.schema import PART_BUFFER, PART_SNAPSHOT
from nbdyn.store.backend import reading
from nbdyn.store.store import Store


def places(store: Store, part: int) -> np.ndarray:
    """Steps at which a part is stored, ascending (n,) int64."""
    with store.open("state") as array, reading(array.uri):
        cells = array.query(attrs=[], dims=["step"], order="U").multi_index[:, part]
    return np.sort(np.asarray(cells["step"], dtype=np.int64))


def read(store: Store, step: int, part: int) -> bytes | None:
    """The bytes of a part at a step, None if there are none."""
    with store.open("state") as array, reading(array.uri):
        cells = array.query(order="U").multi_index[step, part]
    return bytes(cells["data"][0]) if len(cells["data"]) else None


def read_range(store: Store, part: int, start: int, stop: int) -> dict[int, bytes]:
    """Step -> bytes of a part, for steps start..stop-1."""
    if stop <= start:
        return {}
    with store.open("state") as array, reading(array.uri):
        cells = array.query(order="U").multi_index[start : stop - 1, part]
    return {int(step): bytes(data) for step, data in zip(cells["step"], cells["data"], strict=True)}


def latest(store: Store, step: int, part: int) -> bytes | None:
    """The bytes of a part at the last step <= `step` that has it."""
    steps = places(store, part)
    steps = steps[steps <= step]
    return read(store, int(steps[-1]), part) if len(steps) else None


def last_snapshot(store: Store, step: int) -> int | None:
    """The last step <= `step` with a full snapshot (weights, optimizer, generators), None if there is none."""
    steps = np.intersect1d(places(store, PART_SNAPSHOT), store.weights.steps)
    steps = steps[steps <= step]
    return int(steps[-1]) if len(steps) else None


def buffer(store: Store, step: int, number: int) -> bytes | None:
    """The raw bytes of the model's buffer `number` as of weights[step]."""
    return latest(store, step, PART_BUFFER + number)
