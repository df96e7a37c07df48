"""The parts that several statements share: selectors, members, units, scopes, and how exact an answer must be."""

from __future__ import annotations

from nbdyn.query.expressions import ExpressionParser
from nbdyn.query.tokens import Scanner
from nbdyn.query.tree import Expression, Scope, Selector
from nbdyn.query.words import CELL_UNITS, MEMBERS, PLURALS, SAME_MEMBER, SAME_UNIT

_NO_AGGREGATE = "a condition speaks of one row at a time; mean, share and the like stand in show ... per epoch."
_MEMBER_FORMS = {form: word for word in (*MEMBERS, *SAME_MEMBER) for form in (word, PLURALS[word])}
_UNIT_FORMS = {"run": "run"} | {form: word for word in (*CELL_UNITS, *SAME_UNIT) for form in (word, PLURALS[word])}


def read_selector(scanner: Scanner) -> Selector:
    """The parameters that are named here, taken."""
    start = scanner.position
    scanner.possible("<selector>", "all")
    found = scanner.scan_selector()
    if found is None:
        raise scanner.unexpected("a parameter (fc1.weight[3,5], fc1.*, all)")
    scanner.jump(found[1])
    return Selector(found[0], start)


def read_member(scanner: Scanner, *, plural: bool) -> str:
    """A word of MEMBERS, taken; singular and plural both read, one of them is offered."""
    offered = [PLURALS[word] if plural else word for word in (*MEMBERS, *SAME_MEMBER)]
    word = _read_form(scanner, _MEMBER_FORMS, offered)
    return SAME_MEMBER.get(word, word)


def read_unit(scanner: Scanner, offered: tuple[str, ...]) -> str:
    """A word of CELL_UNITS, taken; `offered` are those that fit here."""
    start = scanner.position
    word = _read_form(scanner, _UNIT_FORMS, [*offered, *SAME_UNIT])
    if word == "run":
        raise scanner.error("a statement asks one run; several are set side by side: compare a, b by loss.", start)
    return SAME_UNIT.get(word, word)


def _read_form(scanner: Scanner, forms: dict[str, str], offered: list[str]) -> str:
    scanner.possible(*offered)
    token = scanner.peek()
    if token.kind != "name" or token.text not in forms:
        raise scanner.unexpected(f"one of {', '.join(offered)}")
    scanner.advance()
    return forms[token.text]


def read_tail(parser: ExpressionParser) -> tuple[Scope, Expression | None]:
    """Scope and `where`, in either order, taken."""
    scope = read_scope(parser)
    where = None
    if parser.scanner.accept("where"):
        with parser.without_aggregates(_NO_AGGREGATE):
            where = parser.condition()
    if scope is None and where is not None:
        scope = read_scope(parser)
    return scope or Scope(), where


def read_scope(parser: ExpressionParser) -> Scope | None:
    """The scope that stands here, taken; None where there is none."""
    scanner = parser.scanner
    start = scanner.position
    word = scanner.accept("during", "at", "over")
    if word is None:
        return None
    if word == "over":
        scanner.require("all")
        return Scope()
    if word == "at":
        scanner.require("step")
        return _read_range(parser, "steps", start, single=True)
    unit = scanner.require("epoch", "epochs", "step", "steps")
    return _read_range(parser, "epochs" if unit.startswith("epoch") else "steps", start, single=not unit.endswith("s"))


def _read_range(parser: ExpressionParser, kind: str, start: int, *, single: bool) -> Scope:
    scanner = parser.scanner
    first = parser.whole()
    if single and scanner.look(".."):
        raise scanner.error(f'a range is written "during {kind} {first}..{first + 1}".')
    if single or not scanner.accept(".."):
        return Scope(kind, first, first, start)
    last_at = scanner.position
    last = parser.whole()
    if last < first:
        raise scanner.error(f"this range ends before it begins; write {last}..{first}.", last_at)
    return Scope(kind, first, last, start)


def read_within(parser: ExpressionParser) -> float | None:
    """The relative error that `approximately within 5%` allows, taken; None where nothing of it stands here."""
    scanner = parser.scanner
    if not scanner.accept("approximately"):
        return None
    scanner.require("within")
    start = scanner.position
    within = parser.percentage().value
    if not 0 < within < 1:
        raise scanner.error("an error between 0 and 100 % is needed here, such as 5%.", start)
    return within
