"""The errors of nbdyn, and the helper that finds the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NbdynError(ValueError):
    """Any error that nbdyn raises on purpose: what was found, what is needed, what to type."""


class UnknownName(NbdynError):
    """A layer, run, column or word that does not exist; the message names the nearest known one."""


class QueryError(NbdynError):
    """A statement that cannot be read; the message points at the place with a caret."""


class NotRecorded(NbdynError):
    """The run does not hold what was asked for; the message says how to record it."""


class Incompatible(NbdynError):
    """Versions, shapes or objects that do not fit together."""


class CorruptRun(NbdynError):
    """A run whose files are damaged or incomplete; the message names the array and the way out."""


class RunBusy(NbdynError):
    """Another live writer holds the run."""


class RecordingStopped(NbdynError):
    """The writer could not go on (disk full, budget reached, path lost); training may, unrecorded."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None where none is alike.

    >>> nearest("fc1.wieght", ["fc1.weight", "fc1.bias"])
    'fc1.weight'
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str], limit: int = 8) -> str:
    """The tail of an error message: the nearest name, or the first few known ones.

    >>> did_you_mean("los", ["loss", "lr"])
    'did you mean "loss"?'
    """
    known = list(known)
    guess = nearest(name, known)
    if guess is not None:
        return f'did you mean "{guess}"?'
    if not known:
        return "there are none."
    shown = ", ".join(known[:limit]) + (", ..." if len(known) > limit else "")
    return f"known: {shown}."
