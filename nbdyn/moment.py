"""A moment of a recorded training: its state can be loaded, and training repeated from there with a change."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from nbdyn.errors import NbdynError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nbdyn.recorder.rerun import Rerun
    from nbdyn.store import Store


class Moment:
    """The training state before one step. Made by `run.at(step)`."""

    def __init__(self, store: Store, step: int, model: nn.Module | None = None, data: Any = None) -> None:
        self._store, self.step = store, step
        self._model, self._data = model, data

    def load_into(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put the recorded weights and buffers into a model, in place; with an optimizer, its state too.

        Raises:
            Incompatible: if the model has other parameters.
            NotRecorded: if the weights are not stored at this step, the message names the nearest that are; or if the
                optimizer's state is not (it is at snapshots).
        """
        from nbdyn.recorder.replay import load_state

        load_state(self._store, self.step, model, optimizer)

    def rerun(
        self,
        model: nn.Module | None = None,
        loss_fn: Any = None,
        data: Any = None,
        *,
        without: Any = None,
        order: Any = None,
        until: int | None = None,
        path: str | os.PathLike[str] | None = None,
        optimizer: Any = None,
        per_sample: bool = False,
    ) -> Rerun:
        """Train steps t..until-1 again from here, without some samples or in another order, as a new run.

        Whether samples that are associated with a change of the weights also caused it: leave them out and look.
        All else is as recorded: learning rates and other param-group options, torch's generator before each forward
        pass, the number that clipping multiplied the gradient with. With neither `without` nor `order` the rerun is a
        control: on the same machine with as many threads it equals the recorded run bit for bit.

        A sample in `without` is taken out of every batch. The rest of the batch stays, and `loss_fn` is called on the
        rest alone: with reduction "mean" the loss is the mean over the *remaining* samples, each of which counts
        for a little more than before. A batch that becomes empty takes no step (momentum stands still, too); the
        notes count such steps. Where both are given, the visits are reordered first.

        With fewer samples, or others, a dropout layer that starts from the same generator state draws other masks;
        the difference is then that of the masks, too.

        The new run lies beside the first and counts its steps and epochs from 0; `nbdyn.open(uri).config["rerun"]`
        says what it repeats, and both logbooks have a line. Weights and snapshots are recorded as in the first.

        Cost: the training of these steps, the recording, and a replay to t, and to until, from the snapshot before
        where weights are not stored; memory for a copy of the model and three rows of weights.

        Args:
            model: a model like the recorded one; by default that of `nbdyn.open`. It is copied, not changed.
            loss_fn: the loss, called as loss_fn(model(inputs), targets).
            data: the data set, a pair (inputs, targets), or a function of ids; by default that of `nbdyn.open`.
            without: ids of samples, as a list, an array or a column of a frame.
            order: a seed: within each epoch the visits of these steps are permuted; or the ids of all their visits,
                in the order wanted. Batch sizes stay as recorded.
            until: the first step not repeated; by default the end of the run.
            path: where the new run goes; by default `<run>-rerun` beside the first, or the next free name.
            optimizer: for optimizers that torch.optim does not have: a function of param groups.
            per_sample: whether the gradients of single samples are recorded again, with the options of the first run.

        Raises:
            NotRecorded: if a step cannot be repeated (no snapshot, unknown samples, accumulated batches, a gradient
                that was replaced as a whole), there is no such range, or none of the samples occurs in it.
            Incompatible: if the model differs, or `without` or `order` cannot be used.
        """
        from nbdyn.query.execute import rising_edges
        from nbdyn.recorder.rerun import rerun

        model, data = model or self._model, data if data is not None else self._data
        missing = [name for name, value in (("model", model), ("loss_fn", loss_fn), ("data", data)) if value is None]
        if missing:
            raise NbdynError(f"rerun needs {', '.join(missing)}: run.at({self.step}).rerun(model, loss_fn, data, ...).")
        assert model is not None
        return rerun(
            self._store,
            self.step,
            model,
            loss_fn,
            data,
            without=without,
            order=order,
            until=until,
            path=None if path is None else os.fspath(path),
            optimizer=optimizer,
            per_sample=per_sample,
            edges_of=rising_edges,
        )

    def __repr__(self) -> str:
        return f"<{self._store.name} before step {self.step}>"
