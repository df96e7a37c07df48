"""Rerun: training repeated from a recorded step with other samples, or in another order, and recorded as a new run."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from tqdm.auto import tqdm

from nbdyn.cells import WriteOut
from nbdyn.errors import Incompatible, NbdynError, NotRecorded
from nbdyn.recorder import snapshot
from nbdyn.recorder.capture.options import CaptureOptions
from nbdyn.recorder.describe import named_parameters
from nbdyn.recorder.recorder import Recorder
from nbdyn.recorder.replay import (
    PROGRESS_STEPS,
    Plan,
    advance,
    as_fetch,
    flat_weights,
    load_state,
    load_weights,
    rebuild_optimizer,
    replay,
)
from nbdyn.recorder.schedule import Schedule, id_ranges, sample_ids, schedule
from nbdyn.settings import say
from nbdyn.store import Store, frames, state
from nbdyn.store.backend import basename
from nbdyn.store.names import select
from nbdyn.store.provenance import with_provenance
from nbdyn.store.written import EdgesOf

TOLERANCE = 1e-2
"""Relative; where loss or gradient of the first step are further from the recorded ones, the loop was another."""


@dataclass(frozen=True, eq=False)
class Rerun:
    """Training repeated with a change, and what came of it.

    Attributes:
        uri: the new run; its steps count from 0.
        steps: the steps of the first run that were repeated, t..until-1, (n,) int64.
        losses: loss of each step in the rerun, (n,) float64; NaN where no step was taken.
        distances: Euclidean |w_rerun - w| before each step, (n,) float64; NaN where the first run stored no weights.
        left_out: how many samples each step's batch lost, (n,) int64.
        w_from, w, w_rerun: weights[t]; weights[until] of the first run, and of the rerun, each (parameters,).
        change: what was changed, in words.
        notes: what else there is to know.
        store: the first run.
    """

    uri: str
    steps: np.ndarray
    losses: np.ndarray
    distances: np.ndarray
    left_out: np.ndarray
    w_from: np.ndarray
    w: np.ndarray
    w_rerun: np.ndarray
    change: str
    notes: tuple[str, ...]
    store: Store

    @property
    def distance(self) -> float:
        """Euclidean |w_rerun - w| after the last step."""
        return _distance(self.w_rerun, self.w)

    def frame(self) -> pd.DataFrame:
        """One row a step: step (of the first run), loss, loss_rerun, distance, n_left_out; see the class."""
        recorded = self.store.read_steps(int(self.steps[0]), int(self.steps[-1]) + 1, ("loss",))["loss"]
        table = {
            "step": self.steps,
            "loss": recorded.astype(np.float64),
            "loss_rerun": self.losses,
            "distance": self.distances,
            "n_left_out": self.left_out,
        }
        return self._with_provenance(pd.DataFrame(table))

    def weights(self, selector: str = "all") -> pd.DataFrame:
        """One row a parameter: how far it moved, and how far it moved in the rerun.

        Columns: parameter (global index); tensor; w_from = weights[t]; w and w_rerun = weights[until] of the first
        run and of the rerun; moved = w - w_from; moved_rerun = w_rerun - w_from; difference = w_rerun - w (the last
        three in float64).

        Raises:
            UnknownName: if the selector names no tensor.
        """
        tensors = self.store.config["tensors"]
        indices = select(selector, tensors).indices
        owner = np.searchsorted([t["first"] for t in tensors], indices, side="right") - 1
        w_from, w, w_rerun = (row[indices] for row in (self.w_from, self.w, self.w_rerun))
        table = {
            "parameter": indices,
            "tensor": np.array([t["name"] for t in tensors], dtype=object)[owner],
            "w_from": w_from,
            "w": w,
            "w_rerun": w_rerun,
            "moved": w.astype(np.float64) - w_from,
            "moved_rerun": w_rerun.astype(np.float64) - w_from,
            "difference": w_rerun.astype(np.float64) - w,
        }
        return self._with_provenance(pd.DataFrame(table))

    def _with_provenance(self, frame: pd.DataFrame) -> pd.DataFrame:
        more = {"notes": "; ".join(self.notes)} if self.notes else {}
        return with_provenance(frame, self.store, f"rerun of {self._range}, {self.change}", rerun=self.uri, **more)

    @property
    def _range(self) -> str:
        return f"steps {self.steps[0]}..{self.steps[-1]}"

    def __repr__(self) -> str:
        notes = "".join(f"; {note}" for note in self.notes)
        return (
            f"<Rerun of {self.store.name}, {self._range}, {self.change}: |w_rerun - w| = {self.distance:.4g} before "
            f"step {self.steps[-1] + 1}; recorded as {basename(self.uri)}{notes}>"
        )


def rerun(
    store: Store,
    t: int,
    model: nn.Module,
    loss_fn: Any,
    data: Any,
    *,
    without: Any = None,
    order: Any = None,
    until: int | None = None,
    path: str | None = None,
    optimizer: Any = None,
    per_sample: bool = False,
    edges_of: EdgesOf | None = None,
) -> Rerun:
    """Train steps t..until-1 again with a change; see `nbdyn.moment.Moment.rerun`."""
    stop = _checked_range(store, t, until)
    left_out = None if without is None else sample_ids(without, "without")
    new_order = _checked_order(order)
    fetch = as_fetch(data)
    plan = Plan(store, t, stop)
    batches = schedule(store, plan, stop, left_out, new_order)
    _check_gradients(plan, batches, stop)
    _check_known(data, batches)
    model = copy.deepcopy(model)
    rebuilt = rebuild_optimizer(store, model, optimizer)
    change = _words(left_out, order)
    with snapshot.generators_kept():
        w = _weights_at(store, stop, model, loss_fn, data, optimizer)
        _go_to(store, t, model, rebuilt, loss_fn, data)
        w_from = flat_weights(model, store)
        notes = (*batches.notes, *_start_notes(store, plan, model, rebuilt, loss_fn, fetch))
        recorder = Recorder(
            path or f"{store.uri}-rerun",
            model,
            rebuilt,
            loss_fn,
            weights=store.config["weights"],
            snapshot_every=store.config["every"],
            capture=_capture(store) if per_sample else None,
            edges_of=edges_of,
            note=f"rerun of steps {t}..{stop - 1} of {store.name}, {change}",
            rerun=_link(store, t, stop, left_out, order, batches),
        )
        with recorder:
            for note in notes:
                recorder.note(note)
            losses, distances = _train(store, plan, batches, recorder, model, rebuilt, loss_fn, fetch, data)
    found = Rerun(
        recorder.uri, np.arange(t, stop), losses, distances, batches.left_out, w_from, w, flat_weights(model, store),
        change, notes, store,
    )  # fmt: skip
    _note_in_first(found, t)
    return found


def _checked_range(store: Store, t: int, until: int | None) -> int:
    """The end of the half-open range of steps."""
    end = store.steps_committed
    stop = end if until is None else until
    if not isinstance(stop, (int, np.integer)) or isinstance(stop, bool) or not 0 <= t < stop <= end:
        raise NotRecorded(
            f"{store.name} has steps 0..{end - 1}; a rerun from step {t} needs until= from {t + 1} to {end}, "
            f"not {stop!r}."
            if t < end
            else f"{store.name} has steps 0..{end - 1}: none begins at {t}; rerun from an earlier one."
        )
    return int(stop)


def _checked_order(order: Any) -> int | np.ndarray | None:
    if order is None:
        return None
    if isinstance(order, (int, np.integer)) and not isinstance(order, bool):
        if order < 0:
            raise Incompatible(f"order={order}: a seed is a whole number from 0.")
        return int(order)
    return sample_ids(order, "order")


def _check_gradients(plan: Plan, batches: Schedule, stop: int) -> None:
    """A gradient that was replaced as a whole is of use only as long as nothing differs."""
    if batches.first_changed is None:
        return
    replaced = [step for step in plan.replaced if step >= batches.first_changed]
    if not replaced:
        return
    first, last = replaced[0], replaced[-1]
    ways = [f"begin after it, run.at({last + 1}).rerun(...)"] if last + 1 < stop else []
    ways += [f"end before it, until={first}"] if first > plan.start else []
    raise NotRecorded(
        f"the gradient of step {first} was replaced before the optimizer saw it (noise, clipping by value, or the "
        "first clipped step of a loop), and what replaced it belongs to the recorded batches alone: it cannot be "
        "reused once they differ. "
        + (f"To get around it, {' or '.join(ways)}." if ways else "So are those of the steps after it.")
    )


def _check_known(data: Any, batches: Schedule) -> None:
    """Every sample must be among the data, where their number is known: said before a run is created."""
    part = data[0] if isinstance(data, (tuple, list)) else data
    if not hasattr(part, "__len__"):
        return
    largest = max(int(batch.max()) for batch in batches.batches if len(batch))
    if largest >= len(part):
        raise Incompatible(
            f"sample {largest} is to be visited, and data holds {len(part):,} samples, 0..{len(part) - 1}; give the "
            "data set that was trained on (under any Subset), and in order= ids of its samples."
        )


def _weights_at(store: Store, step: int, model: nn.Module, loss_fn: Any, data: Any, optimizer: Any) -> np.ndarray:
    """weights[step] of the first run, rebuilt where they are not stored."""
    if step in store.weights.steps:
        return store.weights.row(step)
    return replay(store, step, step, model, loss_fn, data, optimizer=optimizer).weights[0]


def _go_to(store: Store, t: int, model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Any, data: Any) -> None:
    """Bring model, optimizer and generators to the state before step t."""
    anchor = state.last_snapshot(store, t)
    if anchor is None:
        raise NotRecorded(f"{store.name} holds no snapshot at or before step {t} to start a rerun from.")
    load_state(store, anchor, model, optimizer)
    if anchor < t:
        advance(store, anchor, t, model, optimizer, loss_fn, data)
        if t in store.weights.steps:  # exactly, on another machine too
            load_weights(store, store.weights.row(t), model)


def _start_notes(
    store: Store, plan: Plan, model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Any, fetch: Any
) -> list[str]:
    """What to say if the recorded batch of the first step has another loss or gradient here than was recorded."""
    recorded = frames.steps(store, plan.start, plan.start + 1).iloc[0]
    if plan.skipped[0]:
        return []
    twin = copy.deepcopy(model)  # batch normalization would take note of this pass
    parameters = [p for _, p in named_parameters(twin)]
    with snapshot.generators_kept():
        inputs, targets = fetch(plan.samples(plan.start))
        plan.before_forward(plan.start, optimizer)
        twin.zero_grad()
        loss = loss_fn(twin(inputs.to(parameters[0].device)), targets.to(parameters[0].device))
        loss.backward()
    plan.change_gradient(plan.start, parameters)
    norm = torch.stack([p.grad.double().norm() for p in parameters if p.grad is not None]).norm()
    for what, value, column in (("loss", loss, "loss"), ("gradient's norm", norm, "grad_norm")):
        here, there = float(value.detach()), float(recorded[column])
        if abs(here - there) > TOLERANCE * abs(there) + 1e-6:  # never where it was not recorded and is NaN
            note = (
                f"the {what} of step {plan.start} is {here:.6g} here and was {there:.6g} when recorded: loss_fn, "
                "model, data or loop are not those of the run, and the difference is not that of the change alone"
            )
            say(note + ".")
            return [note]
    return []


def _capture(store: Store) -> CaptureOptions:
    """What the first run recorded of single samples; where it recorded nothing, everything."""
    options = store.config.get("per_sample")
    if options is None:
        return CaptureOptions()
    layers = None if options["layers"] is None else tuple(options["layers"])
    cells = WriteOut.from_json(options["cells"])
    return CaptureOptions(layers, options["every"], options["fraction"], options["project"], cells)


def _link(store: Store, t: int, stop: int, without: np.ndarray | None, order: Any, batches: Schedule) -> dict[str, Any]:
    """What the new run's metadata say of the first."""
    ids = np.unique(without) if without is not None else np.empty(0, np.int64)
    return {
        "of": store.uri,
        "from_step": t,
        "until": stop,
        "without": len(ids),
        "without_ids": id_ranges(ids),
        "order": order if order is None else int(order) if isinstance(order, (int, np.integer)) else "given",
        "omitted": id_ranges(np.array(batches.omitted, np.int64)),
    }


