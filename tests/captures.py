"""Runs with per-sample captures made by hand: what is written is known, so that what is read can be compared."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from nbdyn.schema import PART_SNAPSHOT
from nbdyn.store import Store, layout
from nbdyn.store.backend import context
from nbdyn.store.journal import Entry, JournalWriter
from nbdyn.store.sites import Site
from nbdyn.store.writer import Segment, SegmentWriter


def config(parameters: int) -> dict[str, Any]:
    """The metadata of a run whose model is one tensor."""
    tensor = {
        "name": "w", "layer": "l", "dtype": "float32", "shape": [parameters], "first": 0, "size": parameters,
        "trainable": True, "group": 0,
    }  # fmt: skip
    return {
        "model": "m", "created": "", "row_dtype": "f4", "weights": "snapshots", "every": 10**6, "row_extent": 1,
        "parameters": parameters, "optimizer": {"name": "SGD", "groups": [], "order": []}, "tensors": [tensor],
        "layers": [], "buffers": [], "sources": [], "seams": [],
    }  # fmt: skip


class Recording:
    """A run that is written segment by segment.

    Attributes:
        entries: every call so far, sorted as a reader finds them.
        samples: step -> ids of its batch.
    """

    def __init__(self, path: Path | str, sites: list[Site], parameters: int = 2000) -> None:
        self.path, self.sites = Path(path), sites
        self.uri = str(path)
        self._parameters = parameters
        layout.create(self.uri, config(parameters), context(self.uri))
        self._writer = SegmentWriter(self.uri, context(self.uri, writing=True), 0, [])
        self.entries: list[Entry] = []
        self.samples: list[np.ndarray] = []
        self.batch_only: dict[str, str] = {}

    def commit(self, steps: list[tuple[Iterable[int], list[Entry]]], journal: bool = True) -> None:
        """Write a segment: of each step the sample ids of its batch and its calls (whose `step` is set here)."""
        start, number = len(self.samples), self._writer.segment + 1
        found = []
        for samples, entries in steps:
            for entry in entries:
                entry.step = len(self.samples)
            self.samples.append(np.array(samples, np.int64))
            found += entries
        if journal:
            self.journal(number, found)
        self._writer.commit(self._segment(start))
        self.entries += sorted(copy.copy(found), key=lambda e: (e.step, e.batch, e.site, e.call))

    def journal(self, number: int, entries: list[Entry]) -> None:
        """Write the journal of a segment."""
        journal = JournalWriter(self.uri, context(self.uri, writing=True), number)
        journal.append(entries)
        journal.finish([site.to_json() for site in self.sites], self.batch_only)

    def _segment(self, start: int) -> Segment:
        sizes = np.array([len(samples) for samples in self.samples[start:]])
        steps = {name: np.zeros(len(sizes), dtype) for name, dtype in layout.STEP_ATTRIBUTES if name != "segment"}
        steps["batch_size"][:] = sizes
        total = int(sizes.sum())
        visits = {
            "step": np.repeat(np.arange(start, start + len(sizes), dtype=np.uint32), sizes),
            "position": np.concatenate([np.arange(size, dtype=np.uint32) for size in sizes]),
            "sample": np.concatenate(self.samples[start:]),
            "target": np.full(total, -1, np.int32),
            "loss": np.zeros(total, np.float32),
            "correct": np.zeros(total, np.int8),
        }
        segment = Segment(start, steps, {"lr/0": np.ones(len(sizes))}, visits)
        if not start:  # what else a whole run has
            segment.weights = [(0, np.zeros((1, self._parameters), np.float32))]
            segment.state = [(0, PART_SNAPSHOT, b"snapshot")]
        return segment

    def store(self) -> Store:
        """The run, opened for reading."""
        return Store(self.uri)


def entry(
    site: int, tensors: dict[str, np.ndarray], *, batch: int = 0, position: int = 0, call: int = 0, factor: float = 1.0,
    data: bool = False,
) -> Entry:  # fmt: skip
    """A call of step 0; bfloat16 is given as its bits, uint16."""
    return Entry(0, batch, position, len(next(iter(tensors.values()))), site, call, factor, data, tensors)


def linear(inputs: int, outputs: int, first: int = 0, name: str = "fc") -> Site:
    """A Linear layer with bias."""
    return Site(name, name, "linear", first=first, shape=(outputs, inputs), bias=first + outputs * inputs)
