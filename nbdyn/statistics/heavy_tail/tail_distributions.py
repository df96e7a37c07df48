"""Distributions of values beyond a threshold xmin: the power law, and what is compared with it.

All are written for y = log(x / xmin) >= 0, where the power law is an exponential distribution: neither large values nor
small probabilities overflow. Each has logpdf, sf, ppf and rvs, as scipy's frozen distributions do.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from nbdyn.statistics.heavy_tail import power_law_kernels as kernels

NODES = 32
"""Of the Gauss-Legendre rule on each panel."""


@functools.cache
def rule() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights for `power_law_kernels.cut_off`."""
    return np.polynomial.legendre.leggauss(NODES)


def log_erfcx(z: ArrayLike) -> np.ndarray:
    """log(exp(z^2) erfc(z)), without overflow where z is far below 0."""
    z = np.asarray(z, np.float64)
    left = np.minimum(z, 0.0)
    return np.where(z < 0, left**2 + np.log(special.erfc(left)), np.log(special.erfcx(np.maximum(z, 0.0))))


@dataclass(frozen=True)
class Tail(ABC):
    """A distribution of x >= xmin.

    Attributes:
        xmin: the threshold.
    """

    xmin: float

    @abstractmethod
    def log_density(self, y: np.ndarray) -> np.ndarray:
        """Log density of y = log(x / xmin), for y >= 0."""

    @abstractmethod
    def log_sf(self, y: np.ndarray) -> np.ndarray:
        """Log probability above y, for y >= 0."""

    @abstractmethod
    def inverse(self, log_sf: np.ndarray) -> np.ndarray:
        """The y of a log probability above it."""

    def logpdf(self, x: ArrayLike) -> np.ndarray:
        """Log density at x; -inf below xmin."""
        x = np.asarray(x, np.float64)
        logs = np.log(np.maximum(x, self.xmin))
        return np.where(x < self.xmin, -np.inf, self.log_density(logs - math.log(self.xmin)) - logs)

    def sf(self, x: ArrayLike) -> np.ndarray:
        """The probability of a value above x; 1 below xmin."""
        return np.exp(self.log_sf(np.log(np.maximum(np.asarray(x, np.float64), self.xmin)) - math.log(self.xmin)))

    def ppf(self, q: ArrayLike) -> np.ndarray:
        """The value below which a share q lies; infinite for q = 1."""
        q = np.asarray(q, np.float64)
        found = self.xmin * np.exp(self.inverse(np.log1p(-np.where(q < 1, q, 0.0))))
        return np.where(q < 1, found, np.inf)

    def rvs(self, size: Any = 1, random_state: Any = None) -> np.ndarray:
        """Random values.

        Args:
            size: shape.
            random_state: a seed or a numpy Generator.
        """
        return self.ppf(np.random.default_rng(random_state).random(size))


@dataclass(frozen=True)
class PowerLaw(Tail):
    """p(x) = (alpha - 1) / xmin (x / xmin)^-alpha: y is exponential with rate alpha - 1.

    Attributes:
        alpha: exponent of the density, above 1; the tail index is alpha - 1.

    >>> round(float(PowerLaw(2.0, alpha=2.5).sf(8.0)), 6)
    0.125
    """

    alpha: float

    def log_density(self, y: np.ndarray) -> np.ndarray:
        """Log density of y."""
        return math.log(self.alpha - 1) - (self.alpha - 1) * y

    def log_sf(self, y: np.ndarray) -> np.ndarray:
        """Log probability above y."""
        return -(self.alpha - 1) * y

    def inverse(self, log_sf: np.ndarray) -> np.ndarray:
        """The y of a log probability above it."""
        return -log_sf / (self.alpha - 1)


