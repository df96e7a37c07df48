"""A streaming summary of a series over steps, of constant size, that never loses a spike."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

_NO_STEP = np.iinfo(np.int64)


class Envelope:
    """Minimum, maximum and mean of a series in at most `bins` equal bins of steps.

    Bin i holds the steps from `origin + i * width` up to, not including, `origin + (i + 1) * width`, where `origin` is
    the smallest step of the first call. When a step falls behind the last bin, neighbouring bins merge in pairs and
    `width` doubles: memory stays constant however long the run, and since the minimum of two minima is the minimum of
    both bins, the result does not depend on how the series was cut into calls. NaN and infinite values are counted,
    not mixed into minimum, maximum and mean.

    Time O(values) a call, memory 48 bytes a bin. Not thread-safe: the caller holds the lock.

    Args:
        bins: the number of bins, even.

    >>> envelope = Envelope(bins=4)
    >>> envelope.add([0, 1, 2, 3, 4, 5], [3.0, 1.0, 9.0, 2.0, float("nan"), 5.0])
    >>> envelope.width, envelope.low.tolist(), envelope.high.tolist(), envelope.nan_count.tolist()
    (2, [1.0, 2.0, 5.0], [3.0, 9.0, 5.0], [0, 0, 1])
    """

    def __init__(self, bins: int = 800) -> None:
        """Start an empty envelope."""
        if bins < 2 or bins % 2:
            raise ValueError(f"an envelope needs an even number of bins, at least 2, not {bins}.")
        self.bins = bins
        self.width = 1
        """Steps in a bin."""
        self.origin = 0
        """The step at which bin 0 begins; set by the first call."""
        self.size = 0
        """Values taken in so far, NaN and infinite ones included."""
        self.final = float("nan")
        """The value given last."""
        self._first = np.full(bins, _NO_STEP.max)
        self._last = np.full(bins, _NO_STEP.min)
        self._low = np.full(bins, np.inf)
        self._high = np.full(bins, -np.inf)
        self._sum = np.zeros(bins)
        self._count = np.zeros(bins, dtype=np.int64)
        self._nans = np.zeros(bins, dtype=np.int64)

    def add(self, steps: ArrayLike, values: ArrayLike) -> None:
        """Take in more of the series.

        Args:
            steps: integer steps, shape (n,), none smaller than `origin`; a step may occur several times.
            values: one value a step, shape (n,).

        Raises:
            ValueError: if the shapes differ, or a step lies before `origin`.
        """
        steps = np.asarray(steps, dtype=np.int64)
        values = np.asarray(values, dtype=np.float64)
        if steps.shape != values.shape or steps.ndim != 1:
            raise ValueError(f"steps and values must be two vectors of one length, not {steps.shape}, {values.shape}.")
        if steps.size == 0:
            return
        if self.size == 0:
            self.origin = int(steps.min())
        if steps.min() < self.origin:
            raise ValueError(f"step {steps.min()} lies before step {self.origin}, with which this envelope began.")
        while (int(steps.max()) - self.origin) // self.width >= self.bins:
            self._merge_pairs()
        self.size += steps.size
        self.final = float(values[-1])
        self._fill((steps - self.origin) // self.width, steps, values)

    def _fill(self, index: np.ndarray, steps: np.ndarray, values: np.ndarray) -> None:
        np.minimum.at(self._first, index, steps)
        np.maximum.at(self._last, index, steps)
        finite = np.isfinite(values)
        self._nans += np.bincount(index[~finite], minlength=self.bins)
        index, values = index[finite], values[finite]
        np.minimum.at(self._low, index, values)
        np.maximum.at(self._high, index, values)
        with np.errstate(over="ignore"):
            np.add.at(self._sum, index, values)
        self._count += np.bincount(index, minlength=self.bins)

    def _merge_pairs(self) -> None:
        self.width *= 2
        half = self.bins // 2
        for array, unite, empty in (
            (self._first, np.minimum, _NO_STEP.max),
            (self._last, np.maximum, _NO_STEP.min),
            (self._low, np.minimum, np.inf),
            (self._high, np.maximum, -np.inf),
            (self._sum, np.add, 0),
            (self._count, np.add, 0),
            (self._nans, np.add, 0),
        ):
            array[:half] = unite(array[0::2], array[1::2])
            array[half:] = empty

    @property
    def _used(self) -> np.ndarray:
        return np.flatnonzero(self._count + self._nans)

    @property
    def first(self) -> np.ndarray:
        """First step seen in each bin that holds any, shape (used,)."""
        return self._first[self._used]

    @property
    def last(self) -> np.ndarray:
        """Last step seen in each bin that holds any, shape (used,)."""
        return self._last[self._used]

    @property
    def low(self) -> np.ndarray:
        """Least finite value of each bin that holds any value; NaN where none is finite, shape (used,)."""
        return self._finite_or_nan(self._low)

    @property
    def high(self) -> np.ndarray:
        """Greatest finite value, else as `low`."""
        return self._finite_or_nan(self._high)

    @property
    def mean(self) -> np.ndarray:
        """Mean of the finite values (a sum past the range of float64 is cut at low or high), else as `low`."""
        mean = self._sum / np.maximum(self._count, 1)
        return self._finite_or_nan(np.clip(mean, self._low, self._high))

    @property
    def nan_count(self) -> np.ndarray:
        """How many values of each bin are NaN or infinite, shape (used,)."""
        return self._nans[self._used]

    def _finite_or_nan(self, array: np.ndarray) -> np.ndarray:
        used = self._used
        return np.where(self._count[used] > 0, array[used], np.nan)
