"""The tree of a statement: frozen nodes that print back to text which re-parses to an equal tree."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from nbdyn.query.words import RESERVED

_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_RUN = re.compile(r"[\w./:~@+-]+")
_PRECEDENCE = {"or": 1, "and": 2, "+": 5, "-": 5, "*": 6, "/": 6}


class Node:
    """Any part of a statement; `str(node)` is the part in the language."""

    def __str__(self) -> str:
        """The node as text that re-parses to an equal one."""
        return _print(self)


def _position() -> int:
    """Where a node stood in the text: for carets only, two trees are equal without it."""
    return field(default=0, compare=False, repr=False)


@dataclass(frozen=True)
class Number(Node):
    """A number as typed; `10%` is 0.1."""

    typed: float
    percent: bool = False

    @property
    def value(self) -> float:
        """The number that is meant."""
        return self.typed / 100 if self.percent else self.typed


@dataclass(frozen=True)
class Field(Node):
    """A column by name."""

    name: str
    position: int = _position()


@dataclass(frozen=True)
class Negative(Node):
    """-x."""

    operand: Expression


@dataclass(frozen=True)
class Binary(Node):
    """Arithmetic with one of + - * /."""

    operator: str
    left: Expression
    right: Expression


@dataclass(frozen=True)
class Call(Node):
    """A function of one value: abs, log2, sqrt, nan, inf."""

    function: str
    argument: Expression
    position: int = _position()


@dataclass(frozen=True)
class Aggregate(Node):
    """One value from many rows: mean, min, max, sum, count, share, first, last (no argument: count of rows)."""

    function: str
    argument: Expression | None
    position: int = _position()


@dataclass(frozen=True)
class Comparison(Node):
    """left < right and its like; the operators are < <= > >= = !=."""

    operator: str
    left: Expression
    right: Expression


@dataclass(frozen=True)
class Logic(Node):
    """Two conditions joined by `and` or `or`."""

    operator: str
    left: Expression
    right: Expression


@dataclass(frozen=True)
class Not(Node):
    """A condition turned round."""

    operand: Expression


Expression = Number | Field | Negative | Binary | Call | Aggregate | Comparison | Logic | Not


@dataclass(frozen=True)
class Selector(Node):
    """Parameters by name: fc1.weight[3,5], fc1.*, all."""

    text: str
    position: int = _position()


@dataclass(frozen=True)
class Weights(Node):
    """Weights (`w`) or their changes (`dw`) of some parameters."""

    quantity: str
    selector: Selector


@dataclass(frozen=True)
class Table(Node):
    """A whole table: samples or visits."""

    name: str
    position: int = _position()


@dataclass(frozen=True)
class Scope(Node):
    """Which steps: kind "all", "epochs" or "steps", first and last inclusive."""

    kind: str = "all"
    first: int = 0
    last: int = 0
    position: int = _position()


@dataclass(frozen=True)
class Show(Node):
    """Values as recorded, or one row per step, epoch, sample or tensor."""

    items: tuple[Expression | Weights | Table, ...]
    per: tuple[str, ...] = ()
    scope: Scope = Scope()
    where: Expression | None = None


@dataclass(frozen=True)
class Measure(Node):
    """A number made of the cells (visit, parameter) of a quantity: what `top`, `group` and `show ... of` speak of.

    Attributes:
        aggregate: sum, mean, max, var, count (cells other than 0), norm, share, or net, path (displacements, of dw).
        quantity: g (a sample's own gradient), grad (the batch's), w, dw, act, err.
        magnitude: whether it is taken of |quantity|: `sum |g|`.
        absolute: whether |...| stands around the whole: `|sum g|`.
        condition: of `share |g| > 1e-3`: operator and threshold (a number, or the word "explode"); None elsewhere.
    """

    aggregate: str
    quantity: str
    magnitude: bool = False
    absolute: bool = False
    condition: tuple[str, float | str] | None = None
    position: int = _position()


@dataclass(frozen=True)
class In(Node):
    """Whether the sample of a row is among those of a named result: `sample in hot`."""

    field: str
    name: str
    position: int = _position()


@dataclass(frozen=True)
class Top(Node):
    """The members of largest measure: `top 20 samples per weight of fc1.* by sum |g| during epoch 7`.

    Attributes:
        count: how many, or how many percent.
        percent: whether `count` is a percentage of the members.
        what: singular of what is ranked, a word of MEMBERS.
        per: singular of what each ranking belongs to, a word of MEMBERS; None for one ranking.
        selector: parameters; None for all.
        by: a measure of cells, or an expression over the fields of visits or steps.
        within: of `approximately within 5%`, 0.05; None for exact answers.
    """

    count: float
    percent: bool
    what: str
    per: str | None
    selector: Selector | None
    by: Measure | Expression
    scope: Scope = Scope()
    where: Expression | None = None
    within: float | None = None
    position: int = _position()


@dataclass(frozen=True)
class Group(Node):
    """Members in bins of their measure: `group weights by sum |grad| into 8 over all`."""

    what: str
    selector: Selector | None
    by: Measure | Expression
    into: int = 8
    scope: Scope = Scope()
    where: Expression | None = None
    within: float | None = None
    position: int = _position()


@dataclass(frozen=True)
class Becomes(Node):
    """A weight arrives at a value: bit for bit (`within` None), or within a distance of it."""

    selector: Selector
    value: float
    within: float | None = None


@dataclass(frozen=True)
class Crosses(Node):
    """A weight goes from one side of a value to the other, or arrives at it."""

    selector: Selector
    value: float


@dataclass(frozen=True)
class Last(Node):
    """The last samples before an event."""

    count: int
    event: Becomes | Crosses | Expression
    every: bool = False
    scope: Scope = Scope()


@dataclass(frozen=True)
class RunName(Node):
    """A run by its name or path."""

    name: str
    position: int = _position()


@dataclass(frozen=True)
class Compare(Node):
    """Runs side by side; measures are words of `MEASURES`."""

    runs: tuple[RunName, ...]
    measures: tuple[str, ...]
    scope: Scope = Scope()


@dataclass(frozen=True)
class Explain(Node):
    """What a statement would read, without reading it."""

    statement: Show | Last | Compare


Statement = Show | Last | Compare | Explain


def number_text(value: float) -> str:
    """A number in the fewest characters that read back to it.

    >>> number_text(50.0), number_text(1e-6)
    ('50', '1e-06')
    """
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def field_text(name: str) -> str:
    """A field's name, in backticks where it needs them.

    >>> field_text("loss"), field_text("val loss")
    ('loss', '`val loss`')
    """
    return name if _IDENTIFIER.fullmatch(name) and name not in RESERVED else f"`{name}`"


def run_text(name: str) -> str:
    """A run's name or path, in backticks where it needs them."""
    return name if _RUN.fullmatch(name) and name != "by" else f"`{name}`"


