"""Quadrature along one step, w(s) = w[t] + s (w[t+1] - w[t]), 0 <= s <= 1: rules, and refinement where it is needed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nbdyn.errors import NbdynError, did_you_mean

_GAUSS = 0.5 * math.sqrt(0.6)
RULES: dict[str, tuple[tuple[float, ...], tuple[float, ...], int]] = {
    "first order": ((0.0,), (1.0,), 1),
    "trapezoid": ((0.0, 1.0), (1 / 2, 1 / 2), 2),
    "simpson": ((0.0, 0.5, 1.0), (1 / 6, 4 / 6, 1 / 6), 4),
    "boole": ((0.0, 0.25, 0.5, 0.75, 1.0), (7 / 90, 32 / 90, 12 / 90, 32 / 90, 7 / 90), 6),
    "gauss": ((0.5 - _GAUSS, 0.5, 0.5 + _GAUSS), (5 / 18, 8 / 18, 5 / 18), 6),
}
"""Name -> nodes in [0, 1], weights that sum to 1, order of convergence. "simpson" is the paper's RK4: for a quadrature
the classical Runge-Kutta formula is Simpson's. "gauss" is Gauss-Legendre with three nodes."""
ADAPTIVE = "adaptive"
_COARSER = {
    "trapezoid": {0.0: 1.0},
    "simpson": {0.0: 1 / 4, 0.5: 1 / 2, 1.0: 1 / 4},
    "boole": {0.0: 1 / 12, 0.25: 4 / 12, 0.5: 2 / 12, 0.75: 4 / 12, 1.0: 1 / 12},
    "gauss": {0.5: 1.0},
}
"""The next coarser rule on the nodes of a rule: its difference is the error estimate of each parameter."""


class Point(Protocol):
    """What is known at a node: the loss, and its derivative along the step."""

    @property
    def loss(self) -> float:
        """L(w(s))."""
        ...

    @property
    def slope(self) -> float:
        """The derivative: grad L(w(s)) . (w[t+1] - w[t])."""
        ...


@dataclass(frozen=True)
class Quadrature:
    """Weights of the nodes of a step.

    Attributes:
        weights: node -> weight; they sum to 1.
        coarser: node -> weight in the next coarser rule on the same nodes; empty for "first order", which has none.
        missed: the sum of |L(b) - L(a) - quadrature| over the parts [a, b] of the step; only known to `refined`.
    """

    weights: dict[float, float]
    coarser: dict[float, float]
    missed: float = 0.0


def fixed(name: str, splits: int = 1) -> Quadrature:
    """A rule on `splits` equal parts of the step.

    Raises:
        NbdynError: if there is no such rule, or `splits` is no number of parts.

    >>> fixed("simpson").weights
    {0.0: 0.16666666666666666, 0.5: 0.6666666666666666, 1.0: 0.16666666666666666}
    >>> sorted(fixed("trapezoid", 2).weights.items())
    [(0.0, 0.25), (0.5, 0.5), (1.0, 0.25)]
    """
    if name not in RULES:
        known = (ADAPTIVE, *RULES)
        raise NbdynError(f"integrator={name!r}: {did_you_mean(name, known)} It is one of {', '.join(known)}.")
    if not isinstance(splits, int) or splits < 1:
        raise NbdynError(f"splits={splits!r}: equal parts of each step; give a whole number from 1.")
    nodes, weights, _ = RULES[name]
    rule, coarser = dict(zip(nodes, weights, strict=True)), _COARSER.get(name, {})
    edges = [n / splits for n in range(splits + 1)]
    parts = list(itertools.pairwise(edges))
    return Quadrature(_joined((p, rule) for p in parts), _joined((p, coarser) for p in parts))


def _joined(parts: Iterable[tuple[tuple[float, float], Mapping[float, float]]]) -> dict[float, float]:
    """Rules on parts [a, b] as one rule on [0, 1]."""
    out: dict[float, float] = {}
    for (a, b), rule in parts:
        for s, weight in rule.items():
            node = b if s == 1.0 else a + s * (b - a)
            out[node] = out.get(node, 0.0) + weight * (b - a)
    return out


@dataclass(frozen=True)
class _Part:
    """[a, b] of a step: a trapezoid, or Simpson's rule with the middle."""

    a: float
    b: float
    middle: bool = False

    @property
    def rule(self) -> str:
        return "simpson" if self.middle else "trapezoid"

    def residual(self, points: Mapping[float, Point]) -> float:
        """L(b) - L(a) less what the rule gives."""
        nodes, weights, _ = RULES[self.rule]
        slopes = [points[self.a + s * (self.b - self.a)].slope for s in nodes]
        change = points[self.b].loss - points[self.a].loss
        return change - (self.b - self.a) * float(np.dot(weights, slopes))

    def finer(self) -> list[_Part]:
        """One rule higher, or two halves; neither needs the gradient at a node twice."""
        if not self.middle:
            return [_Part(self.a, self.b, True)]
        middle = (self.a + self.b) / 2
        return [_Part(self.a, middle, True), _Part(middle, self.b, True)]


def refined(
    at: Callable[[float], Point], enough: Callable[[float, float], bool], most: int, epsilon: float
) -> Quadrature:
    """The trapezoid rule, refined where it is least exact until it is exact enough.

    What a part of the step misses is known exactly, since the loss is known at every node: L(b) - L(a) less the
    quadrature of the slopes. The part that misses most gets its middle (Simpson's rule), then is halved, until it is
    enough.

    Args:
        at: the point at s; asked once for each node. 0 and 1 are asked first.
        enough: enough(missed, residual): `missed` is the sum of |what a part misses|, so that parts do not hide one
            another's error; `residual` that of the signed ones, the residual of the step.
        most: nodes at most; refinement stops there.
        epsilon: of the network's arithmetic: what is missed is not refined below epsilon times the loss.
    """
    points = {0.0: at(0.0), 1.0: at(1.0)}
    parts = {part: part.residual(points) for part in [_Part(0.0, 1.0)]}
    rounding = epsilon * max(abs(point.loss) for point in points.values())
    while not enough(missed := sum(map(abs, parts.values())), sum(parts.values())) and missed > rounding:
        worst = max(parts, key=lambda part: abs(parts[part]))
        finer = worst.finer()
        new = [(part.a + part.b) / 2 for part in finer]
        if len(points) + len(new) > most:
            break
        points |= {s: at(s) for s in new}
        del parts[worst]
        parts |= {part: part.residual(points) for part in finer}
    rules = [((part.a, part.b), part.rule) for part in parts]
    weights = _joined((where, dict(zip(*RULES[name][:2], strict=True))) for where, name in rules)
    return Quadrature(weights, _joined((where, _COARSER[name]) for where, name in rules), missed)
