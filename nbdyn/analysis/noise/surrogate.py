"""Gaussian noise of the same covariance: what each measure reads where there is no tail at all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from nbdyn.analysis.noise import measures
from nbdyn.statistics.heavy_tail.log_moments import LEAST, log_moments
from nbdyn.statistics.surrogates import gaussian_surrogate

Measure = Callable[[np.ndarray], float]
LEVEL = 0.01
"""Of the test of normality."""


def per_coordinate(values: np.ndarray, size: int, draws: int, seed: int) -> Iterator[dict[str, object]]:
    """Median index, median kurtosis and share of rejections of a layer, beside Gaussian rows of the same covariance.

    Each surrogate row is Gaussian with the covariance of the rows given, so that coordinates depend on each other as
    they do in truth: what the null's range shows is how far medians over dependent coordinates stray.

    Args:
        values: (n, k).
        size: coordinates of the layer.
        draws: surrogates.
        seed: of these.
    """
    moving = values[:, np.ptp(values, axis=0) > 0]
    functions: dict[str, tuple[Measure, int]] = {
        "stable index": (lambda x: measures.stable_median(x, size), -1),
        "excess kurtosis": (lambda x: measures.kurtosis(x, size).median, 1),
        f"share not normal at {LEVEL:g}": (lambda x: measures.normality(x, LEVEL).share, 1),
    }
    null = [[f(x) for f, _ in functions.values()] for x in gaussian_surrogate(moving, draws, seed)]
    for (name, (f, heavier)), drawn in zip(functions.items(), np.array(null).T, strict=True):
        yield {"statistic": name, "coordinates": moving.shape[1], **against(f(values), drawn, heavier)}


def block_log_moments(
    noise: np.ndarray, layers: Mapping[str, np.ndarray], draws: int, seed: int
) -> Iterator[dict[str, object]]:
    """The estimator of the gradient-noise paper over all coordinates of mini-batches, beside its Gaussian surrogates.

    Args:
        noise: gradients of mini-batches, (n, P).
        layers: name -> which of the P coordinates belong to it, indices; one without enough values is left out.
        draws: surrogates.
        seed: of these.
    """
    for name, where in layers.items():
        if (np.ptp(noise[:, where], axis=0) > 0).sum() * len(noise) < LEAST:
            continue
        found = log_moments(noise[:, where], surrogates=draws, seed=seed)
        yield {
            "layer": name, "statistic": "block log-moments", "coordinates": found.shape[1], "observed": found.alpha,
            "null_mean": found.null_mean, "null_low": found.null_low, "null_high": found.null_high, "p": found.p,
            "draws": draws,
        }  # fmt: skip


def against(observed: float, null: np.ndarray, heavier: int) -> dict[str, object]:
    """A number beside what surrogates give: mean, 95 % range, and the chance p that they look as heavy-tailed.

    Args:
        observed: the number.
        null: those of the surrogates.
        heavier: 1 if heavier tails make it larger, -1 if smaller.

    >>> found = against(30.0, np.arange(39.0), 1)
    >>> found["null_mean"], found["p"]
    (19.0, 0.25)
    """
    if math.isnan(observed) or np.isnan(null).any():
        low = high = mean = p = math.nan
    else:
        p = (1 + int((heavier * null >= heavier * observed).sum())) / (1 + len(null))
        mean, (low, high) = float(null.mean()), np.quantile(null, [0.025, 0.975])
    return {
        "observed": observed, "null_mean": mean, "null_low": float(low), "null_high": float(high), "p": p,
        "draws": len(null),
    }  # fmt: skip
