"""Per-sample capture step by step: which steps are captured, whether it all adds up, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nbdyn.errors import NbdynError
from nbdyn.recorder.arena import Arena
from nbdyn.recorder.assemble import StepRecord
from nbdyn.recorder.capture.capture import Capture, captured_block
from nbdyn.recorder.capture.options import CaptureOptions, captured_tensors
from nbdyn.recorder.scaler import LossScale
from nbdyn.recorder.watch import Batch
from nbdyn.settings import format_size
from nbdyn.store import closed
from nbdyn.store.journal import Entry
from nbdyn.store.sites import Site

TOLERANCE = 1e-3
HALF_TOLERANCE = 5e-2
"""max|sum of contributions - p.grad| / max|p.grad| above which a tensor is recorded by batch only: far above what
rounding leaves (1e-6, in half precision 1e-2), far below what a use of the parameter that was not seen makes."""


class StepCapture:
    """What the loop asks of per-sample capture.

    Args:
        model: what is trained.
        tensors: the run's table of parameter tensors.
        parameters: the model's parameters, in the order of the table.
        options: what to capture.
        sites: the sites of a run that is resumed.
        check_every: at these steps the contributions are added up and compared with p.grad.
        room: bytes that the budget leaves.
        say: tells the user something; `say_once(key, text)` does so once.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: list[dict[str, Any]],
        parameters: list[nn.Parameter],
        options: CaptureOptions,
        sites: list[Site],
        check_every: int,
        room: int,
        say: Callable[[str], None],
        say_once: Callable[[str, str], None],
    ) -> None:
        names = captured_tensors(options.layers, tensors)
        chosen = [(t, p) for t, p in zip(tensors, parameters, strict=True) if t["name"] in names]
        self._tensors = [t for t, _ in chosen]
        self._places = [place for place, t in enumerate(tensors) if t["name"] in names]
        self._parameters = [p for _, p in chosen]
        self.options = options
        self.arena = Arena(next((p.device for p in parameters if p.is_cuda), torch.device("cpu")))
        self._capture = Capture(model, self._tensors, self._parameters, options, self.arena, sites, say_once)
        self.loss_scale = LossScale()
        self._check_every, self._room, self._say = check_every, room, say
        self._checked = False  # until then the whole first step is captured and looked at
        self.batches: int | None = None  # how many batches an epoch has, where that is known
        self.bytes, self.visits = 0, 0

    @property
    def seconds(self) -> float:
        """Time spent on the training thread."""
        return self._capture.seconds

    @property
    def sites(self) -> list[Site]:
        """The sites met so far."""
        return self._capture.sites

    @property
    def batch_only(self) -> dict[str, str]:
        """Tensors whose gradients are not split into samples, and why."""
        return self._capture.batch_only

    def begin(self, step: int, batch: Batch | None) -> None:
        """Forward passes are about this batch from now on."""
        due = step % self.options.every == 0
        self._capture.begin(batch if due else None, whole=not self._checked)

    def loss_scales(self) -> dict[int, Tensor]:
        """What the live GradScalers multiply a loss with."""
        return self.loss_scale.now(self._capture.half)

    def accumulated(self, p: Tensor, fresh: bool) -> None:
        """A backward pass has added to p.grad."""
        self._capture.accumulated(p, fresh)

    def settle(self, batches: list[Batch]) -> None:
        """The gradient of these batches is about to be replaced, and no step was taken."""
        self._capture.settle(batches)

    def remove(self) -> None:
        """Unhook everything."""
        self._capture.remove()

    def collect(self, record: StepRecord, batches: list[Batch], raw: list[Tensor | None] | list[Tensor] | None) -> None:
        """Put what was captured of a step into its record.

        Args:
            record: the step's record.
            batches: its batches.
            raw: the gradients as backward left them, all parameters'; None where they are not at hand.

        Raises:
            NbdynError: before the first step, if an epoch would be larger than the budget.
        """
        entries = self._capture.collect(record.step, batches, [self.loss_scale.of(batch.scales) for batch in batches])
        if not record.skipped:
            self._capture.forget_gradients()
        record.spans, record.arrived = self.arena.hold(), self.arena.event()
        exact = self.options.fraction == 1.0 and self.options.project is None
        due = not self._checked or (exact and record.step % self._check_every == 0)
        if raw is not None and batches and due:
            if record.arrived is not None:
                record.arrived.synchronize()
            self._check(record, entries, [raw[place] for place in self._places])
        record.captured = [e for e in entries if not self._capture.is_batch_only(e.site)]
        record.captured_bytes = sum(t.nbytes for e in record.captured for t in e.tensors.values())
        visits = sum(batch.size for batch in batches)
        if visits and not self.visits:
            self._say_cost(self._later_bytes(record.captured) / visits, visits)
        self.visits += visits
        self.bytes += record.captured_bytes

    def _check(self, record: StepRecord, entries: list[Entry], raw: list[Tensor | None]) -> None:
        """Compare the sum of contributions with p.grad; the first time, give up what does not add up."""
        totals = _unscaled(self._totals(entries), entries, self._tensors, raw)
        grads = [None if g is None else (g.to_dense() if g.is_sparse else g).detach().reshape(-1).cpu() for g in raw]
        largest: dict[str, float] = {}
        for t, grad in zip(self._tensors, grads, strict=True):
            if grad is not None:
                largest[t["layer"]] = max(largest.get(t["layer"], 0.0), _largest(grad))
        half = any(t.itemsize == 2 for e in entries for t in e.tensors.values())
        for place, (t, p, grad) in enumerate(zip(self._tensors, self._parameters, grads, strict=True)):
            if t["name"] in self.batch_only or not p.requires_grad or p._backward_hooks:
                continue  # a hook on the parameter changes its gradient: contributions are what it was before
            total = totals.get(t["name"])
            if grad is None or (total is None and not bool(grad.any())):
                continue
            total = torch.zeros_like(grad) if total is None else total
            difference, residual = _difference(total, grad)
            record.residuals[self._places[place]] = residual
            # Gradients that are zero by a symmetry (a bias before a normalization) are rounding and nothing else:
            # beside those of the layer's other tensors they are nothing.
            negligible = difference <= 1e-2 * TOLERANCE * largest[t["layer"]]
            if not self._checked and not residual <= (HALF_TOLERANCE if half else TOLERANCE) and not negligible:
                self._capture.give_up(t["name"], _why(residual, bool(total.any())))
        self._checked = True

    def _totals(self, entries: list[Entry]) -> dict[str, Tensor]:
        """Tensor name -> sum over visits of the contributions, (size,)."""
        found: dict[str, Tensor] = {}
        ends = [t["first"] + t["size"] for t in self._tensors]
        for entry in entries:
            site = self.sites[entry.site]
            values = torch.from_numpy(closed.total(site, captured_block(entry)))
            place = 0
            for first, size in site.runs:
                t = self._tensors[int(np.searchsorted(ends, first, side="right"))]
                part, place = values[place : place + size], place + size
                if size == t["size"] and t["name"] not in found:
                    found[t["name"]] = part
                    continue
                known = found.get(t["name"])
                whole = torch.zeros(t["size"], dtype=torch.float64) if known is None else known.double()
                whole[first - t["first"] : first - t["first"] + size] += part
                found[t["name"]] = whole
        return found

    def _later_bytes(self, entries: list[Entry]) -> float:
        """What a step like the first one will take: that one was captured whole and exactly, to be checked."""
        total = 0.0
        for entry in entries:
            k = self.options.project if self.sites[entry.site].form == "linear" else None
            for t in entry.tensors.values():
                total += t.nbytes * (1.0 if k is None else min(1.0, k / t.shape[-1]))
        return total * self.options.fraction

    def _say_cost(self, each: float, size: int) -> None:
        epoch = None if self.batches is None else each * size * self.batches / self.options.every
        ways = (
            'layers=["..."] (some of them), every=10 (some steps), fraction=0.1 (some samples), project=16 (random '
            "projections, approximate), or per_sample=False"
        )
        if epoch is not None and epoch > self._room:
            raise NbdynError(
                f"an epoch of per-sample gradients would take up to {format_size(epoch)}, {format_size(each)} a visit; "
                f'the budget leaves {format_size(self._room)}: record with budget="..." or {ways}.'
            )
        whole = "" if epoch is None else f", {format_size(epoch)} an epoch"
        self._say(f"per-sample gradients: {format_size(each)} a visit{whole}, before compression.")


