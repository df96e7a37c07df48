"""Record everything that training a network produced, exactly, and study it in a notebook.

The names below are the whole public surface; they load when first used, so that `import nbdyn` stays fast and
imports neither torch nor TileDB.

    >>> import nbdyn
    >>> "open" in dir(nbdyn)
    True
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbdyn import datasets as datasets
    from nbdyn.accessor import as_frame as as_frame
    from nbdyn.accessor import dyn as dyn
    from nbdyn.analysis.lca.checkpoints import from_checkpoints as from_checkpoints
    from nbdyn.analysis.lca.precision import Precision as Precision
    from nbdyn.cells import WriteOut as WriteOut
    from nbdyn.folder import runs as runs
    from nbdyn.hypotheses import ledger as ledger
    from nbdyn.recording import record as record
    from nbdyn.run import Run as Run
    from nbdyn.run import open as open
    from nbdyn.settings import options as options

__version__ = "0.1.0"

_HOMES = {
    "record": "nbdyn.recording",
    "open": "nbdyn.run",
    "runs": "nbdyn.folder",
    "ledger": "nbdyn.hypotheses",
    "from_checkpoints": "nbdyn.analysis.lca.checkpoints",
    "Precision": "nbdyn.analysis.lca.precision",
    "Run": "nbdyn.run",
    "WriteOut": "nbdyn.cells",
    "dyn": "nbdyn.accessor",
    "as_frame": "nbdyn.accessor",
    "options": "nbdyn.settings",
    "datasets": "nbdyn",
}
"""Where each public name lives; a name whose home is the package itself is a module."""

__all__ = [
    "Precision",
    "Run",
    "WriteOut",
    "as_frame",
    "datasets",
    "dyn",
    "from_checkpoints",
    "ledger",
    "open",
    "options",
    "record",
    "runs",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home when it is first used (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'nbdyn' has no attribute {name!r}; it has {', '.join(__all__)}")
    if home == "nbdyn":
        return importlib.import_module(f"nbdyn.{name}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, also those that are not loaded yet."""
    return sorted({*__all__, "__version__", "load_ipython_extension", "unload_ipython_extension"})


def load_ipython_extension(shell: InteractiveShell) -> None:
    """`%load_ext nbdyn`: the magics %dyn, %%dyn and %%hypothesis, their completion, and `df.dyn` on data frames."""
    from nbdyn import accessor, magics  # noqa: F401  (importing the accessor registers it)

    magics.load_ipython_extension(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """`%unload_ext nbdyn`: take back what `%load_ext nbdyn` added to this shell, and nothing else."""
    from nbdyn import magics

    magics.unload_ipython_extension(shell)
