"""Trees as text in the normal form of the language: what is printed re-parses to an equal tree."""

from __future__ import annotations

import re

from nbdyn.query.tree import (
    Aggregate,
    Becomes,
    Binary,
    Call,
    Compare,
    Comparison,
    Crosses,
    Estimate,
    Exceeds,
    Explain,
    Expression,
    Field,
    From,
    Group,
    In,
    Last,
    Logic,
    Measure,
    Measured,
    Named,
    Negative,
    Node,
    Not,
    Number,
    OneOf,
    RunName,
    Scope,
    Selector,
    Show,
    Table,
    Top,
    Weights,
    field_text,
    number_text,
    run_text,
)
from nbdyn.query.words import EXPLODE, MEASURE_AGGREGATES, ONLY_CELLS, PLURALS, QUANTITIES, SAME_QUANTITY

_PRECEDENCE = {"or": 1, "and": 2, "+": 5, "-": 5, "*": 6, "/": 6}
_LIKE_A_MEASURE = re.compile(
    rf"\|?({'|'.join(MEASURE_AGGREGATES)})\b[ (]*\|?({'|'.join((*QUANTITIES, *SAME_QUANTITY))})\b"
)
"""The beginning of an expression that the parser takes for a measure of cells, where both may stand."""
_ASKS_FOR_OF = re.compile(rf"\w+\(\|?(({'|'.join((*ONLY_CELLS, *SAME_QUANTITY))})\b|.*\b{EXPLODE}\b)")
"""Of those, the beginning after which `show` insists on parameters: fields of such names stand in brackets."""


def text(node: Node) -> str:
    """A node in the language.

    >>> from nbdyn.query.tree import Binary, Field, Number
    >>> text(Binary("*", Field("loss"), Binary("+", Number(1.0), Number(2.0))))
    'loss * (1 + 2)'
    """
    match node:
        case Number(typed, percent):
            return number_text(typed) + "%" * percent
        case Field(name):
            return field_text(name)
        case Negative(operand):
            return f"-{_inside(operand, 7)}"
        case Binary(operator, left, right) | Logic(operator, left, right):
            level = _level(node)
            return f"{_inside(left, level)} {operator} {_inside(right, level + 1)}"
        case Call("abs", argument):
            return f"|{argument}|"
        case Call(function, argument):
            return f"{function}({argument})"
        case Aggregate(function, None):
            return function
        case Aggregate(function, argument):
            written = f"{function}({argument})"
            return f"{function}(({argument}))" if _ASKS_FOR_OF.match(written) else written
        case Comparison(operator, left, right):
            return f"{_inside(left, 5)} {operator} {_inside(right, 5)}"
        case Not(operand):
            return f"not {_inside(operand, 3)}"
        case In(field, name):
            return f"{field} in {name}"
        case OneOf(field, values):
            return f"{field} in ({', '.join(map(str, values))})"
        case _:
            return _statement(node)


def _level(node: Node) -> int:
    """How tightly a node binds: 1 (or) to 8 (a name)."""
    match node:
        case Binary(operator) | Logic(operator):
            return _PRECEDENCE[operator]
        case Not():
            return 3
        case Comparison() | In() | OneOf():
            return 4
        case Negative():
            return 7
        case _:
            return 8


def _inside(node: Node, level: int) -> str:
    """A node as operand of one that binds at `level`."""
    return f"({node})" if _level(node) < level else str(node)


def _statement(node: Node) -> str:
    """The text of a statement."""
    match node:
        case Show(items, per, scope, where, within):
            units = f"per {', '.join(per)}" if per else ""
            return _join("show", _list(items), units, str(scope), _where(where), _approximately(within))
        case Top(count, percent, what, per, selector, by, scope, where, within):
            head = f"top {number_text(count)}{'%' * percent} {PLURALS[what]}"
            words = [head, f"per {per}" if per else "", _of(selector), f"by {_by(by)}", str(scope)]
            return _join(*words, _where(where), _approximately(within))
        case Group(what, selector, by, into, scope, where, within):
            words = [f"group {PLURALS[what]}", _of(selector), f"by {_by(by)} into {into}", str(scope)]
            return _join(*words, _where(where), _approximately(within))
        case Last(count, event, every, scope):
            return _join(f"last {count} samples before", "every" if every else "", str(event), str(scope))
        case Compare(runs, measures, scope):
            return _join(f"compare {_list(runs)} by {', '.join(measures)}", str(scope))
        case From(name):
            return f"from {name}"
        case Explain(statement):
            return f"explain {statement}"
        case Estimate(statement):
            return f"estimate {statement}"
        case Named(statement, name):
            return f"{statement} as {name}"
        case _:
            return _clause(node)


def _clause(node: Node) -> str:
    """The text of a part of a statement."""
    match node:
        case Selector(name) | Table(name):
            return name
        case Weights(quantity, selector):
            return f"{quantity} of {selector}"
        case Measured(measure, selector):
            return f"{measure} of {selector}"
        case Measure():
            return _measure(node)
        case Scope():
            return _scope(node)
        case Becomes(selector, value, within):
            how = "exactly" if within is None else f"within {number_text(within)}"
            return f"{selector} becomes {number_text(value)} {how}"
        case Crosses(selector, value):
            return f"{selector} crosses {number_text(value)}"
        case Exceeds(measure, selector, operator, value):
            return _join(str(measure), _of(selector), f"{operator} {value}")
        case RunName(name):
            return run_text(name)
        case _:
            raise TypeError(f"{type(node).__name__} is no node of the language")


def _measure(measure: Measure) -> str:
    cells = f"|{measure.quantity}|" if measure.magnitude else measure.quantity
    if measure.condition is not None:
        operator, threshold = measure.condition
        limit = threshold if isinstance(threshold, str) else number_text(threshold)
        return f"share({cells} {operator} {limit})"
    taken = f"{measure.aggregate} {cells}"
    return f"|{taken}|" if measure.absolute else taken


def _by(by: Measure | Expression) -> str:
    """What is ranked by; an expression that would be read as a measure stands in brackets."""
    written = str(by)
    return f"({written})" if not isinstance(by, Measure) and _LIKE_A_MEASURE.match(written) else written


def _scope(scope: Scope) -> str:
    if scope.kind == "all":
        return ""
    if scope.first == scope.last:
        return f"during epoch {scope.first}" if scope.kind == "epochs" else f"at step {scope.first}"
    return f"during {scope.kind} {scope.first}..{scope.last}"


def _of(selector: Selector | None) -> str:
    return "" if selector is None else f"of {selector}"


def _where(condition: Expression | None) -> str:
    return "" if condition is None else f"where {condition}"


def _approximately(within: float | None) -> str:
    """The clause, in percent where that reads back to the same number."""
    if within is None:
        return ""
    percent = next((value for value in (round(within * 100, 9), within * 100) if value / 100 == within), None)
    return f"approximately within {number_text(within) if percent is None else number_text(percent) + '%'}"


def _list(nodes: tuple[Node, ...]) -> str:
    return ", ".join(map(str, nodes))


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)
