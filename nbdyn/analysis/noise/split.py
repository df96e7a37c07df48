"""Per-sample sums over whole layers from a batch's factors: norms and inner products, without the gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbdyn.store import closed
from nbdyn.store.closed_linear import is_transposed
from nbdyn.store.closed_tools import exact, tensors_of
from nbdyn.store.factors import Block
from nbdyn.store.sites import Site

TILE_BYTES = 64_000_000
"""Gradients that have to be formed are formed for so many samples at a time as take about this."""

Part = tuple[Site, Block]
"""A use of parameters, and the factors of a batch's samples there."""


@dataclass(frozen=True, eq=False)
class Split:
    """Uses of parameters that belong together: the contributions of all of them make the gradients of some tensors.

    Attributes:
        parts: the uses, all with the same samples in the same order.
        layers: numbers of the layers that the tensors belong to, sorted.
    """

    parts: list[Part]
    layers: tuple[int, ...]

    @property
    def is_single(self) -> bool:
        """Whether sums over the layer need no gradients: one use, of tensors of one layer."""
        return len(self.parts) == 1 and len(self.layers) == 1

    def gradients(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Samples, global indices and their gradients (samples, indices) float64, a tile of samples at a time."""
        indices = np.unique(np.concatenate([site.indices() for site, _ in self.parts]))
        count = len(self.parts[0][1])
        rows = max(1, TILE_BYTES // (8 * len(indices)))
        for first in range(0, count, rows):
            some = slice(first, min(count, first + rows))
            found = np.zeros((some.stop - first, len(indices)))
            for site, block in self.parts:
                found[:, np.searchsorted(indices, site.indices())] += closed.dense(site, block.take(some))
            yield some, indices, found


def splits(parts: Sequence[Part], owners: np.ndarray, layer_of: np.ndarray) -> list[Split]:
    """Uses in groups that share no tensor.

    Args:
        parts: all uses of a batch.
        owners: index of the first parameter of each tensor, (tensors,), ascending.
        layer_of: number of the layer of each tensor, (tensors,).
    """
    groups: list[tuple[set[int], list[Part]]] = []
    for part in parts:
        firsts = np.array([first for first, _ in part[0].runs])
        tensors = set((np.searchsorted(owners, firsts, side="right") - 1).tolist())
        joined, together = tensors, [part]
        apart = []
        for group, members in groups:
            if group & joined:
                joined, together = joined | group, members + together
            else:
                apart.append((group, members))
        groups = [*apart, (joined, together)]
    return [Split(members, tuple(sorted({int(layer_of[t]) for t in group}))) for group, members in groups]


def add_squares(split: Split, layer_at: np.ndarray, out: np.ndarray) -> None:
    """Add the squared norms of the samples' gradients to `out` (samples, layers).

    Args:
        split: uses that belong together.
        layer_at: number of the layer of each parameter, (P,).
        out: float64.
    """
    if split.is_single:
        out[:, split.layers[0]] += closed.norms(*split.parts[0])
        return
    for some, indices, found in split.gradients():
        for layer in split.layers:
            out[some, layer] += np.square(found[:, layer_at[indices] == layer]).sum(axis=1)


def add_along(split: Split, layer_at: np.ndarray, direction: np.ndarray, out: np.ndarray) -> None:
    """Add the inner products of the samples' gradients with a direction (P,) to `out` (samples, layers)."""
    if split.is_single and split.parts[0][0].form == "linear":
        out[:, split.layers[0]] += _along_linear(*split.parts[0], direction)
        return
    for some, indices, found in split.gradients():
        weighted = found * direction[indices]
        for layer in split.layers:
            out[some, layer] += weighted[:, layer_at[indices] == layer].sum(axis=1)


def _along_linear(site: Site, block: Block, direction: np.ndarray) -> np.ndarray:
    """sum_t d_t . (V a_t + v) for weight and bias directions V and v, (visits,) float64: as much as a forward pass."""
    import torch

    with exact():
        t: Mapping[str, Any] = tensors_of(block, np.float64)
        a, d = t["a"], t["d"]
        output = torch.zeros_like(d)
        if site.first is not None:
            size = site.shape[0] * site.shape[1]
            weight = torch.from_numpy(direction[site.first : site.first + size].reshape(site.shape))
            output += a @ (weight if is_transposed(site) else weight.t())
        if site.bias is not None:
            output += torch.from_numpy(direction[site.bias : site.bias + site.bias_size])
        return (output * d).sum((1, 2)).numpy()
