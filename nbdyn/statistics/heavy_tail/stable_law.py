"""The symmetric alpha-stable (SaS) law: distribution function, density, quantiles, random numbers.

The standard law has phi(t) = exp(-|t|^alpha). For x > 0 its survival function is the Fourier integral

    S(x) = (1 / pi) Im int_0^inf exp(i x t) (1 - exp(-t^alpha)) / t dt,

and the density likewise. Along the ray t = s exp(i angle), with angle < pi / (2 max(alpha, 1)), both factors decay, and
the substitution s = exp(pi/2 sinh u) makes the trapezoidal rule converge exponentially (Takahasi and Mori 1974). Beyond
`FAR` the tail series is summed (Bergstrom 1952; Feller 1971, XVII.6), which converges for alpha < 1 and is asymptotic
above. Tests compare with Cauchy, Gauss, Levy-type closed forms and SciPy to 1e-6 or better.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import interpolate, special, stats

from nbdyn.errors import Incompatible

FAR = 30.0
"""From here the tail series is used: its smallest term is below 1e-16 of the first."""
STEP, TOP = 0.02, 2.2
"""Of the trapezoidal rule in u, and where it ends."""
TERMS = np.arange(1, 25)
LEAST_ALPHA = 0.2
"""Below, half of the law lies within a thousandth of sigma, and no sample tells it from zeros."""
KNOTS = 500
GRID = np.arange(0.0, 60.0, 0.03)
"""Where `standard_cdf` has values: at core sinh(GRID), see `_core`."""
ALPHAS = np.linspace(LEAST_ALPHA, 2.0, 181)
"""Indices at which `standard_cdf` has values."""
LEAST_P = 1e-40
"""Quantiles of a smaller chance are those of this one: beyond, they are no numbers."""
NEAR_TWO = 1e-9
"""An alpha that is no further from 2 is 2: the Gaussian has its own formulas."""


class SymmetricStable:
    """A frozen SaS distribution, phi(t) = exp(i loc t - |scale t|^alpha); alpha = 2 is a Gaussian of sd sqrt(2) scale.

    Values come from splines through the exact ones, so that a million cost a second: relative error below 1e-6, or 1e-4
    where alpha is less than 1e-6 below 2.

    Args:
        alpha: 0.2 to 2.
        loc: centre.
        scale: sigma, above 0.

    Raises:
        Incompatible: if alpha or scale is out of range.

    >>> round(float(SymmetricStable(1.0).sf(1.0)), 9)
    0.25
    """

    def __init__(self, alpha: float, loc: float = 0.0, scale: float = 1.0) -> None:
        if not LEAST_ALPHA <= alpha <= 2 or not scale > 0:
            raise Incompatible(f"alpha = {alpha:g}, scale = {scale:g}: give alpha in 0.2..2, scale above 0.")
        self.alpha, self.loc, self.scale = float(alpha), float(loc), float(scale)

    def sf(self, x: ArrayLike) -> np.ndarray:
        """P(X > x)."""
        z = (np.asarray(x, np.float64) - self.loc) / self.scale
        tail = _positive_sf(np.abs(z), self.alpha)
        return np.where(z >= 0, tail, 1 - tail)

    def cdf(self, x: ArrayLike) -> np.ndarray:
        """P(X <= x)."""
        return self.sf(2 * self.loc - np.asarray(x, np.float64))

    def logpdf(self, x: ArrayLike) -> np.ndarray:
        """The logarithm of the density."""
        z = np.abs(np.asarray(x, np.float64) - self.loc) / self.scale
        return _positive_logpdf(z, self.alpha) - np.log(self.scale)

    def pdf(self, x: ArrayLike) -> np.ndarray:
        """The density."""
        return np.exp(self.logpdf(x))

    def ppf(self, q: ArrayLike) -> np.ndarray:
        """The x with P(X <= x) = q."""
        q = np.asarray(q, np.float64)
        below = q < 0.5
        return self.loc + np.where(below, -1.0, 1.0) * self.scale * _positive_isf(np.where(below, q, 1 - q), self.alpha)

    def rvs(self, size: Any = 1, random_state: Any = None) -> np.ndarray:
        """Random numbers; `random_state` is a seed or a generator."""
        return self.loc + self.scale * stable_sample(self.alpha, size, random_state)

    def __repr__(self) -> str:
        return f"SymmetricStable(alpha={self.alpha:.4g}, loc={self.loc:.4g}, scale={self.scale:.4g})"


def stable_sample(alpha: ArrayLike, size: Any, seed: Any = None) -> np.ndarray:
    """Standard SaS random numbers (Chambers, Mallows and Stuck 1976, equation 4.1 with beta = 0).

    Args:
        alpha: in (0, 2]; broadcast with `size`.
        size: shape of the result.
        seed: a seed or a generator.

    >>> abs(float(np.median(np.abs(stable_sample(1.0, 100_001, seed=0)))) - 1) < 0.02
    True
    """
    rng = np.random.default_rng(seed)
    a = np.asarray(alpha, np.float64)
    angle, wait = rng.uniform(-np.pi / 2, np.pi / 2, size), rng.standard_exponential(size)
    return np.sin(a * angle) / np.cos(angle) ** (1 / a) * (np.cos((1 - a) * angle) / wait) ** ((1 - a) / a)


def standard_cdf(z: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """P(Z <= z) by linear interpolation between tabled indices and points: for many alphas at once.

    The error is below 1.5e-4 (2e-5 from alpha of 0.8 on), small beside a Kolmogorov-Smirnov distance.

    Args:
        z: (B, n).
        alpha: (B,); taken into 0.2..2.
    """
    place = np.clip((alpha - LEAST_ALPHA) / (ALPHAS[1] - ALPHAS[0]), 0, len(ALPHAS) - 1 - 1e-9)
    low = place.astype(int)
    share = (place - low)[:, None]
    names = np.unique(np.concatenate([low, low + 1]))
    table = np.stack([_tabled(int(name)) for name in names])
    size, found = np.abs(z), np.zeros(z.shape)
    for name, weight in ((low, 1 - share), (low + 1, share)):
        at = np.minimum(np.arcsinh(size / _core(ALPHAS[name])[:, None]) / GRID[1], len(GRID) - 1.001)
        knot = at.astype(np.int64)
        first = np.searchsorted(names, name)[:, None] * len(GRID) + knot
        left, right = table.ravel()[first], table.ravel()[first + 1]
        found += weight * (left + (at - knot) * (right - left))
    return np.where(z >= 0, 1 - found, found)


def _core(alpha: ArrayLike) -> np.ndarray:
    """The width of the peak, where points must lie close: the root of density over curvature at 0, at most 1."""
    a = np.asarray(alpha, np.float64)
    return np.minimum(1.0, np.exp((special.gammaln(1 / a) - special.gammaln(3 / a)) / 2))


@functools.lru_cache(maxsize=len(ALPHAS))
def _tabled(name: int) -> np.ndarray:
    """The survival function of `ALPHAS[name]` at `GRID`."""
    alpha = float(ALPHAS[name])
    x = _core(alpha) * np.sinh(GRID)
    if 2 - alpha < NEAR_TWO:
        return stats.norm.sf(x, scale=np.sqrt(2))
    near = x < FAR
    return np.concatenate([_fourier(x[near], alpha, 2 * STEP)[0], _series(x[~near], alpha)[0]])


class Quantiles(NamedTuple):
    """Of the standard law, over a grid of alphas: the 75 % and 95 % points, and the density there and at 0."""

    alpha: np.ndarray
    q75: np.ndarray
    q95: np.ndarray
    f75: np.ndarray
    f95: np.ndarray
    f0: np.ndarray


@functools.lru_cache(maxsize=1)
def quantiles() -> Quantiles:
    """Quantiles at 1,801 alphas of 0.2..2: exact at 61, by cubic splines of logarithms over 1 / alpha between."""
    nodes = np.linspace(LEAST_ALPHA, 2.0, 61)
    q = np.array([[_isf_exact(1 - p, float(alpha)) for p in (0.75, 0.95)] for alpha in nodes])
    f = np.array([_fourier_or_series(x, float(alpha))[1] for alpha, x in zip(nodes, q, strict=True)])
    dense = np.linspace(LEAST_ALPHA, 2.0, 1801)
    curves = [np.exp(interpolate.CubicSpline(-1 / nodes, np.log(y))(-1 / dense)) for y in (*q.T, *f.T)]
    return Quantiles(dense, *curves, f0=special.gamma(1 + 1 / dense) / np.pi)


def _isf_exact(p: float, alpha: float) -> float:
    """The x with S(x) = p by Newton's method in logarithms, without splines."""
    x = 1.0
    for _ in range(60):
        sf, pdf = (float(y[0]) for y in _fourier_or_series(np.array([x]), alpha))
        step = np.log(sf / p) * sf / (pdf * x)
        x *= np.exp(np.clip(step, -2.0, 2.0))
        if abs(step) < 1e-12:
            break
    return x


