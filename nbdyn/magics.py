"""`%dyn` and `%%dyn`: the language in a notebook, its completion, and an unload that undoes only its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from IPython.core.completer import context_matcher
from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class, no_var_expand

from nbdyn import magic_hypothesis
from nbdyn.errors import NbdynError
from nbdyn.magic_completion import complete_options, match
from nbdyn.magic_names import asked_run, check_free, collection, folder_of
from nbdyn.magic_options import COMMANDS, Options, split_options, statements
from nbdyn.schema import PROVENANCE
from nbdyn.settings import say

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbdyn.run import Run


@dataclass
class _Answer:
    """The result of a statement, and the name that it was given with `as`."""

    value: Any
    name: str | None = None

    @property
    def shown(self) -> Any:
        """What the notebook shows of it: nothing of a named one."""
        return self.value if self.name is None else None


@magics_class
class DynMagics(Magics):
    """The magics of nbdyn in one shell, and their completion."""

    def __init__(self, shell: InteractiveShell) -> None:
        super().__init__(shell)
        self.matcher = context_matcher(identifier="nbdyn")(lambda context: match(shell, context))

    @no_var_expand
    @line_cell_magic
    def dyn(self, line: str, cell: str | None = None) -> Any:
        """Ask a recorded run; the answer is a pandas.DataFrame.

        Usage::

            %dyn [-r RUN] [-o NAME] [-s NAME] STATEMENT [as NAME]
            %dyn open PATH
            %dyn runs [FOLDER]
            %dyn hypotheses [FOLDER]
            %%dyn [-r RUN] [-o NAME] [-s NAME]
            STATEMENT [as NAME]
            ...

        Options::

            -r, --run RUN    a variable that holds a run, or the path of one (default: the run opened last)
            -o, --out NAME   store the result (of a cell: the last one) under this name and show nothing
            -s, --save NAME  keep the statements with the run under this name: `from NAME` runs them again

        Examples::

            %dyn show loss, |grad| during epoch 3
            %dyn top 20 samples by mean(loss) as hot
            %dyn show mean(loss) per epoch where sample in hot
            best = %dyn compare fc, fc-2 by progress(loss), dist(w, init), acc at step 500
            %dyn explain show w of fc1.*

        In a cell every line is a statement, `#` begins a comment, and an indented line continues the one above. What
        ends with `as NAME` is stored under this name and not shown; later statements may say `sample in NAME`.
        """
        options, rest = split_options(line)
        try:
            answer = self._line(options, rest) if cell is None else self._cell(options, rest, cell)
        except NbdynError as error:
            # A subclass of UsageError would print a whole traceback (IPython); a plain one prints its message.
            raise UsageError(str(error)) from None
        if options.out is None:
            return answer.shown
        self._shell.user_ns[options.out] = answer.value
        return None

    @property
    def _shell(self) -> InteractiveShell:
        assert self.shell is not None
        return self.shell

    def _line(self, options: Options, text: str) -> _Answer:
        from nbdyn.query.tokens import UnfinishedStatement

        if not text:
            print(self._help(options))
            return _Answer(None)
        try:
            return self._all(options, [text])
        except UnfinishedStatement as error:
            raise UsageError(f"{error}\nFor a statement of several lines use %%dyn.") from None

    def _cell(self, options: Options, rest: str, cell: str) -> _Answer:
        if rest:
            raise UsageError(f'the line of %%dyn takes options only, and found "{rest}"; statements go below it.')
        texts = statements(cell)
        if not texts and options.save is None:
            print(self._help(options))
            return _Answer(None)
        return self._all(options, texts)

    def _all(self, options: Options, texts: list[str]) -> _Answer:
        """Run statements one by one and show each result but the last, which is returned; keep them if asked."""
        from nbdyn.query.saved import check, save

        if options.save is not None:
            check(options.save, texts)
        answer = _Answer(None)
        for place, text in enumerate(texts):
            if place and answer.shown is not None:
                self._display(answer.shown)
            answer = self._one(options, text)
        if options.save is not None:
            asked = asked_run(self._shell, options.run)
            save(asked.store, options.save, texts)
            say(f"saved with {asked.name}; %dyn from {options.save} runs it again")
        return answer

    def _display(self, result: Any) -> None:
        from IPython.display import display

        display(result)

    def _one(self, options: Options, text: str) -> _Answer:
        """The answer to one statement or command."""
        verb, _, rest = text.partition(" ")
        if verb == "open":
            return _Answer(self._open(rest.strip()))
        if verb == "runs":
            return _Answer(self._runs(options, rest.strip()))
        if verb == "hypotheses":
            return _Answer(self._hypotheses(options, rest.strip()))
        return self._ask(options, text)

    def _ask(self, options: Options, text: str) -> _Answer:
        """The answer to a statement; its note is printed, and it is stored under its name."""
        from nbdyn.query.language import parse
        from nbdyn.query.saved import saved, unfold
        from nbdyn.query.tree import From, Named

        asked = asked_run(self._shell, options.run)
        tree = typed = parse(text)
        if isinstance(tree, From):
            return self._all(Options(run=options.run), saved(asked.store, tree.name).split("\n"))
        tree, name = unfold(text, asked.store)[0], None
        if isinstance(tree, Named):
            tree, name = tree.statement, tree.name
            check_free(self._shell, name)
        result = asked.query(text if tree == typed else str(tree), lambda wanted: collection(self._shell, wanted))
        note = result.attrs.get(PROVENANCE, {}).get("note")
        if note:
            say(note)
        if name is not None:
            self._shell.user_ns[name] = result
        return _Answer(result, name)

    def _open(self, path: str) -> Run:
        from nbdyn import run

        if not path:
            raise UsageError("%dyn open needs the path of a run: %dyn open runs/fc.")
        return run.open(_unquoted(path))

    def _runs(self, options: Options, folder: str) -> Any:
        from nbdyn.folder import runs

        return runs(*self._folder(options, folder))

    def _hypotheses(self, options: Options, folder: str) -> Any:
        from nbdyn.hypotheses import ledger

        return ledger(*self._folder(options, folder)).frame()

    def _folder(self, options: Options, folder: str) -> list[str]:
        """The folder that is named, or that of the run that is asked; [] for the default."""
        from nbdyn.run import current

        if folder:
            return [_unquoted(folder)]
        asked = asked_run(self._shell, options.run) if options.run else current()
        return [] if asked is None else [folder_of(asked)]

    def _help(self, options: Options) -> str:
        """What a bare %dyn prints."""
        from nbdyn.query.words import VERBS

        try:
            asked = asked_run(self._shell, options.run)
            speaks = f"%dyn speaks to {asked.name} ({asked.uri})"
        except (UsageError, NbdynError) as error:
            speaks = str(error)
        lines = [f"  {verb:8} %dyn {example}" for verb, example in VERBS.items()]
        lines += [f"  {command:8} {example}" for command, example in COMMANDS.items()]
        told = "-r RUN (variable or path), -o NAME (store the result), -s NAME (keep the statement); %dyn? tells more"
        return "\n".join([speaks, *lines, f"  options: {told}"])


def _unquoted(path: str) -> str:
    """A path without the quotes around it, if it has any."""
    quoted = len(path) > 1 and path[0] == path[-1] and path[0] in "\"'"
    return path[1:-1] if quoted else path


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Add %dyn, %%dyn, %%hypothesis and their completion to a shell; a second time changes nothing."""
    if _loaded(shell) is not None:
        return
    magic_hypothesis.load(shell)
    magics = DynMagics(shell)
    shell.register_magics(magics)
    for key in ("%dyn", "%%dyn"):
        shell.set_hook("complete_command", complete_options, str_key=key)
    shell.Completer.custom_matchers.append(magics.matcher)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Take back what `load_ipython_extension` added: its magics, hooks and matcher, nothing else."""
    magics = _loaded(shell)
    if magics is None:
        return
    magic_hypothesis.unload(shell)
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
            chain.chain[:] = [entry for entry in chain.chain if entry[1].__func__ != complete_options]
            if not chain.chain:
                del dispatchers.strs[key]
