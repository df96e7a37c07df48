"""The training loop seen through hooks: batches, losses, gradients, steps. Runs on the training thread."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from nbdyn.errors import NbdynError
from nbdyn.recorder import foreach, snapshot
from nbdyn.recorder.assemble import StepRecord, stage
from nbdyn.recorder.capture.steps import StepCapture
from nbdyn.recorder.describe import as_json, buffers
from nbdyn.recorder.gradients import GradientWatch
from nbdyn.recorder.losses import EVALUATED, Evaluator, LossProbe
from nbdyn.recorder.pool import TensorPool
from nbdyn.recorder.rows import RowBlocks
from nbdyn.recorder.scaler import LossScale
from nbdyn.recorder.watch import Batch

DEFERRED_BYTES = 262_144
"""Outputs up to this size are copied for the writer to evaluate (a joined evaluation of 64 steps costs a fraction of
64 single ones); larger ones are evaluated at once, as copies of them would fill the memory."""


class Loop:
    """Builds one StepRecord a step and hands it to `emit` once nothing can be added to it.

    A record stays open after its step, for what the user logs then; the next batch, step or the end seals it.

    Args:
        model, optimizer, loss_fn: what is trained, and how.
        rows, gradients, pool: where rows of weights and gradients, and small tensors, are copied to.
        every, all_weights: when weights are copied: every so many steps, or at every step.
        step, seconds: number of the first step, and wall time recorded before it.
        capture: what captures single samples; None for nothing.
        emit: called with each finished record; its exceptions go to the training loop.
        refused: called before the error that says why recording cannot go on.
        say_once: called as say_once(key, text) for what the user should know.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Any,
        rows: RowBlocks,
        gradients: RowBlocks,
        pool: TensorPool,
        *,
        every: int,
        all_weights: bool,
        step: int,
        seconds: float,
        capture: StepCapture | None,
        emit: Callable[[StepRecord], None],
        refused: Callable[[NbdynError], None],
        say_once: Callable[[str, str], None],
    ) -> None:
        self._refused = refused
        self._model, self._optimizer = model, optimizer
        self._parameters = list(model.parameters())
        self._buffers = buffers(model)
        self._rows, self._gradients, self._pool = rows, gradients, pool
        self._every, self._all_weights = every, all_weights
        self.step = step
        self._zero = time.perf_counter() - seconds
        self._emit, self._say_once = emit, say_once
        self._batch: Batch | None = None
        self._accumulating: list[list[Batch]] = []
        self._prepared: StepRecord | None = None  # a step that has begun
        self._record: StepRecord | None = None  # a step that was taken
        self._evaluations = 0
        self._before_update: list[torch.Tensor] = []  # kept from snapshot to snapshot: fresh memory is slow
        self._updating = False
        self._loose_logs: dict[str, Any] = {}
        self._buffer_copies: list[tuple[int, torch.Tensor]] = []
        self._last_groups = _group_options(optimizer)
        self._weight_versions: list[int] = []
        self._idle = self._before_forward()
        self._evaluator = Evaluator(loss_fn)
        self.probe = None if loss_fn is None else LossProbe(loss_fn, self._on_loss)
        self._capture = capture
        self._loss_scale = LossScale() if capture is None else capture.loss_scale
        self._watching = GradientWatch(
            self._parameters, self._on_backward, None if capture is None else capture.accumulated
        )
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        if self.probe is not None and not self.probe.is_hooked:
            self._handles.append(model.register_forward_hook(self._on_outputs))

    def begin_batch(self, ids: Any, size: int, source: int, epoch: int, batch: Any) -> None:
        """A batch goes out to the loop."""
        self._batch = None
        self.seal()
        target = batch[-1] if isinstance(batch, (list, tuple)) and len(batch) == 2 else None
        self._batch = Batch(ids, size, source, epoch, target, self._before_forward(), logs=self._loose_logs)
        self._loose_logs = {}
        self._watching.waiting = True
        self._begin_capture()

    def _begin_capture(self) -> None:
        if self._capture is not None:
            self._capture.begin(self.step, self._batch)

    def _before_forward(self) -> dict[str, Any]:
        """Generators as they are now; copies of the buffers, where this step's weights are recorded."""
        due = self.step % self._every == 0
        if (due or self._all_weights) and not self._accumulating:
            # Copies, not versions: batch normalization updates its statistics without counting it as a change.
            self._buffer_copies = [(number, b.detach().clone()) for number, (_, b) in enumerate(self._buffers)]
        self._evaluations = 0
        return snapshot.generators(full=due)

    def log(self, values: dict[str, Any]) -> None:
        """Values for the batch that went out last, before or after its step."""
        done = self._record.batches[-1] if self._record is not None and self._record.batches else None
        batch = done or self._batch
        (self._loose_logs if batch is None else batch.logs).update(values)

    def seal(self) -> None:
        """Hand the last step's record over; nothing can be logged for it any more."""
        record = self._record
        if record is None:
            return
        for batch in record.batches:
            record.logs.update(batch.logs)
        if not record.batches:
            record.logs, self._loose_logs = self._loose_logs, {}
        for batch in record.batches:
            batch.target, batch.rng = None, {}  # used by now
            if isinstance(batch.ids, list) and (self._batch is None or batch.ids is not self._batch.ids):
                batch.ids = self._pool.copy(torch.tensor(batch.ids))
        # Cleared last: an interrupt in between hands the record over twice, and the writer takes it once.
        self._emit(self._ready(record))
        self._record = None

    def finish(self) -> tuple[StepRecord, bool]:
        """The record of the state after the last step, and whether someone changed the weights since that step."""
        self.seal()
        self._emit_skipped()
        record = StepRecord(self.step, [], step_row=False)
        changed = bool(self._weight_versions) and self._weight_versions != [p._version for p in self._parameters]
        if self.step:
            self._accumulating = []
            self._before_forward()
            self._copy_state(record, snapshot.generators(full=True), due=True)
        return self._ready(record), changed

    def detach(self) -> None:
        """Unhook everything."""
        for handle in self._handles:
            handle.remove()
        self._watching.remove()
        if self._capture is not None:
            self._capture.remove()
        if self.probe is not None:
            self.probe.remove()

    # Hooks ----------------------------------------------------------------------------------------------------

    def _on_outputs(self, module: nn.Module, args: Any, outputs: Any) -> None:
        """The model's forward pass, where loss_fn is a plain function: evaluate it once more."""
        batch = self._batch
        if batch is None or self.probe is None or not isinstance(outputs, torch.Tensor) or not outputs.requires_grad:
            return
        if not isinstance(batch.target, torch.Tensor):
            self._say_once("loss", "losses are not recorded: a plain loss function needs batches of (inputs, targets).")
            return
        try:
            with torch.no_grad():
                target = batch.target.to(outputs.device, non_blocking=True)
                self._on_loss(self.probe.loss_fn(outputs.detach(), target), outputs, target)
        except (RuntimeError, ValueError, TypeError) as error:
            self._say_once("loss", f"losses are not recorded: loss_fn(outputs, targets) raised {error}")

    def _on_loss(self, loss: torch.Tensor, outputs: Any, targets: Any) -> None:
        """loss_fn was evaluated with a gradient; it is the batch's loss unless no backward pass follows."""
        batch = self._batch
        if batch is None or self.probe is None or not self._watching.waiting:
            return
        self._evaluations += 1
        if self._evaluations > 1:
            self._say_once(
                "calls", "loss_fn is called several times a batch; the last call before backward is recorded."
            )
        batch.loss = loss.detach()
        self._evaluate(batch, outputs, targets)

    def _evaluate(self, batch: Batch, outputs: Any, targets: Any) -> None:
        """Per-sample losses: small outputs on the host are left to the writer, many steps at once."""
        if not isinstance(outputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
            self._say_once("unreduced", "per-sample losses are not recorded: loss_fn is not given two tensors.")
            return
        if self._evaluator.unreduced is None:
            self._say_once("unreduced", "per-sample losses are not recorded: loss_fn has no reduction='none'.")
        if outputs.is_cpu and outputs.nbytes <= DEFERRED_BYTES:
            # Copies: a loop may change its tensors, or a loader fill the same ones again.
            batch.evaluated = self._pool.copy(outputs), self._pool.copy(targets)
            return
        found = self._evaluator(outputs.detach(), targets, batch.size)
        for name in EVALUATED:
            setattr(batch, name, getattr(found, name))

    def _on_backward(self, fresh: bool) -> None:
        """The current batch has its backward pass; `fresh`: the gradients had been cleared before it."""
        if self._batch is None:
            return
        if fresh or not self._accumulating:
            if self._capture is not None and self._accumulating:
                self._capture.settle(self._accumulating[-1])
            self._accumulating.append([])
        self._accumulating[-1].append(self._batch)
        if self._capture is not None:
            self._batch.scales = self._capture.loss_scales()

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """weights[t] and the gradient as the optimizer sees it."""
        self.seal()
        if self._capture is not None:
            self._loss_scale.confirm(optimizer)
        self._emit_skipped()
        record = self._prepared = StepRecord(self.step, [])
        record.lrs = self._learning_rates()
        due = self.step % self._every == 0
        batch = self._accumulating[-1][0] if self._accumulating else self._batch
        self._copy_state(record, self._idle if batch is None else batch.rng, due)
        if due:
            if [_kind(p) for p in self._before_update] != [_kind(p) for p in self._parameters]:
                self._before_update = [torch.empty_like(p) for p in self._parameters]
            foreach.copy_(self._before_update, [p.detach() for p in self._parameters])
            self._updating = True
            record.weight_norms = _norms(self._before_update)
        if any(arg is not None for arg in args[1:]) or kwargs.get("closure") is not None:  # args[0] is the optimizer
            self._say_once(
                "closure", "step(closure) computes gradients inside; neither their norms nor samples' are recorded."
            )
            return
        record.norms = _norms([p.grad for p in self._parameters])
        changed = self._watching.changed()
        if self._capture is not None:
            raw = self._watching.copies if changed else [p.grad for p in self._parameters]
            try:
                self._capture.collect(record, self._batches_now(), raw)
            except NbdynError as error:  # an epoch of it would be above the budget
                self._refused(error)
                raise
        if changed:
            self._loss_scale.confirm(optimizer)
            self._copy_gradient(record)

    def _batches_now(self) -> list[Batch]:
        """The batches of the step that is being taken."""
        if self._accumulating:
            return self._accumulating[-1]
        return [] if self._batch is None else [self._batch]  # gradients that no backward pass made

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """The step is taken: its batches are known."""
        record = self._prepared
        if record is None:
            return
        record.seconds = time.perf_counter() - self._zero
        if self._updating:
            self._updating = False
            foreach.sub_(self._before_update, [p.detach() for p in self._parameters])
            record.update_norms = _norms(self._before_update)
        record.batches = self._batches_now()
        if not record.batches:
            self._say_once("ids", "no batch is known: wrap the loader in rec.watch(...), or call rec.batch(ids=...).")
        self._note_options(record)
        # At one stroke: an interrupt leaves either no step, or a whole one.
        self.step, self._record, self._prepared, self._accumulating = self.step + 1, record, None, []
        self._weight_versions = [p._version for p in self._parameters]
        # A step again on the same batch needs no generator state of its own: nothing is fetched in between.
        needed = not record.batches or self.step % self._every == 0 or (self._all_weights and self._buffers)
        rng = self._before_forward() if needed else {}
        if record.batches:  # a loop may step again on the same batch
            last = record.batches[-1]
            self._batch = Batch(last.ids, last.size, last.source, last.epoch, last.target, rng, again=True)
            self._watching.waiting = True
            self._begin_capture()
        else:
            self._idle = rng

    # Records --------------------------------------------------------------------------------------------------

    def _learning_rates(self) -> list[Any]:
        rates = [group["lr"] for group in self._optimizer.param_groups if "lr" in group]
        return [rate.detach().clone() if isinstance(rate, torch.Tensor) else rate for rate in rates]

    def _copy_state(self, record: StepRecord, rng: dict[str, Any], due: bool) -> None:
        """Weights now; generators and buffers as they were before the forward pass."""
        record.rng = rng.get("torch")
        if due or self._all_weights:
            record.row = self._rows.copy([p.detach() for p in self._parameters])
            record.buffers = self._buffer_copies
        if due:
            record.snapshot = snapshot.take(self._model, self._optimizer, rng)

    def _note_options(self, record: StepRecord) -> None:
        now = _group_options(self._optimizer)
        if now != self._last_groups:
            self._last_groups = now
            record.groups = json.dumps([{key: as_json(value) for key, value in group.items()} for group in now])

    def _emit_skipped(self) -> None:
        """Steps that were prepared but not taken (GradScaler skips them): visits are kept, the weights stand still."""
        for batches in self._accumulating[:-1]:
            if batches[0].again:  # a backward pass after the step, on data that nobody announced: not a step
                continue
            record = StepRecord(self.step, batches, skipped=True)
            record.lrs = self._learning_rates()
            with torch.no_grad():
                self._copy_state(record, batches[0].rng, self.step % self._every == 0)
            record.seconds = time.perf_counter() - self._zero
            if self._capture is not None:
                self._capture.collect(record, batches, None)
            self.step, self._record = self.step + 1, record
            self.seal()
        self._accumulating = self._accumulating[-1:]

    def _copy_gradient(self, record: StepRecord) -> None:
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self._parameters]
        grads = [g.to_dense() if g.is_sparse else g for g in grads]
        record.seen_gradient = self._gradients.copy(grads)
        if self._watching.copies is None:
            self._watching.keep_copies()
        else:
            record.raw_gradient = self._gradients.copy(self._watching.copies)
            record.loss_scale = self._loss_scale.of(self._loss_scale.now())  # until update() that of the backward pass

    def _ready(self, record: StepRecord) -> StepRecord:
        """Move small tensors into the pool, send what is on a GPU on its way, count the bytes that the record holds."""
        for holder, name in ((record, "rng"), (record, "norms"), *((batch, "loss") for batch in record.batches)):
            if getattr(holder, name) is not None:
                setattr(holder, name, self._pool.copy(getattr(holder, name)))
        if any(p.is_cuda for p in self._parameters):
            stage(record)
        rows = sum(place is not None for place in (record.row, record.seen_gradient, record.raw_gradient))
        state = 0 if record.snapshot is None else sum(t.nbytes for t in record.snapshot.tensors.values())
        batches = sum(24 * batch.size + 5056 for batch in record.batches)
        record.nbytes = rows * self._rows.row_bytes + state + sum(t.nbytes for _, t in record.buffers) + batches + 64
        record.nbytes += record.captured_bytes
        return record


def _group_options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Param-group options other than the learning rate, which is recorded at every step anyhow."""
    skipped = ("params", "lr", "initial_lr")
    return [{key: value for key, value in group.items() if key not in skipped} for group in optimizer.param_groups]


def _kind(t: torch.Tensor) -> tuple[Any, ...]:
    return t.shape, t.dtype, t.device


def _norms(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Euclidean norm of each tensor, (n,); 0 where there is none."""
    present = [t for t in tensors if t is not None]
    if any(t.is_sparse for t in present):
        present = [t.coalesce().values() if t.is_sparse else t for t in present]
    if not present:
        return torch.zeros(len(tensors))
    norms = torch.stack(foreach.norm(present))
    if len(present) == len(tensors):
        return norms
    full = norms.new_zeros(len(tensors))
    full[[place for place, t in enumerate(tensors) if t is not None]] = norms
    return full
