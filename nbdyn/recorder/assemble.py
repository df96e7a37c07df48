"""From step records, as the training thread left them, to a segment. Runs on the writer's thread."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nbdyn.recorder.arena import Span
from nbdyn.recorder.gradients import single_factor
from nbdyn.recorder.losses import EVALUATED, Evaluator
from nbdyn.recorder.rows import Block, RowBlocks, Staged
from nbdyn.recorder.snapshot import Snapshot, to_bytes
from nbdyn.recorder.watch import Batch
from nbdyn.schema import (
    GRAD_FACTOR,
    GRAD_NORM,
    LOG,
    LOSS_SCALE,
    LR,
    PART_BUFFER,
    PART_GRADIENT,
    PART_GROUPS,
    PART_RNG,
    PART_SNAPSHOT,
    RESIDUAL,
    UPDATE_NORM,
    WEIGHT_NORM,
)  # fmt: skip
from nbdyn.store.journal import Entry
from nbdyn.store.writer import Segment


@dataclass(slots=True)
class StepRecord:
    """All that one step left behind, mostly as tensors not yet looked at.

    `step_row` is False for the record made at close: it holds the state after the last step, and no step.
    """

    step: int
    batches: list[Batch]
    seconds: float = 0.0
    skipped: bool = False
    step_row: bool = True
    lrs: list[Any] = field(default_factory=list)
    numbers: Staged | None = None  # set by `stage`: what is still on its way from a GPU
    row: tuple[Block, int] | None = None
    snapshot: Snapshot | None = None
    rng: torch.Tensor | None = None
    buffers: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    norms: torch.Tensor | None = None
    weight_norms: torch.Tensor | None = None
    update_norms: torch.Tensor | None = None
    seen_gradient: tuple[Block, int] | None = None
    raw_gradient: tuple[Block, int] | None = None
    loss_scale: torch.Tensor | float = 1.0  # a GradScaler's, that the raw gradient has
    factor: float | None = None  # c where seen gradient = c * raw gradient, found on the writer's thread
    groups: str | None = None
    logs: dict[str, Any] = field(default_factory=dict)
    captured: list[Entry] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)  # the arena's memory that `captured` lies in
    arrived: torch.cuda.Event | None = None  # what to wait for before `captured` is read
    captured_bytes: int = 0
    journaled: int = 0  # bytes that were released when they had been written to the journal; nbytes stays as it is
    residuals: dict[int, float] = field(
        default_factory=dict
    )  # tensor's number -> how far contributions are from p.grad
    nbytes: int = 0


class Assembler:
    """Turns records into segments; remembers what the last one held, to store only what changed.

    Args:
        gradients: where gradient rows come from, to give them back.
        evaluator: evaluates `loss_fn` sample by sample. Where it sums over samples, losses of accumulated batches
            add up; else they are averaged, weighted by batch size.
    """

    def __init__(self, gradients: RowBlocks, evaluator: Evaluator) -> None:
        self._gradients = gradients
        self._evaluator = evaluator
        self._last: dict[int, bytes] = {}

    def segment(self, records: list[StepRecord]) -> Segment:
        """The segment of consecutive records."""
        for record in records:
            if record.numbers is not None:
                record.numbers.wait()
        segment = Segment(records[0].step)
        for record in records:
            self._add_state(segment, record)
        segment.weights = _consecutive_rows(records)
        rows = [record for record in records if record.step_row]
        self._evaluate([batch for record in rows for batch in record.batches if batch.evaluated is not None])
        if rows:
            segment.visits, correct = _visits(rows)
            segment.steps = self._steps(rows, correct)
            segment.scalars = self._scalars(rows)
        return segment

    def _evaluate(self, batches: list[Batch]) -> None:
        """Evaluate the losses of batches sample by sample, batches of like shapes together."""
        kinds: dict[Any, list[Batch]] = {}
        for batch in batches:
            outputs, targets = batch.evaluated  # type: ignore[misc]
            rows = (outputs.shape[0] // max(batch.size, 1), targets.shape[0] // max(batch.size, 1))
            kind = (outputs.shape[1:], targets.shape[1:], outputs.dtype, targets.dtype, rows)
            kinds.setdefault(kind, []).append(batch)
        for group in kinds.values():
            outputs, targets = zip(*(batch.evaluated for batch in group), strict=True)  # type: ignore[misc]
            sizes = [batch.size for batch in group]
            found = self._evaluator(torch.cat(outputs), torch.cat(targets), sum(sizes))
            for name in EVALUATED:
                values = getattr(found, name)
                for batch, part in zip(group, [] if values is None else values.split(sizes), strict=values is not None):
                    setattr(batch, name, part)

    def _scale(self, batches: list[Batch]) -> float:
        """Sum of per-sample losses / loss of the step; see `Evaluation`."""
        if not batches or any(batch.losses is None for batch in batches):
            return np.nan
        return 1.0 if self._evaluator.is_sum else sum(float(batch.shares.sum()) for batch in batches)  # type: ignore

    def _steps(self, records: list[StepRecord], correct: np.ndarray) -> dict[str, np.ndarray]:
        batches = [batch for record in records for batch in record.batches]
        owner = np.repeat(np.arange(len(records)), [len(record.batches) for record in records])
        sizes = np.array([batch.size for batch in batches], dtype=np.int64)
        visits = np.bincount(owner, sizes, len(records)).astype(np.int32)
        first = [record.batches[0] if record.batches else Batch((), 0, -1, -1) for record in records]
        return {
            "epoch": np.array([batch.epoch for batch in first], np.int32),
            "source": np.array([batch.source for batch in first], np.int32),
            "batch_size": visits,
            "loss": self._losses(records, [batch.loss for batch in batches], owner, sizes),
            "accuracy": correct,
            "scale": np.array([self._scale(record.batches) for record in records]),
            "seconds": np.array([record.seconds for record in records]),
            "batches": np.array([len(record.batches) for record in records], np.int32),
            "skipped": np.array([record.skipped for record in records], np.uint8),
        }

    def _losses(self, records: list[StepRecord], losses: list[Any], owner: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """The loss of each step; a value logged under the name "loss" stands in where no `loss_fn` was seen."""
        values = np.array([np.nan if loss is None else float(loss) for loss in losses])
        total = np.full(len(records), np.nan)
        alone = np.bincount(owner, minlength=len(records)) == 1
        total[alone] = values[alone[owner]]
        if not alone.all() and len(values):
            weights = np.ones_like(values) if self._evaluator.is_sum else sizes / np.bincount(owner, sizes)[owner]
            total[~alone] = np.bincount(owner, values * weights, len(records))[~alone]
        for place, record in enumerate(records):
            if "loss" in record.logs and np.isnan(total[place]):
                total[place] = float(record.logs["loss"])
        return total

    def _scalars(self, records: list[StepRecord]) -> dict[str, np.ndarray]:
        columns: dict[str, np.ndarray] = {}
        groups = max(len(record.lrs) for record in records)
        for group in range(groups):
            columns[LR.format(group)] = np.array(
                [float(r.lrs[group]) if group < len(r.lrs) else np.nan for r in records]
            )
        for pattern, name in ((GRAD_NORM, "norms"), (WEIGHT_NORM, "weight_norms"), (UPDATE_NORM, "update_norms")):
            measured = [(place, getattr(r, name)) for place, r in enumerate(records) if getattr(r, name) is not None]
            if measured:
                places, values = zip(*measured, strict=True)
                table = np.full((len(records), len(values[0])), np.nan)
                table[list(places)] = torch.stack(list(values)).double().numpy()
                columns |= {pattern.format(number): table[:, number] for number in range(table.shape[1])}
        for number in sorted({number for record in records for number in record.residuals}):
            columns[RESIDUAL.format(number)] = np.array([record.residuals.get(number, np.nan) for record in records])
        for name in sorted({name for record in records for name in record.logs if name != "loss"}):
            columns[LOG.format(name)] = np.array([float(record.logs.get(name, np.nan)) for record in records])
        factors = np.array([np.nan if r.factor in (None, 1.0) else r.factor for r in records], np.float64)
        if not np.isnan(factors).all():
            columns[GRAD_FACTOR] = factors
            scales = [np.nan if np.isnan(c) else float(r.loss_scale) for c, r in zip(factors, records, strict=True)]
            columns[LOSS_SCALE] = np.array(scales)
        return columns

    def _add_state(self, segment: Segment, record: StepRecord) -> None:
        step = record.step
        if record.rng is not None:
            self._add_if_changed(segment, step, PART_RNG, record.rng.numpy().tobytes())
        if record.snapshot is not None:
            segment.state.append((step, PART_SNAPSHOT, to_bytes(record.snapshot)))
        if record.groups is not None:
            segment.state.append((step, PART_GROUPS, record.groups.encode()))
        for number, value in record.buffers:
            data = value.cpu().contiguous().view(-1).view(torch.uint8) if value.numel() else torch.empty(0).byte()
            self._add_if_changed(segment, step, PART_BUFFER + number, data.numpy().tobytes())
        if record.seen_gradient is not None:
            seen = _row(record.seen_gradient)
            if record.raw_gradient is not None:
                record.factor = single_factor(_row(record.raw_gradient), seen)
            if record.factor is None:
                segment.state.append((step, PART_GRADIENT, seen.tobytes()))

    def _add_if_changed(self, segment: Segment, step: int, part: int, data: bytes) -> None:
        if self._last.get(part) != data:
            self._last[part] = data
            segment.state.append((step, part, data))

    def release_gradients(self, records: list[StepRecord]) -> None:
        """Give the gradient rows of written records back."""
        for record in records:
            for place in (record.seen_gradient, record.raw_gradient):
                if place is not None:
                    self._gradients.give_back(place[0])


def _row(place: tuple[Block, int]) -> np.ndarray:
    return place[0].values[place[1]]


def _visits(records: list[StepRecord]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Columns of the visits of some steps, and each step's accuracy (NaN where there are no classes)."""
    batches = [batch for record in records for batch in record.batches]
    counts = np.array([sum(batch.size for batch in record.batches) for record in records], dtype=np.int64)
    total = int(counts.sum())
    starts = np.cumsum(counts) - counts
    owner = np.repeat(np.arange(len(records)), counts)

    def gather(name: str, dtype: Any, missing: float) -> np.ndarray:
        parts = []
        for batch in batches:
            value = getattr(batch, name)
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value = value.float()  # NumPy has no bfloat16
            part = np.full(batch.size, missing, dtype) if value is None else np.asarray(value).astype(dtype, copy=False)
            parts.append(part)
        return np.concatenate(parts) if parts else np.empty(0, dtype)

    correct = gather("correct", np.int8, -1)
    known = np.bincount(owner[correct >= 0], minlength=len(records))
    right = np.bincount(owner[correct == 1], minlength=len(records))
    accuracy = np.divide(right, known, out=np.full(len(records), np.nan), where=known > 0)
    columns = {
        "step": np.repeat(np.array([record.step for record in records], np.uint32), counts),
        "position": (np.arange(total) - starts[owner]).astype(np.uint32),
        "sample": gather("ids", np.int64, -1),
        "target": gather("classes", np.int32, -1),
        "loss": gather("losses", np.float32, np.nan),
        "correct": correct,
    }
    return columns, accuracy


