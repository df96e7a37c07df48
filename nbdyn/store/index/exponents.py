"""How many numbers of a tensor have which binary exponent: exact counts above any power of two, bounds above others."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 32_768
"""Numbers are looked at so many at a time: they stay in the cache, and torch starts no threads for so few."""
BINS = 64
ZERO, NOT_FINITE = 0, BINS - 1
LOWEST, HIGHEST = -48, 13
"""Bin 0: zeros. Bin b of 1..62: 2^(b - 49) <= |x| < 2^(b - 48); in bin 1 also all smaller, in bin 62 all larger ones.
Bin 63: NaN and Inf."""


def counts(values: Tensor) -> np.ndarray:
    """The histogram of some numbers, (BINS,) int64. Cost: about 1.5 ns each, from the bits of the numbers.

    >>> import torch
    >>> found = counts(torch.tensor([0.0, 1.0, -1.5, 2.0, float("nan"), 1e-30]))
    >>> {int(b): int(found[b]) for b in np.flatnonzero(found)}
    {0: 1, 1: 1, 49: 2, 50: 1, 63: 1}
    """
    import torch

    wide = values.dtype == torch.float64
    bits, mantissa, fields = (torch.int64, 52, 2048) if wide else (torch.int32, 23, 256)
    found, zeros = np.zeros(fields, np.int64), len(values)
    for part in values.split(CHUNK):
        field = part.view(bits).bitwise_right_shift(mantissa).bitwise_and_(fields - 1)
        found += torch.bincount(field, minlength=fields).numpy()
        zeros -= int(torch.count_nonzero(part))
    exponent = np.arange(fields) - (fields // 2 - 1)
    place = np.clip(exponent, LOWEST, HIGHEST) - LOWEST + 1
    place[-1] = NOT_FINITE
    out = np.bincount(place, found, BINS).astype(np.int64)
    out[ZERO] += zeros  # the rest of their field is smaller than any normal number
    out[1] -= zeros
    return out


def above(histogram: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """How many numbers have |x| > threshold or are not finite: at least, at most; |x| >= threshold lies between, too.

    A power of two from 2^-48 to 2^13 gives how many have |x| >= threshold exactly: the second number.

    Args:
        histogram: (..., BINS) counts.
        threshold: at least 0.

    >>> import torch
    >>> found = counts(torch.tensor([0.0, 1.0, -1.5, 2.0]))
    >>> [tuple(map(int, above(found, t))) for t in (0.0, 1.0, 1.2, 4.0)]
    [(3, 3), (1, 3), (1, 3), (0, 0)]
    """
    tail = np.cumsum(histogram[..., ::-1], axis=-1)[..., ::-1]  # [b]: in bins b..63
    if threshold == 0:
        return tail[..., 1], tail[..., 1]
    exponent = min(max(math.frexp(threshold)[1] - 1, LOWEST), HIGHEST)
    place = exponent - LOWEST + 1
    least = tail[..., place + 1] if threshold < 2.0 ** (HIGHEST + 1) else histogram[..., NOT_FINITE]
    return least, tail[..., place]