def _fourier_or_series(x: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    near, far = _fourier(np.minimum(x, FAR), alpha), _series(np.maximum(x, FAR), alpha)
    return np.where(x < FAR, near[0], far[0]), np.where(x < FAR, near[1], far[1])


# The standard law on x >= 0 ---------------------------------------------------------------------------------------


class _Splines(NamedTuple):
    """Logarithms of survival function and density over arcsinh(x / core), up to `FAR`."""

    core: float
    knots: np.ndarray
    sf: Any
    pdf: Any


@functools.lru_cache(maxsize=64)
def _splines(alpha: float) -> _Splines:
    core = float(_core(alpha))
    knots = np.linspace(0, np.arcsinh(FAR / core), KNOTS)
    sf, pdf = _fourier(core * np.sinh(knots), alpha)
    curves = [interpolate.CubicSpline(knots, np.log(values)) for values in (sf, pdf)]
    return _Splines(core, knots, *curves)


def _positive_sf(x: np.ndarray, alpha: float) -> np.ndarray:
    if 2 - alpha < NEAR_TWO:
        return stats.norm.sf(x, scale=np.sqrt(2))
    splines = _splines(alpha)
    near = np.exp(splines.sf(np.arcsinh(np.minimum(x, FAR) / splines.core)))
    return np.where(x < FAR, near, _series(np.maximum(x, FAR), alpha)[0])


def _positive_logpdf(x: np.ndarray, alpha: float) -> np.ndarray:
    if 2 - alpha < NEAR_TWO:
        return stats.norm.logpdf(x, scale=np.sqrt(2))
    splines = _splines(alpha)
    near = splines.pdf(np.arcsinh(np.minimum(x, FAR) / splines.core))
    return np.where(x < FAR, near, np.log(_series(np.maximum(x, FAR), alpha)[1]))


def _positive_isf(p: np.ndarray, alpha: float) -> np.ndarray:
    """The x >= 0 with S(x) = p, p in [0, 1/2]: from the spline's knots or the tail's first term, then by Newton."""
    if 2 - alpha < NEAR_TWO:
        return stats.norm.isf(p, scale=np.sqrt(2))
    inner, splines = np.clip(p, LEAST_P, 0.5), _splines(alpha)
    heights = splines.sf(splines.knots)
    near = splines.core * np.sinh(np.interp(-np.log(inner), -heights, splines.knots))
    first = special.gamma(alpha) * np.sin(np.pi * alpha / 2) / np.pi
    far = inner < np.exp(heights[-1])
    x = np.where(far, np.maximum((first / inner) ** (1 / alpha), FAR), near)
    for _ in range(4):
        survival = _positive_sf(x, alpha)
        slope = np.exp(_positive_logpdf(x, alpha)) / survival
        # Far out in log x, where log S is nearly a line.
        moved = x * np.exp(np.where(far, np.log(survival / inner) / (slope * np.maximum(x, 1.0)), 0.0))
        x = np.where(far, moved, np.maximum(x + (survival - inner) / (slope * survival), 0.0))
    return np.where(p > 0, x, np.inf)


def _fourier(x: np.ndarray, alpha: float, step: float = STEP) -> tuple[np.ndarray, np.ndarray]:
    """Survival function and density at 0 <= x <= `FAR` by the integral; see the module.

    Below 1 it is S(x) = 1/2 - (1 / pi) Im int (exp(i x t) - 1) exp(-t^alpha) / t dt, whose range stays short near 0.
    """
    bottom = np.arcsinh(2 / np.pi * 40 / min(alpha, 1.0))
    top = max(TOP, np.arcsinh(2 / np.pi * np.log(60.0) / min(alpha, 1.0)))
    u = np.arange(-bottom, top, step)
    s, weight = np.exp(np.pi / 2 * np.sinh(u)), step / 2 * np.cosh(u)
    ray = np.exp(0.6j * np.pi / 2 / max(alpha, 1.0))
    column = x[:, None]
    t = s / (1 + column) * ray
    # (s / (1 + x) ray)^alpha as a product: powers are the dearest part.
    wave, decay = np.exp(1j * column * t), np.exp((1 + column) ** -alpha * (-(s**alpha) * ray**alpha))
    density = ((wave * decay * t) @ weight).real
    middle = column < 1
    survival = (np.where(middle, (1 - wave) * decay, wave * (1 - decay)) @ weight).imag
    return np.where(middle[:, 0], 0.5 + survival, survival), density


def _series(x: np.ndarray, alpha: float) -> tuple[np.ndarray, np.ndarray]:
    """Survival function and density at x >= `FAR`; of an asymptotic series terms count until the smallest."""
    sizes = np.exp(special.gammaln(alpha * TERMS) - special.gammaln(TERMS + 1) - alpha * TERMS * np.log(FAR))
    last = len(TERMS) if alpha < 1 else int(np.argmin(sizes)) + 1
    k = TERMS[:last]
    factor = -((-1.0) ** k) * np.sin(np.pi * alpha * k / 2) * special.gamma(alpha * k) / special.gamma(k) / np.pi
    small = x[..., None] ** (-alpha * k)
    return small @ (factor / k), (small @ (alpha * factor)) / x
