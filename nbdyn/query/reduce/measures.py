"""What the aggregates of a measure are made of: sums over cells that every path can add up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nbdyn.query.evaluate import Array
from nbdyn.query.tree import Measure

SUM, SUM_ABS, SUM_SQ, COUNT, EXCEED, MAX, MAX_ABS = "sum", "sum_abs", "sum_sq", "count", "exceed", "max", "max_abs"

LARGEST = (MAX, MAX_ABS)
"""Operations that take the largest of their cells; the others add."""

_NEEDS = {"sum": (SUM,), "mean": (SUM,), "max": (MAX,), "var": (SUM, SUM_SQ), "norm": (SUM_SQ,), "count": (COUNT,),
          "share": (EXCEED,), "net": (SUM,), "path": (SUM_ABS,)}  # fmt: skip


def operations(measure: Measure) -> tuple[str, ...]:
    """The operations over cells that a measure needs, words of the list above."""
    found = _NEEDS[measure.aggregate]
    if measure.magnitude:
        found = tuple({SUM: SUM_ABS, MAX: MAX_ABS}.get(name, name) for name in found)
    return found


def of_cells(operation: str, cells: Array, threshold: Array | float = 0.0) -> Array:
    """What an operation takes of each cell.

    Args:
        operation: the operation.
        cells: any shape.
        threshold: of EXCEED: the cells whose magnitude is larger are counted, NaN and Inf too.
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
        case _:
            return ~(np.abs(cells) <= threshold)


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
            case _:
                found = first
        return np.abs(found, out=found) if measure.absolute or measure.aggregate == "net" else found
