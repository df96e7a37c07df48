"""Power laws fitted to the tail of a sample, after Clauset, Shalizi and Newman (SIAM Review 51, 661, 2009)."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from nbdyn.errors import Incompatible
from nbdyn.statistics.heavy_tail.family import LEAST_DRAWS, check_draws
from nbdyn.statistics.heavy_tail.power_law_search import Search, goodness, replicates
from nbdyn.statistics.heavy_tail.result import PLAUSIBLE, Estimate, TailFit
from nbdyn.statistics.heavy_tail.sample import clean, remarks
from nbdyn.statistics.heavy_tail.tail_alternatives import compare, fit_power_law

LEAST = 10
"""The shortest tail that is tried: below it the rate is hardly known, and any sample has a fine fit somewhere."""
FEW = 50
"""Fewer values in the tail bring a warning."""

Distance = Literal["two-sided", "one-sided"]


def power_law(
    values: ArrayLike,
    xmin: float | None = None,
    *,
    bootstrap: int = 0,
    seed: int = 0,
    least: int = LEAST,
    block: int | None = None,
    distance: Distance = "two-sided",
    progress: bool = False,
) -> TailFit:
    """Fit p(x) = (alpha - 1) / xmin (x / xmin)^-alpha to the values x >= xmin.

    alpha = 1 + n / sum log(x / xmin) by maximum likelihood (eq. 3.1). alpha is the exponent of the density. The *tail
    index* is alpha - 1, the exponent of P(X > x): a stable law of index 1.5 has alpha = 2.5.

    xmin, if not given, is the observed value whose tail has the smallest Kolmogorov-Smirnov distance from its fit
    (eq. 3.9), over all distinct values with at least `least` values in the tail; the minimum is exact. "two-sided" is
    that distance itself, the supremum over all x. "one-sided" takes the empirical function below each of its jumps
    only, as the authors' program `plfit` does and, for distinct values, the package `powerlaw`; it is smaller by
    1 / n at most.

    Intervals (95 %). For a given xmin: of alpha, exact if the values are independent, 2 n (alpha - 1) / (estimate - 1)
    being chi-squared with 2 n degrees of freedom; for n of some hundred it is estimate -+ 1.96 (alpha - 1) / sqrt(n).
    For an estimated xmin: percentiles of bootstrapped samples, each with a search of its own; without a bootstrap that
    of a given xmin, with a warning, for it is too narrow. With `block`: percentiles of the block bootstrap. In
    simulations (300 samples of 300, 1,000 and 5,000 values, 199 replicates) bootstrapped intervals held alpha in 95, 95
    and 95 % for Pareto samples, in 96, 97 and 95 % where an eighth of the values is the tail of a power law with
    alpha = 2.5, and in 87, 92 and 95 % where it is 4 % and alpha = 3.5, of which small samples know little; those of
    a given xmin in 89 to 93, 84 to 89, and 61 to 80 %.

    Goodness of fit (section 4.1): samples of the same size have their tail from the fit and the rest from the observed
    values below xmin; xmin is searched anew in each; p = (1 + k) / (1 + B), k of B distances being as large. By
    convention a power law is ruled out at p <= 0.1. A large p is no proof: few values rule out nothing.

    Alternatives on the same tail: see `tail_alternatives.compare`.

    Time: sorting; the search takes about 5 ms for 1e5 values, 40 ms for 1e6, and twice that for a replicate.

    Args:
        values: positive, any shape; of signed values give `np.abs(values)` or one side. Zeros, NaN and infinite values
            are counted and left out.
        xmin: the threshold, if it is known beforehand.
        bootstrap: replicates B for p, and as many for intervals, which take 20; 0 for neither. 1000 give p to about
            0.01.
        seed: of the random numbers.
        least: values in the shortest tail that is tried.
        block: values a block, where neighbouring values depend on each other; `bootstrap.block_length` of their
            logarithms suggests one. Needs `bootstrap`.
        distance: "two-sided" or "one-sided".
        progress: show a bar over the replicates.

    Returns:
        The fit. Its estimates: alpha, tail index, xmin, tail share (of the values), decades (log10 of the largest value
        over xmin).

    Raises:
        Incompatible: for negative values; for too few, or none that differ, above xmin; for another distance; for a
            block that does not fit, or has fewer than 20 replicates.

    >>> x = (1 - np.random.default_rng(0).random(10_000)) ** (-1 / 1.5)  # Pareto, tail index 1.5
    >>> power_law(x, xmin=1.0)["alpha"].value.__round__(2), power_law(x, xmin=1.0)["tail index"].value.__round__(2)
    (2.5, 1.5)
    """
    search = _search(xmin, least, distance, bootstrap)
    if block is not None:
        check_draws(bootstrap)
    sample = clean(values, 2 if xmin is not None else least, "power law")
    places = np.argsort(np.argsort(sample.values, kind="stable")) if block is not None else None
    ordered = np.sort(sample.values)
    logs = np.log(ordered)
    found = search(logs)
    threshold = float(ordered[found.first]) if xmin is None else float(xmin)
    if math.isnan(found.ks):
        above = int((ordered >= threshold).sum())
        raise Incompatible(
            f"{above} of {len(ordered)} values are at least xmin = {xmin:g}; a fit takes two that differ."
        )
    # Ratios of values may overflow. Rounding may leave a value that equals xmin a little below it.
    tail = np.maximum(logs[found.first :] - math.log(threshold), 0.0)
    line = fit_power_law(tail, threshold)
    drawn = None
    if bootstrap >= LEAST_DRAWS and (block is not None or xmin is None):
        drawn = replicates(logs, search, bootstrap, seed, 1 if block is None else block, places, progress)
    kind = "bootstrap" if block is None else f"block bootstrap, blocks of {block}"
    estimates = _estimates(line.alpha, threshold, len(logs), tail, xmin is not None, drawn, kind)
    p, null = goodness(logs, search, found, bootstrap, seed, progress)
    compared = compare(tail, line)
    told = [*remarks(sample, block), *_warnings(ordered, tail, threshold, estimates, p), *compared.warnings]
    if xmin is None and len(tail) < 2 * least:
        told.append(f"xmin is at the end of what was searched: a tail of {len(tail)}, and none below {least} is tried.")
    return TailFit(
        family="power law", method=_method(xmin is not None, distance), estimates=estimates, distribution=line,
        values=ordered, xmin=threshold, n_tail=len(tail), zeros=sample.zeros, missing=sample.missing, ks=found.ks,
        p=p, null=null, alternatives=compared.table, warnings=tuple(told), others=compared.fits,
    )  # fmt: skip


def _search(xmin: float | None, least: int, distance: Distance, bootstrap: int) -> Search:
    """The search that was asked for."""
    if distance not in ("two-sided", "one-sided"):
        raise Incompatible(f'distance = "{distance}": give "two-sided" or "one-sided".')
    if bootstrap < 0 or least < 2:
        raise Incompatible(f"bootstrap = {bootstrap}, least = {least}: give 0 or more replicates, tails of 2 or more.")
    if xmin is not None and not 0 < xmin < math.inf:
        raise Incompatible(f"xmin = {xmin:g}; give a positive number.")
    return Search(least, distance == "two-sided", None if xmin is None else math.log(xmin))


def _method(given: bool, distance: Distance) -> str:
    chosen = "xmin given" if given else f"xmin of the smallest {distance} Kolmogorov-Smirnov distance over all values"
    return f"maximum likelihood, {chosen} (Clauset, Shalizi and Newman 2009)"


def _estimates(
    alpha: float, xmin: float, count: int, tail: np.ndarray, given: bool, drawn: np.ndarray | None, kind: str
) -> dict[str, Estimate]:
    """Point estimates with their intervals, from replicates (alpha, xmin, share) or by formula."""
    n, nan = len(tail), math.nan
    point = np.array([alpha, xmin, n / count])
    if drawn is not None and len(drawn) >= LEAST_DRAWS:
        (low, high), how = np.quantile(drawn, [0.025, 0.975], axis=0), f"{kind}, {len(drawn)} replicates"
        alone = [Estimate(float(v), float(a), float(b), how) for v, a, b in zip(point, low, high, strict=True)]
    else:
        # 2 n (alpha - 1) / (estimate - 1) is chi-squared: sums of exponential variables.
        low, high = 1 + (alpha - 1) * stats.chi2.ppf([0.025, 0.975], 2 * n) / (2 * n)
        unknown = "no interval; give bootstrap=1000"
        alone = [
            Estimate(alpha, float(low), float(high), "exact for a given xmin and independent values"),
            Estimate(xmin, nan, nan, unknown),
            Estimate(n / count, nan, nan, unknown),
        ]
    first, threshold, share = alone
    if given:
        threshold = Estimate(xmin, nan, nan, "given")
        if drawn is None:
            between = stats.binomtest(n, count).proportion_ci()
            share = Estimate(share.value, between.low, between.high, "exact binomial")
    index = Estimate(first.value - 1, first.low - 1, first.high - 1, first.interval)
    decades = Estimate(float(tail[-1]) / math.log(10), nan, nan, "observed")
    return {"alpha": first, "tail index": index, "xmin": threshold, "tail share": share, "decades": decades}


def _warnings(
    ordered: np.ndarray, tail: np.ndarray, xmin: float, estimates: dict[str, Estimate], p: float
) -> list[str]:
    """What a reader must know of a power law."""
    found, n, alpha, decades = [], len(tail), estimates["alpha"], estimates["decades"].value
    if alpha.interval.startswith("exact") and estimates["xmin"].interval != "given":
        found.append(
            "xmin was searched, and the interval of alpha does not hold that uncertainty: give bootstrap=1000."
        )
    if p <= PLAUSIBLE:
        found.append(
            f"p = {p:.2g}: the tail lies further from its fit than samples of a power law do (convention: 0.1)."
        )
    if n < FEW:
        found.append(f"only {n} values are in the tail: a large p means little, and alternatives cannot be told apart.")
    if decades < 1:
        found.append(f"the tail spans {decades:.2g} decades: too little to tell a power law from other curves.")
    if xmin > 0.5 and (ordered == np.floor(ordered)).all():
        half = 1 + n / float((tail + math.log(xmin / (xmin - 0.5))).sum())
        if alpha.value - half > 0.01 * half:
            found.append(
                f"all values are whole, and xmin = {xmin:g} is small: the formulas are for continuous values. That of "
                f"Clauset et al. (eq. 3.7), good to 1 % from about xmin = 6 on, gives alpha = {half:.3g} here."
            )
    return found
