"""The recorder: listens to an ordinary training loop and hands every step to the writer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from nbdyn.errors import NbdynError, RecordingStopped, did_you_mean
from nbdyn.recorder import session
from nbdyn.recorder.assemble import StepRecord
from nbdyn.recorder.capture.options import CaptureOptions, check_capturable
from nbdyn.recorder.capture.steps import StepCapture
from nbdyn.recorder.describe import describe, named_parameters, row_dtype
from nbdyn.recorder.loop import Loop
from nbdyn.recorder.losses import Evaluator
from nbdyn.recorder.pool import TensorPool
from nbdyn.recorder.rows import RowBlocks
from nbdyn.recorder.sink import Listener, Sink
from nbdyn.recorder.target import Target, open_target
from nbdyn.recorder.watch import Watch, given_ids, listening_copy
from nbdyn.schema import STEP_COLUMNS
from nbdyn.settings import format_size, options, parse_size, say
from nbdyn.store import Store, verify
from nbdyn.store.layout import row_extent
from nbdyn.store.written import EdgesOf

BLOCK_BYTES = 22_000_000
"""Rows of every step are gathered in blocks of about this size before they are written."""


class Recorder:
    """Records one training run. Make one with `nbdyn.record`, whose docstring describes the arguments.

    A step is an `optimizer.step()`: the optimizer's own hooks see it, the loop stays as it is. On the training
    thread only copies are made; conversions, files and checks are the writer thread's.
    """

    def __init__(
        self,
        path: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Any = None,
        *,
        data: Any = None,
        weights: str = "snapshots",
        snapshot_every: int = 50,
        capture: CaptureOptions | None = None,
        edges_of: EdgesOf | None = None,
        mode: str = "new",
        budget: str | int = "20 GB",
        note: str | None = None,
        view: Callable[[Recorder], Any] | None = None,
        rerun: dict[str, Any] | None = None,
    ) -> None:
        _check_choices(weights, snapshot_every, mode)
        limit, memory = parse_size(budget), parse_size(options.memory)
        self._view = view
        self._said: set[str] = set()
        named = named_parameters(model)
        dtype = row_dtype(named)
        shapes = [p.shape for _, p in named]
        pinned = any(p.is_cuda for _, p in named)
        row_bytes = sum(shape.numel() for shape in shapes) * int(dtype[1])
        extent = row_extent(row_bytes, weights == "every")
        config = describe(model, optimizer, loss_fn, weights, snapshot_every, extent)
        config["per_sample"] = None if capture is None else capture.to_json()
        if rerun is not None:  # which run this one repeats, and with what change
            config["rerun"] = rerun
        if capture is not None:
            check_capturable(model, capture, config["tensors"])
        self._target: Target = open_target(path, mode, config)
        config = self._target.config
        self.uri = self._target.uri
        self._every, self._all_weights = config["every"], config["weights"] == "every"
        extent = config["row_extent"]
        per_block = max(extent, min(64, BLOCK_BYTES // row_bytes // extent * extent)) if self._all_weights else 1
        self._rows = RowBlocks(shapes, dtype, per_block, pinned)
        gradients = RowBlocks(shapes, dtype, 1, pinned)
        self._capture: StepCapture | None = None
        self._edges_of = edges_of
        self._begin(model, optimizer, loss_fn, data, gradients, capture, memory, limit)
        self._pass, self._pass_start = self._target.epochs - 1, -1
        self._copies: dict[int, tuple[Any, Any]] = {}
        self.state = "recording"
        session.register(self)
        if note:
            self.note(note)
        what = "every step" if self._all_weights else f"every {self._every} steps"
        say(
            f"recording to {self._target.shown}: {self._rows.width:,} parameters, weights {what} "
            f"({format_size(row_bytes)} a row); stops at {format_size(limit)}."
        )

    def _begin(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Any,
        data: Any,
        gradients: RowBlocks,
        capture: CaptureOptions | None,
        memory: int,
        limit: int,
    ) -> None:
        """Restore a run to resume, start the writer, hook the loop; after an error nobody holds the run."""
        sink = None
        try:
            if self._target.start:
                session.restore(self._target.store(), model, optimizer, loss_fn, data)
            if capture is not None:
                if capture.cells.around is not None:
                    self._edges(capture.cells.around, self._target.store())  # what is wrong with it is said now
                self._capture = self._make_capture(model, capture, limit)
            evaluator = Evaluator(loss_fn)
            pool = TensorPool()
            sink = self._sink = Sink(
                self._target, self._rows, gradients, pool, evaluator, self._capture, self._edges, memory, limit
            )
            self._loop = Loop(
                model,
                optimizer,
                loss_fn,
                self._rows,
                gradients,
                pool,
                every=self._every,
                all_weights=self._all_weights,
                step=self._target.start,
                seconds=self._target.seconds,
                capture=self._capture,
                emit=self._emit,
                refused=self._refuse,
                say_once=self.say_once,
            )
        except BaseException:  # also an interrupt
            if self._capture is not None:
                self._capture.remove()
            if sink is not None:
                sink.abandon()
            self._target.give_back()
            raise

    def _edges(self, condition: str, store: Store) -> np.ndarray:
        if self._edges_of is None:
            raise NbdynError("this recorder was made without the query language; make it with nbdyn.record(...).")
        return self._edges_of(condition, store)

    def _make_capture(self, model: nn.Module, options: CaptureOptions, limit: int) -> StepCapture:
        return StepCapture(
            model,
            self._target.config["tensors"],
            [p for _, p in named_parameters(model)],
            options,
            sites=self._target.sites(),
            check_every=self._every,
            room=limit - self._target.size,
            say=say,
            say_once=self.say_once,
        )

    # The loop's side ------------------------------------------------------------------------------------------

    def watch(self, loader: Iterable[Any]) -> Iterable[Any]:
        """The loader's batches, unchanged and in order; the recorder learns which samples they hold.

        Sample ids are indices of the data set (under any Subset); for iterable data sets, and for anything that
        is no DataLoader, positions in the stream. Each pass is an epoch, counted from 0.

        Args:
            loader: a DataLoader, or any iterable of batches. `len()` of the result is the loader's.

        Raises:
            RecordingStopped: in the loop, when the writer could not go on.
            Incompatible: if batches cannot be matched with samples.
        """
        if self.state != "recording":
            say(f"this pass is not recorded: the recorder of {self._target.shown} is {self.state}.")
            return loader
        return Watch(self, loader)

    def batch(self, ids: Any = None, *, epoch: int | None = None) -> None:
        """Say which samples the next forward pass is about, in a loop without a DataLoader.

        Args:
            ids: sample ids in batch order (sequence, array or tensor of integers).
            epoch: the pass over the data; without it that of the last batch.
        """
        if self.state != "recording":
            return
        if epoch is not None:
            self._pass = epoch
        self._pass = max(self._pass, 0)
        ids = given_ids(ids)
        self.begin_batch(ids, len(ids), self.source_of(None), None)

    def log(self, **scalars: Any) -> None:
        """Record numbers of your own, as columns of `run.steps`. They belong to the batch that `watch` yielded last.

        Args:
            scalars: name -> number or tensor with one element (not synchronized with the device here).

        Raises:
            NbdynError: if a name is one of the standard columns ("loss" may be logged where no loss_fn is given).
        """
        kept: dict[str, Any] = {}
        for name, value in scalars.items():
            standard = name in STEP_COLUMNS or re.fullmatch(r"lr_\d+", name)
            if standard and not (name == "loss" and self._loop.probe is None):
                raise NbdynError(f'"{name}" is recorded already; log it under another name, such as "my_{name}".')
            kept[name] = _number(name, value)
        self._loop.log(kept)

    def note(self, text: str) -> None:
        """Write a line into the run's logbook, at the current step."""
        self._sink.note(self._loop.step, text)

    @property
    def flushed(self) -> int:
        """How many steps are on disk: steps 0 ... flushed - 1 survive whatever happens next."""
        return self._sink.flushed

    @property
    def step(self) -> int:
        """The number of the next step."""
        return self._loop.step

    def close(self, status: str = "complete") -> None:
        """Write what waits and the final weights, mark the run, unhook. Harmless twice.

        Raises:
            RecordingStopped: if the writer could not finish; what was acknowledged is on disk.
        """
        if self.state != "recording":
            return
        try:
            record, changed = self._loop.finish()
            if changed:
                self.note("the weights were changed after the last step; weights[T] holds them as they were at close")
            self._sink.put(record, urgent=True)
            self._sink.finish(status)
        except BaseException as error:
            self._stop(error)
            raise
        self._detach(status)
        say(self._sink.summary(status))

    def cockpit(self) -> Any:
        """A live view of loss, learning rate, gradient norm and update/weight ratio (at most 5 frames a second)."""
        if self._view is None:
            raise NbdynError("this recorder was made without views; make it with nbdyn.record(...).")
        return self._view(self)

    def listen(self, listener: Listener) -> None:
        """Call `listener.feed(columns)` with every step from the first on, `listener.finish(status)` at the end."""
        self._sink.listen(listener)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is None:
            self.close()
        elif self.state == "recording":
            try:
                self.close("interrupted")
            except RecordingStopped as second:
                say(str(second))  # the exception of the cell goes on; this one must not hide it

    def __repr__(self) -> str:
        return f"<Recorder of {self._target.shown}: {self.state}, {self.step} steps, {self.flushed} on disk>"

    # What Watch and Loop tell -----------------------------------------------------------------------------------------

    def begin_pass(self, batches: int | None) -> None:
        """A pass over the data begins; passes without a step do not count as epochs."""
        if self.step > self._pass_start:
            self._pass += 1
            self._pass_start = self.step
        if batches is not None:
            row = self._rows.row_bytes
            weights = row * batches if self._all_weights else row * (batches // self._every + 1)
            if self._capture is not None:
                self._capture.batches = batches
            self.say_once("cost", f"about {format_size(weights)} of weights an epoch ({batches} batches).")

    def begin_batch(self, ids: Sequence[int] | None, size: int, source: int, batch: Any) -> None:
        """A batch goes out to the loop."""
        self._sink.check(self._stop)
        self._loop.begin_batch(ids, size, source, max(self._pass, 0), batch)

    def source_of(self, dataset: Any) -> int:
        """The number of a data set among those of this run."""
        return self._target.source_of(dataset)

    def listening_copy(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """The loader whose sampler is listened to; the same one each pass, for persistent workers."""
        known = self._copies.get(id(loader))
        if known is None or known[0] is not loader:
            known = self._copies[id(loader)] = (loader, listening_copy(loader))
        return known[1]

    def say_once(self, key: str, text: str) -> None:
        """Announce something at most once a run."""
        if key not in self._said:
            self._said.add(key)
            say(text)

    def _emit(self, record: StepRecord) -> None:
        """A finished record goes to the writer."""
        block_full = record.row is not None and record.row[1] == self._rows.per_block - 1 and self._all_weights
        try:
            self._sink.put(record, urgent=block_full)
        except RecordingStopped as error:  # an interrupt while training waits is no failure of the writer
            self._stop(error)
            raise

    # The end --------------------------------------------------------------------------------------------------

    def _stop(self, error: BaseException) -> None:
        """The writer failed: unhook, so that training can go on unrecorded."""
        if self.state == "recording":
            self._sink.abandon()
            self._detach("stopped")

    def _refuse(self, error: BaseException) -> None:
        """What was asked for is too much: unhook, and leave no run where there was none."""
        self._stop(error)
        if not self._target.start:
            verify.delete(self.uri)

    def _detach(self, status: str) -> None:
        self.state = status
        self._loop.detach()
        session.unregister(self)


def _check_choices(weights: str, snapshot_every: int, mode: str) -> None:
    for name, value, known in (
        ("weights", weights, ("snapshots", "every")),
        ("mode", mode, ("new", "resume", "replace")),
    ):
        if value not in known:
            raise NbdynError(f"{name}={value!r}: {did_you_mean(str(value), known)} It is one of {', '.join(known)}.")
    if not isinstance(snapshot_every, int) or snapshot_every < 1:
        raise NbdynError(f"snapshot_every={snapshot_every!r}: steps between snapshots; give a whole number from 1.")


def _number(name: str, value: Any) -> Any:
    """A number to log, or a tensor with one element that the writer will read."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.detach().clone()
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise NbdynError(f"rec.log({name}={value!r}): log numbers, or tensors with one element.") from None
