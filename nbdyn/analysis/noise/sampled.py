"""What was sampled: values of chosen coordinates of a layer, and sums over all of a layer's coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nbdyn.errors import Incompatible

if TYPE_CHECKING:
    from nbdyn.analysis.noise.probe import Probe


@dataclass(frozen=True, eq=False)
class Sample:
    """The values sampled of one layer at one place.

    Attributes:
        step: the weights are weights[step]; of a window of steps the first.
        stop: end of the half-open window; step + 1 for one place.
        layer: the layer's name.
        values: (rows, coordinates), not centred; exact zeros are zeros.
        parameters: global indices of the coordinates, (coordinates,); of kind "coordinates" those of the rows.
        size: parameters that the layer has.
    """

    step: int
    stop: int
    layer: str
    values: np.ndarray
    parameters: np.ndarray
    size: int

    @property
    def live(self) -> np.ndarray:
        """Which coordinates are not zero in every row, (coordinates,) bool."""
        return np.asarray(self.values.any(axis=0))


@dataclass(frozen=True, eq=False)
class Sums:
    """Over all coordinates of each layer at one place, of n samples.

    Attributes:
        step: of the weights.
        layers: names, (L,).
        squares: |g_s|^2 of each sample in each layer, (n, L) float64.
        along: g_s . G of each sample, G being the mean gradient of the n samples, (n, L) float64.
        mean_square: |G|^2 of each layer, (L,) float64.
    """

    step: int
    layers: tuple[str, ...]
    squares: np.ndarray
    along: np.ndarray
    mean_square: np.ndarray

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Layers whose sums are known -> their column, and "all" -> the columns of all of these."""
        known = np.flatnonzero(~np.isnan(self.mean_square))
        return {self.layers[i]: np.array([i]) for i in known} | {"all": known}


@dataclass(frozen=True, eq=False)
class Source:
    """Where further gradients come from.

    Attributes:
        probe: the network and the samples.
        weights: step -> weights and buffers.
        of: samples that the data has; those of the probe may be a random part.
    """

    probe: Probe
    weights: dict[int, tuple[np.ndarray, dict[str, Any]]]
    of: int


def layers_of(tensors: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Layer -> global indices of the parameters of its tensors, those that are trained."""
    found: dict[str, list[np.ndarray]] = {}
    for tensor in (tensor for tensor in tensors if tensor.get("trainable", True)):
        indices = np.arange(tensor["first"], tensor["first"] + tensor["size"], dtype=np.int64)
        found.setdefault(tensor["layer"], []).append(indices)
    return {layer: np.concatenate(parts) for layer, parts in found.items()}


def choose(layers: Mapping[str, np.ndarray], count: int, seed: int) -> dict[str, np.ndarray]:
    """So many random coordinates of each layer, sorted; all of a layer that has fewer. Dead ones are not avoided.

    Raises:
        Incompatible: if the count is no whole number from 1.

    >>> {name: len(found) for name, found in choose({"a": np.arange(5), "b": np.arange(5, 905)}, 10, 0).items()}
    {'a': 5, 'b': 10}
    """
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
        raise Incompatible(f"coordinates={count!r}: how many of each layer; a whole number from 1.")
    rng = np.random.default_rng(seed)
    return {
        name: np.sort(rng.choice(indices, min(int(count), len(indices)), replace=False))
        for name, indices in layers.items()
    }
