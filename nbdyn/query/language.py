"""The parser: one statement of text to its tree, by recursive descent.

Grammar::

    statement := ["explain" | "estimate"] (show | top | group | last | compare | from)
                 ["approximately" "within" number["%"]] ["as" name]
    show      := "show" item ("," item)* ["per" unit ("," unit)*] [scope] ["where" condition]
    item      := quantity "of" selector | measure "of" selector | "samples" | "visits" | expression
    top       := "top" number["%"] member ["per" member] ["of" selector] "by" by [scope] ["where" condition]
    group     := "group" member ["of" selector] "by" by ["into" N] [scope] ["where" condition]
    by        := measure | expression
    measure   := aggregate cells | aggregate "(" cells ")" | "|" aggregate cells "|" | ("net" | "path") "dw"
               | "share" "(" cells ("<" | ">" | ...) (number | "explode") ")"
    cells     := quantity | "|" quantity "|"
    quantity  := "g" | "grad" | "w" | "dw" | "act" | "err" | "delta"
    last      := "last" N "samples" "before" ["first" | "every"] event [scope]
    event     := selector "becomes" number ["exactly" | "within" number] | selector "crosses" number
               | measure ["of" selector] ("<" | ">" | ...) number["%"] | condition
    compare   := "compare" run ("," run)+ "by" name ("," name)* [scope]
    from      := "from" name
    scope     := "during" ("epoch" | "step") N | "during" ("epochs" | "steps") a..b | "at step" N | "over all"

`top` and `group` take a scope after `where`, too, as `show` does. After `by`, an aggregate word followed by a quantity
is a measure of cells; anything else, and whatever stands in brackets, is an expression over recorded fields.
"""

from __future__ import annotations

import re
from dataclasses import replace

from nbdyn.errors import QueryError, did_you_mean
from nbdyn.query.clauses import read_scope, read_selector, read_tail, read_unit, read_within
from nbdyn.query.expressions import ExpressionParser
from nbdyn.query.measures import measure_follows, read_measure, read_quantity, try_measure
from nbdyn.query.top_group import read_group, read_top
from nbdyn.query.tree import (
    Becomes,
    Compare,
    Crosses,
    Estimate,
    Event,
    Exceeds,
    Explain,
    Expression,
    From,
    Group,
    Last,
    Measure,
    Measured,
    Named,
    Plain,
    RunName,
    Scope,
    Selector,
    Show,
    Statement,
    Table,
    Top,
    Weights,
)
from nbdyn.query.words import (
    AGGREGATES,
    CELL_UNITS,
    EXPLODE,
    MEASURES,
    ONLY_CELLS,
    PREFIXES,
    QUANTITIES,
    SAME_QUANTITY,
    TABLES,
    UNITS,
    VERBS,
)

