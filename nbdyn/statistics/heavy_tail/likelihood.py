"""Maximum likelihood of many samples at once, and the families that are fitted so.

Every `fit` takes rows of values sorted upwards, (B, n), and returns parameters, (B, p): one row for the data, many for
a bootstrap.
"""

from __future__ import annotations

import numpy as np
from scipy import special, stats

from nbdyn.statistics.heavy_tail.family import Family

LEAST_FREEDOM = 0.1
MOST_FREEDOM = 200.0
"""Degrees of freedom at which a Student t counts as normal: no sample of a million tells them apart."""
LEAST_SHAPE = -0.9
"""Of a generalized Pareto law: below -1 the likelihood grows without end as the law's end nears the largest value."""
STEPS = 200
"""Of Newton's method, at most."""
DONE = 1e-9


# Weibull ----------------------------------------------------------------------------------------------------------


def shapes(magnitudes: np.ndarray) -> np.ndarray:
    """Shape and scale by maximum likelihood of each row of (B, n): (B, 2).

    The shape k solves sum x^k log x / sum x^k - 1 / k = mean log x, whose left side rises: Newton's steps from the
    moments of log x, in log k, of at most a factor e.
    """
    logs = np.log(np.abs(magnitudes))
    logs = logs - (middle := logs.mean(axis=1, keepdims=True))
    top = logs.max(axis=1, keepdims=True)
    spread = np.maximum(logs.std(axis=1), 1e-12)
    k = np.pi / np.sqrt(6) / spread
    for _ in range(100):
        weight = np.exp(k[:, None] * (logs - top))
        total = weight.sum(axis=1)
        first = (weight * logs).sum(axis=1) / total
        second = (weight * logs**2).sum(axis=1) / total
        step = (first - 1 / k) / (k * (second - first**2) + 1 / k)
        k = k * np.exp(-np.clip(step, -1, 1))
        if np.abs(step).max(initial=0.0) < 1e-10:
            break
    mean = np.log(np.exp(k[:, None] * (logs - top)).mean(axis=1)) / k
    return np.stack([k, np.exp(mean + top[:, 0] + middle[:, 0])], axis=1)


