"""The whole computation: along the path, into memory or the run's `lca` arrays; taken up where it ended."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from nbdyn.analysis.lca.engine import Allocator, StepAllocation
from nbdyn.analysis.lca.objective import Objective
from nbdyn.analysis.lca.paths import Extent, Path
from nbdyn.analysis.lca.precision import Precision
from nbdyn.analysis.lca.totals import Rows, Sums, Totals
from nbdyn.errors import NbdynError
from nbdyn.settings import say
from nbdyn.store.allocations import SUMS, Archive, Entry
from nbdyn.store.provenance import package_version

Array = np.ndarray
COMMIT_SECONDS, COMMIT_BYTES = 20.0, 64_000_000
"""What was computed is written so often, or once it takes so much memory: a kill loses no more."""

Split = Callable[[int, StepAllocation, Array, Array], Array]
"""split(place, step, w[t], w[t+1]) -> the parts of the motion, (parts, P)."""


@dataclass
class Task:
    """What to compute, and where it goes.

    Attributes:
        extent: where the path lies.
        objective: the loss.
        precision: how exact.
        tensors: as in a run's configuration.
        cells: whether A of every step and parameter is kept; "classes": that of each class, as well.
        decay: see `Totals`.
        parts: names of the parts of the motion; empty for none.
        split: gives them.
        archive: None to keep everything in memory.
    """

    extent: Extent
    objective: Objective
    precision: Precision
    tensors: Sequence[Mapping[str, Any]]
    cells: bool | str
    decay: Array | None = None
    parts: tuple[str, ...] = ()
    split: Split | None = None
    archive: Archive | None = None
    _waiting: list[Rows] = field(default_factory=list)

    def spec(self) -> dict[str, Any]:
        """What was asked for: a computation taken up must be of the same."""
        buffers = {"buffers": self.extent.buffers_from} if self.objective.has_live_buffers else {}
        return {
            "objective": self.objective.describe() | buffers,
            "precision": asdict(self.precision),
            "steps": self.extent.extent,
            "cells": self.cells,
            "parts": list(self.parts),
        }

    def labels(self) -> dict[str, Any]:
        """Names of what the arrays hold."""
        samples = self.objective.samples
        return {
            "steps": self.extent.labels,
            "kind": samples.kind,
            "groups": list(samples.names),
            "shares": self.objective.shares.tolist() if samples.groups else [],
            "of": samples.of,
            "size": len(samples),
            "parts": list(self.parts),
            "version": package_version(),
        }

    def run(self, path: Path, progress: bool = True, replace: bool = False) -> tuple[Rows, Sums]:
        """Compute what is missing; rows of all steps, and what is summed over them.

        Raises:
            NbdynError: if another computation has the archive's name, or the place cannot be written.
        """
        if self.archive is None:
            whole = self.begin(None)
            self._go_through(path, whole, progress)
            return Rows.joined(self._waiting), whole.totals.sums
        entry = None if replace else self._known(self.archive, path)
        if entry is not None and entry.done:
            self._check_is_same(self.archive, path)
            if self._is_done(entry, path):
                return read(self.archive)
        self.archive.lock()
        try:
            entry = None if replace else self._known(self.archive, path)
            if entry is not None:
                self.archive.clean()
            if not self._is_done(entry, path):
                self._go_through(path, self.begin(entry), progress)
        finally:
            self.archive.close()
        return read(self.archive)

    def _is_done(self, entry: Entry | None, path: Path) -> bool:
        return entry is not None and entry.status == "complete" and entry.done == len(path.steps) - 1

    def keep(self, rows: Rows) -> None:
        """Rows that are to be written, or to be given in the end."""
        self._waiting.append(rows)

    def take(self) -> Rows | None:
        """What waits to be written, and nothing waits any more."""
        waiting, self._waiting = self._waiting, []
        return Rows.joined(waiting) if waiting else None

    @property
    def nbytes_waiting(self) -> int:
        """Bytes of cells that wait."""
        return sum(rows.cells.nbytes for rows in self._waiting)

    def _known(self, archive: Archive, path: Path) -> Entry | None:
        """What is there of this very task, or of its first steps: the run may have gone on since."""
        entry, mine = archive.entry(), self.spec()
        if entry is None:
            return None
        theirs = entry.spec
        if theirs["steps"][:1] == mine["steps"][:1] and entry.done < len(path.steps):
            theirs = theirs | {"steps": mine["steps"]}
        if theirs != mine:
            other = [key for key in mine if mine[key] != theirs.get(key)]
            raise NbdynError(
                f"{archive.name!r} is there already, computed otherwise ({', '.join(other)} differ). Give another "
                "name=, or replace=True to compute it anew."
            )
        return entry

    def _check_is_same(self, archive: Archive, path: Path) -> None:
        """Raise NbdynError unless the loss before the first step is that stored: names do not tell all losses apart."""
        objective, stored = self.objective, float(read(archive)[0].steps["loss"][0])
        weights = next(path.rows(0))
        objective.load_buffers(path.buffers(0))
        loss = objective(weights, gradient=False).loss
        if math.isfinite(stored) and not math.isclose(loss, stored, rel_tol=1e-4, abs_tol=1e-9):
            raise NbdynError(
                f"{archive.name!r} is there already, of another loss: {stored:.6g} at its first step, not {loss:.6g}. "
                "Give another name=, or replace=True to compute it anew."
            )

    def begin(self, entry: Entry | None) -> Progress:
        """Stand before the first step that is missing.

        Args:
            entry: what is there of it, in the archive; None for nothing.
        """
        done, sums, allocator, last = 0, {}, Allocator(self.objective, self.precision), None
        if entry is not None and entry.done:
            assert self.archive is not None
            rows, sums = read(self.archive)
            done, first = len(rows), float(rows.steps["loss"][0])
            losses = np.concatenate([rows.steps["loss"], rows.steps["loss_after"]])
            last = float(rows.steps["loss_after"][-1])
            finite = np.abs(losses - first)[np.isfinite(losses - first)]
            residuals = rows.steps["residual"]
            allocator.go_on(first, float(finite.max(initial=0.0)), float(residuals[np.isfinite(residuals)].sum()))
        totals = Totals(self.tensors, self.cells, self.decay, self.objective.samples.groups, sums)
        writer = None if self.archive is None else Writer(self, self.archive, totals, begun=done > 0)
        return Progress(self, done, allocator, totals, writer, last)

    def _go_through(self, path: Path, progress: Progress, bar: bool) -> None:
        """Allocate the steps that are missing; what was computed is written whatever happens."""
        count, done = len(path.steps) - 1, progress.done
        rows = path.rows(done)
        before = next(rows)
        try:
            with tqdm(total=count, initial=done, desc="allocating", unit="step", leave=False, disable=not bar) as shown:
                for place, after in enumerate(rows, done):
                    progress.advance(before, after, functools.partial(path.buffers, place))
                    before = after
                    shown.update()
        except BaseException:
            progress.write(complete=False)
            if progress.writer is not None and progress.writer.begun:
                kept = getattr(progress.writer.archive.entry(), "done", 0)
                say(f"stopped after {kept:,} of {count:,} steps; the same call goes on from there.")
            raise
        progress.write(complete=True)


@dataclass
class Progress:
    """A task on its way.

    Attributes:
        task: what is computed.
        done: steps that are there.
        allocator, totals, writer: what allocates, adds up and writes (None: everything stays in memory).
        last: L after the step before, where an earlier computation ended there.
    """

    task: Task
    done: int
    allocator: Allocator
    totals: Totals
    writer: Writer | None
    last: float | None = None
    _whole: bool = True

    def advance(self, before: Array, after: Array, buffers: Callable[[], dict[str, Any]]) -> None:
        """Allocate the next step.

        Args:
            before: w[t].
            after: w[t+1].
            buffers: gives those that may have changed before this step; asked only where L depends on them.
        """
        objective = self.task.objective
        if objective.has_live_buffers and objective.load_buffers(buffers()):
            self.allocator.buffers_changed()
        found = self.allocator.step(before, after)
        if objective.has_live_buffers and self.last is not None:
            found = dataclasses.replace(found, drift=found.loss - self.last)
        self.last = None
        parts = None if self.task.split is None else self.task.split(self.done, found, before, after)
        self._whole = False
        self.task.keep(self.totals.add(found, after, parts))
        self._whole = True
        self.done += 1
        if self.writer is not None:
            self.writer.now_and_then()

    def write(self, complete: bool) -> None:
        """Write what waits; not if an interrupt fell into the adding up, for the sums would count a step too many."""
        if self.writer is not None and self._whole:
            self.writer.write(complete)


@dataclass
class Writer:
    """Writes what waits of a task, every COMMIT_SECONDS and at the end."""

    task: Task
    archive: Archive
    totals: Totals
    begun: bool
    _written: float = field(default_factory=time.monotonic)

    def now_and_then(self) -> None:
        """Write, if it is time."""
        if time.monotonic() - self._written > COMMIT_SECONDS or self.task.nbytes_waiting > COMMIT_BYTES:
            self.write(complete=False)

    def write(self, complete: bool) -> None:
        """Write what waits."""
        rows = self.task.take()
        if rows is None and not (complete and self.begun):
            return
        if not self.begun:
            assert rows is not None
            self.archive.create(self.task.spec(), self.task.labels(), rows.columns(), self.totals.sums)
            self.begun = True
        self.archive.append({} if rows is None else rows.columns(), self.totals.sums, complete)
        self._written = time.monotonic()


def read(archive: Archive) -> tuple[Rows, Sums]:
    """An archive's rows, without cells, and what is summed over the steps.

    Raises:
        CorruptRun: if it is damaged.
        NbdynError: if there is none.
    """
    entry = archive.entry()
    if entry is None or not entry.done:
        raise NbdynError(f"there is no allocation {archive.name!r}.")
    found = archive.read(entry)
    return Rows.from_columns(found), {name: found[name] for name in SUMS if name in found}
