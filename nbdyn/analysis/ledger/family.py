"""Many hypotheses at once: which of a ledger's p-values still count.

The family of confirmatory hypotheses is every one that was declared as such, tested or not: one without a confirmatory
test counts with p = 1. So looking at the table after each test costs nothing: verdicts of fixed declarations can only
turn from "not" to "supported" as tests come in. Declaring more can turn them back: a verdict is that over the ledger as
it is now. Nothing leaves the family: who gives a declaration up, or spoils it by looking at the data, does not make it
easier for the others. Only a declaration that was corrected before any data was seen is counted once, as corrected.
Exploratory hypotheses are a family of their own, which no guarantee holds for: their number is what was written down.

Each hypothesis is supported if its Holm-adjusted p is at most its own level. Where levels differ, the chance of one or
more false findings among those with a level of at most l is at most l: what is found at l_i is found by Holm's
rule at l, over the same family. At all, it is at most the largest level.

This holds if the number of declarations does not depend on outcomes. Who declares one hypothesis, sees its outcome,
declares the next, and stops when something is found, finds something false with a chance of 1 - prod(1 - l / k), k = 1,
2, ... (16.6 % within 20 at 5 %). For them there is `anytime`: p_k k (k + 1), k in the order of declarations. The
shares 1 / (k (k + 1)) sum to 1, so by Bonferroni the chance of any false finding stays below the level whenever one
stops; it never changes later, and has less power.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nbdyn.statistics.testing import benjamini_hochberg, holm


class Family(NamedTuple):
    """Adjusted p-values of a family, each (m,), NaN where there is no p.

    Attributes:
        holm: by Holm's rule over the whole family; the verdict is taken from it.
        bh: by Benjamini and Hochberg: the expected share of false findings among all findings.
        anytime: for who declares in view of outcomes; see the module.
        supported: whether `holm` is at most the level of the hypothesis.
    """

    holm: np.ndarray
    bh: np.ndarray
    anytime: np.ndarray
    supported: np.ndarray


def judge(p: ArrayLike, level: ArrayLike, order: ArrayLike | None = None) -> Family:
    """The verdicts over a family.

    Holm (1979) holds whatever the dependence; Benjamini and Hochberg (1995) suppose that the tests are independent or
    positively dependent, such as tests on the same runs often are.

    Args:
        p: p-values in the order of declarations, (m,); NaN: not tested, or the test gave none. They count as 1.
        level: one for all, or (m,).
        order: the number of each declaration, from 1, (m,); by default 1..m.

    Raises:
        Incompatible: if a value is not in 0..1.

    >>> judge([0.01, 0.02, float("nan")], 0.05).holm.tolist()
    [0.03, 0.04, nan]
    """
    p = np.asarray(p, np.float64).reshape(-1)
    missing = np.isnan(p)
    full = np.where(missing, 1.0, p)
    k = np.arange(1, len(p) + 1) if order is None else np.asarray(order, np.float64)
    adjusted = [holm(full), benjamini_hochberg(full), np.minimum(1.0, full * k * (k + 1))]
    for values in adjusted:
        values[missing] = np.nan
    with np.errstate(invalid="ignore"):
        return Family(*adjusted, supported=adjusted[0] <= np.asarray(level, np.float64))
