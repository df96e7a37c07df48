"""Does a series go up or down? A rank test whose null keeps the series' dependence on its own past."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import linalg, signal, stats

from nbdyn.errors import Incompatible, UnknownName, did_you_mean
from nbdyn.statistics.testing import one_sample

CHUNK = 4_000_000
"""Values simulated at once."""
BURN_IN = 100
"""Steps after which a simulated series has forgotten its start."""


class Trend(NamedTuple):
    """The trend of a series.

    Attributes:
        n: values, NaN left out.
        rho: Spearman's rank correlation with the step.
        slope: of the straight line by least squares, per step.
        low: lower end of the 95 % confidence interval of the slope.
        high: upper end.
        p: two-sided, of rho, against stationary series of the same autoregression.
        order: of the autoregression of the residuals; 0: there are none.
        draws: simulated series.
    """

    n: int
    rho: float
    slope: float
    low: float
    high: float
    p: float
    order: int
    draws: int


def trend(values: ArrayLike, steps: ArrayLike | None = None, draws: int = 999, seed: int = 0) -> Trend:
    """Is there a trend? Spearman's rho with the step, against a sieve bootstrap (after Noguchi, Gel, Duguay 2011).

    Under independence rank tests of trend hold their level; along a training path neighbours depend on each other, and
    they find trends where there are none. Here an autoregression is fitted to the residuals of the straight line,
    series without trend are simulated from it with resampled innovations, and rho is compared with theirs, both divided
    by what dependence does to its spread (bootstrap-t). The interval of the slope is from the same series. It assumes
    that what is left of the line is stationary, and that steps are evenly spaced, about.

    Under the null it is at p <= 0.05 in 4.6 to 5.6 % of autoregressions (50 values, neighbours correlated by 0 and 0.5;
    200, by up to 0.8; 1,000, by 0.9; 4,000 series each, docs/statistics.md); more often where few values depend
    strongly. A random walk is not stationary: its trends are often taken for real.

    Args:
        values: (T,); NaN and infinite ones are left out.
        steps: of each value, in any order; by default 0, 1, ...
        draws: simulated series; p is (1 + k) / (1 + draws).
        seed: of the simulation.

    Raises:
        Incompatible: if there are fewer than ten values, or steps that do not fit, are not finite or there twice.

    >>> found = trend(np.arange(40) * 0.5 + np.tile([0.0, 1.0, 0.5, -1.0], 10))
    >>> found.p < 0.01, 0.4 < found.low < 0.5 < found.high < 0.6
    (True, True)
    """
    y = np.asarray(values, np.float64).reshape(-1)
    t = np.arange(len(y), dtype=np.float64) if steps is None else np.asarray(steps, np.float64).reshape(-1)
    if len(t) != len(y):
        raise Incompatible(f"there are {len(t)} steps and {len(y)} values; give one step for each value.")
    order = np.argsort(t, kind="stable")
    order = order[np.isfinite(y[order])]
    y, t = y[order], t[order]
    if len(y) < 10:
        raise Incompatible(f"a trend takes ten values or more; there are {len(y)}.")
    if not np.isfinite(t).all() or (np.diff(t) == 0).any():
        raise Incompatible("a step is there twice, or NaN; rows of several layers or classes? Take one of them first.")
    line = _Line(t)
    rho, slope = float(line.rho(y)), float(line.slope(y))
    rest = line.rest(y)
    if not np.abs(rest).max() > 1e-12 * np.abs(y).max() or math.isnan(rho):
        return Trend(len(y), rho, slope, slope, slope, math.nan, 0, 0)
    weights, innovations = autoregression(rest)
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK // (len(y) + BURN_IN))
    ranked, sloped = [], []
    for first in range(0, draws, rows):
        noise = rng.choice(innovations, size=(min(rows, draws - first), len(y) + BURN_IN))
        null = np.asarray(signal.lfilter([1.0], np.append(1.0, -weights), noise))[:, BURN_IN:]
        inflation, error = line.errors(null)
        ranked.append(np.abs(line.rho(null)) / inflation)
        sloped.append(line.slope(null) / error)
    inflation, error = line.errors(y)
    as_large = int((np.concatenate(ranked) >= abs(rho) / inflation - 1e-12).sum())
    low, high = np.quantile(np.concatenate(sloped), [0.025, 0.975]) * float(error)
    p = (1 + as_large) / (1 + draws)
    return Trend(len(y), rho, slope, slope - float(high), slope - float(low), p, len(weights), draws)


class _Line:
    """The straight line and the ranks over given steps, for series (..., T)."""

    def __init__(self, steps: np.ndarray) -> None:
        self.centred = steps - steps.mean()
        self._square = float(self.centred @ self.centred)
        ranks = stats.rankdata(steps)
        self._ranks = ranks - ranks.mean()

    def slope(self, y: np.ndarray) -> np.ndarray:
        """By least squares."""
        return y @ self.centred / self._square

    def rest(self, y: np.ndarray) -> np.ndarray:
        """What the line leaves of series."""
        rest = y - self.slope(y)[..., None] * self.centred
        return rest - rest.mean(axis=-1, keepdims=True)

    def errors(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How much wider dependence makes a slope's distribution, and the slope's standard error.

        The former is sqrt((1 + r) / (1 - r)) of the lag-one correlation r. To divide by them makes null distributions
        alike whatever r is.
        """
        rest = self.rest(y)
        square = (rest * rest).sum(axis=-1)
        r = (rest[..., 1:] * rest[..., :-1]).sum(axis=-1) / square
        r = np.clip(r + (2 + 4 * r) / y.shape[-1], -0.98, 0.98)
        inflation = np.sqrt((1 + r) / (1 - r))
        return inflation, inflation * np.sqrt(square / (y.shape[-1] - 2) / self._square)

    def rho(self, y: np.ndarray) -> np.ndarray:
        """Spearman's, NaN where all values are equal."""
        ranks = stats.rankdata(y, axis=-1)
        ranks = ranks - ranks.mean(axis=-1, keepdims=True)
        spread = np.sqrt((ranks * ranks).sum(axis=-1) * (self._ranks @ self._ranks))
        return np.divide(ranks @ self._ranks, spread, out=np.full(np.shape(spread), math.nan), where=spread > 0)


