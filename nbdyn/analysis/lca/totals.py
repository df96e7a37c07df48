"""What is kept of an allocation when its (step, parameter) matrix is not: sums and counts, exact, as steps go by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from nbdyn.analysis.lca.engine import StepAllocation

Array = np.ndarray
Sums = dict[str, dict[str, Array]]
"""Array -> attribute -> values that have no row for each step."""

STEP_COLUMNS = (
    "loss", "loss_after", "allocated", "residual", "first_order", "error", "drift", "nodes", "gradients", "met",
)  # fmt: skip
TENSOR_COLUMNS = ("sum", "hurt", "helping", "hurting", "decay", "gradient_square", "motion_square")
PARAMETER_COLUMNS: dict[str, Any] = {
    "help": np.float64, "hurt": np.float64, "error": np.float64, "helping": np.int32, "hurting": np.int32,
    "lca_turns": np.int32, "weight_turns": np.int32, "gradient_turns": np.int32,
    "last_lca": np.int8, "last_motion": np.int8,
}  # fmt: skip
"""Of each parameter over all steps; `last_*` are signs at the last step, from which turns are counted further."""


@dataclass(frozen=True)
class Units:
    """The units of a network: outputs of linear layers, channels of convolutions, rows of embeddings.

    A unit's parameters are runs of consecutive ones: a row of the weight, an element of the bias. The first axis of a
    transposed convolution's weight is that of its input channels.

    Attributes:
        starts: where each run begins, (R,) int64 global indices.
        of_run: the unit of each run, (R,) int64.
        tensor_runs: the first run of each tensor that has any parameters.
        filled: which tensors these are, (tensors,) bool.
        table: one row a unit: layer, unit.
    """

    starts: Array
    of_run: Array
    tensor_runs: Array
    filled: Array
    table: pd.DataFrame

    def __len__(self) -> int:
        return len(self.table)

    def by_run(self, values: Array) -> Array:
        """Sums over the runs, along the last axis: (..., P) -> (..., R)."""
        return np.add.reduceat(values, self.starts, axis=-1)

    def by_tensor(self, runs: Array) -> Array:
        """Sums of runs over the tensors: (..., R) -> (..., tensors)."""
        found = np.zeros((*runs.shape[:-1], len(self.filled)), runs.dtype)
        found[..., self.filled] = np.add.reduceat(runs, self.tensor_runs, axis=-1)
        return found

    def by_unit(self, runs: Array) -> Array:
        """Sums of runs over the units: (..., R) -> (..., units)."""
        flat = runs.reshape(-1, runs.shape[-1])
        return np.stack([np.bincount(self.of_run, row, len(self)) for row in flat]).reshape(*runs.shape[:-1], -1)


def units_of(tensors: Sequence[Mapping[str, Any]]) -> Units:
    """The units of some tensors: the first axis of each, shared by the weight and the bias of a layer.

    Tensors of a layer whose first axes differ (recurrent layers, attention) have units of their own.

    >>> units_of([{"name": "fc.weight", "layer": "fc", "shape": [2, 3], "size": 6, "first": 0},
    ...           {"name": "fc.bias", "layer": "fc", "shape": [2], "size": 2, "first": 6}]).of_run.tolist()
    [0, 1, 0, 1]
    """
    firsts: dict[tuple[str, int], int] = {}
    layers, numbers, starts, of_run, edges = [], [], [], [], [0]
    for tensor in tensors:
        if not tensor["size"]:
            continue
        size = int(tensor["shape"][0]) if tensor["shape"] else 1
        key = tensor["layer"], size
        if key not in firsts:
            firsts[key] = len(layers)
            layers += [tensor["layer"]] * size
            numbers += range(size)
        starts.append(tensor["first"] + np.arange(size) * (tensor["size"] // size))
        of_run.append(firsts[key] + np.arange(size))
        edges.append(edges[-1] + size)
    table = pd.DataFrame({"layer": layers, "unit": numbers})
    filled = np.array([tensor["size"] > 0 for tensor in tensors])
    return Units(np.concatenate(starts), np.concatenate(of_run), np.array(edges[:-1]), filled, table)


@dataclass
class Rows:
    """Consecutive steps of an allocation.

    Attributes:
        steps: column of STEP_COLUMNS -> (n,).
        tensors: column of TENSOR_COLUMNS -> (n, tensors): sum of A; sum of its positive cells; how many cells are
            negative; how many positive; "decay": what the optimizer's L2 weight decay, seen as a term of the loss,
            changed of it; squared norms of the gradient before the step (NaN for rules that do not take it) and of the
            motion.
        units: sum of A of each unit, (n, units).
        groups: sum of A^g of each tensor for each group of samples, (n, groups, tensors).
        parts: sum of A of each tensor for each part of the motion, (n, parts, tensors).
        cells: A, (n, P) float32, or (n, 0) where they are not kept; by class (n, 1 + groups, P), A itself first.
    """

    steps: dict[str, Array]
    tensors: dict[str, Array]
    units: Array
    groups: Array
    parts: Array
    cells: Array

    def __len__(self) -> int:
        return len(self.units)

    def columns(self) -> dict[str, dict[str, Array]]:
        """As `nbdyn.store.allocations` stores them: array -> attribute -> values."""
        named = {name: {"value": getattr(self, name)} for name in ("units", "groups", "parts", "cells")}
        return {"steps": self.steps, "tensors": self.tensors, **named}

    @staticmethod
    def from_columns(found: Mapping[str, Mapping[str, Array]]) -> Rows:
        """What was stored; the cells stay there."""
        count, tensors = found["tensors"]["sum"].shape
        none = {"value": np.empty((count, 0, tensors))}
        return Rows(
            steps=dict(found["steps"]),
            tensors=dict(found["tensors"]),
            units=found["units"]["value"],
            groups=found.get("groups", none)["value"],
            parts=found.get("parts", none)["value"],
            cells=np.empty((count, 0), np.float32),
        )

    @staticmethod
    def joined(rows: Sequence[Rows]) -> Rows:
        """Several runs of steps as one."""
        if len(rows) == 1:
            return rows[0]
        return Rows(
            {name: np.concatenate([r.steps[name] for r in rows]) for name in STEP_COLUMNS},
            {name: np.concatenate([r.tensors[name] for r in rows]) for name in TENSOR_COLUMNS},
            *(np.concatenate([getattr(r, name) for r in rows]) for name in ("units", "groups", "parts", "cells")),
        )


@dataclass
class Totals:
    """Sums and counts of an allocation, updated step by step.

    Cost a step: about fifteen passes over (P,), and two more for each group of samples or part of the motion.

    Attributes:
        tensors: those of the run's configuration.
        keep_cells: whether rows of A are given, too; "classes": those of each group, as well.
        decay: L2 weight decay of each parameter's group, (P,) or None: the term (lambda/2) w^2 of the loss that it
            stands for is integrated exactly, lambda/2 (w[t+1]^2 - w[t]^2).
        groups: groups of samples; 0 for none.
        sums: what is summed over the steps: "parameters", PARAMETER_COLUMNS -> (P,); and "unit_groups", "value" ->
            the sum of A^g of each unit for each group of samples, (groups, units).
    """

    tensors: Sequence[Mapping[str, Any]]
    keep_cells: bool | str
    decay: Array | None = None
    groups: int = 0
    sums: Sums = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.units = units_of(self.tensors)
        if not self.sums:
            size = sum(tensor["size"] for tensor in self.tensors)
            self.sums = {
                "parameters": {name: np.zeros(size, dtype) for name, dtype in PARAMETER_COLUMNS.items()},
                "unit_groups": {"value": np.zeros((self.groups, len(self.units)))},
            }

    @np.errstate(over="ignore", invalid="ignore")  # a diverging training
    def add(self, found: StepAllocation, after: Array, parts: Array | None = None) -> Rows:
        """Count a step in; what is to be kept of it.

        Args:
            found: the step.
            after: w[t+1], (P,).
            parts: parts of its motion, (parts, P), if it was split.
        """
        cells, positive, negative = found.cells, found.cells > 0, found.cells < 0
        hurt = np.where(positive, cells, 0.0)
        self._count(found, positive, negative, hurt)
        steps = {
            "loss": found.loss, "loss_after": found.loss_after, "allocated": cells.sum(), "residual": found.residual,
            "first_order": math.nan if found.grad is None else found.grad.astype(np.float64) @ found.motion,
            "error": found.error.sum(), "drift": found.drift, "nodes": found.nodes, "gradients": found.gradients,
            "met": found.met,
        }  # fmt: skip
        units = self.units
        runs = units.by_run(cells)
        tensors = {
            "sum": units.by_tensor(runs), "hurt": self._by_tensor(hurt),
            "helping": self._by_tensor(negative.astype(np.int64)),
            "hurting": self._by_tensor(positive.astype(np.int64)),
            "decay": self._of_decay(found, after),
            "gradient_square": self._of_squares(found.grad), "motion_square": self._of_squares(found.motion),
        }  # fmt: skip
        groups = split = np.empty((0, len(self.tensors)))
        kept = cells.astype(np.float32) if self.keep_cells else np.empty(0, np.float32)
        if found.groups is not None:
            group_cells = found.groups * found.motion
            if self.keep_cells == "classes":
                kept = np.vstack([kept, group_cells.astype(np.float32)])
            of_groups = units.by_run(group_cells)
            groups = units.by_tensor(of_groups)
            self.sums["unit_groups"]["value"] += units.by_unit(of_groups)
        if parts is not None:
            split = self._by_tensor(found.average * parts)
        return Rows(
            {name: np.array([float(value)]) for name, value in steps.items()},
            {name: values[None] for name, values in tensors.items()},
            units.by_unit(runs)[None],
            groups[None],
            split[None],
            kept[None],
        )

    def _by_tensor(self, values: Array) -> Array:
        return self.units.by_tensor(self.units.by_run(values))

    def _of_squares(self, values: Array | None) -> Array:
        """The square of the Euclidean norm of each tensor; NaN where there are no values."""
        if values is None:
            return np.full(len(self.tensors), np.nan)
        return self._by_tensor(np.square(values, dtype=np.float64))

    def _of_decay(self, found: StepAllocation, after: Array) -> Array:
        if self.decay is None:
            return np.zeros(len(self.tensors))
        # w'^2 - w^2 = (w' - w)(w' + w), which does not cancel
        return self._by_tensor(0.5 * self.decay * found.motion * (2 * after.astype(np.float64) - found.motion))

    def _count(self, found: StepAllocation, positive: Array, negative: Array, hurt: Array) -> None:
        mine = self.sums["parameters"]
        mine["hurt"] += hurt
        mine["help"] += np.where(negative, found.cells, 0.0)
        mine["error"] += found.error
        mine["helping"] += negative
        mine["hurting"] += positive
        self._turn("lca", positive.astype(np.int8) - negative)
        self._turn("weight", np.sign(found.motion).astype(np.int8), "last_motion")
        if found.grad is not None and found.grad_after is not None:
            mine["gradient_turns"] += np.sign(found.grad) * np.sign(found.grad_after) < 0

    def _turn(self, name: str, sign: Array, last: str = "") -> None:
        """Count strict changes of sign between consecutive steps: a zero between them counts as none."""
        last = last or f"last_{name}"
        mine = self.sums["parameters"]
        mine[f"{name}_turns"] += mine[last] * sign < 0
        mine[last] = sign
