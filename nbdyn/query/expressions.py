"""The part of the parser that reads expressions and conditions (recursive descent, no evaluation)."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from keyword import iskeyword

from nbdyn.query.tokens import Scanner
from nbdyn.query.tree import (
    Aggregate,
    Binary,
    Call,
    Comparison,
    Expression,
    Field,
    In,
    Logic,
    Negative,
    Not,
    Number,
    OneOf,
)
from nbdyn.query.words import AGGREGATES, CONDITIONS, FUNCTIONS, IN_FIELDS, RESERVED

MAX_OPERATIONS = 64
"""Operators, brackets and calls in one statement, at most: it keeps every tree shallow enough to walk."""

COMPARISONS = ("<=", ">=", "==", "!=", "<", ">", "=")


def is_condition(node: Expression) -> bool:
    """Whether a node may stand where a condition is needed (a bare field is checked once its column is known)."""
    conditional_call = isinstance(node, Call) and node.function in CONDITIONS
    return conditional_call or isinstance(node, Comparison | Logic | Not | Field | In | OneOf)


class ExpressionParser:
    """Reads expressions from a scanner; `aggregates` says why none may stand here, or None where they may."""

    def __init__(self, text: str) -> None:
        """Start at the beginning of a statement."""
        self.scanner = Scanner(text)
        self._operations = 0
        self._no_aggregate: str | None = None

    @contextmanager
    def without_aggregates(self, why: str) -> Generator[None, None, None]:
        """Read expressions in which mean(...) and its like are an error that says why."""
        before, self._no_aggregate = self._no_aggregate, why
        try:
            yield
        finally:
            self._no_aggregate = before

    def _spend(self) -> None:
        self._operations += 1
        if self._operations > MAX_OPERATIONS:
            raise self.scanner.error(f"a statement has at most {MAX_OPERATIONS} operations; split it in two.")

    def condition(self) -> Expression:
        """An expression that is true or false."""
        start = self.scanner.position
        return self._checked(self._either(), start, condition=True)

    def value(self) -> Expression:
        """An expression that is a number."""
        start = self.scanner.position
        return self._checked(self._sum(), start, condition=False)

    def _checked(self, node: Expression, start: int, *, condition: bool) -> Expression:
        if condition and not is_condition(node):
            raise self.scanner.error("a condition is needed here, such as loss > 5.", start)
        if not condition and is_condition(node) and not isinstance(node, Field):
            raise self.scanner.error("a number is needed here, and this is a condition.", start)
        return node

    def _either(self) -> Expression:
        start = self.scanner.position
        node = self._both()
        while self.scanner.look("or"):
            node = self._logic(node, start, self._both)
        return node

    def _both(self) -> Expression:
        start = self.scanner.position
        node = self._negation()
        while self.scanner.look("and"):
            node = self._logic(node, start, self._negation)
        return node

    def _logic(self, left: Expression, start: int, operand: Callable[[], Expression]) -> Logic:
        left = self._checked(left, start, condition=True)
        self._spend()
        operator = self.scanner.advance().text
        second = self.scanner.position
        return Logic(operator, left, self._checked(operand(), second, condition=True))

    def _negation(self) -> Expression:
        if not self.scanner.accept("not"):
            return self._comparison()
        self._spend()
        start = self.scanner.position
        return Not(self._checked(self._negation(), start, condition=True))

    def _comparison(self) -> Expression:
        start = self.scanner.position
        left = self._sum()
        if self.scanner.look("in", "not"):
            return self._membership(left, start)
        operator = self.comparison()
        if operator is None:
            return left
        self._spend()
        left = self._checked(left, start, condition=False)
        right = self.value()
        if self.scanner.look(*COMPARISONS):
            raise self.scanner.error("one comparison at a time: write a < b and b < c.")
        return Comparison(operator, left, right)

    def comparison(self) -> str | None:
        """The comparison sign that stands here, taken, in its normal form."""
        operator = self.scanner.accept(*COMPARISONS)
        return "=" if operator == "==" else operator

    def _membership(self, left: Expression, start: int) -> Expression:
        """`in NAME` or `in (3, 17)` after a field; `not in` is the same turned round."""
        scanner = self.scanner
        if not isinstance(left, Field) or left.name not in IN_FIELDS:
            raise scanner.error(f"only {', '.join(IN_FIELDS)} may be in something: sample in hot.", start)
        self._spend()
        turned = bool(scanner.accept("not"))
        scanner.require("in")
        if not scanner.accept("("):
            node: Expression = In(left.name, self.name("the name of a result, or (3, 17, 99)", "<name>"), start)
        else:
            values = [self._whole_value()]
            while scanner.accept(","):
                values.append(self._whole_value())
            scanner.require(")")
            node = OneOf(left.name, tuple(values), start)
        return Not(node) if turned else node

    def _whole_value(self) -> int:
        sign = -1 if self.scanner.accept("-") else 1
        return sign * self.whole()

    def name(self, needed: str, kind: str) -> str:
        """A name that Python could give to a variable, taken; `kind` stands for it in completions."""
        self.scanner.possible(kind)
        token = self.scanner.peek()
        if token.kind != "name":
            raise self.scanner.unexpected(needed)
        if not token.text.isidentifier() or iskeyword(token.text):
            raise self.scanner.error(f'"{token.text}" cannot be the name of a variable; type another, such as hot.')
        return self.scanner.advance().text

    def _sum(self) -> Expression:
        return self._chain(("+", "-"), self._product)

    def _product(self) -> Expression:
        return self._chain(("*", "/"), self._signed)

    def _chain(self, operators: tuple[str, ...], operand: Callable[[], Expression]) -> Expression:
        start = self.scanner.position
        node = operand()
        while operator := self.scanner.accept(*operators):
            self._spend()
            node = self._checked(node, start, condition=False)
            second = self.scanner.position
            node = Binary(operator, node, self._checked(operand(), second, condition=False))
        return node

    def _signed(self) -> Expression:
        if not self.scanner.accept("-"):
            return self._primary()
        self._spend()
        start = self.scanner.position
        return Negative(self._checked(self._signed(), start, condition=False))

    def _primary(self) -> Expression:
        scanner = self.scanner
        scanner.possible("<field>")
        token = scanner.peek()
        if token.kind == "number":
            return Number(self.number(), bool(scanner.accept("%")))
        if token.kind == "quoted":
            return Field(scanner.advance().text[1:-1], token.start)
        if scanner.accept("("):
            self._spend()
            node = self._either()
            scanner.require(")")
            return node
        if scanner.accept("|"):
            self._spend()
            node = self.value()
            scanner.require("|")
            return Call("abs", node, token.start)
        if token.kind == "name":
            return self._named()
        raise scanner.unexpected("a field or a number")

    def _named(self) -> Expression:
        scanner = self.scanner
        token = scanner.peek()
        if token.text in AGGREGATES:
            return self._aggregate()
        if token.text in FUNCTIONS:
            scanner.advance()
            self._spend()
            scanner.require("(")
            node = self.value()
            scanner.require(")")
            return Call(token.text, node, token.start)
        if token.text in RESERVED:
            raise scanner.unexpected("a field or a number")
        scanner.advance()
        if scanner.peek().text == "(":
            known = ", ".join((*FUNCTIONS, *AGGREGATES))
            raise scanner.error(f'no function is called "{token.text}"; known: {known}.', token.start)
        return Field(token.text, token.start)

    def _aggregate(self) -> Aggregate:
        scanner = self.scanner
        if self._no_aggregate is not None:
            raise scanner.error(self._no_aggregate)
        token = scanner.advance()
        self._spend()
        with self.without_aggregates(f"{token.text} is already taken of many rows; one inside it has no meaning."):
            if token.text == "share":
                scanner.require("(")
                argument = self.condition()
                scanner.require(")")
            elif token.text == "count" and scanner.peek().text != "(":
                argument = None
            else:
                start = scanner.position
                argument = self._checked(self._primary(), start, condition=False)
        return Aggregate(token.text, argument, token.start)

    def number(self) -> float:
        """A number without a sign."""
        self.scanner.possible("<number>")
        if self.scanner.peek().kind != "number":
            raise self.scanner.unexpected("a number")
        value = float(self.scanner.peek().text)
        if not math.isfinite(value):
            raise self.scanner.error("this number is too large.")
        self.scanner.advance()
        return value

    def signed_number(self) -> float:
        """A number that may be negative."""
        return -self.number() if self.scanner.accept("-") else self.number()

    def percentage(self) -> Number:
        """A number that may be negative, with or without %."""
        value = self.signed_number()
        return Number(value, bool(self.scanner.accept("%")))

    def whole(self, least: int = 0) -> int:
        """A whole number, at least `least`."""
        start = self.scanner.position
        value = self.number()
        if not value.is_integer() or value < least or value >= 2**53:
            raise self.scanner.error(f"a whole number from {least} on is needed here.", start)
        return int(value)
