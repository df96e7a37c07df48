"""Writes segments into TileDB and compacts what they leave, on a thread that lets training go first."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from dataclasses import dataclass

import torch

from nbdyn.errors import RecordingStopped
from nbdyn.recorder.assemble import Assembler, StepRecord
from nbdyn.recorder.pipeline import Pipeline
from nbdyn.recorder.pool import TensorPool
from nbdyn.recorder.rows import RowBlocks
from nbdyn.recorder.target import Target
from nbdyn.settings import format_size
from nbdyn.store import journal
from nbdyn.store.backend import context, is_local
from nbdyn.store.compact import compact
from nbdyn.store.writer import Segment, SegmentWriter
from nbdyn.store.written import EdgesOf, cells_of, wanted

JOURNAL_BYTES = 2_000_000_000
"""The journal is compacted while training goes on, once it is so large: disks are not endless. Below that, at close."""
NICENESS = 19
"""Training goes first: with a niced writer the loop took 1.33 times the plain one's time instead of 1.53."""


@dataclass(slots=True, eq=False)
class Batch:
    """A segment on its way to disk, the records whose memory it lies in, and bytes: of its journal, and that wait."""

    segment: Segment
    records: list[StepRecord]
    journal_bytes: int
    nbytes: int


class Committer:
    """Commits segments in order.

    Args:
        target: the run.
        rows, pool: where rows of weights and small tensors come from, to give them back.
        assembler: gets the gradient rows of written records back.
        edges_of: finds events, around which cells are written out.
        memory: bytes that may wait.
        budget: bytes that the run may take.
    """

    def __init__(
        self,
        target: Target,
        rows: RowBlocks,
        pool: TensorPool,
        assembler: Assembler,
        edges_of: EdgesOf,
        memory: int,
        budget: int,
    ) -> None:
        self._target, self._rows, self._pool, self._assembler = target, rows, pool, assembler
        self._edges_of, self._budget = edges_of, budget
        self._journal_bytes = 0  # bytes in the journal that are not compacted yet
        self._earlier_bytes = 0  # of these, what earlier recordings of the run left
        self._writer: SegmentWriter | None = None
        self.flushed = target.start
        self.visits = 0
        self.bytes_captured = 0  # on disk, of what was captured
        self.waiting: list[StepRecord] = []
        """Records whose segment is not committed yet; to be read, as `flushed`, while `moving` is held."""
        self.moving = threading.Lock()
        self._pipeline = Pipeline("nbdyn-committer", self._work, memory, self._setup)

    def _setup(self) -> None:
        _step_back()  # first: TileDB's own threads inherit the priority
        use_one_core()
        self._ctx = context(self._target.uri, writing=True)
        self._writer = SegmentWriter(self._target.uri, self._ctx, self._target.segment, list(self._target.columns))
        if self._target.start:
            self._journal_bytes = self._earlier_bytes = journal.size(self._target.uri)

    @property
    def bytes_written(self) -> int:
        """Bytes on disk that this recording wrote."""
        return self.bytes_captured + (0 if self._writer is None else self._writer.bytes_written)

    def put(self, batch: Batch) -> None:
        """Hand a segment over; waits while too many bytes wait.

        Raises:
            RecordingStopped: if an earlier one could not be written.
        """
        with self.moving:
            self.waiting += batch.records
        self._pipeline.put(batch, batch.nbytes, urgent=True)

    def check(self) -> None:
        """Raise what stopped the thread, if anything did."""
        self._pipeline.check()

    def close(self) -> None:
        """Commit everything that waits."""
        self._pipeline.close()

    def compact_rest(self) -> None:
        """Compact what is left of the journal, with a progress bar; called once the thread has ended."""
        if self._journal_bytes:
            self._compact(whole=True)

    def _work(self, batches: list[Batch], final: bool, hurry: bool) -> int:
        return sum(self._commit(batch) for batch in batches)

    def _commit(self, batch: Batch) -> int:
        assert self._writer is not None
        segment = batch.segment
        self._journal_bytes += batch.journal_bytes
        self.bytes_captured += batch.journal_bytes
        if self._target.size + self.bytes_written + segment.nbytes() > self._budget:
            raise RecordingStopped(
                f"recording has stopped at its budget of {format_size(self._budget)} after step {self.flushed - 1}; "
                'record with a larger budget="...", a larger snapshot_every=, weights="snapshots", or fewer per-sample '
                "gradients: layers=, every=, fraction=, project=, per_sample=False."
            )
        self._writer.commit(segment)
        with self.moving:
            self.flushed += segment.count
            del self.waiting[: len(batch.records)]
        self.visits += len(segment.visits["step"]) if segment.visits else 0
        self._give_back(batch.records)
        if not is_local(self._target.uri):
            self._target.write_metadata(self._ctx, writer=self._target.lock.lease())
        if self._journal_bytes > JOURNAL_BYTES:
            self._compact(whole=False)
        return batch.nbytes

    def _compact(self, whole: bool) -> None:
        """Compress the journal into arrays; not `whole`: but the last steps, which may come before an event."""
        store = self._target.store()
        upto = None
        if not whole:
            last = max(0, store.steps_committed - wanted(store).before - 1)
            upto = int(store.read_steps(last, last + 1)["segment"][0]) - 1
        done = compact(store, progress=whole, upto=upto, locked=True, cells=cells_of(store, self._edges_of))
        saved, earlier = done.bytes_before - done.bytes_after, min(self._earlier_bytes, done.bytes_before)
        of_earlier = round(saved * earlier / max(1, done.bytes_before))  # not saved by what this recording wrote
        self._target.size -= of_earlier
        self.bytes_captured -= saved - of_earlier
        self._earlier_bytes -= earlier
        self._journal_bytes = max(0, self._journal_bytes - done.bytes_before)

    def _give_back(self, records: list[StepRecord]) -> None:
        for record in records:
            if record.row is not None and record.row[1] == self._rows.per_block - 1:
                self._rows.give_back(record.row[0])
            for t in (record.norms, *(batch.loss for batch in record.batches)):
                self._pool.give_back(t)
        self._assembler.release_gradients(records)


def _step_back() -> None:
    """Lower this thread's priority where the system has per-thread ones (Linux)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox may forbid it; the thread then works at training's priority
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def use_one_core() -> None:
    """Keep torch, on this thread, from starting OpenMP threads of its own.

    GNU OpenMP counts the threads of all teams; once they are more than there are cores, none of them waits actively
    any more, for good: each parallel region of the training then begins with a system call, and the loop of a small
    network took 1.8 times as long from the writer's first segment on.
    """
    before = torch.get_num_threads()  # also sets this thread up: what is set before that is overwritten by it
    torch.set_num_threads(1)
    # The number is also the default of threads to come; one that ends at once puts that back.
    restoring = threading.Thread(target=torch.set_num_threads, args=(before,))
    restoring.start()
    restoring.join()
