"""Events of weights, where every step was recorded: sign changes and exact zeros, by parameter and step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nbdyn.store.index.entry import open_to_write

SIGN, ARRIVED, ZERO = 1, 2, 3
"""Kinds: the sign changed; 0 was reached from another number; 0 at the first row, or after NaN.

In the language `crosses 0` is SIGN or ARRIVED, `becomes 0 exactly` is ARRIVED or ZERO."""
MOST = 50_000_000
"""More are not kept."""
WRITE_EVENTS = 2_000_000
"""Events written together."""


@dataclass(frozen=True)
class Events:
    """Events in order of step and parameter: step (n,) int64, parameter (n,) int64, kind (n,) uint8."""

    step: np.ndarray
    parameter: np.ndarray
    kind: np.ndarray


def kinds_of(values: np.ndarray, is_first: bool) -> np.ndarray:
    """The kind of what happened at each row but the first, (rows - 1, k) uint8, 0 for nothing; with `is_first`, at all.

    >>> kinds_of(np.array([[0.0], [1.0], [-1.0], [0.0], [0.0], [np.nan], [0.0]]), True).ravel().tolist()
    [3, 0, 1, 2, 0, 0, 3]
    """
    before, after = values[:-1], values[1:]
    found = np.zeros(after.shape, np.uint8)
    found[((before < 0) & (after > 0)) | ((before > 0) & (after < 0))] = SIGN
    zero = after == 0
    found[zero & (before != 0)] = ARRIVED
    found[zero & np.isnan(before)] = ZERO
    if is_first:
        found = np.concatenate([np.where(values[:1] == 0, ZERO, 0).astype(np.uint8), found])
    return found


class Collector:
    """Writes events as rows of weights are gone through.

    Attributes:
        count: events so far, those of earlier builds too; beyond MOST nothing more is written.
    """

    def __init__(self, uri: str, timestamp: int, known_rows: int, count: int) -> None:
        self._uri, self._timestamp, self._known = uri, timestamp, known_rows
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._size, self.count = 0, count

    def take(self, row: int, steps: np.ndarray, parameters: np.ndarray, values: np.ndarray) -> None:
        """Look at consecutive stored rows.

        Args:
            row: number of the first of them among all stored rows; what happened at it was seen before, unless it is 0.
            steps: (n,) their steps.
            parameters: (k,) global parameter indices.
            values: (n, k) the weights.
        """
        if self.count > MOST:
            return
        found = kinds_of(values, row == 0)
        first = row if row == 0 else row + 1
        skipped = max(0, self._known - first)
        places, columns = np.nonzero(found[skipped:])
        kinds = found[skipped:][places, columns]
        self._waiting.append((parameters[columns], steps[len(steps) - len(found) + skipped :][places], kinds))
        self._size += len(kinds)
        self.count += len(kinds)
        if self._size >= WRITE_EVENTS:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self._size and self.count <= MOST:
            parameter, step, kind = (np.concatenate(column) for column in zip(*self._waiting, strict=True))
            with open_to_write(self._uri, "events", self._timestamp) as array:
                array[parameter, step] = kind
        self._waiting, self._size = [], 0
