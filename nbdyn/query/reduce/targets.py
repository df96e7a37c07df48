"""Targets: the groups of parameters that a question speaks of: weights, units, tensors, layers."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from nbdyn.query.evaluate import Array
from nbdyn.store.names import ascending, locate

KINDS = ("weight", "unit", "tensor", "layer")


@dataclass(frozen=True)
class Targets:
    """Parameters and the target of each.

    Attributes:
        kind: a word of KINDS, or "" for one target of all parameters.
        indices: (k,) global parameter indices, ascending.
        code: (k,) int64 number of the parameter's target.
        count: how many targets there are.
        tensors: the run's table of tensors.
    """

    kind: str
    indices: Array
    code: Array
    count: int
    tensors: Sequence[dict[str, Any]]

    @property
    def sizes(self) -> Array:
        """Parameters of each target, (count,)."""
        return np.bincount(self.code, minlength=self.count)

    def only(self, first: int, stop: int) -> Targets:
        """The targets first..stop-1, numbered from 0."""
        keep = (self.code >= first) & (self.code < stop)
        return Targets(self.kind, self.indices[keep], self.code[keep] - first, stop - first, self.tensors)

    def within(self, kind: str) -> Targets:
        """Coarser targets of the same parameters; `code[first]` of a target's first parameter says in which it lies."""
        return targets_of(self.indices, kind, self.tensors)

    @property
    def firsts(self) -> Array:
        """Place of the first parameter of each target, (count,)."""
        first = np.zeros(self.count, np.int64)
        first[self.code[::-1]] = np.arange(len(self.code))[::-1]
        return first

    def labels(self, places: Array) -> pd.DataFrame:
        """A row for each of some targets, which may repeat.

        weight: parameter, weight (a categorical of labels such as fc1.weight[3,5]); unit: layer, unit; tensor: tensor;
        layer: layer; without a kind no column.
        """
        if self.kind == "":
            return pd.DataFrame(index=range(len(places)))
        if self.kind == "weight":
            met = np.bincount(places, minlength=self.count) > 0
            names = pd.Index(locate(self.indices[met], self.tensors)[1], dtype=object)
            code = (np.cumsum(met) - 1)[places]
            labels = pd.Categorical.from_codes(code, dtype=pd.CategoricalDtype(names))
            return pd.DataFrame({"parameter": self.indices[places], "weight": labels})
        first = self.indices[self.firsts[places]]
        owner = _owner(first, self.tensors)
        if self.kind == "tensor":
            return pd.DataFrame({"tensor": _names(self.tensors, "name")[owner]})
        table = pd.DataFrame({"layer": _names(self.tensors, "layer")[owner]})
        return table.assign(unit=_unit(first, owner, self.tensors)) if self.kind == "unit" else table


def targets_of(indices: Array, kind: str, tensors: Sequence[dict[str, Any]]) -> Targets:
    """The targets of some parameters.

    Args:
        indices: global parameter indices.
        kind: a word of KINDS, or "". A unit is a number along the first axis of a layer's tensors: an output neuron or
            channel with its bias, a row of an embedding.
        tensors: the run's table of tensors.
    """
    indices = ascending(indices)
    owner = _owner(indices, tensors)
    if kind == "weight":
        return Targets(kind, indices, np.arange(len(indices)), len(indices), tensors)
    if kind == "":
        return Targets(kind, indices, np.zeros(len(indices), np.int64), min(1, len(indices)), tensors)
    names = _names(tensors, "name" if kind == "tensor" else "layer")
    number = pd.factorize(names)[0][owner].astype(np.int64)
    if kind == "unit":
        number = number * (int(indices.max(initial=0)) + 1) + _unit(indices, owner, tensors)
    found, code = np.unique(number, return_inverse=True)
    return Targets(kind, indices, code.reshape(-1), len(found), tensors)


def _owner(indices: Array, tensors: Sequence[dict[str, Any]]) -> Array:
    firsts = np.array([t["first"] for t in tensors], dtype=np.int64)
    return np.searchsorted(firsts, indices, side="right") - 1


def _names(tensors: Sequence[dict[str, Any]], key: str) -> Array:
    return np.array([str(t[key]) for t in tensors], dtype=object)


def _unit(indices: Array, owner: Array, tensors: Sequence[dict[str, Any]]) -> Array:
    """The number of each parameter along the first axis of its tensor."""
    firsts = np.array([t["first"] for t in tensors], dtype=np.int64)
    each = np.array([max(1, int(t["size"]) // max(1, (t["shape"] or [1])[0])) for t in tensors], dtype=np.int64)
    return (indices - firsts[owner]) // each[owner]
