"""What is asked of an allocation, however the weights are known: the loss, how exact, and what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nbdyn.analysis.lca.precision import Precision
from nbdyn.errors import NbdynError
from nbdyn.settings import format_size, say

if TYPE_CHECKING:
    from torch import nn

    from nbdyn.analysis.lca.objective import Objective

CELLS_BYTES = 2_000_000_000
"""Where nothing is said, A of every step and parameter is kept up to so many bytes."""


@dataclass(frozen=True)
class Asked:
    """The options that `Run.lca`, `Checkpoints.lca` and `nbdyn.record(lca={...})` share; see `nbdyn.Run.lca`.

    Raises:
        NbdynError: if cells of classes are asked for without classes.
    """

    classes: bool = False
    subset: int | None = None
    precision: Precision | None = None
    batch_norm: str = "batch"
    dropout: str = "off"
    chunk: int | None = None
    cells: bool | str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.cells, str) and (self.cells != "classes" or not self.classes):
            raise NbdynError(
                f'cells={self.cells!r}: True, False, or with classes=True "classes", which keeps A of each class.'
            )

    @property
    def name(self) -> str:
        """The name of an allocation that was given none."""
        return "classes" if self.classes else "subset" if self.subset is not None else "train"

    def objective(self, model: nn.Module, loss_fn: Any, data: Any, progress: bool = True) -> Objective:
        """The loss as a function of the weights; see `Objective` and `samples_of` for what is raised."""
        from nbdyn.analysis.lca.objective import Objective
        from nbdyn.analysis.lca.samples import samples_of

        samples = samples_of(data, classes=self.classes, subset=self.subset, seed=self.seed, progress=progress)
        return Objective(
            model, loss_fn, samples, batch_norm=self.batch_norm, dropout=self.dropout, chunk=self.chunk, seed=self.seed
        )

    def kept(self, parameters: int, steps: int) -> bool | str:
        """Whether A of each step and parameter is kept: as asked, or by its size."""
        nbytes = 4 * steps * parameters
        if self.cells is None and nbytes > CELLS_BYTES:
            say(
                f"A of {steps:,} steps and {parameters:,} parameters would be {format_size(nbytes)}: sums and counts "
                "are kept, single cells are not (cells=True keeps them)."
            )
        return nbytes <= CELLS_BYTES if self.cells is None else self.cells
