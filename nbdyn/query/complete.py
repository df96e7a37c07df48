"""What may come next at a cursor: the parser is asked, and its answer is spelled out with this run's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nbdyn.errors import NbdynError
from nbdyn.query.language import expected_at_end
from nbdyn.query.words import (
    AGGREGATES,
    DISPLACEMENTS,
    FIELDS,
    FUNCTIONS,
    MEASURE_AGGREGATES,
    MEASURES,
    QUANTITIES,
    SAME_QUANTITY,
)

if TYPE_CHECKING:
    from nbdyn.store import Store

_PLAIN_WORD = re.compile(r"`[^`]*$|\|?[\w]*$")
_KINDS = {"<field>": "field", "<selector>": "parameter", "<aggregate>": "measure", "<quantity>": "quantity",
          "<measure>": "measure", "<run>": "run", "<name>": "name", "<saved>": "statement"}  # fmt: skip
_PATH_WORD = re.compile(r"`[^`]*$|[\w./:~@+*?-]*$")


@dataclass(frozen=True)
class Completion:
    """A word that may stand at `start` instead of what is typed there; kind: keyword, field, parameter ..."""

    text: str
    start: int
    kind: str


Names = Callable[[], Iterable[str]]


def complete(
    text: str, store: Store | None = None, runs: Names | None = None, names: Names | None = None
) -> list[Completion]:
    """The words that may come next.

    Args:
        text: a statement up to the cursor.
        store: the run that is asked; without it only the words of the language are offered.
        runs: gives names of runs, for `compare`; by default those beside `store`.
        names: gives names of results, for `sample in ...`; by default there are none.

    Returns:
        Completions, those of the language first, each with what the half-typed word begins with.

    >>> [word.text for word in complete("last 50 samples before ev")]
    ['every']
    """
    places: dict[str, Names] = {
        "<field>": lambda: [*_fields(store), *(f"{name}(" for name in (*FUNCTIONS, *AGGREGATES))],
        "<selector>": lambda: _selectors(store),
        "<aggregate>": lambda: [f"{name} dw" if name in DISPLACEMENTS else f"{name}(" for name in MEASURE_AGGREGATES],
        "<quantity>": lambda: [form for name in (*QUANTITIES, *SAME_QUANTITY) for form in (name, f"|{name}|")],
        "<measure>": lambda: MEASURES,
        "<run>": lambda: _runs(store, runs),
        "<name>": lambda: names() if names is not None else (),
        "<saved>": lambda: _saved(store),
    }
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
        for word, kind in _offers(text[:start], places):
            if word.startswith(typed) and word != typed:
                found.setdefault(word, Completion(word, start, kind))
    return list(found.values())


def _offers(before: str, places: dict[str, Names]) -> Iterator[tuple[str, str]]:
    """Every word that may follow a beginning, with its kind."""
    try:
        expected = expected_at_end(before)
    except NbdynError:
        return  # longer than a statement may be: nothing may follow
    for item in expected:
        if item in places:
            for word in places[item]():
                yield word, "function" if word.endswith("(") else _KINDS[item]
        elif item[0].isalpha():
            yield item, "keyword"


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


def _saved(store: Store | None) -> list[str]:
    """Names of the statements that were saved with the run."""
    if store is None:
        return []
    from nbdyn.query.saved import saved_names

    return saved_names(store)


def _runs(store: Store | None, runs: Names | None) -> list[str]:
    from nbdyn.query.tree import run_text

    if runs is None:
        if store is None:
            return []
        from nbdyn.query.runs import siblings

        names: Iterable[str] = siblings(store.uri)
    else:
        names = runs()
    return [run_text(name) for name in names]
