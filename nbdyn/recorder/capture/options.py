"""What per-sample capture is asked to record, checked before anything is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from nbdyn.cells import WriteOut, write_out
from nbdyn.errors import Incompatible, NbdynError
from nbdyn.store.names import select


@dataclass(frozen=True)
class CaptureOptions:
    """The per-sample arguments of `nbdyn.record`.

    Attributes:
        layers: selectors of the tensors or layers to capture; None for all.
        every: capture each so-many-th step.
        fraction: share of the samples to capture, chosen by their ids: the same samples at every step.
        project: dimension of random projections of factors; None keeps them exact.
        cells: which cells are written out besides.
    """

    layers: tuple[str, ...] | None = None
    every: int = 1
    fraction: float = 1.0
    project: int | None = None
    cells: WriteOut = field(default_factory=WriteOut)

    def to_json(self) -> dict[str, Any]:
        """What a run's metadata says of it."""
        layers = None if self.layers is None else list(self.layers)
        sizes = {"layers": layers, "every": self.every, "fraction": self.fraction, "project": self.project}
        return sizes | {"cells": self.cells.to_json()}


def capture_options(layers: Any, every: Any, fraction: Any, project: Any, cells: Any) -> CaptureOptions:
    """The options, checked.

    Raises:
        NbdynError: if one of them is not what it should be.
    """
    if isinstance(layers, str):
        layers = (layers,)
    if layers is not None and not (isinstance(layers, Sequence) and layers and all(isinstance(n, str) for n in layers)):
        raise NbdynError(f'layers={layers!r}: give names or patterns, such as "fc1" or ["conv*", "fc.weight"].')
    if not _whole(every):
        raise NbdynError(f"every={every!r}: steps between captures; give a whole number from 1.")
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise NbdynError(f"fraction={fraction!r}: the share of the samples to capture; a number above 0, at most 1.")
    if project is not None and not _whole(project):
        raise NbdynError(f"project={project!r}: the dimension of random projections; a whole number from 1, or None.")
    return CaptureOptions(None if layers is None else tuple(layers), every, float(fraction), project, write_out(cells))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_capturable(model: nn.Module, options: CaptureOptions, tensors: list[dict[str, Any]]) -> None:
    """Raise what is wrong with a capture before a run is created for it.

    Raises:
        UnknownName: if a selector in `layers` matches no tensor.
        Incompatible: if a selector names a part of a tensor, or the model is compiled.
    """
    captured_tensors(options.layers, tensors)
    for text in options.cells.of:
        select(text, tensors)
    compiled = hasattr(model, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
    )
    if compiled:
        raise Incompatible(
            "per-sample gradients are captured by hooks, which a compiled model does not call; record the model before "
            "torch.compile and train that one, or pass per_sample=False to record everything else."
        )


def captured_tensors(layers: tuple[str, ...] | None, tensors: list[dict[str, Any]]) -> set[str]:
    """Names of the parameter tensors that `layers` selects.

    Raises:
        UnknownName: if a selector matches none; the message has the nearest name.
        Incompatible: if it has an index: whole tensors are captured.
    """
    if layers is None:
        return {t["name"] for t in tensors}
    names: set[str] = set()
    for text in layers:
        found = select(text, tensors)
        whole = sum(int(t["size"]) for t in tensors if t["name"] in found.names)
        if len(found.indices) != whole:
            raise Incompatible(f'layers="{text}" names a part of a tensor; per-sample capture takes whole ones.')
        names |= set(found.names)
    return names


def chosen_samples(ids: np.ndarray, fraction: float) -> np.ndarray:
    """Which samples are captured, (n,) bool: those whose id hashes below `fraction` (the same ones in every run).

    >>> ids = np.arange(100_000)
    >>> bool(abs(chosen_samples(ids, 0.25).mean() - 0.25) < 0.01)
    True
    """
    # The finalizer of splitmix64 (Steele, Lea and Flood 2014): every bit of the id moves every bit of the result.
    x = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53 < fraction
