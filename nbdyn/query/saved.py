"""Statements kept with a run under a name: `%%dyn --save hot` writes them, `from hot` runs them again."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from dataclasses import replace
from keyword import iskeyword
from typing import TYPE_CHECKING

from nbdyn.errors import QueryError, UnknownName, did_you_mean
from nbdyn.query.language import parse
from nbdyn.query.tokens import caret
from nbdyn.query.tree import Estimate, Explain, From, Named, Plain, Statement
from nbdyn.store import frames

if TYPE_CHECKING:
    from nbdyn.store import Store

KIND = "saved"
"""Their kind in the logbook of a run; the text is "NAME: STATEMENT", several statements one below the other."""


def check(name: str, statements: list[str]) -> list[Statement]:
    """The trees of statements that are to be kept under a name.

    Raises:
        QueryError: if the name is none, if there is no statement, or if one cannot be read or runs what is saved.
    """
    if not name.isidentifier() or iskeyword(name):
        raise QueryError(f'"{name}" cannot name statements; type letters, digits and _, such as hot.')
    if not statements:
        raise QueryError(f'there is no statement to save as "{name}"; write one below %%dyn --save {name}.')
    trees = [parse(text) for text in statements]
    for text, tree in zip(statements, trees, strict=True):
        again = _from(tree)
        if again is not None:
            raise QueryError(caret(text, again.position, f'save the statement itself, not "{again}".'))
    return trees


def save(store: Store, name: str, statements: list[str]) -> None:
    """Keep statements with a run; a later save under the same name replaces the earlier one, which stays in the log.

    Args:
        store: the run.
        name: a name that Python could give to a variable.
        statements: texts of statements; they are kept in their normal form.

    Raises:
        QueryError: see `check`.
        NbdynError: if the run's place cannot be written.
    """
    trees = check(name, statements)
    store.write_note(store.steps_committed, KIND, f"{name}: " + "\n".join(map(str, trees)))


def saved(store: Store, name: str) -> str:
    """What was saved last under a name: a statement, or several below each other.

    Args:
        store: the run.
        name: the name.

    Raises:
        UnknownName: where nothing was saved under it, with the nearest name.
    """
    found = _all(store)
    if name not in found:
        raise UnknownName(f'no statement is saved as "{name}" with {store.name}; {_known(name, found)}')
    return found[name]


def saved_names(store: Store) -> list[str]:
    """The names under which statements were saved with a run, the latest first."""
    return list(_all(store))


def unfold(text: str, store: Store) -> tuple[Statement, str]:
    """The tree of a statement with `from NAME` replaced by what was saved, and the text that its carets point at.

    Args:
        text: the statement.
        store: the run.

    Raises:
        QueryError: if the statement cannot be read, or if several are saved under the name.
        UnknownName: where nothing is saved under it, with a caret and the nearest name.
    """
    tree = parse(text)
    again = _from(tree)
    if again is None:
        return tree, text
    try:
        kept = saved(store, again.name)
    except UnknownName as error:
        raise UnknownName(caret(text, again.position, str(error))) from None
    if "\n" in kept:
        count = kept.count("\n") + 1
        message = f"{again.name} holds {count} statements, which only a notebook runs one by one: %dyn {again}."
        raise QueryError(caret(text, again.position, message))
    return _replaced(tree, parse(kept)), kept


def _all(store: Store) -> dict[str, str]:
    """Name -> statements, the latest first."""
    notes = frames.notes(store)
    found: dict[str, str] = {}
    for line in notes.loc[notes["kind"] == KIND, "text"].iloc[::-1]:
        name, _, kept = str(line).partition(": ")
        found.setdefault(name, kept)
    return found


def _known(name: str, found: dict[str, str]) -> str:
    return did_you_mean(name, found) if found else f"nothing is yet: %%dyn --save {name}."


def _from(tree: Statement) -> From | None:
    """The `from NAME` in a statement, if there is one."""
    match tree:
        case From():
            return tree
        case Explain(statement) | Estimate(statement) | Named(statement):
            return _from(statement)
        case _:
            return None


def _replaced(tree: Statement, kept: Statement) -> Statement:
    """`from NAME` in a tree exchanged for what was kept; an outer name or `explain` stands before those kept."""
    match tree:
        case Named(statement):
            inner = _replaced(statement, kept)
            return replace(tree, statement=inner.statement if isinstance(inner, Named) else inner)
        case Explain(statement) | Estimate(statement):
            return replace(tree, statement=_plain(kept))
        case _:
            return kept


def _plain(tree: Statement) -> Plain:
    """A statement without `explain`, `estimate` and `as`."""
    return _plain(tree.statement) if isinstance(tree, Named | Explain | Estimate) else tree
