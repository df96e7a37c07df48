"""The tree of a statement: frozen nodes that print back to text which re-parses to an equal tree."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from nbdyn.query.words import RESERVED

_IDENTIFIER = re.compile(r"[^\W\d]\w*")
_RUN = re.compile(r"[\w./:~@+-]+")


class Node:
    """Any part of a statement; `str(node)` is the part in the language."""

    def __str__(self) -> str:
        """The node as text that re-parses to an equal one."""
        from nbdyn.query.printing import text  # printing knows every node, so it imports this module

        return text(self)


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
    """A function of one value: abs, log2, sqrt, sign, nan, inf."""

    function: str
    argument: Expression
    position: int = _position()


@dataclass(frozen=True)
class Aggregate(Node):
    """One value from many rows: mean, min, max, sum, var, count, share, first, last (no argument: count of rows)."""

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


@dataclass(frozen=True)
class In(Node):
    """Whether a field's value is among those of a named result: `sample in hot`."""

    field: str
    name: str
    position: int = _position()


@dataclass(frozen=True)
class OneOf(Node):
    """Whether a field's value is one of some whole numbers: `sample in (3, 17, 99)`."""

    field: str
    values: tuple[int, ...]
    position: int = _position()


Expression = Number | Field | Negative | Binary | Call | Aggregate | Comparison | Logic | Not | In | OneOf


@dataclass(frozen=True)
class Selector(Node):
    """Parameters by name: fc1.weight[3,5], fc1.*, all."""

    text: str
    position: int = _position()


@dataclass(frozen=True)
class Weights(Node):
    """The cells of some parameters: `w of fc1.*`; the quantity is a word of `QUANTITIES`."""

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
class Measure(Node):
    """A number made of the cells (visit, parameter) of a quantity: what `top`, `group` and `show ... of` speak of.

    Attributes:
        aggregate: sum, mean, max, var, count (cells other than 0), norm, share, or net, path (displacements, of dw).
        quantity: g (a sample's own gradient), grad (the batch's), w, dw, act, err.
        magnitude: whether it is taken of |quantity|: `sum |g|`.
        absolute: whether |...| stands around the whole: `|sum g|`.
        condition: of `share(|g| > 1e-3)`: operator and threshold (a number, or the word "explode"); None elsewhere.
    """

    aggregate: str
    quantity: str
    magnitude: bool = False
    absolute: bool = False
    condition: tuple[str, float | str] | None = None
    position: int = _position()


@dataclass(frozen=True)
class Measured(Node):
    """A measure of the cells of some parameters, as an item of `show`: `sum |g| of fc1.*`."""

    measure: Measure
    selector: Selector


@dataclass(frozen=True)
class Show(Node):
    """Values as recorded, or one row per step, epoch, sample ...; a `Measured` is the only item.

    Attributes:
        items: what is shown.
        per: words of UNITS, or of CELL_UNITS for a `Measured`.
        scope: which steps.
        where: a condition on rows; of a `Measured` on visits.
        within: of `approximately within 5%`, 0.05, for a `Measured`; None for exact answers.
    """

    items: tuple[Expression | Weights | Table | Measured, ...]
    per: tuple[str, ...] = ()
    scope: Scope = Scope()
    where: Expression | None = None
    within: float | None = None


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
class Exceeds(Node):
    """A measure of the cells of a step compares with a number: `share(|grad| > explode) of fc1.* > 10%`.

    Attributes:
        measure: of the cells of one step.
        selector: parameters; None for all.
        operator: < <= > >= = !=.
        value: the number; it may be negative.
    """

    measure: Measure
    selector: Selector | None
    operator: str
    value: Number


Event = Becomes | Crosses | Exceeds | Expression


@dataclass(frozen=True)
class Last(Node):
    """The last samples before an event."""

    count: int
    event: Event
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
class From(Node):
    """A statement that was saved with the run, by its name."""

    name: str
    position: int = _position()


Plain = Show | Top | Group | Last | Compare | From


@dataclass(frozen=True)
class Explain(Node):
    """What a statement would read, without reading it."""

    statement: Plain


@dataclass(frozen=True)
class Estimate(Node):
    """What a statement would cost, without reading it: bytes and seconds."""

    statement: Plain


@dataclass(frozen=True)
class Named(Node):
    """A statement whose result gets a name: `show loss as hot`."""

    statement: Plain | Explain | Estimate
    name: str
    position: int = _position()


Statement = Plain | Explain | Estimate | Named


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
