"""The door out: open a run; everything one can do with it is a method here."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pandas as pd

from nbdyn import (
    accessor,  # noqa: F401  (importing it registers df.dyn, for the frames that runs give)
    asking,
)
from nbdyn.errors import NbdynError
from nbdyn.folder import card, weights_words
from nbdyn.moment import Moment
from nbdyn.store import Store, Weights, frames
from nbdyn.store.gradients import Gradients
from nbdyn.thumbnails import Thumbnails, thumbnails

if TYPE_CHECKING:
    from torch import nn

    from nbdyn.analysis.lca.precision import Precision
    from nbdyn.analysis.lca.result import Allocation
    from nbdyn.analysis.noise.result import Noise
    from nbdyn.recorder.recorder import Recorder
    from nbdyn.recorder.replay import Replay
    from nbdyn.widgets.cockpit import Cockpit

_current: Run | None = None


class Run:
    """One recorded training run. Open it with `nbdyn.open`.

    It shows all steps committed when it was opened; `refresh` looks again. A run can be opened while it is
    being recorded, by this process or another.

    Attributes:
        store: the run on disk, for code that needs more than frames.
        model, data: what was given to `nbdyn.open`; `replay` uses them.
    """

    def __init__(self, store: Store, model: nn.Module | None = None, data: Any = None) -> None:
        self.store = store
        self.model = model
        self.data = data

    @property
    def name(self) -> str:
        """The last part of the run's path."""
        return self.store.name

    @property
    def uri(self) -> str:
        """Where the run lies."""
        return self.store.uri

    @property
    def status(self) -> str:
        """One of "recording", "complete", "interrupted", "stopped", "killed"."""
        return self.store.status

    @property
    def config(self) -> dict[str, Any]:
        """The run's metadata: model, tensors, optimizer, versions, seeds."""
        return self.store.config

    def __len__(self) -> int:
        return self.store.steps_committed

    def refresh(self) -> bool:
        """Look again at what is committed; True if there are new steps."""
        return self.store.refresh()

    @property
    def steps(self) -> pd.DataFrame:
        """One row a step: epoch, loss, accuracy, learning rate, gradient norm, ... See `nbdyn.store.frames.steps`."""
        return frames.steps(self.store)

    @property
    def visits(self) -> pd.DataFrame:
        """One row a sample at a step: the order of the data. See `nbdyn.store.frames.visits`."""
        return frames.visits(self.store)

    @property
    def norms(self) -> pd.DataFrame:
        """One row a step and tensor: norms of gradient, weights and update. See `nbdyn.store.frames.norms`."""
        return frames.norms(self.store)

    @property
    def parameters(self) -> pd.DataFrame:
        """One row a parameter tensor. See `nbdyn.store.frames.parameters`."""
        return frames.parameters(self.store)

    @property
    def layers(self) -> pd.DataFrame:
        """One row a module with parameters of its own. See `nbdyn.store.frames.layers`."""
        return frames.layers(self.store)

    @property
    def samples(self) -> pd.DataFrame:
        """One row a sample: how it was learned and forgotten. See `nbdyn.store.frames.samples`."""
        return frames.samples(self.store)

    @property
    def notes(self) -> pd.DataFrame:
        """The logbook: notes, alarms, statements run. See `nbdyn.store.frames.notes`."""
        return frames.notes(self.store)

    @property
    def weights(self) -> Weights:
        """The recorded weights: `run.weights["fc1.weight", 0:100]`. See `nbdyn.store.Weights`."""
        return self.store.weights

    @property
    def gradients(self) -> Gradients:
        """The gradients of single samples: `run.gradients[step, "fc1.weight[3,:]", sample].frame()`.

        Exact contributions to p.grad, computed from the recorded factors on read; `.own()` gives the samples' own
        gradients, `.total()` and `gradients.rebuild(step)` the batch gradient. See `nbdyn.store.gradients.Gradients`.
        """
        return Gradients(self.store)

    def lca(
        self,
        data: Any = None,
        loss_fn: Any = None,
        model: nn.Module | None = None,
        *,
        name: str | None = None,
        classes: bool = False,
        subset: int | None = None,
        motion: bool = False,
        steps: tuple[int, int] | None = None,
        precision: Precision | None = None,
        batch_norm: str = "batch",
        dropout: str = "off",
        chunk: int | None = None,
        cells: bool | str | None = None,
        save: bool = True,
        seed: int = 0,
        progress: bool = True,
        replace: bool = False,
    ) -> Allocation:
        """Loss Change Allocation: which parameter, at which step, changed the loss by how much.

        A[t, i] = mean of dL/dw_i along step t x (w_i[t+1] - w_i[t]); the sum over i is L[t+1] - L[t], and what is
        missing of it is in the result. L is the loss over all of `data`. The result is stored with the run; asked
        again the same way it is read, and one that was stopped goes on. `run.lca(name="train")` is the stored one.
        The logbook keeps that it was looked at, as it does of statements.

        Cost: about one to two gradients over all of `data` a step, and little else. See docs/lca.md.

        Args:
            data: the samples of L: the training set, a validation set; a data set of (input, target) pairs, or a pair
                (inputs, targets).
            loss_fn: the loss, with a mean (or sum) over samples; by default that of the recorded name in torch.nn.
            model: the network; by default that of `nbdyn.open`.
            name: of the result among those of the run ("train", "classes" or "subset" if not given).
            classes: also allocate the loss of each class by itself, at no further gradient (under batch statistics: at
                a backward pass for each class).
            subset: take so many random samples of `data`; layers then have confidence intervals.
            motion: also divide each step's motion into gradient, noise, momentum, weight decay and Adam's scaling.
            steps: (first, last + 1); by default all.
            precision: how exact; see `nbdyn.Precision`.
            batch_norm: "batch" (statistics of fixed chunks) or "running" (as recorded at snapshots).
            dropout: "off", or "fixed" (on, the same masks everywhere).
            chunk: samples at a time; by default measured.
            cells: whether A of each step and parameter is kept (None: up to 2 GB), or sums alone; "classes": that of
                each class, too.
            save: whether the result is stored with the run.
            seed: of subset and masks.
            progress: whether a bar is shown.
            replace: compute anew what is there.

        Raises:
            NotRecorded: if the weights between snapshots can be rebuilt in no way.
            Incompatible: if the model is another, or the loss no mean or sum over samples.
            NbdynError: if the name is taken by another allocation.
        """
        from nbdyn.analysis.lca import of_run
        from nbdyn.analysis.lca.asked import Asked

        if data is None and loss_fn is None and (name is not None or self.data is None):
            found = of_run.open_allocation(self.store, name)
        else:
            asked = Asked(classes, subset, precision, batch_norm, dropout, chunk, cells, seed)
            found = of_run.lca(
                self.store, self.data if data is None else data, loss_fn, model or self.model, asked,
                train_data=self.data, name=name, motion=motion, steps=steps, save=save, progress=progress,
                replace=replace,
            )  # fmt: skip
        self.store.log_look("loss change allocation" + (f" {name}" if name else ""))
        return found

    def noise(
        self,
        data: Any = None,
        loss_fn: Any = None,
        model: nn.Module | None = None,
        *,
        sampled: str = "samples",
        steps: Any = None,
        batch: int | None = None,
        coordinates: int = 150,
        subset: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> Noise:
        """Gradient noise: how far from Gaussian, how large against the gradient, and what a null reads.

        What is sampled has to be said, and is never pooled:

            "samples"       gradients of every sample of `data` at the fixed weights[t] of each step asked for
            "batch"         of the samples of the batch recorded at each step, which alone share weights[t]
            "mini-batches"  means of `batch` samples of `data`, drawn without replacement, at fixed weights[t]
            "steps"         recorded batch gradients of the steps of one window: the weights move, scales mix
            "iterates"      the weights themselves at the steps of one window
            "coordinates"   the coordinates of the batch gradient recorded at each step

        Cost of the first and third: two forward and backward passes over all of `data` for each step, and memory for
        samples x coordinates. The gradients of single samples are exact, from the factors that recording uses; dropout
        is off and batch normalization uses the recorded running statistics. See docs/noise.md.

        Args:
            data: a data set of (input, target) pairs, or a pair (inputs, targets); by default that of `nbdyn.open`.
            loss_fn: the loss; by default that of the recorded name in torch.nn.
            model: the network; by default that of `nbdyn.open`.
            sampled: what is sampled, see above.
            steps: a step or several, at whose weights is sampled (by default the first and the last); of "steps" and
                "iterates" a pair (first, last + 1), by default the whole run.
            batch: samples of a mini-batch, of "mini-batches" only; 100 by default.
            coordinates: how many are drawn at random of each layer.
            subset: take so many random samples of `data`; only of what is sampled from `data`.
            seed: of coordinates, batches and subset.
            progress: whether a bar is shown.

        Raises:
            UnknownName: if nothing is sampled under that name.
            NotRecorded: if a step or its weights are not there, or its batch was not captured by sample.
            Incompatible: if the model is another, or the loss has no gradients of single samples.
            NbdynError: if data or model are missing, or the values would take over 2 GB.
        """
        from nbdyn.analysis.noise import gather

        if data is None and sampled in ("samples", "mini-batches"):
            data = self.data
        return gather.noise(
            self.store, data, loss_fn, model or self.model, sampled, train_data=self.data, steps=steps, batch=batch,
            coordinates=coordinates, subset=subset, seed=seed, progress=progress,
        )  # fmt: skip

    def note(self, text: str) -> None:
        """Write a line into the logbook, at the last committed step."""
        self.store.write_note(self.store.steps_committed, "note", text)

    def at(self, step: int) -> Moment:
        """The training state before step `step` (the final one for `len(run)`; negative counts from there).

        Raises:
            NotRecorded: if the run has no such step.
        """
        step = step + len(self) + 1 if step < 0 else step
        if not 0 <= step <= len(self):
            self.weights.require(step)
        return Moment(self.store, step, self.model, self.data)

    def replay(
        self,
        t0: int,
        t1: int,
        model: nn.Module | None = None,
        loss_fn: Any = None,
        data: Any = None,
        *,
        of: str = "all",
        optimizer: Any = None,
    ) -> Replay:
        """Rebuild weights[t0..t1] by training again from the snapshot before t0.

        Bit for bit the same on the same machine with as many threads, if the loop was forward, loss_fn, backward,
        (clipping or anything else done to the gradient,) step; every recorded row on the way is compared, and
        `.residuals` tells. Cost: the training of those steps; memory for the selected weights. The model given
        is copied, not changed.

        Args:
            t0: the first step; weights[t0] is the first row returned.
            t1: the last one.
            model: a model like the recorded one; by default that of `nbdyn.open`.
            loss_fn: the loss, called as loss_fn(model(inputs), targets).
            data: the data set, a pair (inputs, targets), or a function of ids; by default that of `nbdyn.open`.
            of: which parameters to return.
            optimizer: for optimizers that torch.optim does not have: a function of param groups.

        Raises:
            NotRecorded: if a step cannot be repeated (no snapshot, unknown samples, accumulated batches).
            Incompatible: if the model differs.
        """
        from nbdyn.recorder.replay import replay

        model, data = model or self.model, data if data is not None else self.data
        missing = [name for name, value in (("model", model), ("loss_fn", loss_fn), ("data", data)) if value is None]
        if missing:
            raise NbdynError(f"replay needs {', '.join(missing)}: run.replay({t0}, {t1}, model, loss_fn, data).")
        assert model is not None
        return replay(self.store, t0, t1, model, loss_fn, data, of, optimizer)

    def query(self, text: str, names: Callable[[str], Any] | None = None) -> pd.DataFrame:
        """Answer a statement of the query language; `attrs["nbdyn"]` of the result says where it came from.

        Args:
            text: the statement.
            names: gives what a name stands for in `where sample in hot`: a frame with this column, or numbers.

        Raises:
            QueryError: if the statement cannot be read, with a caret under the place.
            UnknownName: for a name that the run does not have.
            NotRecorded: for what was not recorded.
        """
        from nbdyn import query

        self.refresh()
        return query.execute(text, self.store, names=names)

    top, group, show, last, compare = asking.top, asking.group, asking.show, asking.last, asking.compare

    def thumbnails(self, frame: pd.DataFrame, columns: int = 10) -> Thumbnails:
        """The samples of a result as small pictures, out of the data given to `nbdyn.open`.

        Args:
            frame: a frame with a column "sample".
            columns: pictures in a row.

        Raises:
            NbdynError: if the run was opened without data, or samples are no pictures; see `nbdyn.thumbnails`.
        """
        if self.data is None:
            raise NbdynError(
                f"{self.name} was opened without its data: nbdyn.open(path, data=data), or df.dyn.thumbnails(data)."
            )
        return thumbnails(frame, self.data, columns)

    def cockpit(self) -> Cockpit:
        """Loss, learning rate, gradient norm and update/weight ratio over all steps, as a widget."""
        from nbdyn.widgets.cockpit import Cockpit

        return Cockpit.from_frame(self.steps, self.name, uri=self.uri, status=self.status)

    def __repr__(self) -> str:
        return (
            f"<Run {self.name}: {self.status}, {len(self):,} steps, {self.config['model']} with "
            f"{self.store.parameters:,} parameters, weights {weights_words(self.config)}>"
        )

    def _repr_html_(self) -> str:
        return card(self.store)


def open(path: str | os.PathLike[str] | Recorder, model: nn.Module | None = None, data: Any = None) -> Run:
    """Open a run for reading; it becomes the one that a bare `%dyn` speaks to.

    Args:
        path: where it lies: a folder, any TileDB URI, or the recorder itself.
        model: the model, for `run.replay`.
        data: the data set, for `run.replay` and `run.thumbnails`.

    Raises:
        NbdynError: if nothing is there.
        CorruptRun: if it is damaged.
        Incompatible: if a newer nbdyn wrote it.
    """
    where = path if isinstance(path, (str, os.PathLike)) else path.uri
    run = Run(Store(where), model, data)
    set_current(run)
    return run


def current() -> Run | None:
    """The run opened last, None before the first."""
    return _current


def set_current(run: Run) -> None:
    """Make a run the one that a bare `%dyn` speaks to."""
    global _current
    _current = run


__all__ = ["Moment", "Run", "current", "open", "set_current"]
