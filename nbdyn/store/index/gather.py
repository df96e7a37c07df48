"""One pass over what was captured: the sums and histograms of each group of parameters, span by span."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from nbdyn.store import closed
from nbdyn.store.closed_tools import writable
from nbdyn.store.factors import Block
from nbdyn.store.gradient_reader import Asked, Piece, Reader
from nbdyn.store.index.plan import Group, Plan
from nbdyn.store.index.sums import Histograms, Sums
from nbdyn.store.sites import Site

if TYPE_CHECKING:
    from nbdyn.store.store import Store

WINDOW_BYTES = 32_000_000
"""Factors, or cells of parameters used several times, are gone through so many bytes at a time."""

Advance = Callable[[int], object]
AddGrad = Callable[[int, np.ndarray], None]
Found = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
"""What `Sums.take` gives."""


def gather(store: Store, plan: Plan, number: int, histograms: Histograms, advance: Advance) -> Iterator[Found]:
    """The sums of a group of parameters, one for each span in order; its gradients go into `histograms` meanwhile.

    Cost: one read of the group's factors. Where a layer has one position a visit: for every visit and parameter four
    multiplications and additions (batch gradient, |g| and g by class, g^2; two without classes less). Memory: the sums,
    8 bytes x (6 + 2 classes) a parameter, and about 200 MB.

    Args:
        store: the run.
        plan: the build.
        number: of the group.
        histograms: receives the batch gradients.
        advance: called with the visits done.
    """
    group, sums = plan.groups[number], Sums(plan, plan.groups[number])

    def add_grad(step: int, grad: np.ndarray) -> None:
        import torch

        values = torch.from_numpy(writable(grad))
        sums.add_grad(step, values)
        histograms.add(number, step, values)

    if plan.grads:
        histograms.begin(number)
    parts = _of_site(store, plan, group.site) if group.site is not None else _of_several(store, plan, group)
    done = 0
    for place, part in parts:
        for _ in range(done, place):
            yield sums.take()
        done = place
        visits = part.add(plan, sums, add_grad)
        advance(visits)
    for _ in range(done, len(plan.spans)):
        yield sums.take()


# Parameters used once a batch, by one site ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blocks:
    """Whole steps of one span and one site."""

    site: Site
    blocks: list[Block]

    def add(self, plan: Plan, sums: Sums, add_grad: AddGrad) -> int:
        """Add them; how many visits they were."""
        if plan.grads:
            for step in np.unique(np.concatenate([block.step for block in self.blocks])).tolist():
                add_grad(step, self._grad(step))
        for block in self.blocks:
            _add_moments(self.site, plan, block, sums)
        return sum(map(len, self.blocks))

    def _grad(self, step: int) -> np.ndarray:
        """What the visits of a step add to p.grad, as `gradient_reader.Reader.totals` adds it up."""
        parts = [_between(block, step, step + 1) for block in self.blocks]
        return functools.reduce(np.add, [closed.total(self.site, part) for part in parts if len(part)])


def _of_site(store: Store, plan: Plan, number: int) -> Iterator[tuple[int, _Blocks]]:
    """All of a site, in order: the place of the span, and blocks of it."""
    site = store.factors.sites[number]
    for window in _windows(store, plan, number):
        first, last = min(block.step[0] for block in window), max(block.step[-1] for block in window)
        for place, span in enumerate(plan.spans):
            if span.start <= last and span.stop > first:
                here = [_between(block, span.start, span.stop) for block in window]
                here = [block for block in here if len(block)]
                if here:
                    yield place, _Blocks(site, here)


def _windows(store: Store, plan: Plan, site: int) -> Iterator[list[Block]]:
    """The blocks of a site, so many together as hold whole steps."""
    window: list[Block] = []
    for block in store.factors.blocks(site, plan.start, plan.stop, max_bytes=WINDOW_BYTES):
        if window and block.step[0] > max(b.step[-1] for b in window):
            yield window
            window = []
        window.append(block)
    if window:
        yield window


def _between(block: Block, start: int, stop: int) -> Block:
    return block.take(slice(*np.searchsorted(block.step, [start, stop]).tolist()))


def _add_moments(site: Site, plan: Plan, block: Block, sums: Sums) -> None:
    """Moments of g over a block: of a layer with one position a visit g^2 in one product, other sums class by class."""
    block = replace(block, factor=block.factor * plan.scale[block.step - plan.start])
    wanted = sums.wanted
    if site.form == "linear" and block.tensors["d"].shape[1] == 1:
        sums.add(-1, closed.moments(site, block, ("sum_sq",)))
    else:
        wanted = (*wanted, "sum_sq")
    if not plan.classes:
        sums.add(-1, closed.moments(site, block, wanted))
        return
    labels = plan.classes_at(block.step, block.position)
    order = np.argsort(labels, kind="stable")
    block, labels = block.take(order), labels[order]
    for part in np.split(np.arange(len(labels)), np.nonzero(np.diff(labels))[0] + 1):
        some = block.take(slice(int(part[0]), int(part[-1]) + 1))
        sums.add(int(labels[part[0]]), closed.moments(site, some, wanted))


# Parameters used several times ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cells:
    """Whole steps of one span: the visits' cells, in which all uses of a parameter are added up."""

    reader: Reader
    steps: np.ndarray
    grads: np.ndarray
    """(steps, n), to be filled."""

    def add(self, plan: Plan, sums: Sums, add_grad: AddGrad) -> int:
        """Add them; how many visits they were."""
        if plan.grads:
            self.reader.totals(self.grads, True, None)
            for step, grad in zip(self.steps.tolist(), self.grads, strict=True):
                add_grad(step, grad)
        visits = 0
        for piece in self.reader.pieces(WINDOW_BYTES):
            _add_cells(plan, piece, self.grads.shape[1], sums)
            visits += len(piece.step) * (piece.columns.start == 0)
        return visits


def _of_several(store: Store, plan: Plan, group: Group) -> Iterator[tuple[int, _Cells]]:
    """All cells of parameters, in order: the place of the span, and steps of it."""
    if not group.used:
        return
    indices, dtype = group.indices(), np.dtype(store.config["row_dtype"])
    everything, none = np.ones(len(indices), bool), np.empty(0, np.int64)
    count = max(1, WINDOW_BYTES // (dtype.itemsize * len(indices)))
    for place, span in enumerate(plan.spans):
        captured = plan.captured[slice(*np.searchsorted(plan.captured, [span.start, span.stop]).tolist())]
        for start in range(0, len(captured), count):
            steps = captured[start : start + count]
            asked = Asked("parameters used several times", indices, steps, none, everything, None, {})
            yield place, _Cells(Reader(store, asked), steps, np.zeros((len(steps), len(indices)), dtype))


def _add_cells(plan: Plan, piece: Piece, width: int, sums: Sums) -> None:
    values = piece.values * plan.scale[piece.step - plan.start][:, None].astype(piece.values.dtype)
    labels = plan.classes_at(piece.step, piece.position) if plan.classes else np.full(len(values), -1)
    for label in np.unique(labels).tolist():
        some = values[labels == label]
        found = {
            "sum": some.sum(0, dtype=np.float64),
            "sum_abs": np.abs(some).sum(0, dtype=np.float64),
            "sum_sq": np.square(some, dtype=np.float64).sum(0),
        }
        sums.add(label, {name: _spread(values, piece.columns, width) for name, values in found.items()})


def _spread(values: np.ndarray, columns: slice, width: int) -> np.ndarray:
    """Values of a range of the parameters among zeros for the others."""
    if len(values) == width:
        return values
    out = np.zeros(width)
    out[columns] = values
    return out
