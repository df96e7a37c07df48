"""Values of an expression over columns: a fixed list of operations on arrays, nothing is ever evaluated as code."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

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
from nbdyn.query.words import CONDITIONS

Array = npt.NDArray[Any]
Columns = Mapping[str, Array]

_ARITHMETIC: dict[str, Callable[[Array, Array], Array]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
}
_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "<": np.less,
    "<=": np.less_equal,
    ">": np.greater,
    ">=": np.greater_equal,
    "=": np.equal,
    "!=": np.not_equal,
}
_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "abs": np.abs,
    "log2": np.log2,
    "sqrt": np.sqrt,
    "sign": np.sign,
    "nan": np.isnan,
    "inf": np.isinf,
}


def evaluate(node: Expression, columns: Columns, aggregate: Callable[[Aggregate], Array] | None = None) -> Array:
    """The values of an expression, one a row.

    A comparison with NaN is false; division by zero, log2 and sqrt outside their domain give inf or NaN.

    Args:
        node: the expression, its fields names of `columns`.
        columns: arrays of one length.
        aggregate: gives the values of an aggregate, one a group, where `columns` hold one row a group.

    Returns:
        An array, or a 0-d array where no field occurs.

    >>> from nbdyn.query.tree import Binary, Field, Number
    >>> evaluate(Binary("*", Field("loss"), Number(2.0)), {"loss": np.array([1.0, 2.0])})
    array([2., 4.])
    """
    with np.errstate(all="ignore"):
        return _evaluate(node, columns, aggregate)


def _evaluate(node: Expression, columns: Columns, aggregate: Callable[[Aggregate], Array] | None) -> Array:
    def number(part: Expression) -> Array:
        return _evaluate(part, columns, aggregate).astype(np.float64)

    def truth(part: Expression) -> Array:
        return _evaluate(part, columns, aggregate).astype(bool)

    match node:
        case Number():
            return np.asarray(node.value)
        case Field(name):
            return np.asarray(columns[name])
        case Negative(operand):
            return np.negative(number(operand))
        case Binary(operator, left, right):
            return _ARITHMETIC[operator](number(left), number(right))
        case Call(function, argument):
            return _FUNCTIONS[function](number(argument))
        case Comparison(operator, left, right):
            return _COMPARISONS[operator](number(left), number(right))
        case Logic(operator, left, right):
            return np.logical_and(truth(left), truth(right)) if operator == "and" else truth(left) | truth(right)
        case Not(operand):
            return np.logical_not(truth(operand))
        case OneOf(field, values):
            return np.isin(columns[field], values)
        case In(field, name):
            raise TypeError(f"{field} in {name}: names are looked up when a statement is bound")
        case Aggregate():
            if aggregate is None:
                raise TypeError("an aggregate needs groups")
            return aggregate(node)


def aggregator(columns: Columns, groups: Array, count: int) -> Callable[[Aggregate], Array]:
    """What gives an aggregate's values, one a group; NaN are left out, a group without a value is NaN.

    Args:
        columns: arrays of n rows, in the order of training.
        groups: number of the group of each row, (n,), from 0.
        count: how many groups there are.
    """

    def values_of(node: Aggregate) -> Array:
        if node.argument is None:
            return np.bincount(groups, minlength=count)
        values = np.broadcast_to(evaluate(node.argument, columns), groups.shape)
        if node.function == "share":
            values = np.where(_unknown(node.argument, columns, groups.shape), np.nan, values.astype(np.float64))
        elif values.dtype.kind not in "iu":
            values = values.astype(np.float64)
        grouped = pd.Series(values).groupby(groups)
        result: Any
        match node.function:
            case "share":
                result = grouped.mean()
            case "sum":
                result = grouped.sum(min_count=1)
            case "var":
                result = grouped.var(ddof=0)
            case name:
                result = getattr(grouped, name)()
        return np.asarray(result.reindex(range(count)))

    return values_of


def _unknown(condition: Expression, columns: Columns, shape: tuple[int, ...]) -> Array:
    """Rows of which a condition cannot be told: a field of it is NaN, and it does not ask for NaN itself."""
    unknown = np.zeros(shape, dtype=bool)
    if not any(isinstance(part, Call) and part.function in CONDITIONS for part in walk(condition)):
        for name in fields(condition):
            if columns[name].dtype.kind == "f":
                unknown |= np.isnan(columns[name])
    return unknown


def walk(node: Expression) -> Iterator[Expression]:
    """An expression and all its parts."""
    yield node
    match node:
        case Negative(operand) | Not(operand):
            yield from walk(operand)
        case Binary(_, left, right) | Comparison(_, left, right) | Logic(_, left, right):
            yield from walk(left)
            yield from walk(right)
        case Call(_, argument) | Aggregate(_, argument):
            if argument is not None:
                yield from walk(argument)
        case Number() | Field() | In() | OneOf():
            pass


def fields(node: Expression) -> tuple[str, ...]:
    """Names of the fields in an expression, each once."""
    names = (part.name if isinstance(part, Field) else getattr(part, "field", None) for part in walk(node))
    return tuple(dict.fromkeys(name for name in names if name is not None))


def has_aggregate(node: Expression) -> bool:
    """Whether an expression takes one value from many rows."""
    return any(isinstance(part, Aggregate) for part in walk(node))


def rebuilt(node: Expression, change: Callable[[Expression], Expression | None]) -> Expression:
    """An expression with some parts exchanged: where `change` gives a node, it stands instead of the part."""
    new = change(node)
    if new is not None:
        return new
    match node:
        case Negative(operand):
            return Negative(rebuilt(operand, change))
        case Not(operand):
            return Not(rebuilt(operand, change))
        case Binary(operator, left, right):
            return Binary(operator, rebuilt(left, change), rebuilt(right, change))
        case Comparison(operator, left, right):
            return Comparison(operator, rebuilt(left, change), rebuilt(right, change))
        case Logic(operator, left, right):
            return Logic(operator, rebuilt(left, change), rebuilt(right, change))
        case Call(function, argument, position):
            return Call(function, rebuilt(argument, change), position)
        case Aggregate(function, argument, position):
            return Aggregate(function, None if argument is None else rebuilt(argument, change), position)
        case Number() | Field() | In() | OneOf():
            return node


def with_means(node: Expression, keys: tuple[str, ...]) -> Expression:
    """An expression whose every field is aggregated: plain ones by their mean, the group's own keys as they are.

    >>> from nbdyn.query.language import parse
    >>> str(with_means(parse("show max(loss) - loss per epoch").items[0], ("epoch",)))
    'max(loss) - mean(loss)'
    """
    if not has_aggregate(node):
        return node if set(fields(node)) <= set(keys) else Aggregate("mean", node)

    def change(part: Expression) -> Expression | None:
        if isinstance(part, Aggregate):
            return part
        return Aggregate("mean", part) if isinstance(part, Field) and part.name not in keys else None

    return rebuilt(node, change)