def _consecutive_rows(records: list[StepRecord]) -> list[tuple[int, np.ndarray]]:
    """Rows of weights as pieces of consecutive steps and consecutive rows of one block: no copy is made."""
    pieces: list[tuple[int, Block, int, int]] = []
    for record in records:
        if record.row is None:
            continue
        block, row = record.row
        if pieces:
            first, last_block, start, stop = pieces[-1]
            if block is last_block and row == stop and record.step == first + (stop - start):
                pieces[-1] = (first, block, start, stop + 1)
                continue
        pieces.append((record.step, block, row, row + 1))
    return [(first, block.values[start:stop]) for first, block, start, stop in pieces]


def stage(record: StepRecord) -> None:
    """Send a record's tensors from the GPU to pinned memory; the writer waits for them, training does not."""
    places: list[tuple[Any, str]] = [
        (holder, name)
        for holder, names in (
            (record, ("norms", "weight_norms", "update_norms", "loss_scale")),
            *((batch, ("loss", *EVALUATED)) for batch in record.batches),
        )
        for name in names
        if isinstance(getattr(holder, name), torch.Tensor)
    ]
    record.numbers = Staged([getattr(holder, name) for holder, name in places])
    for (holder, name), host in zip(places, record.numbers.tensors, strict=True):
        setattr(holder, name, host)
