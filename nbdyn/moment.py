"""A moment of a recorded training: its state can be loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from nbdyn.store import Store


class Moment:
    """The training state before one step. Made by `run.at(step)`."""

    def __init__(self, store: Store, step: int) -> None:
        self._store, self.step = store, step

    def load_into(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Put the recorded weights and buffers into a model, in place; with an optimizer, its state too.

        Raises:
            Incompatible: if the model has other parameters.
            NotRecorded: if the optimizer's state is not stored at this step (it is at snapshots).
        """
        from nbdyn.recorder.replay import load_state

        load_state(self._store, self.step, model, optimizer)

    def __repr__(self) -> str:
        return f"<{self._store.name} before step {self.step}>"
