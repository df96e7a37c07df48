"""What is typed after %dyn and below %%dyn: options, statements, and the statement that the cursor is in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from keyword import iskeyword

from IPython.core.error import UsageError

from nbdyn.errors import NbdynError, did_you_mean

OPTIONS = {"-r": "run", "--run": "run", "-o": "out", "--out": "out", "-s": "save", "--save": "save"}
"""Every option and the field of `Options` that it sets."""

COMMANDS = {"open": "%dyn open runs/fc", "runs": "%dyn runs runs", "hypotheses": "%dyn hypotheses runs"}
"""What %dyn knows besides statements, each with an example."""

_NEEDS = {
    "run": ("a variable or path", "runs/fc"),
    "out": ("a name for the result", "result"),
    "save": ("a name for the statement", "hot"),
}
_OPTION = re.compile(r"(--?[\w-]*)(?:\s*=\s*|\s+|$)")
_VALUE = re.compile(r"(?:\"([^\"]*)\"|'([^']*)'|(\S+))\s*")


@dataclass
class Options:
    """What stood before the query: a run by variable or path, names for the result and for the statement."""

    run: str | None = None
    out: str | None = None
    save: str | None = None


def split_options(line: str) -> tuple[Options, str]:
    """The options at the head of a line, and the rest exactly as typed (a query is never split by a shell's rules).

    Raises:
        UsageError: for an unknown option, with the nearest one, or one without its value.

    >>> split_options("-o hot show |grad|  where loss > 5")
    (Options(run=None, out='hot', save=None), 'show |grad|  where loss > 5')
    """
    options = Options()
    rest = line.strip()
    while rest.startswith("-"):
        match = _OPTION.match(rest)
        name = match[1] if match else rest.split()[0]
        if match is None or name not in OPTIONS:
            raise UsageError(f'unknown option "{name}"; {did_you_mean(name, OPTIONS)}')
        value = _VALUE.match(rest, match.end())
        if value is None:
            what, example = _NEEDS[OPTIONS[name]]
            raise UsageError(f"{name} needs {what}: {name} {example}.")
        setattr(options, OPTIONS[name], next(group for group in value.groups() if group is not None))
        rest = rest[value.end() :]
    for name, option in ((options.out, "-o result"), (options.save, "--save hot")):
        if name is not None and (not name.isidentifier() or iskeyword(name)):
            raise UsageError(f'"{name}" is no name for a variable; write {option}.')
    return options, rest


def statements(body: str) -> list[str]:
    r"""The statements of a cell: one a line; a line goes on in the next where that is indented or it ends open.

    >>> statements("show loss\n# a comment\ncompare a, b\n  by loss")
    ['show loss', 'compare a, b\n  by loss']
    """
    from nbdyn.query.language import parse
    from nbdyn.query.tokens import UnfinishedStatement

    found: list[str] = []
    open_end = False
    for line in body.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if found and (open_end or line[0].isspace()):
            found[-1] += "\n" + line.rstrip()
        else:
            found.append(line.strip())
        try:
            parse(found[-1])
            open_end = False
        except UnfinishedStatement:
            open_end = True
        except NbdynError:
            open_end = False
    return found


def open_statement(lines: list[str]) -> str:
    """Of the lines of a cell up to the cursor, the statement that the cursor is in."""
    *above, last = lines
    if above and last.strip() and last[0].isspace():
        found = statements("\n".join(above))
        return f"{found[-1]}\n{last}" if found else last.lstrip()
    found = statements("\n".join(above))
    marked = statements("\n".join([*above, last.strip() or "_"]))
    # Where the line above ended open, a further line makes no further statement.
    return f"{found[-1]}\n{last}" if found and len(marked) == len(found) else last