def _below(x: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    """P(magnitude <= |x|)."""
    return -np.expm1(-((np.abs(x) / parameters[:, 1:]) ** parameters[:, :1]))


def _cdf_signed(x: np.ndarray, parameters: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.sign(x) * _below(x, parameters)


def _draw(parameters: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    return parameters[1] * rng.weibull(parameters[0], size)


def _draw_signed(parameters: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    return np.where(rng.random(size) < 0.5, -1.0, 1.0) * _draw(parameters, size, rng)


WEIBULL = Family("Weibull", shapes, _below, _draw, lambda p: stats.weibull_min(p[0], scale=p[1]))
DOUBLE_WEIBULL = Family("double Weibull", shapes, _cdf_signed, _draw_signed, lambda p: stats.dweibull(p[0], scale=p[1]))


# Lognormal --------------------------------------------------------------------------------------------------------


def _logs(x: np.ndarray) -> np.ndarray:
    """Standard deviation (by n) and mean of log x of each row: (B, 2)."""
    logs = np.log(x)
    return np.stack([logs.std(axis=1), logs.mean(axis=1)], axis=1)


LOGNORMAL = Family(
    "lognormal",
    _logs,
    lambda x, p: special.ndtr((np.log(x) - p[:, 1:]) / p[:, :1]),
    lambda p, size, rng: rng.lognormal(p[1], p[0], size),
    lambda p: stats.lognorm(p[0], scale=np.exp(p[1])),
)


# Student t --------------------------------------------------------------------------------------------------------


def student_information(freedom: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fisher's information of one value about log scale, log scale with df, and df (Lange, Little and Taylor 1989)."""
    v = freedom
    both = -2 / ((v + 1) * (v + 3))
    trigamma = special.polygamma(1, v / 2) - special.polygamma(1, (v + 1) / 2)
    return 2 * v / (v + 3), both, trigamma / 4 - (v + 5) / (2 * v * (v + 1) * (v + 3))


def students(x: np.ndarray) -> np.ndarray:
    """Degrees of freedom (0.1 to 200), location and scale of each row, (B, 3).

    By Fisher scoring of degrees of freedom and scale, and reweighting of the location.
    """
    n = x.shape[1]
    freedom = np.full(len(x), 4.0)
    low, centre, high = (
        np.take_along_axis(x, np.full((len(x), 1), int(q * (n - 1))), 1)[:, 0] for q in (0.25, 0.5, 0.75)
    )
    scale = np.maximum((high - low) / 2 / 0.74, 1e-3 * np.abs(x - centre[:, None]).mean(axis=1))
    for _ in range(STEPS):
        z = (x - centre[:, None]) / scale[:, None]
        squares = z**2
        weight = (freedom[:, None] + 1) / (freedom[:, None] + squares)
        # The mean of weighted values (Lange, Little and Taylor 1989, eq. 4) stays among them; scoring's step may not.
        of_centre = (weight * z).mean(axis=1) / weight.mean(axis=1) * scale
        of_scale = (weight * squares).mean(axis=1) - 1
        of_freedom = (special.digamma((freedom + 1) / 2) - special.digamma(freedom / 2) - 1 / freedom) / 2
        of_freedom -= np.log1p(squares / freedom[:, None]).mean(axis=1) / 2
        of_freedom += (of_scale + 1) / (2 * freedom)
        ss, sv, vv = student_information(freedom)
        step_freedom = (ss * of_freedom - sv * of_scale) / (ss * vv - sv**2) / freedom
        at_end = np.where(step_freedom > 0, freedom >= MOST_FREEDOM, freedom <= LEAST_FREEDOM)
        step_freedom = np.where(at_end, 0.0, np.clip(step_freedom, -0.7, 0.7))
        step_scale = np.clip((of_scale - sv * freedom * step_freedom) / ss, -0.7, 0.7)
        freedom = np.clip(freedom * np.exp(step_freedom), LEAST_FREEDOM, MOST_FREEDOM)
        centre, scale = centre + of_centre, scale * np.exp(step_scale)
        size = max(np.abs(step_freedom).max(), np.abs(step_scale).max(), np.abs(of_centre / scale).max())
        if size < 1e-7:
            break
    return np.stack([freedom, centre, scale], axis=1)


STUDENT = Family(
    "Student t",
    students,
    lambda x, p: special.stdtr(p[:, :1], (x - p[:, 1:2]) / p[:, 2:]),
    lambda p, size, rng: p[1] + p[2] * rng.standard_t(p[0], size),
    lambda p: stats.t(p[0], p[1], p[2]),
)


# Generalized Pareto -----------------------------------------------------------------------------------------------


def paretos(excess: np.ndarray) -> np.ndarray:
    """Shape xi and scale sigma of each row of excesses (not negative), (B, 2); density (1 + xi x / s)^(-1 - 1/xi) / s.

    With theta = xi / sigma the likelihood is largest at xi = mean log(1 + theta x), which leaves one equation (Grimshaw
    1993). Its root is taken next to the best of the points that Zhang and Stephens (2009) average over.
    """
    n = excess.shape[1]
    unit = np.maximum(excess[:, n // 2 : n // 2 + 1], 1e-300)
    x = excess / unit
    count = 20 + min(int(np.sqrt(n)), 20)
    quarter, top = x[:, int(n / 4 + 0.5) - 1 : int(n / 4 + 0.5)], x[:, -1:]
    spread = (1 - np.sqrt(count / (np.arange(1, count + 1) - 0.5))) / (3 * np.maximum(quarter, 1e-6))
    grid = -(1 / top + spread)
    grid = np.where(np.abs(grid) < 1e-8, 1e-8, grid)
    heights = np.stack([_profile(x, grid[:, j : j + 1]) for j in range(count)], axis=1)
    best = np.clip(heights.argmax(axis=1), 1, count - 2)[:, None]
    low, high = (np.take_along_axis(grid, best + side, 1) for side in (1, -1))
    low, high = np.minimum(low, high), np.maximum(low, high)
    theta = np.take_along_axis(grid, best, 1)
    for _ in range(60):
        slope, curve = _slope(x, theta)
        low, high = np.where(slope > 0, theta, low), np.where(slope > 0, high, theta)
        moved = theta - slope / np.where(curve < 0, curve, -np.inf)
        moved = np.where((moved > low) & (moved < high) & (curve < 0), moved, (low + high) / 2)
        moved = np.where(np.abs(moved) < 1e-8, 1e-8, moved)
        change, theta = np.abs(moved - theta).max(), moved
        if change < DONE:
            break
    shape = np.log1p(theta * x).mean(axis=1)
    return np.stack([shape, shape / theta[:, 0] * unit[:, 0]], axis=1)


def _profile(x: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """The log likelihood a value at theta, largest over the rest, (B,); not at shapes near -1, where it has no end."""
    shape = np.log1p(theta * x).mean(axis=1)
    return np.where(shape > LEAST_SHAPE, -np.log(shape / theta[:, 0]) - shape, -np.inf)


def _slope(x: np.ndarray, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and second derivative of `_profile`, (B, 1) each."""
    part = x / (1 + theta * x)
    shape = np.log1p(theta * x).mean(axis=1, keepdims=True)
    first, second = part.mean(axis=1, keepdims=True), -(part**2).mean(axis=1, keepdims=True)
    slope = 1 / theta - first / shape - first
    return slope, -1 / theta**2 - second / shape + (first / shape) ** 2 - second


def _pareto_cdf(x: np.ndarray, p: np.ndarray) -> np.ndarray:
    """P(X <= x) of the generalized Pareto law; beyond the end of a shape below 0 it is 1."""
    shape, z = p[:, :1], x / p[:, 1:]
    return -np.expm1(-np.log1p(np.maximum(shape * z, -1 + 1e-15)) / shape)


PARETO = Family(
    "generalized Pareto",
    paretos,
    _pareto_cdf,
    lambda p, size, rng: p[1] * np.expm1(p[0] * rng.standard_exponential(size)) / p[0],
    lambda p: stats.genpareto(p[0], scale=p[1]),
)
