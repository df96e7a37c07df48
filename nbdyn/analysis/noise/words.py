"""What a noise carries, in words: a sentence a layer, and the paragraph for a paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nbdyn.plots.panels import show_number

if TYPE_CHECKING:
    from nbdyn.analysis.noise.result import Noise
    from nbdyn.analysis.noise.sampled import Sample


SETTLED = 0.1
"""A kurtosis that grows as n to less than this (the upper end of its interval) is called settled."""


def plural(word: str) -> str:
    """The plural of a row's name.

    >>> plural("mini-batch"), plural("step")
    ('mini-batches', 'steps')
    """
    return word + ("es" if word.endswith("ch") else "s")


def verdicts(noise: Noise, surrogates: pd.DataFrame | None) -> list[str]:
    """A sentence for each step and layer."""
    index, kurtosis = noise.usual("index"), noise.usual("kurtosis")
    found = []
    for sample in noise.samples:
        parts = [_of_index(_at(index, sample)), _of_kurtosis(_at(kurtosis, sample))]
        if surrogates is not None:
            parts += _of_surrogates(_at(surrogates, sample))
        if noise.has_sums:
            parts += _of_scale(_at(noise.usual("scale"), sample))
        place = f"{sample.step}..{sample.stop - 1}" if noise.kind.in_order else f"{sample.step}"
        said = "; ".join(part for part in parts if part)
        found.append(f"layer {sample.layer or '(root)'}, step {place} ({noise.kind.words_of(noise.batch)}): {said}.")
    return found


def _at(table: pd.DataFrame, sample: Sample) -> Any:
    return table[(table["step"] == sample.step) & (table["layer"] == sample.layer)]


def _of_index(rows: Any) -> str:
    """What the index says: of one batch size a number and no conclusion, of several whether it rises."""
    rows = rows[rows["low"].notna()]
    if not len(rows):
        return "the stable index cannot be read (too few values that are not zero)"
    first, last, highest = rows.iloc[0], rows.iloc[-1], rows.iloc[int(np.argmax(rows["low"]))]
    if last["low"] <= first["high"] < highest["low"]:  # the last ones are the fewest means, and tell the least
        last = highest
    if len(rows) == 1:
        return (
            f"the stable index reads {_range(first)} (n = {first['n']:,}); without batches of several sizes that does "
            "not tell a stable law from another"
        )
    ends = f"alpha {_range(first)} for batches of {first['batch']:,} and {_range(last)} for {last['batch']:,}"
    if last["low"] > first["high"]:
        short = "" if last["high"] >= 2 else ", though not to 2 by then"
        return f"{ends}: it rises with the batch{short}; a stable law keeps its index, a finite variance takes it to 2"
    if last["high"] < first["low"]:
        return f"{ends}: it falls with the batch, which neither a stable law nor a finite variance explains"
    near_two = first["high"] >= 2 and last["high"] >= 2
    return f"{ends}: {'both as Gaussian' if near_two else 'no change can be told, which a stable law would show, too'}"


def _of_kurtosis(rows: Any) -> str:
    last = rows.iloc[-1]
    if pd.isna(last["slope"]):
        return ""
    slope, low, high = last["slope"], last["slope_low"], last["slope_high"]
    if high < SETTLED:
        says = "it settles, as with a finite fourth moment"
    elif high < 1:
        says = f"slower than under a stable law (1); a tail index of {4 / (1 + max(0.0, slope)):.1f} would give that"
    else:
        says = "that of a stable law (1) is not excluded"
    grows = f"growing as n to the {slope:.2f} ({low:.2f}..{high:.2f})"
    return f"excess kurtosis {show_number(last['median'])} at n = {last['n']:,}, {grows}: {says}"


def _of_surrogates(rows: Any) -> list[str]:
    found = []
    for row in rows[rows["statistic"] == "block log-moments"].to_dict("records"):
        sees = ": a sign of tails" if row["p"] < 0.05 else ": it sees no tail"
        found.append(
            f"the gradient-noise paper's estimator reads {row['observed']:.3f}, Gaussian noise of the same covariance "
            f"{row['null_mean']:.3f} ({row['null_low']:.3f}..{row['null_high']:.3f}, p {row['p']:.2g})"
            + (sees if 0 < row["observed"] <= 2 else ": outside 0..2, the index of no law")
        )
    return found


def _of_scale(rows: Any) -> list[str]:
    return [
        f"noise scale {show_number(row['scale'])} samples ({show_number(row['low'])}..{show_number(row['high'])})"
        if row["resolved"] else "noise scale not resolved (the interval of |G|^2 reaches 0)"
        for row in rows.to_dict("records")
    ]  # fmt: skip


def _range(row: Any) -> str:
    return f"{row['median']:.2f} ({row['low']:.2f}..{row['high']:.2f})"


def methods(noise: Noise) -> str:
    """What was done, for a paper."""
    first = noise.samples[0]
    counts = sorted({sample.values.shape[1] for sample in noise.samples})
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    dead = sum(int((~sample.live).sum()) for sample in noise.samples)
    place = f"steps {first.step}..{first.stop - 1}" if noise.kind.in_order else "weights before step(s) " + ", ".join(
        map(str, noise.steps)
    )  # fmt: skip
    text = f"Sampled were {noise.sampled}, at {place}"
    if noise.kind.name != "coordinates":
        text += (
            f"; {many} coordinates of each layer were drawn at random (seed {noise.seed}), of which {dead:,} were zero "
            "throughout and are left out"
        )
    text += (
        ". The index of a symmetric stable law is the slope of log(-log |phi|^2) on log t (Koutrouvelis 1980), exact "
        "zeros left out; the number of a layer is the median over coordinates, its interval from a jackknife over ten "
        "groups of rows and the draw of the coordinates. Normality is tested by D'Agostino and Pearson's test."
    )
    if noise.kind.of_samples:
        text += (
            " Batches are disjoint and drawn without replacement, so that the variance of a mean is 1 - B/P of that of "
            "independent draws (P samples). The noise scale is tr(Sigma)/|G|^2 (McCandlish et al. 2018), both parts "
            "unbiased, with Fieller's interval with the covariance of a jackknife over samples."
        )
    if noise.kind.at_fixed_weights:
        text += " The null of the surrogates is Gaussian noise with the sampled covariance."
    return text + "".join(f" Note: {warning}." for warning in noise.warnings)