def _words(without: np.ndarray | None, order: Any) -> str:
    """The change in words."""
    words = [] if without is None else [f"without {len(np.unique(without)):,} samples"]
    if order is not None:
        words.append(f"order={order}" if isinstance(order, (int, np.integer)) else "in a given order")
    return ", ".join(words) or "with nothing changed"


def _train(
    store: Store,
    plan: Plan,
    batches: Schedule,
    recorder: Recorder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Any,
    fetch: Any,
    data: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """The loop: losses, and distances from the first run where its weights are stored, each (steps,)."""
    device = next(model.parameters()).device
    parameters = [p for _, p in named_parameters(model)]
    source = recorder.source_of(data[0] if isinstance(data, (tuple, list)) else data)
    stored = set(store.weights.steps.tolist())
    losses = [torch.tensor(torch.nan)] * len(batches.batches)
    distances = np.full(len(losses), np.nan)
    epoch = -1
    for place, ids in enumerate(
        tqdm(batches.batches, "rerun", leave=False, disable=len(losses) < PROGRESS_STEPS or None)
    ):
        step = plan.start + place
        if step in stored:
            distances[place] = _distance(flat_weights(model, store), store.weights.row(step))
        if not len(ids):
            plan.before_forward(step, optimizer)  # options that change here hold for the steps that follow
            continue
        if batches.epochs[place] != epoch:
            epoch = batches.epochs[place]
            recorder.begin_pass(None)
        inputs, targets = fetch(ids)
        plan.before_forward(step, optimizer)
        recorder.begin_batch(ids.tolist(), len(ids), source, (inputs, targets))
        optimizer.zero_grad()
        loss = loss_fn(model(inputs.to(device)), targets.to(device))
        loss.backward()
        plan.change_gradient(step, parameters)
        optimizer.step()
        losses[place] = loss.detach()
    return torch.stack([loss.to(device) for loss in losses]).cpu().double().numpy(), distances


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b))


def _note_in_first(found: Rerun, t: int) -> None:
    """A line in the first run's logbook; a run that cannot be written to is no reason to lose the rerun."""
    text = f"steps {found.steps[0]}..{found.steps[-1]} were rerun, {found.change}: {found.uri}"
    try:
        found.store.write_note(t, "note", text)
    except NbdynError as error:
        say(str(error))
