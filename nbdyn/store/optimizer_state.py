"""The optimizer as recorded: its state at snapshots, its options and learning rates at every step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nbdyn.errors import CorruptRun, NotRecorded
from nbdyn.schema import LR, PART_GROUPS, PART_SNAPSHOT
from nbdyn.store import state

if TYPE_CHECKING:
    import torch

    from nbdyn.store.store import Store


@dataclass(slots=True)
class Snapshot:
    """The training state beside the weights.

    Attributes:
        tensors: `optimizer/{place}/{key}`: a parameter's state, place counted through all param groups; generators.
        entries: what is no tensor: param groups, other values of the optimizer's state, modes, Python's generator.
    """

    tensors: dict[str, torch.Tensor]
    entries: dict[str, Any]


def from_bytes(data: bytes) -> Snapshot:
    """Read what `nbdyn.recorder.snapshot.to_bytes` wrote.

    Raises:
        CorruptRun: if the bytes are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        entries = json.loads(tensors.pop("entries").numpy().tobytes())
    except (SafetensorError, KeyError, ValueError) as error:
        raise CorruptRun(f"a snapshot of the optimizer is damaged: {error}") from error
    return Snapshot(tensors, entries)


def read_snapshot(store: Store, step: int) -> Snapshot:
    """The snapshot at a step.

    Raises:
        NotRecorded: if there is none.
    """
    data = state.read(store, step, PART_SNAPSHOT)
    if data is None:
        anchor = state.last_snapshot(store, step)
        raise NotRecorded(f"{store.name} holds no optimizer state at step {step}; the last one before is at {anchor}.")
    return from_bytes(data)


def set_groups(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    """Set the options of every param group from their JSON form (lists become tuples, as betas are)."""
    for group, options in zip(optimizer.param_groups, groups, strict=True):
        for key, value in options.items():
            group[key] = tuple(value) if isinstance(value, list) else value


def places(store: Store) -> dict[str, tuple[int, int]]:
    """Tensor name -> (param group, place counted through all groups), of those that the optimizer updates."""
    names = [(number, name) for number, group in enumerate(store.config["optimizer"]["order"]) for name in group]
    return {name: (number, place) for place, (number, name) in enumerate(names)}


def options(store: Store, snapshot: Snapshot, start: int, stop: int) -> list[list[dict[str, Any]]]:
    """The options of every step start <= t < stop and param group, learning rates among them.

    Args:
        store: the run.
        snapshot: that at `start`.
        start: first step.
        stop: end of the half-open range.

    Returns:
        A list of the groups' options for each step; a step that changes nothing shares its dicts with the one before.
    """
    changes = state.read_range(store, PART_GROUPS, start, stop)
    scalars = store.read_scalars(start, stop)
    now = [dict(group) for group in snapshot.entries["groups"]]
    rates = [scalars.get(LR.format(number), np.full(stop - start, np.nan)) for number in range(len(now))]
    found = []
    for step in range(start, stop):
        if step in changes:
            now = [old | new for old, new in zip(now, json.loads(changes[step]), strict=True)]
        lrs = [float(column[step - start]) for column in rates]
        now = [g if np.isnan(lr) or g["lr"] == lr else g | {"lr": lr} for g, lr in zip(now, lrs, strict=True)]
        found.append(now)
    return found
