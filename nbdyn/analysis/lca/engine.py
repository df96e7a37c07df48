"""Loss change allocation, step by step: A[t, i] = (mean of dL/dw_i along the step) x (w_i[t+1] - w_i[t]).

Source: Lan, Liu, Zhou, Yosinski, "LCA: Loss Change Allocation for Neural Network Training", NeurIPS 2019
(arXiv 1909.01440), section 2. Written from the paper's formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from nbdyn.analysis.lca.objective import Objective, Value
from nbdyn.analysis.lca.precision import Precision
from nbdyn.analysis.lca.rules import ADAPTIVE, RULES, Quadrature, fixed, refined

Array = np.ndarray


@dataclass(frozen=True)
class StepAllocation:
    """One step.

    Attributes:
        loss, loss_after: L before and after the step.
        cells: A[t], (P,) float64, in the units of the loss.
        motion: w[t+1] - w[t], (P,) float64.
        average: mean of dL/dw along the step, (P,) float64; cells = average x motion.
        grad: dL/dw before the step, (P,); None for rules without a node there.
        grad_after: after it, likewise.
        error: (P,) |cells - those of the next coarser rule on the same nodes|: an over-estimate of the error where
            the path is smooth; NaN for "first order", which has no coarser rule.
        groups: mean of dL_g/dw along the step, (G, P), for groups of samples; None without.
        nodes: points of the quadrature.
        gradients: full gradients that were computed for it; end points are shared with the neighbours.
        met: whether the tolerance of a step was met; True for fixed rules, which have none.
        drift: what new buffers (running statistics) changed of L before the step, at the same weights.
    """

    loss: float
    loss_after: float
    cells: Array
    motion: Array
    average: Array
    grad: Array | None
    grad_after: Array | None
    error: Array
    groups: Array | None
    nodes: int
    gradients: int
    met: bool
    drift: float = 0.0

    @property
    def residual(self) -> float:
        """L(t+1) - L(t) - sum of A[t]: what was not allocated."""
        with np.errstate(invalid="ignore"):  # infinite cells
            return self.loss_after - self.loss - float(self.cells.sum())


@dataclass(frozen=True)
class _Node:
    """A point of a step: the objective there, and its slope along the step."""

    value: Value
    slope: float

    @property
    def loss(self) -> float:
        return self.value.loss


@dataclass
class Allocator:
    """Allocates steps one after the other; neighbouring steps share the gradient at their common point.

    Cost a step: one full gradient for the trapezoid, two for Simpson's rule, ... and a few passes over (P,).
    Memory: as many rows (P,) as the step has nodes, times groups.

    Attributes:
        objective: L.
        precision: how exact.
        missed: sum of residuals so far.
    """

    objective: Objective
    precision: Precision = field(default_factory=Precision)
    missed: float = 0.0
    _first: float = math.nan
    _largest: float = 0.0
    _end: tuple[Array, Value] | None = None
    _drift: float = 0.0

    def go_on(self, first: float, largest: float, missed: float) -> None:
        """Take up an allocation of which some steps are there.

        Args:
            first: L before the first.
            largest: the largest |L - first| so far.
            missed: the sum of their residuals.
        """
        self._first, self._largest, self.missed = first, largest, missed

    def buffers_changed(self) -> None:
        """The objective's buffers changed: what is known of the point reached no longer holds."""
        if self._end is not None:
            weights, before = self._end
            value = self.objective(weights, gradient=self._ends)
            self._drift = value.loss - before.loss
            self._end = weights, value

    @np.errstate(over="ignore", invalid="ignore")  # a diverging training; `met` tells it
    def step(self, before: Array, after: Array) -> StepAllocation:
        """Allocate the loss change of a step.

        Args:
            before: w[t], (P,).
            after: w[t+1].
        """
        began = self.objective.gradients
        motion = after.astype(np.float64) - before
        nodes = self._start(before, motion)
        if not motion.any():  # a skipped step: the loss does not change, whatever its gradient
            start = self.objective(before, gradient=self._ends) if 0.0 not in nodes else nodes[0.0].value
            nodes = dict.fromkeys((0.0, 1.0), self._node(start, motion))

        def at(s: float) -> _Node:
            if s not in nodes:
                where = after if s == 1.0 else before if s == 0.0 else before + s * motion
                nodes[s] = self._node(self.objective(where, gradient=self._ends or 0 < s < 1), motion)
            return nodes[s]

        if self.precision.integrator == ADAPTIVE:
            rule = refined(at, self._enough(at(0.0).loss, at(1.0).loss), self.precision.most, self.objective.epsilon)
        else:
            rule = fixed(self.precision.integrator, self.precision.splits)
        values = {s: at(s).value for s in dict.fromkeys((0.0, *rule.weights, 1.0))}
        found = self._allocation(rule, values, motion, self.objective.gradients - began)
        self._end, self._drift = (after, values[1.0]), 0.0
        self.missed += found.residual if math.isfinite(found.residual) else 0.0
        return found

    @property
    def _ends(self) -> bool:
        """Whether the gradient is needed at the ends of a step; the loss always is."""
        return self.precision.integrator == ADAPTIVE or 0.0 in RULES[self.precision.integrator][0]

    def _start(self, before: Array, motion: Array) -> dict[float, _Node]:
        """The point that the step before ended at, if that was here."""
        if self._end is None or not np.array_equal(self._end[0], before):
            return {}
        return {0.0: self._node(self._end[1], motion)}

    def _node(self, value: Value, motion: Array) -> _Node:
        return _Node(value, math.nan if value.grad is None else float(value.grad.astype(np.float64) @ motion))

    def _enough(self, loss: float, loss_after: float) -> Callable[[float, float], bool]:
        """Whether a step is exact enough: by itself, and as a part of what all steps may miss together.

        The sum of the residuals stays within `total` of the largest change of the loss so far. A step may take half of
        the room that is left, or bring the sum nearer to 0. So most steps get by with the trapezoid or Simpson's rule.
        """
        precision = self.precision
        self._first = self._first if math.isfinite(self._first) else loss
        changes = (abs(value - self._first) for value in (loss, loss_after))
        self._largest = max(self._largest, *(change for change in changes if math.isfinite(change)), 0.0)
        limit, before = precision.total * self._largest, abs(self.missed)

        def enough(missed: float, residual: float) -> bool:
            if not math.isfinite(missed):  # NaN or Inf in the loss: no refinement helps
                return True
            after = abs(self.missed + residual)
            small = abs(residual) <= (limit - before) / 2 or after < before
            return missed <= precision.tolerance and after <= limit and small

        return enough

    def _allocation(
        self, rule: Quadrature, values: dict[float, Value], motion: Array, gradients: int
    ) -> StepAllocation:
        start, end = values[0.0], values[1.0]
        still = not motion.any()
        grads = {s: values[s].grad for s in rule.weights}
        average = np.zeros_like(motion) if still and start.grad is None else _mean(rule.weights, grads)
        cells = average * motion
        error = np.abs((average - _mean(rule.coarser, grads)) * motion) if rule.coarser and not still else 0.0 * motion
        residual = end.loss - start.loss - float(cells.sum())
        adaptive = self.precision.integrator == ADAPTIVE
        return StepAllocation(
            loss=start.loss,
            loss_after=end.loss,
            cells=cells,
            motion=motion,
            average=average,
            grad=start.grad,
            grad_after=end.grad,
            error=error if rule.coarser else np.full_like(cells, np.nan),
            groups=None
            if not self.objective.samples.groups
            else _mean(rule.weights, {s: values[s].grads for s in rule.weights}),
            nodes=len(rule.weights),
            gradients=gradients,
            met=math.isfinite(residual) and (not adaptive or rule.missed <= self.precision.tolerance),
            drift=self._drift,
        )

    def _groups(self, rule: Quadrature, values: dict[float, Value]) -> Array | None:
        """The mean gradient of each group of samples along the step, (G, P); None without groups."""
        groups = self.objective.samples.groups
        grads = {s: values[s].grads for s in rule.weights}
        if not groups or any(grad is None for grad in grads.values()):  # a step without motion may have no gradient
            return np.zeros((groups, self.objective.parameters)) if groups else None
        return _mean(rule.weights, grads)


def _mean(weights: dict[float, float], rows: Mapping[float, Array | None]) -> Array:
    """The weighted sum of rows, in float64."""
    total: Array | None = None
    for s, weight in weights.items():
        row = rows[s]
        assert row is not None
        part = np.multiply(row, weight, dtype=np.float64)
        total = part if total is None else np.add(total, part, out=total)
    assert total is not None
    return total
