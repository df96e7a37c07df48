"""What a plan reads: one row of `explain` each."""

from __future__ import annotations

from dataclasses import dataclass

MAX_ROWS = 10_000_000
"""Rows of one result, at most (400 MB of frame)."""


@dataclass(frozen=True)
class Read:
    """One array that is read: steps half-open, `bytes` before compression, `how` it is had, `seconds` reckoned."""

    run: str
    array: str
    columns: tuple[str, ...]
    start: int
    stop: int
    rows: int
    bytes: int
    how: str = "stored"
    seconds: float = float("nan")

    @property
    def cost(self) -> float:
        """Seconds that it may take, by the bytes where nothing better is known."""
        return self.seconds if self.seconds == self.seconds else 0.005 + self.bytes / 200e6
