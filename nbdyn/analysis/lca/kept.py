"""What an allocation holds, in memory or in its archive: rows, sums, cells, and how they belong to layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nbdyn.analysis.lca.totals import Rows, Sums, units_of
from nbdyn.errors import NotRecorded, UnknownName, did_you_mean
from nbdyn.store.allocations import Archive
from nbdyn.store.names import select

Array = np.ndarray


class Kept:
    """The numbers of an allocation.

    Attributes:
        rows: what was kept of each step.
        sums: what was summed over the steps.
        spec: what was computed.
        labels: names of steps, groups and parts.
        tensors: those of the model.
        steps: number of each step, (T,).
        layers: names, in order.
        layer_of: the layer of each tensor, as a place in `layers`.
    """

    def __init__(
        self,
        rows: Rows,
        sums: Sums,
        spec: dict[str, Any],
        labels: dict[str, Any],
        tensors: Sequence[Mapping[str, Any]],
        archive: Archive | None,
    ) -> None:
        self.rows, self.sums, self.spec, self.labels, self.tensors = rows, sums, spec, labels, tensors
        self._archive = archive
        first = labels["steps"]
        self.steps = np.asarray(first)[: len(rows)] if isinstance(first, list) else first + np.arange(len(rows))
        self.layers = list(dict.fromkeys(tensor["layer"] for tensor in tensors))
        self.layer_of = np.array([self.layers.index(tensor["layer"]) for tensor in tensors])

    def cells(self, selector: str, steps: slice, of_class: int | None) -> Array:
        """See `nbdyn.analysis.lca.result.Allocation.cells`."""
        group = 0 if of_class is None else 1 + self._class(of_class)
        indices = select(selector, list(self.tensors)).indices
        places = np.arange(len(self.rows))[steps]
        if not self.spec["cells"]:
            raise NotRecorded("only sums of this allocation were kept; cells=True keeps A of each step and parameter.")
        if not len(places):
            return np.empty((0, len(indices)), np.float32)
        if self._archive is None:
            kept = self.rows.cells[places]
            return (kept[:, group] if kept.ndim == 3 else kept)[:, indices]
        entry = self._archive.entry()
        assert entry is not None
        whole = np.array_equal(indices, np.arange(sum(t["size"] for t in self.tensors)))
        first, last = int(places.min()), int(places.max())
        return self._archive.cells(entry, first, last + 1, slice(None) if whole else indices, group)[places - first]

    def _class(self, label: int) -> int:
        """The number of a class whose cells are kept."""
        if self.spec["cells"] != "classes":
            raise NotRecorded('cells of classes were not kept; compute with classes=True, cells="classes".')
        if label not in self.labels["groups"]:
            raise UnknownName(f"no class {label!r}; there are {', '.join(map(str, self.labels['groups']))}.")
        return self.labels["groups"].index(label)

    def need(self, kind: str) -> None:
        """Raise NotRecorded unless samples were divided so: "class" or "block"."""
        if self.labels["kind"] != kind:
            ask = "classes=True" if kind == "class" else "subset=5000"
            raise NotRecorded(f"this allocation is not of {kind}s; compute with {ask}.")

    def by_layer(self, values: Array) -> Array:
        """Sums over the tensors of each layer, along the last axis."""
        member = (self.layer_of[:, None] == np.arange(len(self.layers))).astype(np.float64)
        return values @ member

    def counts(self) -> tuple[Array, Array, Array]:
        """Helping and hurting parameters, (T, 1 + layers) each, and sizes; the first column is all layers."""
        counts = [self.by_layer(self.rows.tensors[name]) for name in ("helping", "hurting")]
        size = self.by_layer(np.array([t["size"] for t in self.tensors]))
        helping, hurting = (np.column_stack([c.sum(1), c]).astype(np.int64) for c in counts)
        return helping, hurting, np.concatenate([[size.sum()], size]).astype(np.int64)

    def units_of(self, layer: str) -> Array:
        """The places of a layer's units among all units."""
        if layer not in self.layers:
            raise UnknownName(f"no layer {layer!r}: {did_you_mean(layer, self.layers)}")
        return np.flatnonzero(units_of(self.tensors).table["layer"] == layer)

    def tensor(self, name: str) -> Mapping[str, Any]:
        """The description of a tensor."""
        names = [tensor["name"] for tensor in self.tensors]
        if name not in names:
            raise UnknownName(f"no tensor {name!r}: {did_you_mean(name, names)}")
        return self.tensors[names.index(name)]
