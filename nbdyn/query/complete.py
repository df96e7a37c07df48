"""What may come next at a cursor: the parser is asked, and its answer is spelled out with this run's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdyn.errors import NbdynError
from nbdyn.query.language import expected_at_end
from nbdyn.query.words import AGGREGATES, FIELDS, FUNCTIONS, MEASURES

if TYPE_CHECKING:
    from nbdyn.store import Store

_PLAIN_WORD = re.compile(r"`[^`]*$|\|?[\w]*$")
_PATH_WORD = re.compile(r"`[^`]*$|[\w./:~@+*?-]*$")


@dataclass(frozen=True)
class Completion:
    """A word that may stand at `start` instead of what is typed there; kind: keyword, field, parameter ..."""

    text: str
    start: int
    kind: str


def complete(
    text: str, store: Store | None = None, runs: Callable[[], Iterable[str]] | None = None
) -> list[Completion]:
    """The words that may come next.

    Args:
        text: a statement up to the cursor.
        store: the run that is asked; without it only the words of the language are offered.
        runs: gives names of runs, for `compare`; by default those beside `store`.

    Returns:
        Completions, those of the language first, each with what the half-typed word begins with.

    >>> [word.text for word in complete("last 50 samples before ev")]
    ['every']
    """
    found: dict[str, Completion] = {}
    # A half-typed word may be the beginning of a plain word, or of a name with dots: the place before either is asked.
    for pattern in (_PLAIN_WORD, _PATH_WORD):
        match = pattern.search(text)
        start = match.start() if match else len(text)
        typed = text[start:]
        # Right after a name or a bracket nothing begins, and after a dot no plain word does.
        if text[:start][-1:] and not typed and (text[start - 1].isalnum() or text[start - 1] in "_.])`*%"):
            continue
        if pattern is _PLAIN_WORD and text[:start].endswith("."):
            continue
        for word, kind in _offers(text[:start], store, runs):
            if word.startswith(typed) and word != typed:
                found.setdefault(word, Completion(word, start, kind))
    return list(found.values())


def _offers(before: str, store: Store | None, runs: Callable[[], Iterable[str]] | None) -> list[tuple[str, str]]:
    """Every word that may follow a beginning, with its kind."""
    try:
        expected = expected_at_end(before)
    except NbdynError:
        return []  # longer than a statement may be: nothing may follow
    offers: list[tuple[str, str]] = []
    for item in expected:
        if item == "<field>":
            offers += [(name, "field") for name in _fields(store)]
            offers += [(f"{name}(", "function") for name in (*FUNCTIONS, *AGGREGATES)]
        elif item == "<selector>":
            offers += [(name, "parameter") for name in _selectors(store)]
        elif item == "<measure>":
            offers += [(name, "measure") for name in MEASURES]
        elif item == "<run>":
            offers += [(name, "run") for name in _runs(store, runs)]
        elif item[0].isalpha():
            offers.append((item, "keyword"))
    return offers


def _fields(store: Store | None) -> list[str]:
    from nbdyn.query.tree import field_text

    names = dict.fromkeys(name for table in ("steps", "visits", "samples", "norms") for name in FIELDS[table])
    if store is not None:
        from nbdyn.query.source import logged

        names |= dict.fromkeys(logged(store))
    return ["|grad|", *map(field_text, names)]


def _selectors(store: Store | None) -> list[str]:
    """Names of parameter tensors, and each layer as `layer.*`."""
    if store is None:
        return []
    tensors = store.config["tensors"]
    layers = dict.fromkeys(str(tensor["layer"]) for tensor in tensors)
    return [*(str(tensor["name"]) for tensor in tensors), *(f"{layer}.*" for layer in layers if layer)]


def _runs(store: Store | None, runs: Callable[[], Iterable[str]] | None) -> list[str]:
    from nbdyn.query.tree import run_text

    if runs is None:
        if store is None:
            return []
        from nbdyn.query.runs import siblings

        names: Iterable[str] = siblings(store.uri)
    else:
        names = runs()
    return [run_text(name) for name in names]
