"""The writer's side of a recording: the journal, when to commit, what to tell live views, what it all cost."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from nbdyn.errors import NbdynError, RecordingStopped
from nbdyn.recorder.arena import CHUNK_BYTES, joined
from nbdyn.recorder.assemble import Assembler, StepRecord
from nbdyn.recorder.capture.steps import StepCapture
from nbdyn.recorder.committer import Batch, Committer, use_one_core
from nbdyn.recorder.losses import EVALUATED, Evaluator
from nbdyn.recorder.pipeline import Pipeline
from nbdyn.recorder.pool import TensorPool
from nbdyn.recorder.rows import RowBlocks
from nbdyn.recorder.target import Target, finish_metadata
from nbdyn.settings import format_size, say
from nbdyn.store import frames, verify
from nbdyn.store.backend import context, tiledb
from nbdyn.store.index.build import build
from nbdyn.store.index.plan import seconds as index_seconds
from nbdyn.store.journal import JournalWriter
from nbdyn.store.writer import now_ns
from nbdyn.store.written import EdgesOf

SEGMENT_SECONDS = 1.0
SEGMENT_SHARE = 1 / 200
SEGMENT_SECONDS_MOST = 30.0
"""Steps wait about a second before they are committed, in long runs a 200th of the time so far, at most 30 s: the
number of fragments stays in the low thousands, which is what TileDB opens quickly."""
SEGMENT_BYTES = 24_000_000
SEGMENT_JOURNAL_BYTES = 128_000_000
"""A segment is committed once it holds so much, in memory or in its journal, which compaction takes up as one."""
INDEX_BYTES = 32_000_000
INDEX_SECONDS = 60.0
"""Indexes are built at close if more than so many bytes were captured of single samples (less is read as fast as an
index), and it takes no longer than about so many seconds."""
ALIGNED_SECONDS = 10.0
"""Rows of every step are committed in whole tiles, unless they have waited so long."""

LIVE_COLUMNS = ("step", "loss", "lr", "grad_norm", "update_ratio")


class Listener(Protocol):
    """A live view: `feed` gets columns of new steps (on the writer's thread), `finish` the run's status."""

    def feed(self, columns: dict[str, np.ndarray]) -> None:
        """Take some steps."""

    def finish(self, status: str) -> None:
        """No more steps will come."""


class Sink:
    """Takes step records, writes what was captured into the journal, hands segments on, feeds live views.

    Two threads: this one has little to do, at training's own priority, so that memory is free again soon; the
    committer's waits until the cores are free.
    """

    def __init__(
        self,
        target: Target,
        rows: RowBlocks,
        gradients: RowBlocks,
        pool: TensorPool,
        evaluator: Evaluator,
        capture: StepCapture | None,
        edges_of: EdgesOf,
        memory: int,
        budget: int,
    ) -> None:
        self._target, self._capture, self._pool = target, capture, pool
        self._journal: JournalWriter | None = None
        self._segment = target.segment  # number of the last segment that was handed on
        self._unwoken = 0  # bytes captured since the writer was woken; the training thread counts them
        self._journaled = 0  # so many of the waiting records have their tensors in the journal
        self._assembler = Assembler(gradients, evaluator)
        self._open: list[StepRecord] = []
        self._began = self._since = time.perf_counter()
        self._listeners: list[Listener] = []
        self._status: str | None = None
        self._working = threading.Lock()
        self._noting = threading.Lock()
        self._notes: list[tuple[int, int, str, str]] = []
        self._next = target.start
        self._gap = False
        self._committer = Committer(target, rows, pool, self._assembler, edges_of, memory // 2, budget)
        self._pipeline = Pipeline("nbdyn-writer", self._work, memory // 2, use_one_core)

    @property
    def flushed(self) -> int:
        """How many steps are on disk, counted from the run's first."""
        return self._committer.flushed

    # Called on the training thread ----------------------------------------------------------------------------

    def put(self, record: StepRecord, urgent: bool) -> None:
        """Hand a record over; waits while too many bytes wait. Raises what stopped the writer."""
        self._unwoken += record.captured_bytes
        if self._unwoken >= CHUNK_BYTES:  # soon: then few chunks are in use, and stay in the cache
            self._unwoken, urgent = 0, True
        self._pipeline.put(record, record.nbytes, urgent)

    def check(self, stop: Callable[[BaseException], None]) -> None:
        """Raise what stopped the writer, after `stop`."""
        try:
            self._pipeline.check()
            self._committer.check()
        except RecordingStopped as error:
            stop(error)
            raise

    def note(self, step: int, text: str) -> None:
        """A line for the logbook, written with the next segment."""
        with self._noting:
            self._notes.append((step, now_ns(), "note", str(text)))

    def listen(self, listener: Listener) -> None:
        """Feed a live view: first all steps so far, then each new one; its end too, if that is past."""
        with self._working, self._committer.moving:
            if self.flushed:
                table = frames.steps(self._target.store(), 0, self.flushed)
                listener.feed({name: table[name].to_numpy() for name in LIVE_COLUMNS})
            self._listeners.append(listener)
            self._feed(self._committer.waiting + self._open, [listener])
        if self._status is not None:
            listener.finish(self._status)

    def finish(self, status: str) -> None:
        """Write everything, mark the run, release the lock."""
        self._pipeline.close()
        self._pipeline.check()
        self._committer.close()
        self._committer.check()
        end = self.flushed if self.flushed else None
        try:
            finish_metadata(self._target, context(self._target.uri, writing=True), status, end)
        except tiledb().TileDBError as error:
            raise RecordingStopped(f"the run is written but could not be marked {status}: {error}") from error
        self._after_the_end("compact", "compaction", self._committer.compact_rest)
        if status == "complete" and self._committer.bytes_captured > INDEX_BYTES:
            self._index()
        self._end(status)

    def _index(self) -> None:
        """Build the indexes, unless that would keep the user waiting: it can be done at any time."""
        store = self._target.store()
        seconds = index_seconds(store)
        if seconds <= INDEX_SECONDS:
            self._after_the_end("index", "the index", lambda: build(store, locked=True))
        else:
            way = f"python -m nbdyn index {self._target.shown}"
            say(f"questions over whole epochs are faster with an index: `{way}`, about {seconds / 60:.0f} minutes.")

    def _after_the_end(self, command: str, what: str, work: Callable[[], object]) -> None:
        """The run is whole already: what goes wrong here is said, and can be done again."""
        try:
            work()
        except (KeyboardInterrupt, Exception) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            why = "interrupted" if isinstance(error, KeyboardInterrupt) else reason
            way = f"python -m nbdyn {command} {self._target.shown}"
            say(f"{what} did not finish ({why}); nothing is lost, `{way}` takes it up.")

    def abandon(self) -> None:
        """The writer failed: remove the unfinished segment, mark the run if that is possible, release the lock."""
        self._pipeline.close()
        self._committer.close()
        if self._journal is not None:
            self._journal.abandon()
        with contextlib.suppress(NbdynError, tiledb().TileDBError):  # gc can do it later
            verify.collect(self._target.store())  # on a full disk, this makes the room for the mark
        with contextlib.suppress(NbdynError, tiledb().TileDBError):  # the run then shows as "killed"
            finish_metadata(self._target, context(self._target.uri, writing=True), "stopped", None)
        self._end("stopped")

    def _end(self, status: str) -> None:
        self._target.lock.release()
        self._status = status
        for listener in self._listeners:
            listener.finish(status)

    def summary(self, status: str) -> str:
        """One line on what was recorded and what it cost."""
        written = self._committer.bytes_written
        steps = self.flushed - self._target.start
        each = f", {format_size(written / steps)} a step" if steps else ""
        waited = self._pipeline.seconds_waited
        late = f"; training waited {waited:.1f} s for the writer" if waited >= 0.1 else ""
        return (
            f"{status}: {self._target.shown} holds {self.flushed:,} steps; this recording wrote "
            f"{self._committer.visits:,} visits in {format_size(written)}{each}{late}."
        )

    # On the writer's thread -----------------------------------------------------------------------------------

    def _work(self, records: list[StepRecord], final: bool, hurry: bool) -> int:
        """Take new records; commit if it is time. Returns the bytes released."""
        with self._working:
            if not self._open:
                self._since = time.perf_counter()
            records, released = self._in_order(records)
            self._open += records
            self._feed(records, self._listeners)
            released += self._write_journal(self._aligned())
            while count := self._due(final or self._gap, hurry):
                released += self._write_journal(count)
                batch, self._open = self._open[:count], self._open[count:]
                released += self._hand_on(batch)
        if self._gap:
            self._committer.close()
            raise RecordingStopped(f"step {self._next} did not reach the writer; every step before it is on disk.")
        return released

    def _in_order(self, records: list[StepRecord]) -> tuple[list[StepRecord], int]:
        """The records, each step once, and the bytes of those left out: an interrupt may hand a step over twice."""
        kept = []
        for record in records:
            if record.step > self._next:
                self._gap = True  # what an interrupt tore out; rows after it would stand at the wrong steps
            if record.step == self._next and not self._gap:
                self._next += record.step_row
                kept.append(record)
        return kept, sum(record.nbytes for record in records) - sum(record.nbytes for record in kept)

    def _feed(self, records: list[StepRecord], listeners: list[Listener]) -> None:
        """Show new steps to live views. One that fails is left out from then on: recording goes on."""
        columns = _live_columns(records) if listeners else None
        if columns is None:
            return
        for listener in list(listeners):
            try:
                listener.feed(columns)
            except Exception as error:
                self._listeners.remove(listener)
                say(f"a live view failed and is no longer fed: {type(error).__name__}: {error}")

    def _due(self, final: bool, hurry: bool) -> int:
        """How many of the waiting records to commit now; 0 for none yet. `hurry`: training waits for memory."""
        count = len(self._open)
        if not count or final or hurry:
            return count
        age = time.perf_counter() - self._since
        patience = (time.perf_counter() - self._began) * SEGMENT_SHARE
        patience = min(max(SEGMENT_SECONDS, patience), SEGMENT_SECONDS_MOST)
        large = sum(record.nbytes - record.journaled for record in self._open) >= SEGMENT_BYTES
        large |= self._journal is not None and self._journal.nbytes >= SEGMENT_JOURNAL_BYTES
        if not (large or age >= patience):
            return 0
        return self._aligned() or (count if age >= max(patience, ALIGNED_SECONDS) else 0)

    def _aligned(self) -> int:
        """How many of the waiting records end with a whole tile of weights."""
        extent = self._target.config["row_extent"]
        return (
            max(0, len(self._open) - (self._open[-1].step + 1) % extent)
            if self._open and extent > 1
            else len(self._open)
        )

    def _write_journal(self, count: int) -> int:
        """Put what was captured of the first `count` waiting records into the journal; returns the bytes released.

        At once, not when their segment is complete: it is most of what a step leaves, and its memory is used again.
        """
        records = [record for record in self._open[self._journaled : count] if record.captured or record.spans]
        self._journaled = max(self._journaled, count)
        if self._capture is None or not records:
            return 0
        for record in records:
            if record.arrived is not None:
                record.arrived.synchronize()
            for entry in record.captured:
                entry.factor = 1.0 / float(entry.factor)  # until now a loss scale, which may have been on a GPU
        if self._journal is None:
            ctx = context(self._target.uri, writing=True)
            self._journal = JournalWriter(self._target.uri, ctx, self._segment + 1)
        spans = [span for record in records for span in record.spans]
        self._journal.append([entry for record in records for entry in record.captured], joined(spans))
        return sum(self._forget(record) for record in records)

    def _forget(self, record: StepRecord) -> int:
        """What was captured of a record is in the journal; returns the bytes released."""
        assert self._capture is not None
        self._capture.arena.release(record.spans)
        record.journaled = record.captured_bytes
        record.captured, record.spans = [], []
        return record.journaled

    def _finish_journal(self) -> int:
        """Complete the journal of the segment that is about to be handed on; returns its bytes."""
        if self._journal is None or self._capture is None:
            return 0
        self._journal.finish([site.to_json() for site in self._capture.sites], dict(self._capture.batch_only))
        nbytes, self._journal = self._journal.nbytes, None
        return nbytes

    def _hand_on(self, records: list[StepRecord]) -> int:
        """Give the committer a segment; returns the bytes that are its concern now."""
        self._journaled -= len(records)
        journal_bytes = self._finish_journal()
        segment = self._assembler.segment(records)
        self._strip(records)
        with self._noting:
            segment.notes, self._notes = self._notes, []
        nbytes = sum(record.nbytes - record.journaled for record in records)
        self._committer.put(Batch(segment, records, journal_bytes, nbytes))
        self._segment += segment.count > 0
        self._since = time.perf_counter()
        return nbytes

    def _strip(self, records: list[StepRecord]) -> None:
        """Let go of what is in the segment now, but for what a live view that comes late is shown."""
        for record in records:
            self._pool.give_back(record.rng)
            record.rng = record.snapshot = None
            for batch in record.batches:
                for t in (batch.ids, *(batch.evaluated or ())):
                    self._pool.give_back(t)
                batch.ids = batch.evaluated = None
                for name in EVALUATED:
                    setattr(batch, name, None)


def _live_columns(records: list[StepRecord]) -> dict[str, np.ndarray] | None:
    """The columns that live views show, of the steps among some records; None if there are none."""
    rows = [record for record in records if record.step_row]
    if not rows:
        return None
    for record in rows:
        if record.numbers is not None:
            record.numbers.wait()
    columns = {
        "step": np.array([record.step for record in rows]),
        "loss": np.array([_mean_loss(record) for record in rows]),
        "lr": np.array([float(record.lrs[0]) if record.lrs else np.nan for record in rows]),
        "grad_norm": np.array([_total(record.norms) for record in rows]),
        "update_ratio": np.array([_total(r.update_norms) / _total(r.weight_norms) for r in rows]),
    }
    if np.isnan(columns["loss"]).all() and not any(r.batches and r.batches[0].loss is not None for r in rows):
        del columns["loss"]  # not recorded, which is not the same as NaN
    return columns


def _mean_loss(record: StepRecord) -> float:
    known = [(float(batch.loss), batch.size) for batch in record.batches if batch.loss is not None]
    if known:
        return float(np.average([loss for loss, _ in known], weights=[size for _, size in known]))
    return float(record.logs.get("loss", np.nan))


def _total(norms: torch.Tensor | None) -> np.float64:
    return np.float64(np.nan) if norms is None else np.float64(norms.double().norm())
