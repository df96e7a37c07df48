"""What the aggregates of a measure are made of: sums over cells that every path can add up."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from nbdyn.query.evaluate import Array
from nbdyn.query.tree import Measure

SUM, SUM_ABS, SUM_SQ, COUNT, EXCEED, MAX, MAX_ABS = "sum", "sum_abs", "sum_sq", "count", "exceed", "max", "max_abs"
CELLS = "cells"
"""How many cells there are, for cells that are not counted by visits and parameters; NaN are left out but of shares."""

LARGEST = (MAX, MAX_ABS)
"""Operations that take the largest of their cells; the others add."""

_NEEDS = {"sum": (SUM,), "mean": (SUM,), "max": (MAX,), "var": (SUM, SUM_SQ), "norm": (SUM_SQ,), "count": (COUNT,),
          "share": (EXCEED,), "net": (SUM,), "path": (SUM_ABS,)}  # fmt: skip


_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge, "=": operator.eq,
}  # fmt: skip


class Condition(NamedTuple):
    """What a share asks of each cell: the operator, and whether of its magnitude."""

    operator: str = ">"
    magnitude: bool = True

    @property
    def is_beyond(self) -> bool:
        """Whether it is |x| > t or |x| >= t: what exploded (NaN, Inf) fulfils it, and norms bound how many cells do."""
        return self.magnitude and self.operator in (">", ">=")

    def holds(self, cells: Any, limits: Any) -> Any:
        """Where it holds; NaN is beyond every limit, and any other comparison with NaN is false.

        Args:
            cells: a NumPy array or torch tensor.
            limits: a number, or what broadcasts with them.

        >>> Condition(">", magnitude=True).holds(np.array([-2.0, 1.0, np.nan]), 1.0).tolist()
        [True, False, True]
        >>> Condition("!=", magnitude=False).holds(np.array([-2.0, 0.0, np.nan]), 0.0).tolist()
        [True, False, False]
        """
        x = abs(cells) if self.magnitude else cells
        if self.is_beyond:
            return ~_COMPARE["<=" if self.operator == ">" else "<"](x, limits)
        return (x < limits) | (x > limits) if self.operator == "!=" else _COMPARE[self.operator](x, limits)


BEYOND = Condition()
"""|x| > t."""


def condition_of(measure: Measure) -> Condition:
    """The condition of a share; |x| > t for other measures, which ask for none."""
    return BEYOND if measure.condition is None else Condition(measure.condition[0], measure.magnitude)


def operations(measure: Measure) -> tuple[str, ...]:
    """The operations over cells that a measure needs, words of the list above."""
    found = _NEEDS[measure.aggregate]
    if measure.magnitude:
        found = tuple({SUM: SUM_ABS, MAX: MAX_ABS}.get(name, name) for name in found)
    return found


def of_cells(operation: str, cells: Array, threshold: Array | float = 0.0, condition: Condition = BEYOND) -> Array:
    """What an operation takes of each cell.

    Args:
        operation: the operation.
        cells: any shape.
        threshold: of EXCEED: what cells are compared with.
        condition: of EXCEED: the cells of which it holds are counted.
    """
    match operation:
        case "sum" | "max":
            return cells
        case "sum_abs" | "max_abs":
            return np.abs(cells)
        case "sum_sq":
            return np.square(cells, dtype=np.float64)  # exact, so that a variance of equal cells is 0
        case "count":
            return cells != 0
        case "cells":
            return np.ones(cells.shape, dtype=bool)
        case _:
            return condition.holds(cells, threshold)


def finished(measure: Measure, parts: dict[str, Array], counted: Callable[[], Array]) -> Array:
    """The measure from its operations' values.

    Args:
        measure: the measure.
        parts: operation -> values.
        counted: gives how many cells each value was taken of (visits x parameters).
    """
    with np.errstate(all="ignore"):
        first = parts[operations(measure)[0]]
        match measure.aggregate:
            case "mean" | "share":
                found = first / counted()
            case "var":
                # The population variance of the cells; |x| and x have the same squares.
                cells = counted()
                found = np.maximum(parts[SUM_SQ] / cells - np.square(first / cells), 0.0)
            case "norm":
                found = np.sqrt(first, out=first)
            case "max":
                found = np.where(np.isneginf(first), np.nan, first)  # no cells, or only NaN
            case _:
                found = first
        return np.abs(found, out=found) if measure.absolute or measure.aggregate == "net" else found
