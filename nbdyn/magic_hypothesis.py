"""`%%hypothesis`: a cell that declares a hypothesis when it runs first, and tests it when it runs again."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, cell_magic, magics_class, no_var_expand

from nbdyn.errors import NbdynError, did_you_mean

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

OPTIONS = {"-r": "runs", "--runs": "runs", "-l": "level", "--level": "level"}
_USAGE = '%%hypothesis deeper-is-better -r "runs/resnet-*" --level 0.05'
_WORD = re.compile(r"\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s=\"']+))\s*=?")


@dataclass
class _Asked:
    """What stands in the line of the cell."""

    name: str = ""
    runs: str = ""
    level: str = "0.05"


@magics_class
class HypothesisMagics(Magics):
    """The magic of the ledger in one shell."""

    @no_var_expand
    @cell_magic
    def hypothesis(self, line: str, cell: str) -> Any:
        """Declare a hypothesis on runs; run the cell again to test it, and once more to replicate it on new runs.

        Usage::

            %%hypothesis NAME -r "FOLDER/PATTERN" [--level 0.05]
            what is expected, in words
            measure: one number a run
            test: RELATION NUMBER, METHOD over runs

        Examples::

            %%hypothesis last-layer-hurts -r "runs/resnet-*" --level 0.01
            The last layer's total LCA is positive.
            measure: sum lca of fc over all
            test: > 0, t over runs

            %%hypothesis deeper-learns-sooner -r "runs/deep-*"
            Deep networks have a lower loss after the first epoch.
            measure: mean(loss) during epoch 1
            test: < "plain-*", paired t over 10 pairs

        A measure is a loss change allocation (sum lca of LAYER over all), progress(loss) or dist(w, init) at a step, or
        whatever `%dyn show` answers with one number. Tests are t, wilcoxon and permutation. The ledger lies beside the
        runs; `%dyn hypotheses FOLDER` shows it. docs/hypotheses.md tells more.
        """
        asked = _asked(line)
        try:
            from nbdyn.analysis.ledger.looks import split_pattern
            from nbdyn.hypotheses import ledger

            folder, names = split_pattern(asked.runs)
            return ledger(folder).run_cell(asked.name, cell, names, _level(asked.level))
        except NbdynError as error:
            # A subclass of UsageError would print a whole traceback (IPython); a plain one prints its message.
            raise UsageError(str(error)) from None


def _asked(line: str) -> _Asked:
    """The name and the options, in any order.

    Raises:
        UsageError: says what is missing or unknown.
    """
    found, words = _Asked(), _words(line)
    place = 0
    while place < len(words):
        word = words[place]
        if word.startswith("-"):
            if word not in OPTIONS:
                raise UsageError(f'unknown option "{word}"; {did_you_mean(word, OPTIONS)}')
            if place + 1 == len(words):
                raise UsageError(f"{word} needs a value: {_USAGE}")
            setattr(found, OPTIONS[word], words[place + 1])
            place += 2
        elif found.name:
            raise UsageError(f'a hypothesis has one name, and found "{found.name}" and "{word}": {_USAGE}')
        else:
            found.name, place = word, place + 1
    if not found.name or not found.runs:
        raise UsageError(f"{'a name' if not found.name else '-r RUNS'} is missing: {_USAGE}")
    return found


def _words(line: str) -> list[str]:
    words, at = [], 0
    line = line.strip()
    while at < len(line):
        match = _WORD.match(line, at)
        if match is None:
            raise UsageError(f"a quote opens and none closes it: {line[at:].strip()}")
        words.append(next(group for group in match.groups() if group is not None))
        at = match.end()
    return words


def _level(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(f'--level needs a number such as 0.05, not "{text}".') from None


def load(shell: InteractiveShell) -> None:
    """Add %%hypothesis to a shell."""
    shell.register_magics(HypothesisMagics(shell))


def unload(shell: InteractiveShell) -> None:
    """Take back what `load` added, and nothing else."""
    manager = shell.magics_manager
    mine = manager.registry.pop(HypothesisMagics.__name__, None)
    if mine is not None and getattr(manager.magics["cell"].get("hypothesis"), "__self__", None) is mine:
        del manager.magics["cell"]["hypothesis"]
