"""Surrogates: series that keep the power spectrum of given ones, and nothing else."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def phase_randomized(values: ArrayLike, draws: int = 1, seed: int = 0, together: bool = False) -> np.ndarray:
    """Surrogates: the series' Fourier coefficients turned by random angles (Theiler and others 1992).

    Each keeps the power spectrum (so the autocorrelation), mean and variance of its series, and nothing between series.

    Args:
        values: real, (..., T); of three axes the first is classes.
        draws: how many.
        seed: of the angles.
        together: whether angles are the same along the first axis, which keeps cross spectra along it (Prichard and
            Theiler 1994).

    Returns:
        (draws, ..., T), float64.
    """
    return randomized(np.asarray(values, np.float64), draws, np.random.default_rng(seed), together)


def randomized(values: np.ndarray, draws: int, rng: np.random.Generator, together: bool) -> np.ndarray:
    """As `phase_randomized`. The mean's and, of an even number of steps, the last coefficient are real and stay."""
    steps = values.shape[-1]
    spectrum = np.fft.rfft(values)
    shape = (1, *spectrum.shape[1:]) if together and values.ndim > 2 else spectrum.shape
    angles = rng.uniform(0, 2 * np.pi, (draws, *shape))
    angles[..., 0] = 0
    if steps % 2 == 0:
        angles[..., -1] = 0
    return np.fft.irfft(spectrum * np.exp(1j * angles), n=steps)
