"""Estimators of heavy tails against known truth, and the size and power of the tests in `nbdyn.statistics`.

    python -m tests.benchmarks.tails estimators [--replicates 500] [--only stable] [--jobs 2]
    python -m tests.benchmarks.tails tests [--replicates 4000] [--only Weibull] [--jobs 2]

Both print Markdown. `estimators`: bias, root mean square error and coverage of the 95 % intervals, through the public
functions. `tests`: how often each test rejects at 5 % where its null holds (size), with the 95 % interval of that
share, and where an alternative holds (power, a quarter of the replicates). A further test is one more line in `tests`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import signal, stats

from nbdyn.statistics import heavy_tail as ht
from nbdyn.statistics import synchronization
from nbdyn.statistics.associations import suggest
from nbdyn.statistics.comparing import sign_flips, two_samples
from nbdyn.statistics.heavy_tail import dependence
from nbdyn.statistics.heavy_tail.alternatives import Alternative, ranking
from nbdyn.statistics.heavy_tail.ecf import STABLE
from nbdyn.statistics.heavy_tail.family import Family, distances, goodness
from nbdyn.statistics.heavy_tail.hill import EXPONENTIAL
from nbdyn.statistics.heavy_tail.likelihood import DOUBLE_WEIBULL, LOGNORMAL, PARETO, STUDENT, WEIBULL
from nbdyn.statistics.heavy_tail.stable_quantiles import QUANTILES, skewness
from nbdyn.statistics.testing import one_sample
from nbdyn.statistics.trends import trend

LEVEL = 0.05
RNG = np.random.Generator
DRAWS = 99
"""Replicates within a bootstrapped goodness of fit: (1 + k) / (1 + 99) <= 0.05 has the exact size 5 %."""


# Estimators ---------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """An estimator and data of which the truth is known."""

    name: str
    data: str
    truth: dict[str, float]
    n: int
    draw: Callable[[RNG, int], np.ndarray]
    fit: Callable[..., ht.TailFit]
    options: dict[str, Any]


def dependent(ppf: Callable[[np.ndarray], np.ndarray], rho: float, rng: RNG, n: int) -> np.ndarray:
    """Draws with the given quantile function that are in order a Gaussian autoregression of first order."""
    steps = rng.normal(size=n) * math.sqrt(1 - rho**2)
    steps[0] /= math.sqrt(1 - rho**2)
    return ppf(stats.norm.cdf(signal.lfilter([1.0], [1.0, -rho], steps)))


def weibull(shape: float, rng: RNG, n: int) -> np.ndarray:
    """Of scale 1."""
    return rng.weibull(shape, n)


def student(freedom: float, rng: RNG, n: int) -> np.ndarray:
    """Of scale 1."""
    return rng.standard_t(freedom, n)


def generalized(xi: float, rng: RNG, n: int) -> np.ndarray:
    """Generalized Pareto of scale 1."""
    return np.asarray(stats.genpareto.rvs(xi, size=n, random_state=rng))


def pareto(index: float, rng: RNG, n: int) -> np.ndarray:
    """Pareto from 1 on."""
    return 1 + rng.pareto(index, n)


def cases() -> list[Case]:
    """What the table of estimators has."""
    found: list[Case] = []

    def add(fit: Any, data: str, truth: dict[str, float], draw: Any, sizes: Iterable[int], **options: Any) -> None:
        found.extend(Case(fit.__name__, data, truth, n, draw, fit, options) for n in sizes)

    for alpha in (0.8, 1.0, 1.5, 1.8, 2.0):
        draw = functools.partial(lambda a, rng, n: ht.stable_sample(a, n, rng), alpha)
        truth = {"alpha": alpha, "alpha by quantiles": alpha, "scale": 1.0, "location": 0.0}
        add(ht.stable, f"SaS {alpha}", truth, draw, (300, 1_000, 10_000))
    for shape in (0.5, 1.0, 2.0):
        draw = functools.partial(weibull, shape)
        add(ht.weibull, f"Weibull {shape}", {"shape": shape, "scale": 1.0}, draw, (100, 1_000))
    add(ht.double_weibull, "Laplace", {"shape": 1.0, "scale": 1.0}, lambda rng, n: rng.laplace(size=n), (1_000,))
    truth = {"sigma": 1.5, "mu": 0.5}
    add(ht.lognormal, "LogN(0.5, 1.5)", truth, lambda rng, n: rng.lognormal(0.5, 1.5, n), (100,))
    for freedom in (2.5, 5.0):
        truth = {"df": freedom, "scale": 1.0}
        add(ht.student_t, f"t {freedom}", truth, functools.partial(student, freedom), (300, 1_000, 10_000))
    for xi in (-0.2, 0.0, 0.5, 1.0):
        add(ht.generalized_pareto, f"GP {xi}", {"shape": xi}, functools.partial(generalized, xi), (1_000, 10_000))
    draw = functools.partial(pareto, 1.5)
    add(ht.hill, "Pareto 1.5", {"tail index": 1.5}, draw, (300, 10_000))
    add(ht.moment_estimator, "Pareto 1.5", {"gamma": 1 / 1.5}, draw, (10_000,))
    add(ht.moment_estimator, "exponential", {"gamma": 0.0}, lambda rng, n: rng.exponential(size=n), (10_000,))
    # Tails that are Pareto only in the limit: bias is part of the answer.
    two_sided = functools.partial(lambda rng, n: np.abs(student(2.5, rng, n)))
    add(ht.hill, "|t 2.5|", {"tail index": 2.5}, two_sided, (10_000,))
    add(ht.moment_estimator, "|t 2.5|", {"gamma": 0.4}, two_sided, (10_000,))
    add(ht.generalized_pareto, "t 2.5", {"shape": 0.4}, functools.partial(student, 2.5), (10_000,))
    add(ht.power_law, "Pareto 1.5, xmin given", {"alpha": 2.5}, draw, (1_000,), xmin=1.0)
    add(ht.power_law, "Pareto 1.5, xmin found", {"alpha": 2.5}, draw, (1_000,), bootstrap=99)
    for options in ({}, {"block": 30, "bootstrap": 199}):
        said = f"AR(1) 0.6, block={options.get('block')}"
        draw = functools.partial(dependent, lambda u: stats.weibull_min.ppf(u, 0.5), 0.6)
        add(ht.weibull, f"Weibull 0.5, {said}", {"shape": 0.5}, draw, (2_000,), **options)
        draw = functools.partial(dependent, stats.cauchy.ppf, 0.6)
        add(ht.stable, f"SaS 1.0, {said}", {"alpha": 1.0}, draw, (2_000,), **options)
    return found


def measured(number: int, replicates: int) -> list[dict[str, Any]]:
    """Rows of the table of estimators."""
    case = cases()[number]
    rng = np.random.default_rng([number, 0])
    began = time.perf_counter()
    options = {"bootstrap": 0} | case.options
    fitted = [case.fit(case.draw(rng, case.n), **options).estimates for _ in range(replicates)]
    took = 1e3 * (time.perf_counter() - began) / replicates
    rows = []
    for name, truth in case.truth.items():
        value, low, high = np.array([found[name][:3] for found in fitted]).T
        covered = float(((low <= truth) & (truth <= high)).mean())
        rows.append({
            "estimator": case.name, "parameter": name, "data": case.data, "n": case.n, "truth": truth,
            "median": float(np.median(value)), "bias": float(value.mean()) - truth,
            "RMSE": math.sqrt(float(np.square(value - truth).mean())), "coverage %": 100 * covered,
            "+-": 196 * math.sqrt(covered * (1 - covered) / replicates),
            "too low %": 100 * float((high < truth).mean()), "too high %": 100 * float((low > truth).mean()),
            "ms": took,
        })  # fmt: skip
    return rows


# Tests --------------------------------------------------------------------------------------------------------------


class Test(NamedTuple):
    """A test, data under its null and under an alternative, and its p-value."""

    name: str
    null_name: str
    null: Callable[[RNG], Any]
    other_name: str
    other: Callable[[RNG], Any]
    p: Callable[[Any, int], float]


def fits(kind: Family, seed: int, x: np.ndarray) -> float:
    """The p-value of a goodness of fit."""
    ordered = np.sort(x)[None]
    found = kind.fit(ordered)
    return goodness(kind, found[0], float(distances(ordered, kind, found)[0]), x.size, DRAWS, seed)[0]


SIMPLE: dict[str, Callable[[np.ndarray], Alternative]] = {
    "exponential": lambda x: Alternative("exponential", stats.expon(scale=x.mean()), 1, "inside"),
    "Laplace": lambda x: Alternative("Laplace", stats.laplace(0, np.abs(x).mean()), 1, "inside"),
    "normal": lambda x: Alternative("normal", stats.norm(x.mean(), x.std()), 2, "edge"),
}


def ratio(kind: Family, simple: str, x: np.ndarray) -> float:
    """The p-value of the likelihood ratio against a special case."""
    found = kind.fit(np.sort(x)[None])[0]
    table, _ = ranking(x, kind.law(found), len(found), [SIMPLE[simple](x)])
    return float(table["p"].iloc[0])


def moments(rate: float, shared: float, rng: RNG) -> np.ndarray:
    """Moments (5 classes, 3 series, 200 steps) at a rate; a share of them is common to the series."""
    own = rng.random((5, 3, 200)) < rate
    return own | (rng.random((5, 1, 200)) < shared)


def smooth(shared: float, rng: RNG) -> np.ndarray:
    """Autocorrelated series (3, 300), with a common part."""
    noise = rng.normal(size=(3, 320)) + shared * rng.normal(size=320)
    return np.stack([np.convolve(row, np.ones(5), "valid")[:300] for row in noise])


def minima(x: np.ndarray) -> np.ndarray:
    """The local minima."""
    found = np.zeros(x.shape, bool)
    found[..., 1:-1] = (x[..., 1:-1] < x[..., :-2]) & (x[..., 1:-1] < x[..., 2:])
    return found


def one_noise(tail: float, rng: RNG) -> np.ndarray:
    """Samples (40, 60) of coordinates that depend on each other; times heavy-tailed factors a sample."""
    x = rng.normal(size=(40, 60)) @ np.random.default_rng(0).normal(size=(60, 60))
    return x * rng.standard_gamma(1 / tail, size=(40, 60)) ** -0.5 if tail else x


def tests() -> list[Test]:
    """What the table of tests has."""
    n = 300

    def shape(kind: Family, said: str, parameters: list[float], other: str, law: Callable[[RNG], np.ndarray]) -> Test:
        null = functools.partial(lambda rng: kind.draw(np.array(parameters), (1, n), rng)[0])
        return Test(f"goodness of fit, {said}", f"{said} {parameters}", null, other, law, lambda x, s: fits(kind, s, x))

    laplace, normal = (lambda r: r.laplace(size=n)), (lambda r: r.normal(size=n))
    found = [
        shape(STABLE, "stable", [1.5, 0.0, 1.0], "Laplace", laplace),
        shape(STABLE, "stable", [2.0, 0.0, 1.0], "Laplace", laplace),
        shape(QUANTILES, "stable by quantiles", [1.5, 0.0, 1.0], "Laplace", laplace),
        shape(WEIBULL, "Weibull", [0.5, 1.0], "LogN(0, 1)", lambda r: r.lognormal(size=n)),
        shape(DOUBLE_WEIBULL, "double Weibull", [1.0, 1.0], "t 2", lambda r: r.standard_t(2, n)),
        shape(STUDENT, "Student t", [3.0, 0.0, 1.0], "Laplace", laplace),
        shape(LOGNORMAL, "lognormal", [1.0, 0.0], "exponential", lambda r: r.exponential(size=n)),
        shape(PARETO, "generalized Pareto", [0.3, 1.0], "Weibull 2", lambda r: r.weibull(2, n)),
        shape(EXPONENTIAL, "Pareto (Hill)", [1.0], "Weibull 1.2", lambda r: r.weibull(1.2, n)),
        Test("likelihood, exponential in Weibull", "exponential", lambda r: r.exponential(size=n), "Weibull 0.8",
             lambda r: r.weibull(0.8, n), lambda x, s: ratio(WEIBULL, "exponential", x)),
        Test("likelihood, Laplace in double Weibull", "Laplace", laplace, "double Weibull 0.8",
             lambda r: r.weibull(0.8, n) * r.choice([-1, 1], n), lambda x, s: ratio(DOUBLE_WEIBULL, "Laplace", x)),
        Test("likelihood, normal in Student t", "normal", normal, "t 5", lambda r: r.standard_t(5, n),
             lambda x, s: ratio(STUDENT, "normal", x)),
        Test("likelihood, exponential in generalized Pareto", "exponential", lambda r: r.exponential(size=n), "GP 0.3",
             lambda r: generalized(0.3, r, n), lambda x, s: ratio(PARETO, "exponential", x)),
        Test("asymmetry of a stable law", "SaS 1.5", lambda r: ht.stable_sample(1.5, n, r), "exponential",
             lambda r: r.exponential(size=n), lambda x, s: skewness(np.sort(x), float(ht.stable_index(x)))),
        Test("independence (Ljung-Box, ranks)", "Cauchy", lambda r: r.standard_cauchy(n), "AR(1) 0.2 of Cauchy",
             lambda r: dependent(stats.cauchy.ppf, 0.2, r, n), lambda x, s: dependence.depends(x)),
        Test("block log-moments against surrogates", "Gaussian (40, 60)", functools.partial(one_noise, 0.0),
             "t 2 a sample and coordinate", functools.partial(one_noise, 1.0),
             lambda x, s: ht.log_moments(x, surrogates=DRAWS, seed=s).p),
    ]  # fmt: skip
    return found + of_events() + of_groups() + of_series() + [
        Test("goodness of fit, power law, xmin found", "Pareto 1.5, n 200", lambda r: pareto(1.5, r, 200),
             "LogN(0, 1)", lambda r: r.lognormal(size=200), lambda x, s: ht.power_law(x, bootstrap=DRAWS, seed=s).p)
    ]  # fmt: skip


def of_events() -> list[Test]:
    """Synchronization and one sample."""
    null, other = functools.partial(moments, 0.1, 0.0), functools.partial(moments, 0.1, 0.02)
    said, that = "5 x 3 x 200 moments, rate 0.1", "2 % common"
    nulls = {
        "synchronization, shifts": lambda x, s: synchronization.shift_test(x, least=2, seed=s).p,
        "synchronization, circular shifts": lambda x, s: synchronization.circular_shift_test(x, 2, 199, s).p,
        "synchronization, blocks of 10": lambda x, s: synchronization.block_permutation(x, 10, 2, 199, s).p,
    }
    found = [Test(name, said, null, that, other, p) for name, p in nulls.items()]
    found += [
        Test("synchronization, random phases", "3 smooth series", functools.partial(smooth, 0.0), "a common part",
             functools.partial(smooth, 1.0), lambda x, s: synchronization.phase_test(x, minima, 2, 99, s).p),
        Test("one sample, t", "normal, n 10", lambda r: r.normal(size=10), "mean 1", lambda r: r.normal(1, 1, 10),
             lambda x, s: one_sample(x).p),
        Test("one sample, Wilcoxon", "normal, n 10", lambda r: r.normal(size=10), "mean 1",
             lambda r: r.normal(1, 1, 10), lambda x, s: one_sample(x).p_wilcoxon),
    ]  # fmt: skip
    return found


def of_groups() -> list[Test]:
    """Two samples and pairs."""

    def groups(shift: float, r: RNG) -> tuple[np.ndarray, np.ndarray]:
        return r.exponential(size=7) + shift, r.exponential(size=6)

    def welch(shift: float, r: RNG) -> tuple[np.ndarray, np.ndarray]:
        return r.normal(shift, 1, 6), r.normal(0, 3, 9)

    same, apart = functools.partial(groups, 0.0), functools.partial(groups, 1.5)
    return [
        Test("two samples, Welch", "normal, n 6 and 9, sd 1 and 3", functools.partial(welch, 0.0), "3 apart",
             functools.partial(welch, 3.0), lambda x, s: two_samples(*x, draws=2, seed=s).p),
        Test("two samples, permutation", "exponential, n 7 and 6", same, "1.5 apart", apart,
             lambda x, s: two_samples(*x, draws=1_999, seed=s).p_permutation),
        Test("two samples, Mann-Whitney", "exponential, n 7 and 6", same, "1.5 apart", apart,
             lambda x, s: two_samples(*x, draws=2, seed=s).p_rank),
        Test("pairs, signs flipped", "t 2, n 8", lambda r: r.standard_t(2, 8), "mean 2",
             lambda r: r.standard_t(2, 8) + 2, lambda x, s: sign_flips(x, seed=s)[0]),
    ]  # fmt: skip


def of_series() -> list[Test]:
    """Trends and associations of series whose neighbours depend on each other."""

    def walk(r: RNG, correlation: float, size: int, slope: float = 0.0) -> np.ndarray:
        noise = r.normal(size=size + 200)
        return np.asarray(signal.lfilter([1.0], [1.0, -correlation], noise))[200:] + slope * np.arange(size)

    def two(r: RNG, common: float) -> pd.DataFrame:
        x, y, z = (walk(r, 0.8, 400) for _ in range(3))
        return pd.DataFrame({"step": np.arange(400), "x": x + common * z, "y": y + common * z})

    found = [
        Test(f"trend, n {size}", f"AR(1) {correlation}", functools.partial(walk, correlation=correlation, size=size),
             f"rises by {100 * slope:g} over 100 steps",
             functools.partial(walk, correlation=correlation, size=size, slope=slope),
             lambda x, s: trend(x, draws=199, seed=s).p)
        for size, correlation, slope in ((50, 0.0, 0.02), (50, 0.5, 0.02), (200, 0.0, 0.005), (200, 0.5, 0.005),
                                         (200, 0.8, 0.01), (1000, 0.9, 0.005))
    ]  # fmt: skip
    return [
        *found,
        Test("association given the step, n 200 of 400", "two AR(1) 0.8", functools.partial(two, common=0.0),
             "half in common", functools.partial(two, common=1.0),
             lambda x, s: float(suggest(x, ["x", "y"], seed=s)["p"].iloc[0])),
    ]  # fmt: skip


def rejected(number: int, replicates: int) -> list[dict[str, Any]]:
    """One row of the table of tests."""
    test = tests()[number]
    began = time.perf_counter()
    shares = []
    for which, (draw, count) in enumerate(((test.null, replicates), (test.other, max(1, replicates // 4)))):
        rng = np.random.default_rng([number, which])
        shares.append(np.array([test.p(draw(rng), seed) <= LEVEL for seed in range(count)]))
    took = time.perf_counter() - began
    ends = stats.binomtest(int(shares[0].sum()), replicates).proportion_ci(method="wilson")
    row = {
        "test": test.name, "null": test.null_name, "size %": 100 * float(shares[0].mean()), "low": 100 * ends.low,
        "high": 100 * ends.high, "alternative": test.other_name, "power %": 100 * float(shares[1].mean()),
        "ms": 1e3 * took / (len(shares[0]) + len(shares[1])),
    }  # fmt: skip
    return [row]


# Tables -------------------------------------------------------------------------------------------------------------


ONE_DIGIT = ("coverage %", "+-", "too low %", "too high %", "power %", "ms")


def markdown(tables: Iterable[list[dict[str, Any]]]) -> None:
    """Print rows as they come."""
    head = False
    for row in itertools.chain.from_iterable(tables):
        if not head:
            print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|", flush=True)
            head = True
        shown = (f"{v:.{1 if k in ONE_DIGIT else 3}f}" if isinstance(v, float) else f"{v}" for k, v in row.items())
        print("| " + " | ".join(shown) + " |", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("what", choices=["estimators", "tests"])
    parser.add_argument("--replicates", type=int, help="500 of estimators, 4,000 of tests")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    names = [case.name for case in cases()] if given.what == "estimators" else [test.name for test in tests()]
    numbers = [i for i, name in enumerate(names) if given.only in name]
    count = given.replicates or (500 if given.what == "estimators" else 4_000)
    row = measured if given.what == "estimators" else rejected
    with concurrent.futures.ProcessPoolExecutor(given.jobs) as pool:
        markdown(pool.map(row, numbers, [count] * len(numbers)))


if __name__ == "__main__":
    main()
