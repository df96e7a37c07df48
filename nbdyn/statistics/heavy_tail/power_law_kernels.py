"""Compiled loops of power laws: the exact search of xmin, and integrals of the power law with a cut-off.

The search takes logarithms of positive values, sorted upwards, L_0 <= ... <= L_(n-1). A candidate is the place i of
the first of equal values. Its tail has m = n - i values and the rate s_i = m / sum_(j >= i) (L_j - L_i), which is
alpha - 1; its distance D_i is the largest difference between the tail's empirical survival function and
exp(-s_i (L - L_i)). What is sought is the smallest D_i. It is exact, because only two things are left out:

- Candidates with a witness. A difference at any one place j is a lower bound of D_i. Places of large differences move
  little from a candidate to the next, so one or two looked at rule out nearly all candidates: O(1) each.
- Stretches of a tail that cannot matter. Both functions fall, so between the places j and k no difference is above
  max(S(j) - F(k), F(j) - S(k)). Where that is at most the difference that is of interest, the stretch is passed over in
  one step. Steps double after a success and halve after a failure.

Only a candidate without a witness has its tail walked, in about as many steps as 1 / D_i; of 1e6 candidates some
hundred are. Of equal distances the smaller xmin wins. Numbers are those of float64: a distance is good to about 1e-15.
"""

# pyright: standard
# numba ships no types.
from __future__ import annotations

import math

import numpy as np
from numba import njit

WITNESSES = 4
"""Places of large differences kept, the most recently useful first."""
FINER = 64
"""Each sweep over the candidates is this much finer than the one before."""
PANELS = 8
"""Pieces of an integral; each has the nodes of a Gauss-Legendre rule."""
NEGLIGIBLE = 45.0
"""An integrand is cut where it is below exp(-45) of its largest value."""

_compiled = njit(nogil=True, cache=True, error_model="numpy")


@_compiled
def rates(logs):
    """The rate, alpha - 1, of the tail that begins at each place; infinite where all its values are equal. (n,), O(n).

    The sums are added up from the top, of positive terms only: nothing cancels.
    """
    n = len(logs)
    found = np.empty(n)
    total = 0.0
    found[n - 1] = np.inf
    for i in range(n - 2, -1, -1):
        total += (n - 1 - i) * (logs[i + 1] - logs[i])
        found[i] = (n - i) / total
    return found


@_compiled
def _difference(logs, first, origin, rate, j, after):
    """The difference at the place j: below its jump, and (after = 1) above it."""
    n = len(logs)
    fit = math.exp(-rate * (logs[j] - origin))
    return max((n - j) / (n - first) - fit, fit - (n - j - after) / (n - first))


@_compiled
def walk(logs, first, origin, rate, after, bound):
    """The largest difference above `bound` and its place; `bound` and -1 where there is none.

    Args:
        logs: sorted upwards, (n,).
        first: where the tail begins.
        origin: log(xmin), at most logs[first].
        rate: alpha - 1.
        after: 1 takes both sides of each jump (the supremum over all x); 0 the lower side only.
        bound: what is of interest is above it.
    """
    n = len(logs)
    m = n - first
    place, j, stride = -1, first, max(1, int(bound * m / 2))
    fit = math.exp(-rate * (logs[first] - origin))
    while j < n:
        k = min(j + stride, n)
        below = math.exp(-rate * (logs[min(k, n - 1)] - origin))
        if stride > 1 and ((n - j) / m - below > bound or fit - (n - k) / m > bound):
            stride //= 2
            continue
        if stride == 1:
            found = max((n - j) / m - fit, fit - (n - j - after) / m)
            if found > bound:
                bound, place = found, j
        j, fit = k, below
        stride *= 2
    return bound, place


@_compiled
def _ruled_out(logs, i, rate, after, best, best_at, witnesses):
    """Whether a witness says that D_i is not the smallest; the witness that did moves to the front."""
    for z in range(WITNESSES):
        w = witnesses[z]
        if w < i:
            continue
        found = _difference(logs, i, logs[i], rate, w, after)
        if found > best or (found == best and i > best_at):
            if z > 0:
                witnesses[z] = witnesses[z - 1]
                witnesses[z - 1] = w
            return True
    return False


@_compiled
def _remember(witnesses, place):
    """A new witness, in front."""
    for z in range(WITNESSES - 1, 0, -1):
        witnesses[z] = witnesses[z - 1]
    witnesses[0] = place


