"""The door to the ledger of hypotheses of a folder of runs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbdyn.analysis.ledger import Ledger


def ledger(folder: str | os.PathLike[str] = "runs") -> Ledger:
    """The ledger of hypotheses beside the runs of a folder: `nbdyn.ledger("runs").frame()` is its table.

    A measure in Python is given an `nbdyn.Run`. Nothing is written before the first declaration.

    Args:
        folder: the folder that holds the runs; it need not be there yet.

    Raises:
        Incompatible: for an object store: a ledger needs a folder of this machine.
        Tampered: if an entry of the ledger was changed, moved or removed.
    """
    from nbdyn.analysis.ledger import Ledger
    from nbdyn.run import Run

    return Ledger(folder, Run)
