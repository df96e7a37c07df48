"""Replay: training repeated from a recorded snapshot, step by step, as it was."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from nbdyn.errors import Incompatible, NotRecorded
from nbdyn.recorder import foreach, snapshot
from nbdyn.recorder.describe import buffers, named_parameters
from nbdyn.schema import LR, PART_GRADIENT, PART_GROUPS, PART_RNG
from nbdyn.store import Store, frames, state
from nbdyn.store.names import select
from nbdyn.store.optimizer_state import read_snapshot, set_groups
from nbdyn.store.provenance import with_provenance
from nbdyn.store.seen_gradients import loop_factors

PROGRESS_STEPS = 500
"""Replays longer than this show a progress bar."""


@dataclass(frozen=True)
class Replay:
    """Weights rebuilt by training again.

    Attributes:
        steps: t, (n,) int64, from t0 to t1 inclusive.
        weights: weights[t] of the selected parameters, (n, k).
        residuals: stored step -> max |replayed - recorded| over all parameters, for every recorded row met.
        selector: which parameters.
    """

    steps: np.ndarray
    weights: np.ndarray
    residuals: dict[int, float]
    selector: str
    store: Store

    @property
    def exact(self) -> bool:
        """Whether every recorded row that was met was reproduced bit for bit (and at least one was met)."""
        return bool(self.residuals) and all(value == 0.0 for value in self.residuals.values())

    def frame(self) -> pd.DataFrame:
        """Tidy: step, parameter (global index), value; `attrs["nbdyn"]` carries the largest residual."""
        indices = select(self.selector, self.store.config["tensors"]).indices
        n, k = self.weights.shape
        table = {"step": np.repeat(self.steps, k), "parameter": np.tile(indices, n), "value": self.weights.reshape(-1)}
        worst = max(self.residuals.values(), default=math.nan)
        return with_provenance(pd.DataFrame(table), self.store, f"replay of {self.selector}", residual=f"{worst:.3g}")

    def __repr__(self) -> str:
        met = (
            f"residual {max(self.residuals.values()):.3g} at {len(self.residuals)} recorded rows"
            if self.residuals
            else ("no recorded row met, so nothing to check against")
        )
        return f"<Replay of {self.store.name}, weights[{self.steps[0]}..{self.steps[-1]}]: {met}>"


def replay(
    store: Store,
    t0: int,
    t1: int,
    model: nn.Module,
    loss_fn: Any,
    data: Any,
    of: str = "all",
    optimizer: Any = None,
) -> Replay:
    """Rebuild weights[t0..t1] from the nearest snapshot before t0; see `nbdyn.Run.replay`."""
    if not 0 <= t0 <= t1 <= store.steps_committed:
        raise NotRecorded(f"{store.name} has steps 0..{store.steps_committed}; {t0}..{t1} is not among them.")
    anchor = state.last_snapshot(store, t0)
    if anchor is None:
        raise NotRecorded(f"{store.name} holds no snapshot at or before step {t0} to start a replay from.")
    indices = select(of, store.config["tensors"]).indices
    model = copy.deepcopy(model)
    rebuilt = rebuild_optimizer(store, model, optimizer)
    stored = set(store.weights.steps.tolist())
    kept: list[np.ndarray] = []
    residuals: dict[int, float] = {}

    def keep(step: int) -> None:
        if step < t0:
            return
        row = flat_weights(model, store)
        kept.append(row[indices])
        if step in stored and step != anchor:
            residuals[step] = float(np.max(np.abs(row.astype(np.float64) - store.weights.row(step)), initial=0.0))

    with snapshot.generators_kept():
        load_state(store, anchor, model, rebuilt)
        advance(store, anchor, t1, model, rebuilt, loss_fn, data, keep)
    return Replay(np.arange(t0, t1 + 1), np.stack(kept), residuals, of, store)


def advance(
    store: Store,
    start: int,
    stop: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Any,
    data: Any,
    each: Callable[[int], None] | None = None,
) -> None:
    """Train a model, which is at `start`, through the recorded steps start..stop-1; `each(t)` sees every weights[t].

    Batches are fetched from `data` by their recorded ids; learning rates, other param-group options, torch's
    generator before each forward pass, and changes of the gradient (clipping) are as recorded.

    Raises:
        NotRecorded: where a step cannot be repeated (unknown samples, several batches accumulated).
    """
    plan = Plan(store, start, stop)
    fetch = as_fetch(data)
    device = next(model.parameters()).device
    parameters = [p for _, p in named_parameters(model)]
    each = each or (lambda step: None)
    for step in tqdm(range(start, stop), desc="replay", leave=False, disable=stop - start < PROGRESS_STEPS or None):
        each(step)
        if plan.skipped[step - start]:
            continue
        inputs, targets = fetch(plan.samples(step))
        plan.before_forward(step, optimizer)  # after fetching, which may draw random numbers
        optimizer.zero_grad()
        loss_fn(model(inputs.to(device)), targets.to(device)).backward()
        plan.change_gradient(step, parameters)
        optimizer.step()
    each(stop)


class Plan:
    """What was recorded of the steps to repeat, start..stop-1, read in one go.

    Attributes:
        start: the first step.
        skipped: which steps GradScaler skipped, (steps,) bool.
        replaced: the steps whose gradient was replaced as a whole before the optimizer saw it, ascending.
    """

    def __init__(self, store: Store, start: int, stop: int) -> None:
        self.start = start
        table = frames.visits(store, start, stop)
        self._cuts = np.searchsorted(table["step"], np.arange(start, stop + 1))
        self._ids = table["sample"].to_numpy(copy=True)
        self._store = store
        rows, self._scalars = store.read_steps(start, stop), store.read_scalars(start, stop)
        self.skipped = rows["skipped"].astype(bool)
        self._batches = rows["batches"]
        self._rng = state.read_range(store, PART_RNG, start, stop)
        self._groups = state.read_range(store, PART_GROUPS, start, stop)
        self._gradients = state.read_range(store, PART_GRADIENT, start, stop)
        self._factors = loop_factors(store, start, stop)
        self.replaced = [step for step in sorted(self._gradients) if np.isnan(self._factors[step - start])]
        first = state.latest(store, start, PART_RNG)
        if first is not None:
            self._rng.setdefault(start, first)

    def samples(self, step: int) -> np.ndarray:
        """Ids of the step's batch."""
        place = step - self.start
        if self._batches[place] > 1:
            raise NotRecorded(
                f"step {step} accumulates {self._batches[place]} batches; replay repeats steps of one batch only."
            )
        ids = self._ids[self._cuts[place] : self._cuts[place + 1]]
        if len(ids) == 0 or (ids < 0).any():
            raise NotRecorded(f"the samples of step {step} are unknown; record with rec.watch(loader) to replay.")
        return ids

    def before_forward(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Generator, learning rates and options as they were."""
        if step in self._rng:
            torch.set_rng_state(torch.frombuffer(bytearray(self._rng[step]), dtype=torch.uint8))
        if step in self._groups:
            groups = json.loads(self._groups[step])
            set_groups(optimizer, groups)
        for number, group in enumerate(optimizer.param_groups):
            rates = self._scalars.get(LR.format(number))
            if rates is not None:
                group["lr"] = float(rates[step - self.start])

    def change_gradient(self, step: int, parameters: list[nn.Parameter]) -> None:
        """The gradient as the optimizer saw it."""
        factor = self._factors[step - self.start]
        if not np.isnan(factor):
            foreach.multiply_([p.grad for p in parameters if p.grad is not None], float(factor))
        elif step in self._gradients:
            flat = torch.from_numpy(np.frombuffer(self._gradients[step], self._store.config["row_dtype"]).copy())
            for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                if p.grad is not None:
                    p.grad.copy_(piece.view_as(p))


def as_fetch(data: Any) -> Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor]]:
    """How to get (inputs, targets) of some sample ids from what the user gave.

    Args:
        data: a map-style data set of (input, target) pairs; a pair of tensors or arrays; or a function of ids.

    Raises:
        Incompatible: for anything else.
    """
    if isinstance(data, (tuple, list)) and len(data) == 2:
        inputs, targets = (torch.as_tensor(part) for part in data)
        return lambda ids: (inputs[torch.from_numpy(ids)], targets[torch.from_numpy(ids)])
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        from torch.utils.data import default_collate

        def fetch(ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            inputs, targets = default_collate([data[int(i)] for i in ids])
            return inputs, targets

        return fetch
    if callable(data):
        return cast("Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor]]", data)
    raise Incompatible(
        f"data is a {type(data).__name__}; give the data set that was trained on, a pair (inputs, targets), "
        "or a function ids -> (inputs, targets)."
    )


def load_state(
    store: Store,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Put weights[step], the buffers and, with an optimizer, its state and the random generators, as recorded.

    Raises:
        NotRecorded: if weights[step] is not stored, or an optimizer is given and its state at `step` is not.
        Incompatible: if the model has other parameters.
    """
    load_weights(store, store.weights.row(step), model)
    with torch.no_grad():
        for number, (name, value) in enumerate(buffers(model)):
            data = state.buffer(store, step, number)
            if data is not None:
                if len(data) != value.nbytes:
                    raise Incompatible(f"buffer {name} has another size than the recorded one; use the same model.")
                if data:
                    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(value.dtype)
                    value.copy_(flat.view(value.shape))
    if optimizer is None:
        return
    recorded = read_snapshot(store, step)
    snapshot.restore_optimizer(optimizer, recorded)
    snapshot.set_modes(model, recorded)
    snapshot.restore_generators(recorded)
    rng = state.latest(store, step, PART_RNG)
    if rng is not None:
        torch.set_rng_state(torch.frombuffer(bytearray(rng), dtype=torch.uint8))


@torch.no_grad()
def load_weights(store: Store, row: np.ndarray, model: nn.Module) -> None:
    """Copy a row of weights into a model with the recorded names and shapes."""
    parameters = dict(named_parameters(model))
    for tensor in store.config["tensors"]:
        p = parameters.get(tensor["name"])
        if p is None or list(p.shape) != tensor["shape"]:
            found = "is missing" if p is None else f"has shape {list(p.shape)}, not {tensor['shape']}"
            raise Incompatible(
                f"{tensor['name']} {found} in this {type(model).__name__}; give the model that was recorded."
            )
        flat = torch.from_numpy(row[tensor["first"] : tensor["first"] + tensor["size"]])
        p.copy_(flat.view(p.shape))


def flat_weights(model: nn.Module, store: Store) -> np.ndarray:
    """The model's parameters as one row, (parameters,)."""
    parts = [p.detach().reshape(-1).cpu().numpy().astype(store.config["row_dtype"]) for _, p in named_parameters(model)]
    return np.concatenate(parts)


def rebuild_optimizer(store: Store, model: nn.Module, kind: Any = None) -> torch.optim.Optimizer:
    """The recorded kind of optimizer over the model's parameters, in their recorded groups and order.

    Args:
        store: the run.
        model: the model, with the recorded parameter names.
        kind: called with the param groups; by default the class of torch.optim with the recorded name.

    Raises:
        Incompatible: if torch.optim has no such optimizer and no `kind` is given.
    """
    name = store.config["optimizer"]["name"]
    kind = kind or getattr(torch.optim, name, None)
    if kind is None or kind is torch.optim.Optimizer:
        raise Incompatible(
            f"the run used {name}, which torch.optim does not have; pass optimizer={name} (a function of param groups)."
        )
    parameters = dict(named_parameters(model))
    groups = [{"params": [parameters[n] for n in names], "lr": 0.0} for names in store.config["optimizer"]["order"]]
    return kind(groups)
