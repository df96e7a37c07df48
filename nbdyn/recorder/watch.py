"""Which samples a batch holds: the loader's own sampler is listened to, its batches stay as they are."""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from nbdyn.errors import Incompatible

if TYPE_CHECKING:
    from nbdyn.recorder.recorder import Recorder


@dataclass(slots=True)
class Batch:
    """One batch that the loop was given.

    Attributes:
        ids: sample ids in batch order; a Python sequence until the writer converts it, None where unknown.
        size: how many samples.
        source: number of the data set.
        epoch: the pass over the data, from 0.
        target: the last element of the batch, for loss functions that cannot be hooked.
        rng: states of the random generators before the forward pass.
        again: whether it is a batch that had its step already (loops may step on it again).
        loss: the value of `loss_fn`, once it was seen at work on the batch.
        evaluated: (outputs, targets) that it was given, copies; the writer evaluates them sample by sample.
        losses, shares, correct, classes: see `Evaluation`; filled in by the writer, or at once for large outputs.
        logs: what the user logged for it.
        captured: what per-sample capture kept of it so far; None where it is not captured, or not any more.
        rows: which of its samples are captured; None for all.
        scales: the scale of each live GradScaler at its backward pass, by the scaler's id.
    """

    ids: Any
    size: int
    source: int
    epoch: int
    target: Any = None
    rng: dict[str, Any] = field(default_factory=dict)
    again: bool = False
    loss: torch.Tensor | None = None
    evaluated: tuple[torch.Tensor, torch.Tensor] | None = None
    losses: torch.Tensor | None = None
    shares: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    classes: torch.Tensor | None = None
    logs: dict[str, Any] = field(default_factory=dict)
    captured: list[Any] | None = None
    rows: torch.Tensor | None = None
    scales: dict[int, torch.Tensor] = field(default_factory=dict)


class _Listener:
    """A sampler that hands on what another yields, and keeps it for the batch that will come of it."""

    def __init__(self, sampler: Iterable[Any]) -> None:
        self.sampler = sampler
        self.pending: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        # A queue of its own for each pass: workers prefetch, and a pass that ended early leaves some behind.
        self.pending = pending = deque()

        def listen() -> Iterator[Any]:
            for keys in self.sampler:
                # A copy: a sampler may fill one list again and again.
                pending.append(keys.copy() if isinstance(keys, (list, np.ndarray)) else keys)
                yield keys

        return listen()

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        # Other attributes (batch_size, set_epoch, ...) are the wrapped sampler's.
        if name in ("sampler", "pending"):
            raise AttributeError(name)
        return getattr(self.sampler, name)


class Watch:
    """An iterable over a loader that yields its batches unchanged and tells the recorder what they hold."""

    def __init__(self, recorder: Recorder, loader: Iterable[Any]) -> None:
        self._recorder = recorder
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        recorder, loader = self._recorder, self._loader
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            yield from _indexed(recorder, loader)
        else:
            yield from _counted(recorder, loader)


def _indexed(recorder: Recorder, loader: DataLoader[Any]) -> Iterator[Any]:
    """Batches of a map-style data set: ids are what the sampler yielded, mapped through Subsets."""
    if loader.num_workers and not getattr(loader, "in_order", True):
        raise Incompatible(
            "this DataLoader has in_order=False, so batches cannot be matched with their samples; use in_order=True, "
            "or call rec.batch(ids=...) in the loop."
        )
    listening = recorder.listening_copy(loader)
    listener: _Listener = listening._index_sampler  # type: ignore[assignment]
    dataset, unwrap = unwrap_subsets(loader.dataset)
    source = recorder.source_of(dataset)
    recorder.begin_pass(len_or_none(loader))
    with warnings.catch_warnings():
        # Workers fork beside our writer thread; they never touch it, nor TileDB.
        warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
        batches = iter(listening)
    pending = listener.pending
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        ids = unwrap(pending.popleft())
        recorder.begin_batch(ids, len(ids), source, batch)
        yield batch


def _counted(recorder: Recorder, loader: Iterable[Any]) -> Iterator[Any]:
    """Batches of anything else: ids are positions in the stream, counted from the start of each pass."""
    dataset = getattr(loader, "dataset", loader)
    source = recorder.source_of(dataset)
    recorder.say_once(
        "count", f"{type(dataset).__name__} has no indices; sample ids are positions in its stream, from 0 each pass."
    )
    recorder.begin_pass(len_or_none(loader))
    count = 0
    for batch in loader:
        size = batch_size(batch)
        recorder.begin_batch(range(count, count + size), size, source, batch)
        count += size
        yield batch


def listening_copy(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same loader (same data set, workers, generator) whose sampler is listened to."""
    clone = copy.copy(loader)
    name = "batch_sampler" if loader.batch_sampler is not None else "sampler"
    # DataLoader refuses to change its sampler after the start; this copy has not started.
    clone.__dict__[name] = _Listener(getattr(loader, name))
    clone.__dict__["_iterator"] = None
    return clone


def unwrap_subsets(dataset: Dataset[Any]) -> tuple[Any, Any]:
    """The data set under any nesting of Subset, and the function from a sampler's keys to its indices."""
    maps: list[Sequence[int]] = []
    while isinstance(dataset, Subset):
        maps.append(dataset.indices)
        dataset = dataset.dataset

    def unwrap(keys: Any) -> Sequence[int]:
        # A sampler without auto-collation yields one key, or a list of them, for each batch.
        if isinstance(keys, (torch.Tensor, np.ndarray)):
            keys = keys.tolist()
        ids = keys if isinstance(keys, (list, tuple, range)) else [keys]
        for indices in maps:
            ids = [indices[i] for i in ids]
        if ids and not isinstance(ids[0], (int, np.integer, torch.Tensor)):
            raise Incompatible(
                f"the sampler yields {type(ids[0]).__name__} keys; nbdyn needs integers: call rec.batch(ids=...)."
            )
        return ids

    return dataset, unwrap


def given_ids(ids: Any) -> np.ndarray:
    """Sample ids as the user gave them, copied into an int64 array (n,).

    Raises:
        Incompatible: if they are no sequence of integers.
    """
    values = np.array(ids.tolist() if isinstance(ids, torch.Tensor) else ids)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise Incompatible(f"ids={ids!r}: give a sequence of integers, one for each sample of the batch.")
    return values.astype(np.int64)


def batch_size(batch: Any) -> int:
    """Length of the first tensor or array found in a batch; 1 if there is none."""
    if isinstance(batch, (torch.Tensor, np.ndarray)):
        return int(batch.shape[0]) if batch.ndim else 1
    items = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    for item in items:
        if isinstance(item, (torch.Tensor, np.ndarray, dict, list, tuple)):
            return batch_size(item)
    return len(batch) if isinstance(batch, (list, tuple)) else 1


def len_or_none(loader: Any) -> int | None:
    """The loader's length, None where it has none."""
    try:
        return len(loader)
    except TypeError:
        return None
