"""Members: the groups of visits (or of steps) that a question speaks of, such as samples, classes, epochs."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from nbdyn.query.evaluate import Array, evaluate
from nbdyn.query.tree import Expression

PLACES = 2**32
"""step * PLACES + position is the key of a visit; of a step, its number times PLACES."""

COLUMN = {"sample": "sample", "class": "class", "batch": "step", "epoch": "epoch"}
"""Which column of a visit says the member it belongs to."""


@dataclass(frozen=True)
class Members:
    """Rows (visits or steps) and the member of each.

    Attributes:
        key: (V,) int64, sorted; see PLACES.
        code: (V,) int64 number of the row's member.
        labels: a row a member: its columns, such as sample.
        scale: (V,) float64, what a contribution is multiplied by; None for contributions as they are.
        by_token: "token" where positions of sequences are members (sample x position, `code` being the sample),
            "position" where the place in the sequence is; "" elsewhere.
        length: positions a visit has at most, where members are tokens or positions; 0 elsewhere.
        notes: what is to be said of rows that belong to no member.
    """

    key: Array
    code: Array
    labels: pd.DataFrame
    scale: Array | None = None
    by_token: str = ""
    length: int = 0
    notes: tuple[str, ...] = field(default=())

    @property
    def count(self) -> int:
        """How many members there are."""
        return len(self.labels)

    @property
    def steps(self) -> tuple[int, int]:
        """First step and the one after the last, half-open; (0, 0) for no rows."""
        return (int(self.key[0] // PLACES), int(self.key[-1] // PLACES) + 1) if len(self.key) else (0, 0)

    def only(self, first: int, stop: int) -> Members:
        """The members first..stop-1, numbered from 0."""
        keep = (self.code >= first) & (self.code < stop)
        scale = None if self.scale is None else self.scale[keep]
        labels = self.labels.iloc[first:stop]
        return replace(self, key=self.key[keep], code=self.code[keep] - first, labels=labels, scale=scale)

    def rows_of(self, step: Array, position: Array | int) -> Array:
        """The row of each of some visits, -1 for those that belong to no member."""
        wanted = step * PLACES + position
        row = np.minimum(np.searchsorted(self.key, wanted), max(0, len(self.key) - 1))
        return np.where(self.key[row] == wanted, row, -1) if len(self.key) else np.full(len(wanted), -1)


def members_of(
    rows: pd.DataFrame,
    kinds: tuple[str, ...],
    *,
    where: Expression | None = None,
    columns: dict[str, Array] | None = None,
    scale: Array | None = None,
) -> Members:
    """The members of some visits or steps.

    Args:
        rows: sorted by (step, position); without a column `position` they are steps.
        kinds: words of COLUMN; rows are told apart by all of them, none makes them one member.
        where: a bound condition; other rows belong to no member.
        columns: the columns for `where`.
        scale: (V,) factor of each row.
    """
    keep = np.ones(len(rows), dtype=bool)
    notes: list[str] = []
    if where is not None:
        keep &= np.broadcast_to(evaluate(where, columns or {}), keep.shape).astype(bool)
    for kind, unknown in (("sample", "their sample is unknown"), ("class", "they have no class")):
        if kind in kinds:
            known = rows[COLUMN[kind]].to_numpy() >= 0
            left = int((keep & ~known).sum())
            notes += [f"{left} visits left out: {unknown}"] if left else []
            keep &= known
    rows = rows.loc[keep]
    position = rows["position"].to_numpy() if "position" in rows else 0
    key = rows["step"].to_numpy().astype(np.int64) * PLACES + position
    names = [COLUMN[kind] for kind in kinds]
    if len(names) == 1:
        found, code = np.unique(rows[names[0]].to_numpy(), return_inverse=True)
        labels = pd.DataFrame({names[0]: found})
    elif names:
        groups, unique = pd.MultiIndex.from_frame(rows.loc[:, names]).factorize(sort=True)
        code, labels = groups, unique.to_frame(index=False)
        labels.columns = names
    else:
        code, labels = np.zeros(len(rows), np.int64), pd.DataFrame(index=range(min(1, len(rows))))
    kept_scale = None if scale is None else scale[keep]
    return Members(key, code.reshape(-1).astype(np.int64), labels, kept_scale, notes=tuple(notes))
