"""Power laws beside the package `powerlaw`: answers and times, in one run.

    python -m tests.benchmarks.power_law                            # 1e4 and 1e5 values; the package takes minutes
    python -m tests.benchmarks.power_law --points 10000             # seconds
    python -m tests.benchmarks.power_law --points 10000 100000 --alone 1000000

Simulated values are an exponential body that goes over into a power law of alpha = 2.5 at x = 1 (Clauset, Shalizi,
Newman 2009, eq. 3.10). The package (extra `bench`) looks at the empirical function below its jumps only: its answers
are those of `distance="one-sided"`. The default, the Kolmogorov-Smirnov distance itself, stands beside. Data sets of
Clauset et al. come with the package and are left out where it is not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import platform
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from nbdyn.statistics.heavy_tail.power_law import power_law
from nbdyn.statistics.heavy_tail.result import TailFit

ALTERNATIVES = ("lognormal", "exponential", "stretched exponential", "truncated power law")
REPLICATES = 200
PUBLISHED = {
    # alpha, xmin, p (table 6.1); lognormal, exponential, stretched exponential: statistic and p, cut-off: R and p (6.2)
    "quakes": (1.64, 794.0, 0.00, (-7.14, 0.00), (11.6, 0.00), (-7.09, 0.00), (-24.4, 0.00)),
    "blackouts": (2.3, 230e3, 0.62, (-0.412, 0.68), (1.21, 0.23), (-0.417, 0.68), (-0.382, 0.38)),
    "cities": (2.37, 52.46e3, 0.76, (-0.090, 0.93), (3.65, 0.00), (0.204, 0.84), (-0.123, 0.62)),
    "flares": (1.79, 323.0, 1.00, (-0.803, 0.42), (13.7, 0.00), (-0.546, 0.59), (-4.52, 0.00)),
    "fires": (2.2, 6324.0, 0.05, (-1.78, 0.08), (4.00, 0.00), (-1.82, 0.07), (-5.02, 0.00)),
    "surnames": (2.5, 111.92e3, 0.20, (-0.836, 0.40), (2.89, 0.00), (-0.844, 0.40), (-1.36, 0.10)),
}
"""As published by Clauset et al.; the package's tests repeat them."""


def sample(n: int, alpha: float = 2.5, seed: int = 0) -> np.ndarray:
    """Values whose density is proportional to exp(-alpha (x - 1)) in 0..1, and to x^-alpha from 1 on."""
    rng = np.random.default_rng(seed)
    below, above = np.expm1(alpha) / alpha, 1 / (alpha - 1)
    u = rng.random(n)
    body = 1 - np.log1p(u * np.expm1(alpha)) / alpha
    return np.where(rng.random(n) < above / (above + below), (1 - u) ** (-1 / (alpha - 1)), body)


def timed(work: Callable[[], Any], repeats: int = 1) -> tuple[Any, float]:
    """The result, and the median of the seconds."""
    found, seconds = None, []
    for _ in range(repeats):
        start = time.perf_counter()
        found = work()
        seconds.append(time.perf_counter() - start)
    return found, float(np.median(seconds))


def package() -> Any:
    """The package, or None."""
    try:
        import powerlaw  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return powerlaw


def quietly(work: Callable[[], Any]) -> Any:
    """Without the package's bars and warnings."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        return work()


def row(who: str, n: int, fit: TailFit, seconds: float) -> dict[str, Any]:
    """A line of the table of fits."""
    alpha = fit["alpha"]
    return {
        "fit": who, "n": n, "alpha": alpha.value, "low": alpha.low, "high": alpha.high, "xmin": fit.xmin,
        "n_tail": fit.n_tail, "D": fit.ks, "p": fit.p, "seconds": seconds,
    }  # fmt: skip


def beside(n: int, powerlaw: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of fits and rows of alternatives, for one simulated sample."""
    x = sample(n)
    one, short = timed(lambda: power_law(x, distance="one-sided"), 5)
    fits = [row("one-sided", n, one, short)]
    both, seconds = timed(lambda: power_law(x), 5)
    fits.append(row("two-sided", n, both, seconds))
    both, seconds = timed(lambda: power_law(x, bootstrap=REPLICATES))
    fits.append(row(f"two-sided, {REPLICATES} replicates", n, both, seconds))
    if powerlaw is None:
        return fits, []
    theirs, long = timed(lambda: _fit(powerlaw, x))
    fits.append(
        {"fit": "package", "n": n, "alpha": theirs.power_law.alpha, "xmin": theirs.xmin, "n_tail": theirs.n_tail}
        | {"D": theirs.power_law.D, "seconds": long, "times ours": long / short}
    )
    return fits, compared(theirs, one)


