"""The parser: one statement of text to its tree, by recursive descent.

Grammar::

    statement := ["explain"] (show | last | compare)
    show      := "show" item ("," item)* ["per" unit ("," unit)*] [scope] ["where" condition]
    item      := ("w" | "dw") "of" selector | "samples" | "visits" | expression
    last      := "last" N "samples" "before" ["first" | "every"] event [scope]
    event     := selector "becomes" number ["exactly" | "within" number] | selector "crosses" number | condition
    compare   := "compare" run ("," run)+ "by" measure ("," measure)* [scope]
    scope     := "during" ("epoch" | "step") N | "during" ("epochs" | "steps") a..b | "at step" N | "over all"
"""

from __future__ import annotations

import re

from nbdyn.errors import QueryError, did_you_mean
from nbdyn.query.expressions import ExpressionParser
from nbdyn.query.tokens import Scanner
from nbdyn.query.tree import (
    Becomes,
    Compare,
    Crosses,
    Explain,
    Expression,
    Last,
    RunName,
    Scope,
    Selector,
    Show,
    Statement,
    Table,
    Weights,
)
from nbdyn.query.words import MEASURES, TABLES, UNBUILT_UNITS, UNBUILT_VERBS, UNITS, VERBS

_NO_AGGREGATE_WHERE = "a condition speaks of one row at a time; mean, share and the like stand in show ... per epoch."
_NO_AGGREGATE_EVENT = (
    "an event over many values (share, mean, max ...) is not built yet; "
    "it may speak of the values of one step: loss > 5, |grad| > 10, nan(loss)."
)
_PARAMETER = re.compile(r"[\[*]|\.[^\W\d]|[^\W\d]\w*\.")


def parse(text: str) -> Statement:
    """The tree of one statement.

    Args:
        text: the statement; blanks and `# comments` are free.

    Returns:
        A frozen tree; `str(tree)` is the statement in its normal form.

    Raises:
        QueryError: with the statement, a caret under the place and the nearest known word.

    >>> str(parse("last 50 samples before fc1.weight[3, 5] becomes 0"))
    'last 50 samples before fc1.weight[3,5] becomes 0 exactly'
    """
    return _Parser(text).statement()


def expected_at_end(text: str) -> tuple[str, ...]:
    """What may come next after the beginning of a statement: words, and kinds such as "<field>".

    >>> expected_at_end("last 50 samples ")
    ('before',)
    """
    parser = _Parser(text)
    try:
        parser.statement()
    except QueryError:
        pass  # an unfinished statement is what is asked about here; what was tried at its end is the answer
    return parser.scanner.possible_at(len(text))


