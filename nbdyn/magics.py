"""`%dyn` and `%%dyn`: the language in a notebook, its completion, and an unload that undoes only its own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from IPython.core.completer import SimpleCompletion, context_matcher
from IPython.core.error import TryNext, UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand

from nbdyn.errors import NbdynError, did_you_mean
from nbdyn.schema import PROVENANCE
from nbdyn.settings import say

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbdyn.run import Run

_OPTIONS = {"-r": "run", "--run": "run", "-o": "out", "--out": "out"}
_OPTION = re.compile(r"(--?[\w-]*)(?:\s*=\s*|\s+|$)")
_VALUE = re.compile(r"(?:\"([^\"]*)\"|'([^']*)'|(\S+))\s*")
_LINE_MAGIC = re.compile(r"^\s*(?:[\w., \[\]]+=\s*)?%dyn(?:\s+|$)")
_CELL_MAGIC = re.compile(r"^\s*%%dyn(?=\s|$)")
_SUBCOMMANDS = {"open": "%dyn open runs/fc", "runs": "%dyn runs runs"}


@dataclass
class _Options:
    """What stood before the query: a run by variable or path, and a name for the result."""

    run: str | None = None
    out: str | None = None


def split_options(line: str) -> tuple[_Options, str]:
    """The options at the head of a line, and the rest exactly as typed (a query is never split by a shell's rules).

    Raises:
        UsageError: for an unknown option, with the nearest one, or one without its value.

    >>> split_options("-o hot show |grad|  where loss > 5")
    (_Options(run=None, out='hot'), 'show |grad|  where loss > 5')
    """
    options = _Options()
    rest = line.strip()
    while rest.startswith("-"):
        match = _OPTION.match(rest)
        name = match[1] if match else rest.split()[0]
        if match is None or name not in _OPTIONS:
            raise UsageError(f'unknown option "{name}"; {did_you_mean(name, _OPTIONS)}')
        value = _VALUE.match(rest, match.end())
        if value is None:
            what = "a variable or path" if _OPTIONS[name] == "run" else "a name for the result"
            raise UsageError(f"{name} needs {what}: {name} {'runs/fc' if _OPTIONS[name] == 'run' else 'result'}.")
        setattr(options, _OPTIONS[name], next(group for group in value.groups() if group is not None))
        rest = rest[value.end() :]
    if options.out is not None and not options.out.isidentifier():
        raise UsageError(f'"{options.out}" is no name for a variable; write -o result.')
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


@magics_class
class DynMagics(Magics):
    """The magics of nbdyn in one shell, and their completion."""

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self.matcher = context_matcher(identifier="nbdyn")(lambda context: self.match(context))

    @no_var_expand
    @line_cell_magic
    def dyn(self, line: str, cell: str | None = None) -> Any:
        """Ask a recorded run; the answer is a pandas.DataFrame.

        Usage::

            %dyn [-r RUN] [-o NAME] STATEMENT
            %dyn open PATH
            %dyn runs [FOLDER]
            %%dyn [-r RUN] [-o NAME]
            STATEMENT
            ...

        Options::

            -r, --run RUN    a variable that holds a run, or the path of one (default: the run opened last)
            -o, --out NAME   store the result under this name and show nothing

        Examples::

            %dyn show loss, |grad| during epoch 3
            %dyn -o moved last 50 samples before fc1.weight[3,5] becomes 0 within 1e-6
            best = %dyn compare fc, fc-2 by progress(loss), dist(w, init), acc at step 500
            %dyn explain show w of fc1.*

        In a cell every line is a statement, `#` begins a comment, and an indented line continues the one above.
        """
        options, rest = split_options(line)
        try:
            result = self._line(options, rest) if cell is None else self._cell(options, rest, cell)
        except NbdynError as error:
            # A subclass of UsageError would print a whole traceback (IPython); a plain one prints its message.
            raise UsageError(str(error)) from None
        if options.out is None:
            return result
        self._shell.user_ns[options.out] = result
        return None

    @property
    def _shell(self) -> InteractiveShell:
        assert self.shell is not None
        return self.shell

    def _line(self, options: _Options, text: str) -> Any:
        from nbdyn.query.tokens import UnfinishedStatement

        if not text:
            print(self._help(options))
            return None
        try:
            return self._one(options, text)
        except UnfinishedStatement as error:
            raise UsageError(f"{error}\nFor a statement of several lines use %%dyn.") from None

    def _cell(self, options: _Options, rest: str, cell: str) -> Any:
        if rest:
            raise UsageError(f'the line of %%dyn takes options only, and found "{rest}"; statements go below it.')
        texts = statements(cell)
        if not texts:
            print(self._help(options))
            return None
        for text in texts[:-1]:
            self._display(self._one(options, text))
        return self._one(options, texts[-1])

    def _display(self, result: Any) -> None:
        from IPython.display import display

        display(result)

    def _one(self, options: _Options, text: str) -> Any:
        """The result of one statement or command; its note is printed."""
        verb, _, rest = text.partition(" ")
        if verb == "open":
            return self._open(rest.strip())
        if verb == "runs":
            return self._runs(options, rest.strip())
        result = self._run(options).query(text)
        note = result.attrs.get(PROVENANCE, {}).get("note")
        if note:
            say(note)
        return result

    def _open(self, path: str) -> Run:
        from nbdyn import run

        if not path:
            raise UsageError("%dyn open needs the path of a run: %dyn open runs/fc.")
        return run.open(_unquoted(path))

    def _runs(self, options: _Options, folder: str) -> Any:
        from nbdyn.folder import runs
        from nbdyn.run import current

        if folder:
            return runs(_unquoted(folder))
        asked = self._run(options) if options.run else current()
        return runs() if asked is None else runs(_folder(asked))

    def _run(self, options: _Options) -> Run:
        """The run that is asked: of the option, or the one opened last.

        Raises:
            UsageError: where there is none.
        """
        from nbdyn import run

        if options.run is None:
            asked = run.current()
            if asked is None:
                raise UsageError("no run is open; type %dyn open PATH, or name one: %dyn -r runs/fc ...")
            return asked
        value = self._shell.user_ns.get(options.run)
        if isinstance(value, run.Run):
            return value
        path = getattr(value, "uri", None) if value is not None else options.run
        if not isinstance(path, str):
            raise UsageError(f'"{options.run}" holds a {type(value).__name__}, not a run; runs: {self._told_runs()}.')
        if value is None and options.run.isidentifier() and not os.path.isdir(options.run):
            raise UsageError(f'no variable and no folder is called "{options.run}"; runs: {self._told_runs()}.')
        before = run.current()
        opened = run.open(path)
        if before is not None:
            run.set_current(before)  # an option speaks for its own statement only
        return opened

    def _told_runs(self) -> str:
        return ", ".join(self._variables()) or "none in a variable; give a path"

    def _variables(self) -> list[str]:
        """Names of the variables that hold a run."""
        from nbdyn.run import Run

        return [name for name, value in self._shell.user_ns.items() if name[0] != "_" and isinstance(value, Run)]

    def _help(self, options: _Options) -> str:
        """What a bare %dyn prints."""
        from nbdyn.query.words import VERBS

        try:
            asked = self._run(options)
            speaks = f"%dyn speaks to {asked.name} ({asked.uri})"
        except (UsageError, NbdynError) as error:
            speaks = str(error)
        lines = [f"  {verb:8} %dyn {example}" for verb, example in VERBS.items()]
        lines += [f"  {command:8} {example}" for command, example in _SUBCOMMANDS.items()]
        options_line = "  options: -r RUN (variable or path), -o NAME (store the result); %dyn? tells more"
        return "\n".join([speaks, *lines, options_line])

    def complete_options(self, _shell: InteractiveShell, event: Any) -> list[str]:
        """Completion of the option line (a `complete_command` hook).

        Raises:
            TryNext: where no option is being typed.
        """
        before = event.text_until_cursor if hasattr(event, "text_until_cursor") else event.line
        words = before.split()
        typed = "" if before[-1:].isspace() else words[-1]
        previous = words[-1] if not typed else words[-2] if len(words) > 1 else ""
        if _OPTIONS.get(previous) == "run":
            return [*self._variables(), *self._run_names()]
        if typed.startswith("-"):
            return list(_OPTIONS)
        raise TryNext

    def _run_names(self) -> list[str]:
        """Names of the runs beside the current one, as paths that can be opened from here."""
        from nbdyn import run

        asked = run.current()
        if asked is None:
            return []
        from nbdyn.query.runs import siblings

        folder = _folder(asked)
        shown = os.path.relpath(folder) if "://" not in folder else folder
        return [f"{shown}/{name}" if shown != "." else name for name in siblings(asked.uri)]

    def match(self, context: Any) -> dict[str, Any]:
        """Completion of statements (a v2 matcher): in the line of %dyn and in the body of %%dyn."""
        nothing: dict[str, Any] = {"completions": [], "suppress": False}
        typed = self._typed(context)
        if typed is None:
            return nothing
        try:
            options, text = typed
            offers = list(self._offers(options, text))
        except (UsageError, NbdynError):
            return nothing  # a run that cannot be opened is told when the statement runs, not while it is typed
        if not offers:
            return nothing
        begin = min(start for _, start, _ in offers)
        found = [SimpleCompletion(text=text[begin:start] + word, type=kind) for word, start, kind in offers]
        return {"completions": found, "matched_fragment": text[begin:], "suppress": True, "ordered": True}

    def _typed(self, context: Any) -> tuple[_Options, str] | None:
        """The options that hold at the cursor and the statement before it; None outside our magics."""
        before = context.text_until_cursor
        lines = context.full_text.split("\n")
        try:
            if _CELL_MAGIC.match(lines[0]):
                if context.cursor_line == 0:
                    return None
                options = split_options(_CELL_MAGIC.sub("", lines[0]))[0]
                return options, _open_statement([*lines[1 : context.cursor_line], before])
            match = _LINE_MAGIC.match(before)
            if match is None:
                return None
            options, rest = split_options(before[match.end() :])
            # split_options strips the end, and a blank there says that the last word is complete.
            return options, rest + before[len(before.rstrip()) :] if rest else rest
        except UsageError:
            return None  # an option is being typed: the hook completes it

    def _offers(self, options: _Options, text: str) -> Iterator[tuple[str, int, str]]:
        """Words that may come next: (word, where it begins in `text`, kind)."""
        from nbdyn import run
        from nbdyn.query.complete import complete

        asked = self._run(options) if options.run or run.current() is not None else None
        for word in complete(text, None if asked is None else asked.store):
            yield word.text, word.start, word.kind
        if not text.strip() or text.isalpha():
            for command in _SUBCOMMANDS:
                if command.startswith(text) and command != text:
                    yield command, 0, "keyword"


def _open_statement(lines: list[str]) -> str:
    """Of the lines of a cell up to the cursor, the statement that the cursor is in."""
    *above, last = lines
    if above and last.strip() and last[0].isspace():
        found = statements("\n".join(above))
        return f"{found[-1]}\n{last}" if found else last.lstrip()
    found = statements("\n".join(above))
    marked = statements("\n".join([*above, last.strip() or "_"]))
    # Where the line above ended open, a further line makes no further statement.
    return f"{found[-1]}\n{last}" if found and len(marked) == len(found) else last


def _folder(asked: Run) -> str:
    from nbdyn.store.backend import parent

    return parent(asked.uri)


def _unquoted(path: str) -> str:
    """A path without the quotes around it, if it has any."""
    quoted = len(path) > 1 and path[0] == path[-1] and path[0] in "\"'"
    return path[1:-1] if quoted else path


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Add %dyn and %%dyn and their completion to a shell; a second time changes nothing."""
    if _loaded(shell) is not None:
        return
    magics = DynMagics(shell)
    shell.register_magics(magics)
    for key in ("%dyn", "%%dyn"):
        shell.set_hook("complete_command", magics.complete_options, str_key=key)
    shell.Completer.custom_matchers.append(magics.matcher)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Take back what `load_ipython_extension` added: its magics, hooks and matcher, nothing else."""
    magics = _loaded(shell)
    if magics is None:
        return
    manager = shell.magics_manager
    for kind in ("line", "cell"):
        if getattr(manager.magics[kind].get("dyn"), "__self__", None) is magics:
            del manager.magics[kind]["dyn"]
    del manager.registry[DynMagics.__name__]
    _remove_hooks(shell, magics)
    matchers = shell.Completer.custom_matchers
    matchers[:] = [matcher for matcher in matchers if matcher is not magics.matcher]


def _loaded(shell: InteractiveShell) -> DynMagics | None:
    found = shell.magics_manager.registry.get(DynMagics.__name__)
    return found if isinstance(found, DynMagics) else None


def _remove_hooks(shell: InteractiveShell, magics: DynMagics) -> None:
    dispatchers = shell.strdispatchers.get("complete_command")
    for key in ("%dyn", "%%dyn"):
        chain = dispatchers.strs.get(key) if dispatchers is not None else None
        if dispatchers is not None and chain is not None:
            # set_hook binds the hook to the shell; the function inside is ours.
            chain.chain[:] = [entry for entry in chain.chain if entry[1].__func__ != magics.complete_options]
            if not chain.chain:
                del dispatchers.strs[key]
