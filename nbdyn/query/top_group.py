"""The part of the parser that reads `top` and `group`."""

from __future__ import annotations

from nbdyn.errors import did_you_mean
from nbdyn.query.clauses import read_member, read_selector, read_tail
from nbdyn.query.expressions import ExpressionParser
from nbdyn.query.measures import measure_follows, read_measure, try_measure
from nbdyn.query.tree import Call, Expression, Field, Group, Measure, Selector, Top
from nbdyn.query.words import MEASURE_AGGREGATES, ONLY_CELLS, PLURALS, QUANTITIES, SAME_QUANTITY, WITHOUT_FIELDS


def read_top(parser: ExpressionParser) -> Top:
    """What follows `top`, taken."""
    scanner = parser.scanner
    start = scanner.position
    if scanner.peek().kind != "number":
        raise scanner.unexpected("how many (20) or what part (1%)")
    count = parser.number()
    percent = bool(scanner.accept("%"))
    if percent and not 0 < count <= 100:
        raise scanner.error("a percentage above 0 and up to 100 is needed here, such as 1%.", start)
    if not percent and not (count.is_integer() and 1 <= count < 2**53):
        raise scanner.error("a whole number from 1 on, or a percentage, is needed here.", start)
    what = read_member(scanner, plural=True)
    per_at = scanner.position
    per = read_member(scanner, plural=False) if scanner.accept("per") else None
    if per == what:
        raise scanner.error(f"{PLURALS[what]} are ranked among all of them; leave out per {per}.", per_at)
    selector = _read_of(parser)
    by = _read_by(parser, what, per)
    return Top(count, percent, what, per, selector, by, *read_tail(parser), position=start)


def read_group(parser: ExpressionParser) -> Group:
    """What follows `group`, taken."""
    start = parser.scanner.position
    what = read_member(parser.scanner, plural=True)
    selector = _read_of(parser)
    by = _read_by(parser, what, None)
    into = parser.whole(least=2) if parser.scanner.accept("into") else Group.into
    return Group(what, selector, by, into, *read_tail(parser), position=start)


def _read_of(parser: ExpressionParser) -> Selector | None:
    return read_selector(parser.scanner) if parser.scanner.accept("of") else None


def _read_by(parser: ExpressionParser, what: str, per: str | None) -> Measure | Expression:
    scanner = parser.scanner
    scanner.require("by")
    start = scanner.position
    if measure_follows(scanner):
        measure = read_measure(parser)
        if scanner.look("+", "-", "*", "/"):
            message = "a measure of cells stands alone; an expression over recorded fields stands in brackets."
            raise scanner.error(message, start)
        return measure
    try_measure(parser)  # takes nothing here: what could stand of a measure is offered beside the fields
    by = parser.value()
    if isinstance(by, Field) and scanner.look(*QUANTITIES, "|"):
        known = did_you_mean(by.name, MEASURE_AGGREGATES)
        raise scanner.error(f'nothing is called "{by.name}" that is made of cells; {known}', start)
    _check_fields(parser, by, (what, per), start)
    return by


def _check_fields(parser: ExpressionParser, by: Expression, members: tuple[str | None, ...], start: int) -> None:
    """Refuse an expression where only cells can be ranked."""
    bare = by.argument if isinstance(by, Call) and by.function == "abs" else by
    quantity = SAME_QUANTITY.get(bare.name, bare.name) if isinstance(bare, Field) else ""
    named = quantity if quantity in QUANTITIES else "g"
    measures = f"by sum |{named}|, max |{named}|, norm {named}"
    for member in members:
        if member in WITHOUT_FIELDS:
            raise parser.scanner.error(f"{PLURALS[member]} are ranked by a measure of their cells: {measures}.", start)
    if quantity in ONLY_CELLS:
        raise parser.scanner.error(f"{quantity} has many cells; say what is made of them: {measures}.", start)