class _Parser(ExpressionParser):
    """Reads statements."""

    def statement(self) -> Statement:
        scanner = self.scanner
        explain = scanner.accept("explain")
        self._refuse_unbuilt(scanner)
        verb = scanner.accept("show", "last", "compare")
        if verb is None:
            words = VERBS if not explain else [word for word in VERBS if word != "explain"]
            raise scanner.unexpected("a verb (" + ", ".join(words) + ")")
        tree = {"show": self._show, "last": self._last, "compare": self._compare}[verb]()
        if scanner.peek().kind != "end":
            raise scanner.unexpected("the end of the statement")
        return Explain(tree) if explain else tree

    @staticmethod
    def _refuse_unbuilt(scanner: Scanner) -> None:
        token = scanner.peek()
        if token.text in UNBUILT_VERBS:
            built = ", ".join(VERBS)
            raise scanner.error(f'"{token.text}" is not built yet; this version knows {built}.')

    def _show(self) -> Show:
        items = [self._item()]
        while self.scanner.accept(","):
            items.append(self._item())
        per = self._per()
        scope = self._scope()
        where = self._where()
        if scope is None and where is not None:
            scope = self._scope()
        return Show(tuple(items), per, scope or Scope(), where)

    def _item(self) -> Expression | Weights | Table:
        scanner = self.scanner
        scanner.possible("w of", "dw of", *TABLES)
        token = scanner.peek()
        if token.kind == "name" and token.text in TABLES:
            scanner.advance()
            return Table(token.text, token.start)
        if token.kind == "name" and token.text in ("w", "dw"):
            scanner.advance()
            if scanner.accept("of"):
                return Weights(token.text, self._selector())
            scanner.jump(token.start)
        return self.value()

    def _per(self) -> tuple[str, ...]:
        if not self.scanner.accept("per"):
            return ()
        units = [self._unit()]
        while self.scanner.accept(","):
            units.append(self._unit())
        return tuple(dict.fromkeys(units))

    def _unit(self) -> str:
        token = self.scanner.peek()
        if token.text in UNBUILT_UNITS:
            raise self.scanner.error(f'"per {token.text}" is not built yet; this version knows {", ".join(UNITS)}.')
        return self.scanner.require(*UNITS)

    def _where(self) -> Expression | None:
        if not self.scanner.accept("where"):
            return None
        with self.without_aggregates(_NO_AGGREGATE_WHERE):
            return self.condition()

    def _selector(self) -> Selector:
        start = self.scanner.position
        self.scanner.possible("<selector>", "all")
        found = self.scanner.scan_selector()
        if found is None:
            raise self.scanner.unexpected("a parameter (fc1.weight[3,5], fc1.*, all)")
        self.scanner.jump(found[1])
        return Selector(found[0], start)

    def _scope(self) -> Scope | None:
        start = self.scanner.position
        word = self.scanner.accept("during", "at", "over")
        if word is None:
            return None
        if word == "over":
            self.scanner.require("all")
            return Scope()
        if word == "at":
            self.scanner.require("step")
            return self._range("steps", start, single=True)
        unit = self.scanner.require("epoch", "epochs", "step", "steps")
        return self._range("epochs" if unit.startswith("epoch") else "steps", start, single=not unit.endswith("s"))

    def _range(self, kind: str, start: int, *, single: bool) -> Scope:
        first = self.whole()
        if single and self.scanner.look(".."):
            raise self.scanner.error(f'a range is written "during {kind} {first}..{first + 1}".')
        if single or not self.scanner.accept(".."):
            return Scope(kind, first, first, start)
        last_at = self.scanner.position
        last = self.whole()
        if last < first:
            raise self.scanner.error(f"this range ends before it begins; write {last}..{first}.", last_at)
        return Scope(kind, first, last, start)

    def _last(self) -> Last:
        count = self.whole(least=1)
        self.scanner.require("samples", "sample")
        self.scanner.require("before")
        every = self.scanner.accept("first", "every") == "every"
        event = self._event()
        return Last(count, event, every, self._scope() or Scope())

    def _event(self) -> Becomes | Crosses | Expression:
        scanner = self.scanner
        start = scanner.position
        scanner.possible("<selector>", "<field>")
        found = scanner.scan_selector()
        if found is not None:
            scanner.jump(found[1])
            word = scanner.accept("becomes", "crosses")
            if word is not None:
                return self._weight_event(word, Selector(found[0], start))
            follows_name = scanner.peek().kind == "name" and not scanner.look("and", "or", "during", "at", "over")
            is_parameter = _PARAMETER.search(found[0].split("`")[-1])
            if (follows_name or is_parameter) and found[0] != "not":
                raise scanner.unexpected('"becomes", "crosses" or a comparison')
            scanner.jump(start)
        with self.without_aggregates(_NO_AGGREGATE_EVENT):
            return self.condition()

    def _weight_event(self, word: str, selector: Selector) -> Becomes | Crosses:
        value = self.signed_number()
        if word == "crosses":
            return Crosses(selector, value)
        if self.scanner.accept("within"):
            return Becomes(selector, value, self.number())
        self.scanner.accept("exactly")
        return Becomes(selector, value)

    def _compare(self) -> Compare:
        runs = [self._run()]
        while self.scanner.accept(","):
            runs.append(self._run())
        if len(runs) < 2:
            raise self.scanner.unexpected('"," and a second run')
        self.scanner.require("by")
        measures = [self._measure()]
        while self.scanner.accept(","):
            measures.append(self._measure())
        return Compare(tuple(runs), tuple(dict.fromkeys(measures)), self._scope() or Scope())

    def _run(self) -> RunName:
        start = self.scanner.position
        self.scanner.possible("<run>")
        name = self.scanner.take_run()
        if name is None:
            raise self.scanner.unexpected("the name or path of a run")
        return RunName(name, start)

    def _measure(self) -> str:
        scanner = self.scanner
        start = scanner.position
        scanner.possible("<measure>")
        if scanner.accept("|"):
            name = self._word()
            scanner.require("|")
            measure = f"|{name}|"
        else:
            measure = self._word()
            if scanner.accept("("):
                arguments = [self._word()]
                while scanner.accept(","):
                    arguments.append(self._word())
                scanner.require(")")
                measure += f"({', '.join(arguments)})"
        if measure not in MEASURES:
            raise scanner.error(f'unknown measure "{measure}"; {did_you_mean(measure, MEASURES)}', start)
        return measure

    def _word(self) -> str:
        if self.scanner.peek().kind != "name":
            raise self.scanner.unexpected("a measure (" + ", ".join(MEASURES) + ")")
        return self.scanner.advance().text
