"""Batch gradients of linear layers: one product a step, reduced at once, so that no matrix of all steps is needed."""

# pyright: standard
# torch ships incomplete types.
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nbdyn.query.evaluate import Array
from nbdyn.query.reduce.linear import Part, Rows
from nbdyn.query.reduce.measures import BEYOND, CELLS, COUNT, EXCEED, LARGEST, MAX_ABS, SUM_ABS, SUM_SQ, Condition
from nbdyn.query.reduce.members import PLACES, Members
from nbdyn.query.reduce.targets import Targets

STEPS = 32
"""Steps added up in float32 before they go into float64."""


def reduce_batches(
    part: Part,
    rows: Rows,
    steps: Array,
    members: Members,
    targets: Targets,
    operations: tuple[str, ...],
    threshold: Callable[[Array, Array], Array | float],
    out: dict[str, Array],
    condition: Condition = BEYOND,
) -> int:
    """Bring the batch gradients of a part into `out`: operation -> (members, targets); NaN are left out.

    Args:
        part: the part.
        rows: its factors, of members that are single steps.
        steps: (n,) those steps.
        members: what is asked: groups of steps.
        targets: of the parameters.
        operations: which.
        threshold: as in `general.reduced`.
        out: float64, changed in place.
        condition: as in `general.reduced`.

    Returns:
        How many cells were NaN.
    """
    import torch

    code = members.code[members.rows_of(steps, 0)]
    order = np.argsort(code, kind="stable")
    missing, sums = 0, _Sums(part, targets, operations, rows.is_finite, condition)
    grad = torch.empty(part.weight.shape, dtype=torch.float32)
    for place, number in enumerate(order.tolist()):
        some = slice(int(rows.starts[number]), int(rows.starts[number + 1]))
        d = torch.from_numpy(rows.d(some))
        torch.mm(d.t(), torch.from_numpy(rows.a(some)), out=grad)
        bias = torch.from_numpy(rows.d(some, part.biases)).sum(0)
        limits = None
        if EXCEED in operations:
            limits = threshold(steps[number : number + 1] * PLACES, targets.indices)
        missing += sums.add(grad, bias, limits)
        if place + 1 == len(order) or code[order[place + 1]] != code[number] or (place + 1) % STEPS == 0:
            sums.flush(int(code[number]), out)
    return missing


class _Sums:
    """What some steps add up to, in float32."""

    def __init__(
        self, part: Part, targets: Targets, operations: tuple[str, ...], is_finite: bool, condition: Condition
    ) -> None:
        self._is_finite, self._condition = is_finite, condition
        self._part, self._targets, self._operations = part, targets, operations
        self._pieces = [where for where in (part.weight, part.bias) if where.size]
        by_weight = targets.kind == "weight"
        self._codes = [None if by_weight else _codes(targets.code[where]) for where in self._pieces]
        self._double = len(set(operations) - {CELLS}) > 1  # a variance is the difference of two sums
        self._held: dict[tuple[str, int], Any] = {}

    def add(self, grad: Any, bias: Any, limits: Any) -> int:
        """Take the gradient of one step: the block of the weight, then the biases."""
        missing = 0
        values = [x for x, where in ((grad, self._part.weight), (bias, self._part.bias)) if where.size]
        values = [x.double() for x in values] if self._double else values
        for number, x in enumerate(values):
            nan = None if self._is_finite else x.isnan()
            missing += 0 if nan is None else int(nan.sum())
            for name in self._operations:
                cells = self._of_cells(name, x, limits, self._pieces[number])
                if nan is not None and name != EXCEED:
                    cells = cells.masked_fill(nan, -float("inf") if name in LARGEST else 0.0)
                self._take(name, number, cells)
        return missing

    def _of_cells(self, name: str, x: Any, limits: Any, where: Array) -> Any:
        import torch

        if name in (SUM_ABS, MAX_ABS):
            return x.abs()
        if name == SUM_SQ:
            return x.square()
        if name == COUNT:
            return (x != 0).float()
        if name == CELLS:
            return torch.ones_like(x)
        if name == EXCEED:
            bound = np.broadcast_to(np.asarray(limits), (1, max(np.shape(limits)[-1:], default=1)))[0]
            bound = bound[where] if len(bound) > 1 else bound[0]
            return self._condition.holds(x, torch.as_tensor(bound, dtype=x.dtype)).float()
        return x

    def _take(self, name: str, number: int, cells: Any) -> None:
        import torch

        codes = self._codes[number]
        if codes is not None:
            rows, places, count = codes
            along = cells.amax(-1) if name in LARGEST else cells.sum(-1)
            along = along if rows else cells
            found = torch.full((count,), -float("inf") if name in LARGEST else 0.0, dtype=along.dtype)
            reduce = "amax" if name in LARGEST else "sum"
            cells = found.scatter_reduce(0, torch.from_numpy(places), along.reshape(-1), reduce)
        held = self._held.get((name, number))
        if held is None:
            self._held[name, number] = cells.clone()
        elif name in LARGEST:
            torch.maximum(held, cells, out=held)
        else:
            held += cells

    def flush(self, member: int, out: dict[str, Array]) -> None:
        """Bring what was added up into a member's row, and begin anew."""
        for (name, number), held in self._held.items():
            where, codes = self._pieces[number].reshape(-1), self._codes[number]
            columns = where if codes is None else np.unique(self._targets.code[self._pieces[number]])
            values = held.double().numpy().reshape(-1)
            row = out[name][member]
            row[columns] = np.maximum(row[columns], values) if name in LARGEST else row[columns] + values
        self._held.clear()


def _codes(code: Array) -> tuple[bool, Array, int]:
    """How cells go to targets: whether rows are added up first, the place of each row or cell, how many targets."""
    by_rows = code.ndim == 2 and bool((code == code[:, :1]).all())
    found, places = np.unique(code[:, 0] if by_rows else code.reshape(-1), return_inverse=True)
    return by_rows, places.reshape(-1).astype(np.int64), len(found)
