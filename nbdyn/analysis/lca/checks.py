"""Does an allocation add up: its summary, and what is to be said of it; its totals, and the shares of cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nbdyn.analysis.lca.rules import ADAPTIVE

Steps = Mapping[str, np.ndarray]
"""Columns of steps, see `nbdyn.analysis.lca.totals.STEP_COLUMNS`."""


def summary(steps: Steps) -> dict[str, float]:
    """The row of `Allocation.check`."""
    change = float(steps["loss_after"][-1] - steps["loss"][0])
    drift = float(steps["drift"][1:].sum())
    allocated, each = float(steps["allocated"].sum()), np.abs(steps["residual"])
    residual = change - drift - allocated

    def percent(missed: float) -> float:
        return 100 * missed / change if change else math.nan

    return {
        "steps": len(each), "loss": float(steps["loss"][0]), "loss_after": float(steps["loss_after"][-1]),
        "change": change, "allocated": allocated, "residual": residual, "residual_percent": percent(residual),
        "first_order_percent": percent(change - drift - float(steps["first_order"].sum())),
        "mean_residual": float(each.mean()), "worst_residual": float(each.max()), "error": float(steps["error"].sum()),
        "gradients": int(steps["gradients"].sum()), "gradients_per_step": float(steps["gradients"].mean()),
        "not_met": int((steps["met"] == 0).sum()), "drift": drift,
    }  # fmt: skip


def misses(steps: Steps, precision: Mapping[str, Any]) -> Iterator[str]:
    """Sentences about tolerances that were not met."""
    row = summary(steps)
    if row["not_met"]:
        yield (
            f"{row['not_met']:,} of {row['steps']:,} steps miss the tolerance of {precision['tolerance']:g} (worst "
            f"residual {row['worst_residual']:.3g}); `.steps` marks them."
        )
    changes = np.abs(steps["loss_after"] - steps["loss"][0])
    largest = float(changes[np.isfinite(changes)].max(initial=0.0))
    if precision["integrator"] == ADAPTIVE and not abs(row["residual"]) <= precision["total"] * largest:
        yield (
            f"{row['residual']:.3g} of the change of the loss was not allocated, more than {precision['total']:g} of "
            f"the largest change, {largest:.3g}."
        )


def shares(tensors: Mapping[str, np.ndarray], sizes: np.ndarray, code: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of `Allocation.layers`.

    Args:
        tensors: columns of `nbdyn.analysis.lca.totals.TENSOR_COLUMNS`, each (steps, tensors).
        sizes: parameters of each tensor.
        code: what each tensor is counted to.
    """
    sums = {name: np.bincount(code, values.sum(0)) for name, values in tensors.items()}
    size = np.bincount(code, sizes)
    cells, moving = size * len(tensors["sum"]), sums["helping"] + sums["hurting"]
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "lca": sums["sum"], "help": sums["sum"] - sums["hurt"], "hurt": sums["hurt"],
            "helping_percent": 100 * sums["helping"] / cells, "zero_percent": 100 * (1 - moving / cells),
            "hurting_percent": 100 * sums["hurting"] / cells,
            "helping_of_nonzero_percent": 100 * sums["helping"] / moving, "decay": sums["decay"], "size": size,
        }  # fmt: skip