@_compiled
def _order(count):
    """Where the search looks first: candidates at geometric tail lengths, which may be few and far up."""
    found = np.empty(5 * 64, np.int64)
    size, length, last = 0, 1.0, -1
    while length <= count:
        q = count - int(length)
        if q != last:
            found[size] = q
            size += 1
            last = q
        length *= 1.25
    return found[:size]


@_compiled
def search(logs, candidates, after):
    """The candidate of the smallest distance, the distance, and how many candidates were walked.

    Args:
        logs: sorted upwards, (n,).
        candidates: places where a tail may begin, increasing; those of infinite rate are passed over.
        after: 1 takes both sides of each jump of the empirical function; 0 the lower side only.

    Returns:
        distance, place (-1 where no candidate has a finite rate), walked.
    """
    rate = rates(logs)
    witnesses = np.zeros(WITNESSES, np.int64)
    count = len(candidates)
    best, best_at, walked = np.inf, -1, 0
    start = _order(count)
    step = 0
    while True:
        # step 0 is the start; then every (64^k)-th candidate, ..., every 64th, every one
        looked = len(start) if step == 0 else (count + step - 1) // step
        for q in range(looked):
            i = candidates[start[q]] if step == 0 else candidates[q * step]
            if not rate[i] < np.inf or _ruled_out(logs, i, rate[i], after, best, best_at, witnesses):
                continue
            walked += 1
            found, place = walk(logs, i, logs[i], rate[i], after, min(best, 1.0))
            if place < 0:
                # No difference is above the best: D_i is needed itself. What witnesses show of it is a start.
                known = 0.0
                for w in witnesses:
                    if w >= i:
                        known = max(known, _difference(logs, i, logs[i], rate[i], w, after))
                found, place = walk(logs, i, logs[i], rate[i], after, known)
                if found < best or (found == best and i < best_at):
                    best, best_at = found, i
            if place >= 0:
                _remember(witnesses, place)
        if step == 1 or count == 0:
            return best, best_at, walked
        if step == 0:
            step = 1
            while step * FINER < count:
                step *= FINER
        else:
            step //= FINER


@_compiled
def _log_integrand(y, slope, cut):
    return -slope * y - cut * math.expm1(min(y, 700.0))


@_compiled
def _far(peak, slope, cut, sign, limit):
    """Where the integrand, going from its peak by `sign`, becomes negligible; 0 at least."""
    floor = limit - NEGLIGIBLE
    reach = 1e-9
    while True:
        y = peak + sign * reach
        if y <= 0 and sign < 0:
            return 0.0
        if _log_integrand(y, slope, cut) < floor:
            break
        reach *= 2
    low, high = reach / 2, reach
    for _ in range(8):
        middle = (low + high) / 2
        if _log_integrand(peak + sign * middle, slope, cut) < floor:
            high = middle
        else:
            low = middle
    return peak + sign * high


@_compiled
def cut_off(slope, cut, nodes, weights):
    """Log Z, E[y] and E[e^y - 1] of the density exp(-slope y - cut (e^y - 1)) / Z on y >= 0.

    Gauss-Legendre on panels of the range where the integrand matters; relative error about 1e-13.

    Args:
        slope: any real.
        cut: above 0.
        nodes: of the rule on -1..1.
        weights: of the rule.
    """
    peak = max(0.0, math.log(-slope / cut)) if slope < 0 else 0.0
    top = _log_integrand(peak, slope, cut)
    low, high = _far(peak, slope, cut, -1.0, top), _far(peak, slope, cut, 1.0, top)
    half = (high - low) / (2 * PANELS)
    total, first, second = 0.0, 0.0, 0.0
    for panel in range(PANELS):
        middle = low + (2 * panel + 1) * half
        for q in range(len(nodes)):
            y = middle + half * nodes[q]
            grown = math.expm1(y)
            mass = weights[q] * math.exp(-slope * y - cut * grown - top)
            total += mass
            first += mass * y
            second += mass * grown
    return top + math.log(total * half), first / total, second / total


@_compiled
def log_normalizers(slope, cuts, nodes, weights):
    """Log Z of each of many cut-offs, (k,)."""
    found = np.empty(len(cuts))
    for q in range(len(cuts)):
        found[q] = cut_off(slope, cuts[q], nodes, weights)[0]
    return found