def _fit(powerlaw: Any, x: np.ndarray, **options: Any) -> Any:
    def work() -> Any:
        found = powerlaw.Fit(x, verbose=0, **options)
        _ = found.power_law.alpha  # what is fitted lazily is fitted now
        return found

    return quietly(work)


def compared(theirs: Any, ours: TailFit) -> list[dict[str, Any]]:
    """The package's likelihood ratios beside ours; they mean the same only if xmin is the same."""
    rows = []
    for name in ALTERNATIVES:
        nested = name == "truncated power law"
        ratio = quietly(
            lambda name=name, nested=nested: theirs.loglikelihood_ratio(
                "power_law", name.replace(" ", "_"), nested=nested, normalized_ratio=not nested
            )
        )
        own = ours.alternatives.set_index("alternative").loc[name]
        rows.append(
            {"alternative": name, "n": ours.n_tail, "quantity": "R" if nested else "R / (sd sqrt n)"}
            | {"ours": own["R" if nested else "statistic"], "p": own["p"]}
            | {"package": float(ratio[0]), "package's p": float(ratio[1]), "verdict": own["verdict"]}
        )
    return rows


def published(powerlaw: Any, replicates: int = 1000) -> pd.DataFrame:
    """Clauset's data sets: what was published, ours, and the package's."""
    rows = []
    for name, (alpha, xmin, p, *ratios) in PUBLISHED.items():
        x = powerlaw.load_test_dataset(name)
        both, seconds = timed(lambda x=x: power_law(x, bootstrap=replicates))
        one = power_law(x, distance="one-sided", bootstrap=replicates)
        theirs = _fit(powerlaw, x) if len(x) < 1e5 else None
        at = power_law(x, xmin=one.xmin).alternatives
        shown = [
            f"{line['R' if line['nested'] else 'statistic']:.3g} ({line['p']:.2g}) / {ratio:g} ({chance:g})"
            for line, (ratio, chance) in zip(at.to_dict("records"), ratios, strict=True)
        ]
        rows.append(
            {"data": name, "n": len(x), "alpha": alpha, "ours": both["alpha"].value, "one-sided": one["alpha"].value}
            | {"package": theirs.power_law.alpha if theirs else np.nan, "xmin": xmin, "our xmin": both.xmin}
            | {
                "one-sided xmin": one.xmin,
                "package's": theirs.xmin if theirs else np.nan,
                "p": p,
                "our p": both.p,
                "one-sided p": one.p,
            }
            | {"s": seconds}
            | dict(zip(ALTERNATIVES, shown, strict=True))
        )
    return pd.DataFrame(rows)


def show(title: str, table: pd.DataFrame) -> None:
    """Print a table."""
    with pd.option_context("display.width", 250, "display.max_columns", 30, "display.float_format", "{:.6g}".format):
        print(f"\n{title}\n{table.to_string(index=False, na_rep='')}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, nargs="*", default=[10_000, 100_000], help="beside the package")
    parser.add_argument("--alone", type=int, nargs="*", default=[1_000_000], help="without it")
    options = parser.parse_args()
    powerlaw = package()
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}")
    power_law(sample(1_000), bootstrap=1)  # compiles
    if powerlaw is None:
        print('The package is not installed (pip install "powerlaw>=2.0"): ours alone.')
    else:
        show("Clauset et al.: published, ours; ratios as ours (p) / published (p)", published(powerlaw))
    for n in options.points:
        fits, ratios = beside(n, powerlaw)
        show(f"{n:,} values", pd.DataFrame(fits))
        if ratios:
            show("Alternatives, on the tail of the one-sided fit", pd.DataFrame(ratios))
    for n in options.alone:
        show(f"{n:,} values", pd.DataFrame(beside(n, None)[0]))


if __name__ == "__main__":
    main()
