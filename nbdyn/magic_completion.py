"""Completion of %dyn and %%dyn: options by a hook of the line, statements by a matcher."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from IPython.core.completer import SimpleCompletion
from IPython.core.error import TryNext, UsageError

from nbdyn.errors import NbdynError
from nbdyn.magic_names import asked_run, collection_variables, folder_of, run_variables
from nbdyn.magic_options import COMMANDS, OPTIONS, Options, open_statement, split_options

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

_LINE_MAGIC = re.compile(r"^\s*(?:[\w., \[\]]+=\s*)?%dyn(?:\s+|$)")
_CELL_MAGIC = re.compile(r"^\s*%%dyn(?=\s|$)")


def complete_options(shell: InteractiveShell, event: Any) -> list[str]:
    """Completion of the option line (a `complete_command` hook).

    Raises:
        TryNext: where no option is being typed.
    """
    before = event.text_until_cursor if hasattr(event, "text_until_cursor") else event.line
    words = before.split()
    typed = "" if before[-1:].isspace() else words[-1]
    previous = words[-1] if not typed else words[-2] if len(words) > 1 else ""
    if OPTIONS.get(previous) == "run":
        return [*run_variables(shell), *_run_paths()]
    if typed.startswith("-"):
        return list(OPTIONS)
    raise TryNext


def _run_paths() -> list[str]:
    """The runs beside the current one, as paths that can be opened from here."""
    from nbdyn import run

    asked = run.current()
    if asked is None:
        return []
    from nbdyn.query.runs import siblings

    folder = folder_of(asked)
    shown = os.path.relpath(folder) if "://" not in folder else folder
    return [f"{shown}/{name}" if shown != "." else name for name in siblings(asked.uri)]


def match(shell: InteractiveShell, context: Any) -> dict[str, Any]:
    """Completion of statements (a v2 matcher): in the line of %dyn and in the body of %%dyn."""
    nothing: dict[str, Any] = {"completions": [], "suppress": False}
    typed = _typed(context)
    if typed is None:
        return nothing
    try:
        options, text = typed
        offers = list(_offers(shell, options, text))
    except (UsageError, NbdynError):
        return nothing  # a run that cannot be opened is told when the statement runs, not while it is typed
    if not offers:
        return nothing
    begin = min(start for _, start, _ in offers)
    found = [SimpleCompletion(text=text[begin:start] + word, type=kind) for word, start, kind in offers]
    return {"completions": found, "matched_fragment": text[begin:], "suppress": True, "ordered": True}


def _typed(context: Any) -> tuple[Options, str] | None:
    """The options that hold at the cursor and the statement before it; None outside our magics."""
    before = context.text_until_cursor
    lines = context.full_text.split("\n")
    try:
        if _CELL_MAGIC.match(lines[0]):
            if context.cursor_line == 0:
                return None
            options = split_options(_CELL_MAGIC.sub("", lines[0]))[0]
            return options, open_statement([*lines[1 : context.cursor_line], before])
        found = _LINE_MAGIC.match(before)
        if found is None:
            return None
        options, rest = split_options(before[found.end() :])
        # split_options strips the end, and a blank there says that the last word is complete.
        return options, rest + before[len(before.rstrip()) :] if rest else rest
    except UsageError:
        return None  # an option is being typed: the hook completes it


def _offers(shell: InteractiveShell, options: Options, text: str) -> Iterator[tuple[str, int, str]]:
    """Words that may come next: (word, where it begins in `text`, kind)."""
    from nbdyn import run
    from nbdyn.query.complete import complete

    store = asked_run(shell, options.run).store if options.run or run.current() is not None else None
    for word in complete(text, store, names=lambda: collection_variables(shell)):
        yield word.text, word.start, word.kind
    if not text.strip() or text.isalpha():
        for command in COMMANDS:
            if command.startswith(text) and command != text:
                yield command, 0, "keyword"
