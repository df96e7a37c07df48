"""What the magics take from the notebook's variables and put there: runs, results by name."""

from __future__ import annotations

import builtins
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from IPython.core.error import UsageError

from nbdyn.errors import QueryError, UnknownName, did_you_mean

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbdyn.run import Run

COLLECTIONS = (pd.DataFrame, pd.Series, pd.Index, np.ndarray, list, tuple, set, frozenset, range)
"""Types of variables that may stand after `sample in`."""


def asked_run(shell: InteractiveShell, name: str | None) -> Run:
    """The run that is asked.

    Args:
        shell: the shell.
        name: a variable that holds a run, or a path; None for the run opened last.

    Raises:
        UsageError: where there is none.
    """
    from nbdyn import run

    if name is None:
        asked = run.current()
        if asked is None:
            raise UsageError("no run is open; type %dyn open PATH, or name one: %dyn -r runs/fc ...")
        return asked
    value = shell.user_ns.get(name)
    if isinstance(value, run.Run):
        return value
    path = getattr(value, "uri", None) if value is not None else name
    told = ", ".join(run_variables(shell)) or "none in a variable; give a path"
    if not isinstance(path, str):
        raise UsageError(f'"{name}" holds a {type(value).__name__}, not a run; runs: {told}.')
    if value is None and name.isidentifier() and not os.path.isdir(name):
        raise UsageError(f'no variable and no folder is called "{name}"; runs: {told}.')
    before = run.current()
    opened = run.open(path)
    if before is not None:
        run.set_current(before)  # an option speaks for its own statement only
    return opened


def run_variables(shell: InteractiveShell) -> list[str]:
    """Names of the variables that hold a run."""
    from nbdyn.run import Run

    return [name for name, value in _variables(shell) if isinstance(value, Run)]


def folder_of(asked: Run) -> str:
    """The folder that holds a run."""
    from nbdyn.store.backend import parent

    return parent(asked.uri)


def collection_variables(shell: InteractiveShell) -> list[str]:
    """Names of the variables that may stand after `sample in`."""
    return [name for name, value in _variables(shell) if isinstance(value, COLLECTIONS)]


def collection(shell: InteractiveShell, name: str) -> Any:
    """The variable that is meant by `sample in NAME`: a frame, or numbers.

    Raises:
        UnknownName: where no variable is called so, with the nearest one.
        QueryError: where it holds neither.
    """
    if name not in shell.user_ns:
        raise UnknownName(f'no variable is called "{name}"; {did_you_mean(name, collection_variables(shell))}')
    value = shell.user_ns[name]
    if not isinstance(value, COLLECTIONS):
        kind = type(value).__name__
        raise QueryError(f'"{name}" holds a {kind}; a frame with a column "sample", or a list of ids, is needed.')
    return sorted(value) if isinstance(value, set | frozenset) else value


def check_free(shell: InteractiveShell, name: str) -> None:
    """Refuse to put a result where something else than a frame stands.

    Raises:
        UsageError: says what stands there.
    """
    if name in shell.user_ns:
        value = shell.user_ns[name]
        if not isinstance(value, pd.DataFrame):
            kind = type(value).__name__
            raise UsageError(f'"{name}" holds a {kind}, no frame; type another name after "as", or del {name} first.')
    elif hasattr(builtins, name):
        raise UsageError(f'"{name}" is a word of Python; type another name after "as".')


def _variables(shell: InteractiveShell) -> list[tuple[str, Any]]:
    """The user's own variables: not those that IPython puts there."""
    hidden = shell.user_ns_hidden
    return [(name, value) for name, value in shell.user_ns.items() if name[0] != "_" and name not in hidden]
