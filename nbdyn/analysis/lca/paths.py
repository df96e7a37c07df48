"""The path of the weights of a run: read where every step is stored, otherwise rebuilt between snapshots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from nbdyn.errors import Incompatible, NbdynError, NotRecorded
from nbdyn.recorder.replay import replay
from nbdyn.schema import PART_SNAPSHOT
from nbdyn.store import Store, state
from nbdyn.store.trajectory import OFF_TOLERANCE, trajectory_chunks

Array = np.ndarray
READ_BYTES = 64_000_000
"""Rows are read about so many bytes at a time."""


class Extent(Protocol):
    """Where a path lies; it may be one that is still being drawn."""

    @property
    def extent(self) -> list[int]:
        """What says which path it is, beside the run."""
        ...

    @property
    def buffers_from(self) -> str:
        """Where buffers (running statistics) are taken from: "snapshots", "training" or "checkpoints"."""
        ...

    @property
    def labels(self) -> int | list[int]:
        """`steps` as they are stored: the first, where they are consecutive."""
        ...


class Path(Extent, Protocol):
    """Weights at consecutive places of a training."""

    @property
    def steps(self) -> Array:
        """(n + 1,) int64: the steps t whose weights[t] are the places of the path, ascending."""
        ...

    def rows(self, first: int) -> Iterator[Array]:
        """weights, (P,), of places first, first + 1, ... to the last."""
        ...

    def buffers(self, place: int, /) -> dict[str, torch.Tensor]:
        """Buffers that are known to have changed at a place; empty where none did."""
        ...


class RunPath:
    """weights[t] of a recorded run, start <= t <= stop.

    Where not every step is stored, the steps between are rebuilt: from the recorded gradients of single samples by the
    optimizer's arithmetic (`nbdyn.store.trajectory`), or else by training again (`run.replay`).

    Attributes:
        residuals: stored step -> max |rebuilt - stored|, filled as rebuilt steps go by.
        how: "stored", "rebuilt from gradients" or "replayed".
    """

    def __init__(self, store: Store, start: int, stop: int, model: nn.Module, loss_fn: Any, data: Any) -> None:
        if not 0 <= start < stop <= store.steps_committed:
            raise NotRecorded(
                f"{store.name} has steps 0..{store.steps_committed - 1}; {start}..{stop - 1} are not all there."
            )
        self.steps = np.arange(start, stop + 1)
        self.extent, self.labels, self.buffers_from = [start, stop], start, "snapshots"
        self.residuals: dict[int, float] = {}
        self._store, self._replay = store, (model, loss_fn, data)
        self._first = 0
        self._snapshots = set(state.places(store, PART_SNAPSHOT).tolist())
        if np.isin(self.steps, store.weights.steps).all():
            self.how = "stored"
        else:
            self.how = "rebuilt from gradients" if self._has_gradients() else "replayed"

    def _has_gradients(self) -> bool:
        some = np.array([tensor["first"] for tensor in self._store.config["tensors"]])
        try:
            list(trajectory_chunks(self._store, some, int(self.steps[0]), int(self.steps[-1]) + 1))
        except NbdynError:
            return False
        return True

    def rows(self, first: int) -> Iterator[Array]:
        """weights, (P,), from a place on."""
        self._first, start, stop = first, int(self.steps[first]), int(self.steps[-1]) + 1
        if self.how == "replayed":
            yield from self._replayed(start, stop)
            return
        everything = np.arange(self._store.parameters)
        if self.how == "stored":
            height = max(1, READ_BYTES // (self._store.parameters * 4))
            for a in range(start, stop, height):
                yield from self._store.weights.read(everything, a, min(a + height, stop))[1]
            return
        for _, rows in trajectory_chunks(self._store, everything, start, stop, residuals=self.residuals):
            yield from rows

    def _replayed(self, start: int, stop: int) -> Iterator[Array]:
        model, loss_fn, data = self._replay
        if data is None:
            raise NotRecorded(
                f"{self._store.name} holds snapshots every {self._store.config['every']} steps; to train the steps "
                "between again, LCA needs the data that it was trained on: nbdyn.open(path, data=train_set)."
            )
        while start < stop:
            cut = min(int(self._store.config["every"]) * (start // int(self._store.config["every"]) + 1), stop - 1)
            found = replay(self._store, start, max(cut, start), model, loss_fn, data)
            self.residuals |= found.residuals
            off = max(found.residuals.values(), default=0.0)
            if off > OFF_TOLERANCE * float(np.abs(found.weights).max()):
                raise Incompatible(
                    f"trained again, the weights are {off:.2g} off those recorded: here loss_fn has to be the loss of "
                    'the training; record with weights="every" to allocate another one.'
                )
            last = cut == stop - 1
            yield from found.weights if last else found.weights[:-1]
            start = stop if last else cut

    def buffers(self, place: int) -> dict[str, torch.Tensor]:
        """The buffers as recorded at this step, where it is a snapshot; where `rows` begin, those of the last one."""
        step, found = int(self.steps[place]), {}
        if step not in self._snapshots:
            if place != self._first:
                return found
            step = max((snapshot for snapshot in self._snapshots if snapshot < step), default=step)
        for number, entry in enumerate(self._store.config["buffers"]):
            data = state.buffer(self._store, step, number)
            if data:
                kind = getattr(torch, entry["dtype"].removeprefix("torch."))
                found[entry["name"]] = (
                    torch.frombuffer(bytearray(data), dtype=torch.uint8).view(kind).view(entry["shape"])
                )
        return found