@dataclass(frozen=True)
class TruncatedLognormal(Tail):
    """A lognormal distribution, given that x >= xmin: y is normal, given that y >= 0.

    Written with t = root y and a shift h its density is proportional to exp(-t^2 - 2 h t). For h -> inf with
    2 h root = alpha - 1 it becomes the power law, for which mu and sigma are infinite.

    Attributes:
        root: 1 / (sigma sqrt(2)), sigma the standard deviation of log x before the cut.
        shift: (log xmin - mu) root, mu the mean of log x before the cut.
    """

    root: float
    shift: float

    @property
    def sigma(self) -> float:
        """Standard deviation of log x before the cut at xmin."""
        return 1 / (self.root * math.sqrt(2))

    @property
    def mu(self) -> float:
        """Mean of log x before the cut at xmin."""
        return math.log(self.xmin) - self.shift / self.root

    def log_density(self, y: np.ndarray) -> np.ndarray:
        """Log density of y."""
        t = self.root * y
        scale = math.log(2 * self.root / math.sqrt(math.pi)) - float(log_erfcx(self.shift))
        return scale - t * (t + 2 * self.shift)

    def log_sf(self, y: np.ndarray) -> np.ndarray:
        """Log probability above y."""
        t = self.root * y
        return log_erfcx(t + self.shift) - log_erfcx(self.shift) - t * (t + 2 * self.shift)

    def inverse(self, log_sf: np.ndarray) -> np.ndarray:
        """The y of a log probability above it."""
        cut = special.log_ndtr(-math.sqrt(2) * self.shift)
        t = -special.ndtri_exp(log_sf + cut) / math.sqrt(2) - self.shift
        return np.maximum(t, 0.0) / self.root


@dataclass(frozen=True)
class StretchedExponential(Tail):
    """S(x) = exp(-(hazard / shape) ((x / xmin)^shape - 1)): a Weibull distribution, given that x >= xmin.

    shape = 1 is the exponential distribution; for shape -> 0 it becomes the power law of alpha = hazard + 1.

    Attributes:
        log_hazard: log of -d log S / dy at xmin.
        shape: above 0.
    """

    log_hazard: float
    shape: float

    def log_density(self, y: np.ndarray) -> np.ndarray:
        """Log density of y."""
        return self.log_hazard + self.shape * y + self.log_sf(y)

    def log_sf(self, y: np.ndarray) -> np.ndarray:
        """Log probability above y."""
        with np.errstate(over="ignore"):  # the probability is 0 there
            return np.exp(self.log_hazard + self.shape * y) * np.expm1(-self.shape * y) / self.shape

    def inverse(self, log_sf: np.ndarray) -> np.ndarray:
        """The y of a log probability above it."""
        if self.log_hazard > -700:
            return np.log1p(-log_sf * self.shape * math.exp(-self.log_hazard)) / self.shape
        with np.errstate(divide="ignore"):  # y = 0 has log_sf = 0
            return np.maximum(np.log(-log_sf * self.shape) - self.log_hazard, 0.0) / self.shape


@dataclass(frozen=True)
class CutPowerLaw(Tail):
    """p(x) proportional to x^-alpha exp(-rate x) on x >= xmin, the power law with an exponential cut-off.

    Attributes:
        alpha: any real.
        rate: above 0, per unit of x.
    """

    alpha: float
    rate: float

    def log_density(self, y: np.ndarray) -> np.ndarray:
        """Log density of y."""
        cut = self.rate * self.xmin
        with np.errstate(over="ignore"):  # the density is 0 there
            return (1 - self.alpha) * y - cut * np.expm1(y) - self._normalizer(np.zeros(1))[0]

    def log_sf(self, y: np.ndarray) -> np.ndarray:
        """Log probability above y: what is beyond y is of the same kind, with the cut-off nearer."""
        cut, y = self.rate * self.xmin, np.asarray(y, np.float64)
        with np.errstate(over="ignore"):  # the probability is 0 there
            start = (1 - self.alpha) * y - cut * np.expm1(y)
        return start + self._normalizer(np.minimum(y, 700.0)) - self._normalizer(np.zeros(1))[0]

    def inverse(self, log_sf: np.ndarray) -> np.ndarray:
        """The y of a log probability above it, by Newton's method: -log S is convex, its slope is 1 / Z."""
        wanted = np.asarray(log_sf, np.float64)
        y = np.zeros(wanted.shape)
        for _ in range(60):
            step = (self.log_sf(y) - wanted) * np.exp(self._normalizer(y))
            # The first step may leap beyond what doubles hold; from the right the steps come back in order.
            y = np.clip(y + step, 0.0, 700.0)
            if np.all(np.abs(step) <= 1e-13 * (1 + y)):
                break
        return y

    def _normalizer(self, y: np.ndarray) -> np.ndarray:
        """Log of the integral that belongs to what is beyond y."""
        cuts = self.rate * self.xmin * np.exp(y)
        return kernels.log_normalizers(self.alpha - 1, cuts.ravel(), *rule()).reshape(cuts.shape)
