"""Surrogates: what keeps the power spectrum of given series, or the covariance of given samples, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from nbdyn.errors import Incompatible

CELLS = 1 << 22
"""Random numbers drawn at once."""


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


def gaussian_surrogate(noise: ArrayLike, draws: int = 1, seed: int = 0) -> Iterator[np.ndarray]:
    """Gaussian samples with the covariance of given ones: what is left of an effect if tails are not heavy.

    Z is the noise less its mean over samples, C = Z'Z / n its covariance. Rows of each surrogate are independent
    N(0, C), exactly: A Z with A an n x n matrix of N(0, 1/n); or, if samples are more than coordinates, independent
    standard Gaussians times the root of C, which is the same law. One surrogate is made at a time, so memory is that of
    a few arrays of the noise's size; a draw takes 2 n d min(n, d) operations.

    Args:
        noise: real and finite, (n, d): samples by coordinates.
        draws: how many.
        seed: of the random numbers.

    Yields:
        (n, d), float64: the mean of its law is zero, that of its rows is not exactly.

    Raises:
        Incompatible: for another number of axes, fewer than two samples, or values that are not finite.

    >>> noise = np.random.default_rng(0).laplace(size=(500, 2)) @ [[1.0, 0.9], [0.0, 0.4]]
    >>> found = np.concatenate(list(gaussian_surrogate(noise, draws=200)))
    >>> np.allclose(np.cov(found.T), np.cov(noise.T), rtol=0.03)
    True
    """
    z = np.asarray(noise, np.float64)
    if z.ndim != 2 or len(z) < 2 or not np.isfinite(z).all():
        raise Incompatible(
            f"noise of shape {z.shape}: give finite values, (samples, coordinates), of two samples or more."
        )
    return _gaussian(z - z.mean(axis=0), draws, np.random.default_rng(seed))


def _gaussian(z: np.ndarray, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """As `gaussian_surrogate`, of centred noise."""
    n, d = z.shape
    if n > d:
        variance, axes = np.linalg.eigh(z.T @ z / n)
        root = np.sqrt(np.maximum(variance, 0.0))[:, None] * axes.T
    else:
        root = z / np.sqrt(n)
    rows = max(1, CELLS // len(root))
    for _ in range(draws):
        drawn = np.empty((n, d))
        for first in range(0, n, rows):
            piece = drawn[first : first + rows]
            np.matmul(rng.standard_normal((len(piece), len(root))), root, out=piece)
        yield drawn