def autoregression(series: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the past values and the innovations of an autoregression; (order,) and (T - order,), centred.

    Yule-Walker for each order from 1 up to 10 log10(T), of which Schwarz's criterion (1978) chooses; Akaike's takes so
    many that the test of trend finds too much. Of what a straight line leaves of a short series the weights come out
    too small, with the same effect: the first is raised by (2 + 4 r) / T, r being the sum of the weights: the bias for
    a first-order autoregression about a line (Kang and others 2003); the sum stays below 0.99.
    """
    x = series - series.mean()
    size = len(x)
    most = min(int(10 * math.log10(size)), size // 4)
    past = np.array([x[: size - lag] @ x[lag:] for lag in range(most + 1)]) / size
    orders = np.arange(1, most + 1)
    fits = [linalg.solve_toeplitz(past[:order], past[1 : order + 1]) for order in orders]
    errors = np.array([past[0] - weights @ past[1 : len(weights) + 1] for weights in fits])
    penalty = orders * math.log(size)
    weights = fits[int(np.argmin(size * np.log(np.maximum(errors, past[0] * 1e-12)) + penalty))]
    total = float(weights.sum())
    weights[0] += max(0.0, min((2 + 4 * total) / size, 0.99 - total))
    innovations = np.asarray(signal.lfilter(np.append(1.0, -weights), [1.0], x))[len(weights) :]
    return weights, innovations - innovations.mean()


def trends(frame: pd.DataFrame, value: str, run: str = "run", step: str = "step", draws: int = 999) -> pd.DataFrame:
    """The trend of a column in each run, and the t-test of the slopes over runs.

    Args:
        frame: rows of one or more runs.
        value: the column.
        run: the column of runs; a frame without it is one run.
        step: the column of steps.
        draws: simulated series for each run.

    Returns:
        One row a run: run, n, rho, slope, low, high, p, order, draws; from two runs on a last row "all runs", whose
        slope is the mean of the slopes, n the number of runs, and whose interval and p are Student's.

    Raises:
        UnknownName: if there is no such column.
        Incompatible: for a run of fewer than ten values, or one that has a step twice.
    """
    for name in (value, step):
        if name not in frame:
            raise UnknownName(f"The frame has no column {name!r}; {did_you_mean(name, map(str, frame.columns))}")
    groups = frame.groupby(run, sort=False) if run in frame else [("", frame)]
    rows = []
    for name, group in groups:
        rows.append({run: name, **trend(group[value].to_numpy(), group[step].to_numpy(), draws)._asdict()})
    if len(rows) > 1:
        over = one_sample([row["slope"] for row in rows])
        rows.append({run: "all runs", "n": over.n, "slope": over.mean, "low": over.low, "high": over.high, "p": over.p})
    return pd.DataFrame(rows)