def _unscaled(
    totals: dict[str, Tensor], entries: list[Entry], tensors: list[dict[str, Any]], raw: list[Tensor | None]
) -> dict[str, Tensor]:
    """The totals as p.grad has them: with a GradScaler's scale or without.

    torch's unscaling does not count as a change of the gradient, so that only the numbers tell whether it was done.
    """
    scale = float(entries[0].factor) if entries else 1.0
    if scale == 1.0:
        return totals
    size = sum(float(total.abs().sum(dtype=torch.float64)) for total in totals.values())
    pairs = zip(tensors, raw, strict=True)
    seen = sum(float(g.detach().double().abs().sum()) for t, g in pairs if g is not None and t["name"] in totals)
    with_scale = abs(np.log(max(size, 1e-300) / max(seen, 1e-300))) < abs(np.log(scale)) / 2
    return totals if with_scale else {name: total / scale for name, total in totals.items()}


def _why(residual: float, seen: bool) -> str:
    """Why a tensor whose contributions do not add up to its gradient is recorded by batch only."""
    if not seen:
        return "it is used outside the modules that own parameters"
    return f"its samples' contributions add up to its gradient only within {100 * residual:.2g} %"


def _largest(t: Tensor) -> float:
    """max|t|, without a copy of it; NaN where a number is."""
    return float(torch.linalg.vector_norm(t, float("inf"))) if t.numel() else 0.0


def _difference(found: Tensor, reference: Tensor) -> tuple[float, float]:
    """max|found - reference|, and that divided by max|reference|; infinite where they are not finite alike."""
    difference, size = _largest(found - reference), _largest(reference)
    if not np.isfinite(difference):
        finite = torch.isfinite(reference)
        if not torch.equal(torch.isfinite(found), finite):
            return float("inf"), float("inf")
        difference, size = _largest(found[finite] - reference[finite]), _largest(reference[finite])
    return difference, difference / max(size, np.finfo(np.float64).tiny)
