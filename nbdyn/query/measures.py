"""The part of the parser that reads measures of cells: `sum |g|`, `net dw`, `share(|grad| > explode)`."""

from __future__ import annotations

from nbdyn.errors import QueryError
from nbdyn.query.expressions import ExpressionParser
from nbdyn.query.tokens import Scanner
from nbdyn.query.tree import Measure
from nbdyn.query.words import DISPLACEMENTS, EXPLODE, MEASURE_AGGREGATES, QUANTITIES, SAME_QUANTITY

_QUANTITY_WORDS = (*QUANTITIES, *SAME_QUANTITY)


def measure_follows(scanner: Scanner) -> bool:
    """Whether an aggregate word and a quantity stand here, with or without brackets: the beginning of a measure.

    >>> measure_follows(Scanner("sum(|g|)")), measure_follows(Scanner("mean(loss)"))
    (True, False)
    """
    return _rest_of_beginning(scanner)[:1] not in ([], [""])


def _rest_of_beginning(scanner: Scanner) -> list[str]:
    """The words here from the quantity of a measure on; [""] where they end before it, [] where it is no measure."""
    words = [*scanner.ahead(5), ""]
    for wanted in (("|",), MEASURE_AGGREGATES, ("(",), ("|",)):
        if words[0] in wanted:
            words = words[1:]
        elif wanted is MEASURE_AGGREGATES:
            return [""] if words == [""] else []
    return words if words[0] in (*_QUANTITY_WORDS, "") else []


def read_quantity(scanner: Scanner) -> str:
    """A quantity by its first name, taken: `delta` is err."""
    scanner.possible("<quantity>")
    word = scanner.peek().text
    if word not in _QUANTITY_WORDS:
        raise scanner.unexpected(f"a quantity ({', '.join(_QUANTITY_WORDS)})")
    scanner.advance()
    return SAME_QUANTITY.get(word, word)


def read_measure(parser: ExpressionParser) -> Measure:
    """The measure that stands here, taken.

    Raises:
        QueryError: where none does.
    """
    scanner = parser.scanner
    start = scanner.position
    absolute = bool(scanner.accept("|"))
    scanner.possible("<aggregate>")
    if scanner.peek().text not in MEASURE_AGGREGATES:
        raise scanner.unexpected(f"a measure ({', '.join(MEASURE_AGGREGATES)} of cells)")
    aggregate = scanner.advance().text
    if aggregate == "share":
        if absolute:
            raise scanner.error("a share is never negative; write it without |...|.", start)
        return _read_share(parser, start)
    bracket = scanner.accept("(")
    at = scanner.position
    quantity, magnitude = _read_cells(scanner)
    if aggregate in DISPLACEMENTS and (quantity != "dw" or magnitude):
        raise scanner.error(f"net and path are displacements of weights: {aggregate} dw.", at)
    if bracket:
        scanner.require(")")
    if absolute:
        scanner.require("|")
    return Measure(aggregate, quantity, magnitude, absolute, position=start)


def try_measure(parser: ExpressionParser) -> Measure | None:
    """The measure that stands here, taken; None, and nothing taken, where none does."""
    start = parser.scanner.position
    if not _rest_of_beginning(parser.scanner):
        parser.scanner.possible("<aggregate>")
        return None
    try:
        return read_measure(parser)
    except QueryError:
        # No measure: the scanner has remembered what could have stood here, for hints and completion.
        parser.scanner.jump(start)
        return None


def _read_cells(scanner: Scanner) -> tuple[str, bool]:
    """A quantity, and whether it is taken by its magnitude."""
    magnitude = bool(scanner.accept("|"))
    quantity = read_quantity(scanner)
    if magnitude:
        scanner.require("|")
    return quantity, magnitude


def _read_share(parser: ExpressionParser, start: int) -> Measure:
    scanner = parser.scanner
    scanner.require("(")
    quantity, magnitude = _read_cells(scanner)
    operator = parser.comparison()
    if operator is None:
        raise scanner.unexpected("a comparison (share(|grad| > 1e-3))")
    if scanner.accept(EXPLODE):
        threshold: float | str = EXPLODE
    else:
        threshold = parser.percentage().value
    scanner.require(")")
    return Measure("share", quantity, magnitude, condition=(operator, threshold), position=start)
