"""Loss change allocation while training goes on: `nbdyn.record(..., lca=train_set)`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import nn

from nbdyn.analysis.lca.asked import Asked
from nbdyn.analysis.lca.compute import Task
from nbdyn.analysis.lca.of_run import decay_of, open_allocation
from nbdyn.analysis.lca.precision import Precision
from nbdyn.errors import NbdynError
from nbdyn.recorder.describe import clean_name, named_parameters
from nbdyn.recorder.recorder import Recorder
from nbdyn.settings import say
from nbdyn.store import Store
from nbdyn.store.allocations import Archive

OPTIONS = ("data", "loss_fn", "name", *(field.name for field in fields(Asked)))
"""What a dict given as `lca` may hold."""
EXPECTED_STEPS = 10_000
"""How long a training may be that single cells are kept of, where nothing is said of them."""


@dataclass(frozen=True)
class _Growing:
    """A path that training is still drawing, from a step on."""

    first: int

    @property
    def extent(self) -> list[int]:
        return [self.first]

    @property
    def labels(self) -> int:
        return self.first

    @property
    def buffers_from(self) -> str:
        return "training"


class Prepared:
    """The objective of an online allocation, made before a recorder hooks the network.

    Args:
        model: the network, before it is recorded.
        loss_fn: of the training.
        what: the data, or a dict of OPTIONS with "data" (see `nbdyn.Run.lca`).

    Raises:
        NbdynError: for an unknown option.
        Incompatible: as `run.lca`.
    """

    def __init__(self, model: nn.Module, loss_fn: Any, what: Any) -> None:
        options = dict(what) if isinstance(what, dict) else {"data": what}
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown or "data" not in options:
            raise NbdynError(
                f"lca={{...}}: {', '.join(unknown) or 'data is missing'}; it takes the data, or a dict of "
                f"{', '.join(OPTIONS)}."
            )
        data, name = options.pop("data"), options.pop("name", None)
        loss_fn = options.pop("loss_fn", None) or loss_fn
        self.asked = Asked(**options)
        self.objective = self.asked.objective(model, loss_fn, data)
        self.name = name or self.asked.name
        Archive("", self.name)  # what is wrong with a name is said before anything is recorded


@dataclass
class Online:
    """Allocates every step as the optimizer takes it; the result is stored with the run.

    Attributes:
        recorder: of the run; it was made before, so that its hooks run first.
        model, optimizer: what is trained.
        prepared: the objective.
    """

    recorder: Recorder
    model: nn.Module
    optimizer: torch.optim.Optimizer
    prepared: Prepared
    _said: bool = field(default=False)
    _failed: bool = field(default=False)

    def __post_init__(self) -> None:
        store, asked = Store(self.recorder.uri), self.prepared.asked
        self._before = self._weights()
        self._next = self.recorder.step
        self._archive = Archive(self.recorder.uri, self.prepared.name)
        self._archive.lock()
        entry = self._archive.entry()
        first = self._next if entry is None else int(entry.labels["steps"])
        self._task = Task(
            extent=_Growing(first),
            objective=self.prepared.objective,
            precision=asked.precision or Precision(),
            tensors=store.config["tensors"],
            cells=asked.kept(store.parameters, EXPECTED_STEPS),
            decay=decay_of(store),
            archive=self._archive,
        )
        if entry is not None and (first + entry.done != self._next or entry.spec != self._task.spec()):
            self._archive.close()
            raise NbdynError(
                f"{self.prepared.name!r} holds steps {first}..{first + entry.done - 1}, the run is at {self._next}; "
                'what does not continue it needs a name of its own, lca={"data": train_set, "name": "train-2"}; '
                "without lca=, run.lca(...) adds the steps that are missing afterwards."
            )
        self._progress = self._task.begin(entry)
        self._handle = self.optimizer.register_step_post_hook(self._after_step)
        self.recorder.listen(self)

    def _weights(self) -> np.ndarray:
        parts = [p.detach().reshape(-1).cpu() for _, p in named_parameters(self.model)]
        wide = getattr(torch, self.prepared.objective.dtype.name)
        return torch.cat([part.to(wide, copy=True) for part in parts]).numpy()

    def _after_step(self, *_: Any) -> None:
        if self.recorder.state != "recording":
            return
        began = time.perf_counter()
        after = self._weights()
        try:
            self._allocate_skipped(self.recorder.step - 1)
            self._allocate(after)
        except BaseException:  # also an interrupt: the steps that follow would not fit to those that are there
            self._handle.remove()
            self._failed = True
            say(f"loss change allocation ended at step {self._next}; the recording goes on without it.")
            raise
        self._before = after
        if not self._said:
            self._said = True
            seconds = time.perf_counter() - began
            say(f"allocating over {len(self._task.objective.samples):,} samples: about {seconds:.2g} s a step.")

    def _allocate_skipped(self, stop: int) -> None:
        """Steps before `stop` that GradScaler skipped: the weights stayed."""
        while self._next < stop:
            self._allocate(self._before)

    def _allocate(self, after: np.ndarray) -> None:
        self._progress.advance(self._before, after, self._buffers)
        self._next += 1

    def _buffers(self) -> dict[str, torch.Tensor]:
        return {clean_name(name): buffer for name, buffer in self.model.named_buffers()}

    # What the recorder tells ------------------------------------------------------------------------------------------

    def feed(self, columns: dict[str, np.ndarray]) -> None:
        """Columns of new steps: nothing to do."""

    def finish(self, status: str) -> None:
        """The recording ended: write what is left."""
        self._handle.remove()
        try:
            if not self._failed and status == "complete":
                self._allocate_skipped(Store(self.recorder.uri).steps_committed)
            self._progress.write(complete=status == "complete" and not self._failed)
            if self._progress.done:
                open_allocation(Store(self.recorder.uri), self.prepared.name)  # says what was not met
        except NbdynError as error:  # the run itself is whole
            say(f"the loss change allocation is not: {error}")
        finally:
            self._archive.close()
