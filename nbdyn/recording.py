"""The door in: record a run, and finish one whose recorder was killed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nbdyn.cells import WriteOut
from nbdyn.store import Store
from nbdyn.store.backend import basename

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nbdyn.recorder.recorder import Recorder
    from nbdyn.store.compact import Compaction
    from nbdyn.store.index.build import Summary
    from nbdyn.widgets.cockpit import Cockpit


def record(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Any = None,
    *,
    data: Any = None,
    weights: str = "snapshots",
    snapshot_every: int = 50,
    per_sample: bool = True,
    layers: str | Sequence[str] | None = None,
    every: int = 1,
    fraction: float = 1.0,
    project: int | None = None,
    cells: int | str | WriteOut | None = 64,
    lca: Any = None,
    mode: str = "new",
    budget: str = "20 GB",
    note: str | None = None,
) -> Recorder:
    """Record the training that follows; returns the recorder, usable with or without `with`.

    Per step: epoch, sample ids, loss, per-sample loss and correctness, learning rates, gradient norm of every
    tensor, wall time, what a replay needs; every `snapshot_every` steps weights, buffers and optimizer state; and
    the gradient of every single sample, exactly, in factors (see `docs/per-sample.md`). On the training thread
    only copies are made; a thread of low priority writes. What waits for it is bounded by
    `nbdyn.options.memory`; when it falls behind, training waits, nothing is dropped.

        rec = nbdyn.record("runs/fc", model, optimizer, loss_fn)
        for x, y in rec.watch(loader):
            ...                                  # the loop stays as it was
        rec.close()

    Args:
        path: a folder or any TileDB URI.
        model: what is trained.
        optimizer: a step is its `step()`; GradScaler's skipped steps are kept, marked skipped.
        loss_fn: the loss of the loop; a `torch.nn` loss module is hooked, a plain function evaluated once more
            on the model's output and the last element of the batch.
        data: the data set that was trained on; `mode="resume"` replays with it.
        weights: "snapshots" (every `snapshot_every` steps) or "every" (every step; a row is 4 bytes a parameter).
        snapshot_every: steps between snapshots.
        per_sample: whether the gradients of single samples are recorded.
        layers: names or patterns of the layers or tensors that per-sample gradients are recorded of; None: all.
        every: per-sample gradients are recorded at every so-many-th step.
        fraction: share of the samples that they are recorded of, the same samples at every step.
        project: dimension of seeded random projections of the factors of linear layers; results are then approximate.
        cells: which cells are written out one by one, too, for plain tiledb: so many of largest |c| of each tensor
            and step, or a selector ("fc3.*": all of its cells), or `nbdyn.WriteOut(...)`; None for none.
        lca: data over whose loss every step is allocated while training goes on (see `Run.lca`; it costs one or two
            gradients over all of it a step), or a dict of `Run.lca`'s options: {"data": train_set, "classes": True}.
        mode: "new" (an existing path gets the next free name), "resume" (go on after the last committed step)
            or "replace".
        budget: bytes on disk at which recording stops with an error; training can then go on unrecorded.
        note: the first line of the run's logbook.

    Raises:
        RunBusy: if a live writer of another process holds the path.
        NbdynError: if the path cannot be written, or an argument is not one of the known ones.
        Incompatible: if the model cannot be recorded, or a run to resume had another.
    """
    from nbdyn.query.execute import rising_edges
    from nbdyn.recorder.capture.options import capture_options
    from nbdyn.recorder.recorder import Recorder

    capture = capture_options(layers, every, fraction, project, cells)
    prepared = None
    if lca is not None:
        from nbdyn.analysis.lca.online import Prepared

        prepared = Prepared(model, loss_fn, lca)  # before the recorder hooks the model, for it is copied
    recorder = Recorder(
        os.fspath(path),
        model,
        optimizer,
        loss_fn,
        data=data,
        weights=weights,
        snapshot_every=snapshot_every,
        capture=capture if per_sample else None,
        edges_of=rising_edges,
        mode=mode,
        budget=budget,
        note=note,
        view=_live_cockpit,
    )
    if prepared is not None:
        from nbdyn.analysis.lca.online import Online

        try:
            Online(recorder, model, optimizer, prepared)
        except BaseException:
            recorder.close("interrupted")
            raise
    return recorder


def compact(path: str | os.PathLike[str]) -> Compaction:
    """Compress what a killed recording left raw of single samples; recorders do it themselves when they close.

    Raises:
        RunBusy: if a live writer holds the run.
        CorruptRun: if what was captured is damaged.
        NbdynError: if the place cannot be written.
    """
    from nbdyn.query.execute import rising_edges
    from nbdyn.store import compact as compaction
    from nbdyn.store.written import cells_of

    store = Store(path)
    return compaction.compact(store, cells=cells_of(store, rising_edges))


def index(path: str | os.PathLike[str]) -> Summary:
    """Build the indexes of a run, or what they lack: sums by epoch and class, exponents of gradients, zones of weights.

    They make statements over whole epochs fast; no answer depends on them. One pass over what was captured.

    Raises:
        RunBusy: if a live writer holds the run.
        CorruptRun: if what was captured is damaged.
        NbdynError: if the place cannot be written.
    """
    from nbdyn.store.index.build import build

    return build(path)


def _live_cockpit(recorder: Recorder) -> Cockpit:
    """The live view of a recorder."""
    from nbdyn.widgets.cockpit import Cockpit

    view = Cockpit(basename(recorder.uri), uri=recorder.uri)
    recorder.listen(view)
    return view
