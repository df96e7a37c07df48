"""What the columns of an answer are: labels of rows, or values; and where a weight stands in its tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

LABELS = (
    "run", "tensor", "layer", "unit", "parameter", "weight", "class", "sample", "token", "position", "epoch", "step",
    "part",
)  # fmt: skip
"""Columns that say what a row is about."""
BESIDES = ("rank", "group", "low", "high", "event", "event_step", "before", "seconds", "batch_size", "skipped")
"""Columns of numbers that are no value to draw either."""


def values_of(frame: pd.DataFrame) -> list[str]:
    """The columns of numbers that are values: no labels, no ranks, at least one finite number.

    >>> values_of(pd.DataFrame({"rank": [1], "sample": [7], "sum |g|": [0.5]}))
    ['sum |g|']
    """
    usual = [c for c in frame.columns if c not in LABELS and c not in BESIDES]
    return [str(c) for c in usual if pd.api.types.is_numeric_dtype(frame[c]) and np.isfinite(frame[c].to_numpy()).any()]


def label_groups(columns: list[str]) -> list[list[str]]:
    """The columns that label rows; those that make one label together (layer and unit, parameter and weight) as one.

    >>> label_groups(["layer", "unit", "sample", "sum |g|"])
    [['layer', 'unit'], ['sample']]
    """
    found: list[list[str]] = []
    for name in columns:
        together = {"unit": "layer", "weight": "parameter"}.get(name)
        if together is not None and found and found[-1] == [together]:
            found[-1].append(name)
        elif name in LABELS:
            found.append([name])
    return found


def label(frame: pd.DataFrame, columns: list[str]) -> Any:
    """The labels of the rows as words, a Series.

    >>> label(pd.DataFrame({"layer": ["fc1"], "unit": [3]}), ["layer", "unit"]).tolist()
    ['fc1[3]']
    >>> label(pd.DataFrame({"sample": [3]}), ["sample"]).tolist()
    ['sample 3']
    """
    name = columns[-1]
    words = frame[name].astype(str)
    if name == "unit" and len(columns) == 2:
        return frame["layer"].astype(str) + "[" + words + "]"
    return words if name in ("run", "tensor", "layer", "weight") else f"{name} " + words


def places(weights: Any) -> pd.DataFrame:
    """Where weights stand: their tensor, row (the first index) and column (all others, flattened).

    Args:
        weights: a Series of names such as "fc1.weight[3,5]", (n,).

    Returns:
        Columns tensor, row, column, (n,); a scalar parameter is at (0, 0).

    >>> places(pd.Series(["fc.weight[3,5]", "fc.bias[2]"])).values.tolist()
    [['fc.weight', 3, 5], ['fc.bias', 2, 0]]
    """
    parts = weights.reset_index(drop=True).astype(str).str.extract(r"^(.*?)(?:\[([\d,]*)\])?$")
    table = pd.DataFrame({"tensor": parts[0], "row": 0, "column": 0})
    for _, some in parts.groupby(0, sort=False)[1]:
        if some.notna().all():
            index = some.str.split(",", expand=True).to_numpy().astype(np.int64).T
            table.loc[some.index, "row"] = index[0]
            if len(index) > 1:
                rest = tuple(int(i.max()) + 1 for i in index[1:])
                table.loc[some.index, "column"] = np.ravel_multi_index(tuple(index[1:]), rest)
    return table.set_index(weights.index)