_NO_AGGREGATE_EVENT = (
    "an event speaks of the values of one step (loss > 5, |grad| > 10, nan(loss)) or of its cells "
    "(share(|grad| > explode) > 10%, max |g| of fc1.* > 3)."
)
_EXACT_ONLY = (
    "only measures of cells are approximated (top 20 samples by sum |g| approximately within 5%); "
    "this is read exactly: leave it out."
)
_BEFORE_A_NAME = ("not", *AGGREGATES)
"""Words of a condition that a name may follow, unlike a parameter."""
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
        prefix = scanner.accept(*PREFIXES)
        readers = {
            "show": self._show,
            "top": lambda: read_top(self),
            "group": lambda: read_group(self),
            "last": self._last,
            "compare": self._compare,
            "from": self._from,
        }
        verb = scanner.accept(*readers)
        if verb is None:
            raise scanner.unexpected("a verb (" + ", ".join(VERBS if prefix is None else readers) + ")")
        tree = self._approximate(readers[verb]())
        told = {"explain": Explain, "estimate": Estimate}[prefix](tree) if prefix else tree
        if scanner.accept("as"):
            start = scanner.position
            told = Named(told, self.name("a name for the result", "<new name>"), start)
        if scanner.peek().kind != "end":
            raise scanner.unexpected("the end of the statement")
        return told

    def _approximate(self, tree: Plain) -> Plain:
        measured = isinstance(tree, Show) and isinstance(tree.items[0], Measured)
        if measured or (isinstance(tree, Top | Group) and isinstance(tree.by, Measure)):
            return replace(tree, within=read_within(self))
        if self.scanner.peek().text == "approximately":
            raise self.scanner.error(_EXACT_ONLY)
        return tree

    def _from(self) -> From:
        start = self.scanner.position
        return From(self.name("the name of a saved statement", "<saved>"), start)

    # show ---------------------------------------------------------------------------------------------------------

    def _show(self) -> Show:
        items = [self._item()]
        while self.scanner.accept(","):
            items.append(self._item())
        for item in items:
            if isinstance(item, Measured) and len(items) > 1:
                message = "a measure of cells comes as a frame of its own: ask for it alone."
                raise self.scanner.error(message, item.measure.position)
        per = self._per(cells=isinstance(items[0], Measured))
        scope, where = read_tail(self)
        return Show(tuple(items), per, scope, where)

    def _item(self) -> Expression | Weights | Table | Measured:
        scanner = self.scanner
        scanner.possible(*(f"{word} of" for word in QUANTITIES), *TABLES)
        token = scanner.peek()
        if token.kind == "name" and token.text in TABLES:
            scanner.advance()
            return Table(token.text, token.start)
        if token.kind == "name" and token.text in (*QUANTITIES, *SAME_QUANTITY):
            quantity = read_quantity(scanner)
            if scanner.accept("of"):
                return Weights(quantity, read_selector(scanner))
            scanner.jump(token.start)
        measure = try_measure(self)
        if measure is not None:
            if scanner.accept("of"):
                return Measured(measure, read_selector(scanner))
            if measure.quantity in ONLY_CELLS or (measure.condition is not None and EXPLODE in measure.condition):
                raise scanner.unexpected(f'"of" and parameters ({measure} of fc1.*, {measure} of all)')
            scanner.jump(token.start)
        value = self.value()
        if scanner.look("of"):
            names = ", ".join(QUANTITIES)
            raise scanner.error(f"of parameters there are {names}, and measures of them: sum |g| of fc1.*.")
        return value

    def _per(self, *, cells: bool) -> tuple[str, ...]:
        if not self.scanner.accept("per"):
            return ()
        units = [self._unit(cells=cells)]
        while self.scanner.accept(","):
            units.append(self._unit(cells=cells))
        return tuple(dict.fromkeys(units))

    def _unit(self, *, cells: bool) -> str:
        start = self.scanner.position
        unit = read_unit(self.scanner, CELL_UNITS if cells else UNITS)
        if not cells and unit not in UNITS:
            known = ", ".join(UNITS)
            message = f"cells are told apart per {unit} (show sum |g| of all per {unit}), recorded fields per {known}."
            raise self.scanner.error(message, start)
        return unit

    # last ---------------------------------------------------------------------------------------------------------

    def _last(self) -> Last:
        count = self.whole(least=1)
        self.scanner.require("samples", "sample")
        self.scanner.require("before")
        every = self.scanner.accept("first", "every") == "every"
        event = self._event()
        return Last(count, event, every, read_scope(self) or Scope())

    def _event(self) -> Event:
        scanner = self.scanner
        if measure_follows(scanner):
            return self._exceeds()
        try_measure(self)  # takes nothing here: what could stand of a measure is offered, too
        start = scanner.position
        scanner.possible("<selector>", "<field>")
        found = scanner.scan_selector()
        if found is not None:
            scanner.jump(found[1])
            word = scanner.accept("becomes", "crosses")
            if word is not None:
                return self._weight_event(word, Selector(found[0], start))
            goes_on = scanner.look("and", "or", "in", "not", "during", "at", "over", "as", "approximately")
            is_parameter = _PARAMETER.search(found[0].split("`")[-1])
            if ((scanner.peek().kind == "name" and not goes_on) or is_parameter) and found[0] not in _BEFORE_A_NAME:
                raise scanner.unexpected('"becomes", "crosses" or a comparison')
            scanner.jump(start)
        with self.without_aggregates(_NO_AGGREGATE_EVENT):
            return self.condition()

    def _exceeds(self) -> Exceeds:
        scanner = self.scanner
        measure = read_measure(self)
        selector = read_selector(scanner) if scanner.accept("of") else None
        operator = self.comparison()
        if operator is None:
            of = "" if selector is not None else '"of" or '
            raise scanner.unexpected(f"{of}a comparison ({measure} > 10%)")
        value = self.percentage()
        if scanner.look("and", "or", "+", "-", "*", "/"):
            raise scanner.error("an event of cells is one measure and one number: share(|grad| > explode) > 10%.")
        return Exceeds(measure, selector, operator, value)

    def _weight_event(self, word: str, selector: Selector) -> Becomes | Crosses:
        value = self.signed_number()
        if word == "crosses":
            return Crosses(selector, value)
        if self.scanner.accept("within"):
            return Becomes(selector, value, self.number())
        self.scanner.accept("exactly")
        return Becomes(selector, value)

    # compare ------------------------------------------------------------------------------------------------------

    def _compare(self) -> Compare:
        runs = [self._run()]
        while self.scanner.accept(","):
            runs.append(self._run())
        if len(runs) < 2:
            raise self.scanner.unexpected('"," and a second run')
        self.scanner.require("by")
        measures = [self._compared()]
        while self.scanner.accept(","):
            measures.append(self._compared())
        return Compare(tuple(runs), tuple(dict.fromkeys(measures)), read_scope(self) or Scope())

    def _run(self) -> RunName:
        start = self.scanner.position
        self.scanner.possible("<run>")
        name = self.scanner.take_run()
        if name is None:
            raise self.scanner.unexpected("the name or path of a run")
        return RunName(name, start)

    def _compared(self) -> str:
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
