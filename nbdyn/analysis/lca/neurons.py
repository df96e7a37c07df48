"""What neurons do together: correlation within a neuron, specialization in classes, saliency (LCA, section S6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from nbdyn.analysis.lca.pairs import KINDS, distinct_pairs, grid_of, regrouped
from nbdyn.errors import Incompatible

CHUNK = 4_000_000
"""Values of trajectories worked on at once."""
SENTENCES = {
    "same output": "which weights of an input belong to which output neuron is exchangeable",
    "same input": "which weights of an output neuron belong to which input is exchangeable",
}
"""The nulls of the permutation tests."""


COLUMNS = ["kind", "n", "mean_r", "std_r", "effect", "ks", "ks_p", "block", "block_mean_r", "null_mean", "null_low",
           "null_high", "p", "draws", "null"]  # fmt: skip
"""Of the frame of correlations."""


# Correlation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SameNeuron:
    """Correlations between trajectories of weights that share a neuron, against those that share none.

    Attributes:
        r: "same output", "same input", "neither" -> Pearson's r of distinct random pairs.
        tests: what `frame` returns.
        parameters: weights in all.
        constant: those whose trajectory never changes: they have no correlation and are left out.
        cumulative: whether r is of the cumulative trajectories.
    """

    r: dict[str, np.ndarray]
    tests: pd.DataFrame
    parameters: int
    constant: int
    cumulative: bool

    def frame(self) -> pd.DataFrame:
        """A row for each kind of pair.

        n (pairs), mean_r, std_r; effect (mean_r less that of "neither"), ks and ks_p (two-sample Kolmogorov-Smirnov
        test against "neither"; pairs share weights, so ks_p is too small); and the permutation test, whose level holds:
        block (weights in it), block_mean_r, null_mean, null_low, null_high (95 %), p (one-sided: larger r), draws,
        null. NaN where there are no such pairs.
        """
        return self.tests.copy()

    def plot(self) -> Any:
        """The distribution of r of each kind of pair, the means, and the tests, as an altair chart."""
        from nbdyn.analysis.lca import figures

        return figures.same_neuron(self)

    def __repr__(self) -> str:
        rows = self.tests.to_dict("records")
        means = ", ".join(f"{row['kind']} {row['mean_r']:.3g} (n {row['n']:,})" for row in rows)
        what = "cumulative trajectories" if self.cumulative else "trajectories"
        return f"<SameNeuron: mean r of {what} of {self.parameters:,} weights, {self.constant:,} constant: {means}>"


def same_neuron(
    trajectories: ArrayLike,
    rows: ArrayLike,
    columns: ArrayLike,
    pairs: int = 10_000,
    seed: int = 0,
    cumulative: bool = False,
    draws: int = 999,
) -> SameNeuron:
    """Do weights into the same output neuron, or out of the same input, learn at the same steps? (LCA, section S6.1).

    Pearson's r between trajectories of random pairs: same output neuron (other input), same input (other output
    neuron), neither. Two tests against "neither", see `SameNeuron.frame`: Kolmogorov-Smirnov on the pairs, and a
    permutation test of the mean r over all pairs in a random block of at most about 900 weights (rows x columns), in
    which labels of output neurons are permuted within each input (for "same input": inputs within each output neuron).

    Cost: reads the trajectories once to find constant ones, then 6 * pairs of them and the block's: about 10 s for
    78,400 weights at 880 steps on one core.

    Args:
        trajectories: of one layer's kernel, (T, n), such as allocations by step; no biases.
        rows: output neuron of each weight, (n,).
        columns: input of each weight, (n,): of a kernel w, `np.arange(w.numel()) % w[0].numel()`.
        pairs: of each kind, at most; fewer where there are fewer.
        seed: of pairs, block and permutations.
        cumulative: whether to correlate sums over the steps so far. Sums of unrelated series correlate, too (r is wide
            around 0), so the default is the steps themselves.
        draws: permutations.

    Raises:
        Incompatible: if shapes do not fit, or fewer than two weights or three steps vary.
    """
    found = np.asarray(trajectories)
    labels = np.asarray(rows).reshape(-1), np.asarray(columns).reshape(-1)
    if found.ndim != 2 or any(len(label) != found.shape[1] for label in labels):
        raise Incompatible(
            f"trajectories {found.shape}, rows {labels[0].shape} and columns {labels[1].shape} do not fit: "
            "they are (steps, n), (n,) and (n,)."
        )
    alive = _varying(found)
    if len(alive) < 2 or len(found) < 3:
        raise Incompatible(f"{len(alive)} weights vary over {len(found)} steps; correlation takes two and three.")
    row, column = (np.unique(label[alive], return_inverse=True)[1] for label in labels)
    rng = np.random.default_rng(seed)
    r = {}
    for kind in KINDS:
        first, second = distinct_pairs(kind, row, column, pairs, rng)
        r[kind] = _correlations(found, alive[first], alive[second], cumulative)
    block = grid_of(row, column, rng)
    gram = _standardized(found[:, alive[block]], cumulative)
    gram = gram.T @ gram
    tests = []
    for kind in KINDS:
        labels_of = {"same output": (row, column), "same input": (column, row)}.get(kind)
        test = {} if labels_of is None else _permuted(gram, labels_of[0][block], labels_of[1][block], draws, rng)
        tests.append(_described(kind, r) | {"block": len(block)} | test | {"null": SENTENCES.get(kind, "")})
    return SameNeuron(r, pd.DataFrame(tests, columns=COLUMNS), found.shape[1], found.shape[1] - len(alive), cumulative)


def _described(kind: str, r: dict[str, np.ndarray]) -> dict[str, object]:
    """A kind of pairs against "neither"."""
    here, other = r[kind], r["neither"]
    mean, base = (float(x.mean()) if len(x) else math.nan for x in (here, other))
    row = {"kind": kind, "n": len(here), "mean_r": mean, "std_r": float(here.std()) if len(here) else math.nan}
    row |= {"effect": math.nan, "ks": math.nan, "ks_p": math.nan}
    if kind != "neither" and len(here) and len(other):
        test = stats.ks_2samp(here, other)
        row |= {"effect": mean - base, "ks": float(test.statistic), "ks_p": float(test.pvalue)}  # pyright: ignore
    return row


def _permuted(
    gram: np.ndarray, labels: np.ndarray, within: np.ndarray, draws: int, rng: np.random.Generator
) -> dict[str, float]:
    """The mean r of pairs with the same label and another `within`, against labels permuted within groups."""
    apart = within[:, None] != within
    pairs = int((apart & (labels[:, None] == labels)).sum())
    if not pairs:
        return {}
    r = np.where(apart, gram, 0.0)
    order = np.argsort(within, kind="stable")
    r, labels, within = r[np.ix_(order, order)], labels[order], within[order]

    def mean_r(now: np.ndarray) -> float:
        member = (now[:, None] == np.arange(labels.max() + 1)).astype(np.float64)
        # A permutation within groups leaves the number of pairs as it is.
        return float(np.einsum("ij,ij->", r @ member, member)) / pairs

    labels = np.unique(labels, return_inverse=True)[1]
    observed = mean_r(labels)
    null = np.array([mean_r(regrouped(labels, within, rng)) for _ in range(draws)])
    low, high = np.quantile(null, [0.025, 0.975])
    as_large = int((null >= observed - 1e-12).sum())  # rounding must not make an equal arrangement a smaller one
    return {
        "block_mean_r": observed, "null_mean": float(null.mean()), "null_low": float(low), "null_high": float(high),
        "p": (1 + as_large) / (1 + draws), "draws": draws,
    }  # fmt: skip


def _varying(trajectories: np.ndarray) -> np.ndarray:
    """The weights whose trajectory changes, in parts: the whole may be a file's map."""
    width = max(1, CHUNK // max(1, len(trajectories)))
    parts = []
    for first in range(0, trajectories.shape[1], width):
        part = trajectories[:, first : first + width]
        if not np.isfinite(part).all():
            raise Incompatible("trajectories hold NaN or infinity, which correlate with nothing; leave these out.")
        parts.append(first + np.flatnonzero((part != part[0]).any(axis=0)))
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _standardized(trajectories: np.ndarray, cumulative: bool) -> np.ndarray:
    """Columns of mean 0 and norm 1, so that products are correlations; (T, m)."""
    x = np.asarray(trajectories, np.float64)
    # Divided first: squares of allocations of 1e-200 would be 0.
    x = x / np.abs(x).max(axis=0)
    x = np.cumsum(x, axis=0) if cumulative else x
    x = x - x.mean(axis=0)
    return x / np.linalg.norm(x, axis=0)


def _correlations(trajectories: np.ndarray, first: np.ndarray, second: np.ndarray, cumulative: bool) -> np.ndarray:
    """Pearson's r of pairs of columns, in parts."""
    size = max(1, CHUNK // len(trajectories))
    found = np.empty(len(first))
    for start in range(0, len(first), size):
        part = slice(start, start + size)
        a, b = (_standardized(trajectories[:, which[part]], cumulative) for which in (first, second))
        found[part] = np.einsum("tj,tj->j", a, b)
    return found


# Classes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Specialization:
    """How far neurons help single classes.

    Attributes:
        neurons: by neuron: helped (sum over classes), top_class, top_1 (its share), top_2 (share of the two largest),
            entropy (of the shares, / log classes: 1 all alike, 0 one class). Neurons that help no class: NaN, class -1.
        tests: against two nulls, over neurons: statistic, n, observed, null_mean, null_low, null_high (95 %), effect, p
            (one-sided: more special), draws, null.
    """

    neurons: pd.DataFrame
    tests: pd.DataFrame

    def frame(self) -> pd.DataFrame:
        """A row for each neuron."""
        return self.neurons.copy()

    def plot(self) -> Any:
        """How neurons' help is divided among classes, beside the nulls, as an altair chart."""
        from nbdyn.analysis.lca import figures

        return figures.specialization(self)

    def __repr__(self) -> str:
        rows = self.tests.to_dict("records")
        tests = "; ".join(
            f"{t['statistic']} {t['observed']:.3g} (null {t['null_mean']:.3g}, p {t['p']:.3g})" for t in rows
        )
        return f"<Specialization of {len(self.neurons):,} neurons: {tests}>"


def specialization(helped: ArrayLike, draws: int = 999, seed: int = 0) -> Specialization:
    """Do neurons help one or two classes more than the others?

    After LCA, section S6.2; its exact definition is not known. A neuron's shares are its amounts / their sum. Two
    nulls, for two questions:

    Neurons exchangeable within each class: each class's amounts are dealt anew to the neurons that help any class. It
    keeps how much help each class gets in which portions, and breaks what belongs together in a neuron. Tested: the
    means over neurons of top_1, top_2 and entropy (those that are dealt nothing left out). A layer in which all neurons
    favour the same class is not special. Neurons that do more than others for all classes make the test conservative.

    Class labels exchangeable within each neuron: every neuron's shares are dealt anew to the classes. It leaves each
    neuron's top_1, top_2 and entropy as they are, so these cannot be tested by it; tested is "layer entropy", that of
    the mean of all neurons' shares: below the null, neurons agree on the classes that they help.

    Args:
        helped: amount helped, -(sum over steps and incoming weights of the class's allocations), (neurons, classes),
            in nats; negative ones count as 0.
        draws: permutations.
        seed: of the permutations.

    Raises:
        Incompatible: if it is not (neurons, two or more classes), or holds NaN or infinity.
    """
    h = np.asarray(helped, np.float64)
    if h.ndim != 2 or h.shape[1] < 2 or not np.isfinite(h).all():
        raise Incompatible(
            f"amounts helped are {h.shape}; give finite ones, (neurons, classes), of two or more classes."
        )
    h = np.maximum(h, 0.0)
    shares = _shares(h)
    described = _spread(shares)
    works = h.any(axis=1)
    neurons = pd.DataFrame(
        {"neuron": np.arange(len(h)), "helped": h.sum(axis=1), "top_class": np.where(works, h.argmax(axis=1), -1)}
        | described
    )
    tests = _special_tests(h[works], draws, np.random.default_rng(seed)) if works.sum() > 1 else []
    columns = ["statistic", "n", "observed", "null_mean", "null_low", "null_high", "effect", "p", "draws", "null"]
    return Specialization(neurons, pd.DataFrame(tests, columns=columns))


def _special_tests(amounts: np.ndarray, draws: int, rng: np.random.Generator) -> list[dict[str, object]]:
    """The tests of a layer, of the amounts of the neurons that help any class."""
    shares = _shares(amounts)
    swapped: dict[str, list[float]] = {"top_1": [], "top_2": [], "entropy": [], "layer entropy": []}
    for _ in range(draws):
        dealt = _spread(_shares(rng.permuted(amounts, axis=0)))
        for name, values in dealt.items():
            swapped[name].append(float(np.nanmean(values)))
        swapped["layer entropy"].append(_layer_entropy(rng.permuted(shares, axis=1)))
    observed = {name: float(values.mean()) for name, values in _spread(shares).items()}
    observed["layer entropy"] = _layer_entropy(shares)
    tests = []
    for name, values in swapped.items():
        null, sign = np.array(values), -1 if "entropy" in name else 1
        low, high = np.quantile(null, [0.025, 0.975])
        as_special = int((sign * null >= sign * observed[name] - 1e-12).sum())  # rounding: equal is as special
        sentence = "class labels exchangeable within each neuron" if name == "layer entropy" else (
            "neurons exchangeable within each class"
        )  # fmt: skip
        tests.append({
            "statistic": name, "n": len(shares), "observed": observed[name], "null_mean": null.mean(), "null_low": low,
            "null_high": high, "effect": observed[name] - null.mean(), "p": (1 + as_special) / (1 + draws),
            "draws": draws, "null": sentence,
        })  # fmt: skip
    return tests


def _shares(amounts: np.ndarray) -> np.ndarray:
    """Rows divided by their sums; NaN where that is 0."""
    total = amounts.sum(axis=1, keepdims=True)
    return np.divide(amounts, total, out=np.full(amounts.shape, math.nan), where=total > 0)


def _spread(shares: np.ndarray) -> dict[str, np.ndarray]:
    """top_1, top_2 and normalized entropy by row."""
    largest = np.sort(shares, axis=1)[:, ::-1]
    entropy = stats.entropy(shares, axis=1) / math.log(shares.shape[1])
    return {"top_1": largest[:, 0], "top_2": largest[:, 0] + largest[:, 1], "entropy": np.asarray(entropy)}


def _layer_entropy(shares: np.ndarray) -> float:
    """Normalized entropy of the mean of the shares."""
    return float(stats.entropy(shares.mean(axis=0))) / math.log(shares.shape[1])


# Saliency -------------------------------------------------------------------------------------------------------


def saliency(totals: ArrayLike, shape: Sequence[int]) -> np.ndarray:
    """How much each pixel's weight into a neuron of the first layer helped: -(sum over steps of A), as images.

    Args:
        totals: allocations summed over steps, in nats, (outputs, inputs).
        shape: of an input image, such as (28, 28) or (3, 32, 32).

    Returns:
        (outputs, *shape): positive where the weight helped.

    Raises:
        Incompatible: if inputs are not the pixels of that shape.

    >>> saliency([[-1.0, 2.0, 0.5, -4.0]], (2, 2)).tolist()
    [[[1.0, -2.0], [-0.5, 4.0]]]
    """
    found = np.asarray(totals)
    if found.ndim != 2 or found.shape[1] != math.prod(shape):
        raise Incompatible(
            f"totals are {found.shape}, images {tuple(shape)} have {math.prod(shape)} pixels: give (outputs, inputs) "
            "with as many inputs as pixels."
        )
    return -found.reshape(len(found), *shape)