def _level(node: Node) -> int:
    """How tightly a node binds: 1 (or) to 8 (a name)."""
    match node:
        case Binary(operator) | Logic(operator):
            return _PRECEDENCE[operator]
        case Not():
            return 3
        case Comparison():
            return 4
        case Negative():
            return 7
        case _:
            return 8


def _inside(node: Node, level: int) -> str:
    """A node as operand of one that binds at `level`."""
    return f"({node})" if _level(node) < level else str(node)


def _print(node: Node) -> str:
    """The text of a node."""
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
        case Aggregate(function, argument):
            return function if argument is None else f"{function}({argument})"
        case Comparison(operator, left, right):
            return f"{_inside(left, 5)} {operator} {_inside(right, 5)}"
        case Not(operand):
            return f"not {_inside(operand, 3)}"
        case _:
            return _print_statement(node)


def _print_statement(node: Node) -> str:
    """The text of a statement or of one of its clauses."""
    match node:
        case Selector(text) | Table(text):
            return text
        case Weights(quantity, selector):
            return f"{quantity} of {selector}"
        case Scope():
            return _print_scope(node)
        case Show(items, per, scope, where):
            words = ["show", _list(items), f"per {', '.join(per)}" if per else "", str(scope)]
            return _join(*words, f"where {where}" if where is not None else "")
        case Becomes(selector, value, within):
            how = "exactly" if within is None else f"within {number_text(within)}"
            return f"{selector} becomes {number_text(value)} {how}"
        case Crosses(selector, value):
            return f"{selector} crosses {number_text(value)}"
        case Last(count, event, every, scope):
            return _join(f"last {count} samples before", "every" if every else "", str(event), str(scope))
        case RunName(name):
            return run_text(name)
        case Compare(runs, measures, scope):
            return _join(f"compare {_list(runs)} by {', '.join(measures)}", str(scope))
        case Explain(statement):
            return f"explain {statement}"
        case _:
            raise TypeError(f"{type(node).__name__} is no node of the language")


def _print_scope(scope: Scope) -> str:
    if scope.kind == "all":
        return ""
    if scope.first == scope.last:
        return f"during epoch {scope.first}" if scope.kind == "epochs" else f"at step {scope.first}"
    return f"during {scope.kind} {scope.first}..{scope.last}"


def _list(nodes: tuple[Node, ...]) -> str:
    return ", ".join(map(str, nodes))


def _join(*words: str) -> str:
    return " ".join(word for word in words if word)
