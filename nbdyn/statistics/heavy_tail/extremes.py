"""Peaks over a threshold: the generalized Pareto distribution, the limit of any tail."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from nbdyn.errors import Incompatible
from nbdyn.statistics.heavy_tail.alternatives import of_positive, ranking
from nbdyn.statistics.heavy_tail.family import bootstrap_errors, distances, goodness, how, plain, positive
from nbdyn.statistics.heavy_tail.likelihood import PARETO
from nbdyn.statistics.heavy_tail.result import Distribution, Estimate, TailFit
from nbdyn.statistics.heavy_tail.sample import clean, remarks

LEAST = 10
"""Values beyond the threshold that a fit takes."""
QUANTILE = float(stats.chi2.ppf(0.95, 1))
SHARE = 0.1
"""Of the values, beyond the threshold that is taken where none is given; a convention."""


def generalized_pareto(
    values: ArrayLike, threshold: float | None = None, *, block: int | None = None, bootstrap: int = 199, seed: int = 0
) -> TailFit:
    """A generalized Pareto law of the excesses over a threshold, by maximum likelihood.

    P(X > u + y | X > u) = (1 + shape y / scale)^(-1 / shape). Shape above 0 is a power law with tail index 1 / shape
    (moments of that order and above are infinite), 0 an exponential tail, below 0 a tail that ends. The limit holds for
    high thresholds (Balkema and de Haan 1974; Pickands 1975): compare several. (Of 10,000 values t with 2.5 degrees of
    freedom, the interval at the 90 % quantile holds 0.4 in 70 % of samples, not 95: the law is not yet at its limit.)

    The interval of the shape is that of its profile likelihood (twice the difference below chi-squared's 3.84; valid
    above -1/2, Smith 1985), or from blocks, whose samples take the k largest each. Time: a second for 1e6 values.

    Args:
        values: real, any shape; the tail is the upper one (for both: np.abs(values), for the lower: -values).
        threshold: u; by default the 90 % quantile.
        block: values of a block, in order, for intervals that respect dependence; None takes values for independent.
        bootstrap: replicates of the goodness of fit, and of the intervals if there is a block; 0: neither.
        seed: of the random numbers.

    Returns:
        Estimates "shape", "scale", and "tail index" (1 / shape; infinite if the shape is not above 0); alternatives for
        the excesses: exponential (nested), half-normal, gamma, lognormal, Weibull.

    Raises:
        Incompatible: if there are fewer than 10 values beyond the threshold, or all are equal.

    >>> x = np.random.default_rng(0).pareto(2.0, 20_000)
    >>> fit = generalized_pareto(x, bootstrap=0)
    >>> fit["shape"].low < 0.5 < fit["shape"].high
    True
    """
    sample = clean(values, LEAST)
    ordered = np.sort(sample.values)
    u = float(np.quantile(ordered, 1 - SHARE)) if threshold is None else float(threshold)
    excess = ordered[ordered > u] - u
    k = len(excess)
    if k < LEAST or excess[0] == excess[-1]:
        raise Incompatible(
            f"{k} of {len(ordered)} values lie beyond {u:g}; a tail takes {LEAST} that differ: lower the threshold."
        )
    found = PARETO.fit(excess[None])
    shape, scale = (float(x) for x in found[0])
    if block is None:
        # Where the shape is below -1/2 the formula does not hold; a warning says so.
        scale_error = math.sqrt(2 * max(1 + shape, 0.5) / k)
        of_shape = Estimate(shape, *profile_interval(excess, shape, scale), "profile likelihood")
    else:
        error, scale_error = bootstrap_errors(lambda x: _top(x, k, u), sample.values, block, bootstrap, seed)
        of_shape = plain(shape, error, how(block, bootstrap))
    of_scale = positive(scale, scale_error, how(block, bootstrap))
    ks = float(distances(excess[None], PARETO, found)[0])
    p, null = goodness(PARETO, found[0], ks, k, bootstrap, seed)
    table, laws = ranking(excess, PARETO.law(found[0]), 2, of_positive(excess, PARETO.name))
    return TailFit(
        family=PARETO.name, method="maximum likelihood over a threshold (Davison and Smith 1990)",
        estimates={"shape": of_shape, "scale": of_scale, "tail index": inverse(of_shape)},
        distribution=shifted(PARETO.law(found[0]), u), values=ordered, xmin=u, n_tail=k, zeros=sample.zeros,
        missing=sample.missing, ks=ks, p=p, null=null, alternatives=table,
        warnings=(*remarks(sample, block), *_notes(shape, k)),
        others={name: shifted(law, u) for name, law in laws.items()},
    )  # fmt: skip


def profile_interval(excess: np.ndarray, shape: float, scale: float) -> tuple[float, float]:
    """The shapes whose likelihood, largest over the scale, is within chi-squared's 95 % of the fit's."""
    k = len(excess)

    def fall(at: float) -> float:
        return 2 * (most - _profile(excess, at, scale)) - QUANTILE

    most, step = _profile(excess, shape, scale), max(1 + shape, 0.5) / math.sqrt(k)
    ends = []
    for sign in (-1, 1):
        far = shape + sign * step
        while fall(far) < 0 and abs(far - shape) < 30:
            far += sign * step
        ends.append(float(optimize.brentq(fall, shape, far, xtol=1e-6)) if fall(far) > 0 else sign * math.inf)  # pyright: ignore
    return ends[0], ends[1]


def _profile(excess: np.ndarray, shape: float, start: float) -> float:
    """The log likelihood at a shape, largest over the scale: Newton's method in log scale."""
    if abs(shape) < 1e-7:
        return -len(excess) * (math.log(float(excess.mean())) + 1)
    least = max(-shape * float(excess[-1]), 0.0) * (1 + 1e-9)
    scale = max(start, 1.1 * least)
    for _ in range(100):
        ratio = shape * excess / scale
        part = ratio / (1 + ratio)
        slope = (1 + 1 / shape) * float(part.mean()) - 1
        curve = -(1 + 1 / shape) * float((part / (1 + ratio)).mean())
        step = min(max(-slope / curve if curve < 0 else math.copysign(0.5, slope), -0.5), 0.5)
        moved = max(scale * math.exp(step), least)
        if abs(moved - scale) < 1e-10 * scale:
            break
        scale = moved
    return -len(excess) * math.log(scale) - (1 + 1 / shape) * float(np.log1p(shape * excess / scale).sum())


def inverse(shape: Estimate) -> Estimate:
    """The tail index 1 / shape; infinite where the shape is not above 0."""
    value, high, low = (1 / x if x > 0 else math.inf for x in shape[:3])
    return Estimate(value, low, high, shape.interval)


def shifted(law: Distribution, by: float) -> Distribution:
    """A frozen SciPy distribution, begun at another place."""
    scipy: Mapping[str, object] = vars(law)
    return scipy["dist"](*scipy["args"], **{**scipy["kwds"], "loc": by})  # pyright: ignore


def _top(ordered: np.ndarray, k: int, threshold: float) -> np.ndarray:
    """Shape and log scale of the k largest of each row over the next one, or where all are: over the threshold."""
    found = PARETO.fit(ordered[:, -k:] - (ordered[:, -k - 1 : -k] if k < ordered.shape[1] else threshold))
    return np.stack([found[:, 0], np.log(found[:, 1])], axis=1)


def _notes(shape: float, k: int) -> list[str]:
    found = []
    if k < 50:
        found.append(f"only {k} values lie beyond the threshold.")
    if shape < -0.5:
        found.append("the shape is below -1/2: the tail ends abruptly, and the interval's formula does not hold.")
    return found
