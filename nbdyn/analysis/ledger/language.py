"""The cell of a hypothesis: the claim in words, one measure a run, and the test over runs.

Grammar::

    cell    := claim "measure:" measure "test:" test
    measure := ("sum" | "mean") "lca" ["of" selector] [scope] ["in" name]
             | ("progress(loss)" | "dist(w, init)") "at step" N
             | whatever `show` answers with one number: mean(loss) during epoch 3, acc at step 500, sum |g| of fc1.*
    test    := (">" | "<" | "!=") number "," method "over" [N] "runs"
             | (">" | "<" | "!=") "pattern" "," ["paired"] method "over" ([N] "runs" | N "pairs")
    method  := "t" | "wilcoxon" | "permutation"

A line that begins with blanks continues the one above. `over 10 runs` fixes how many runs are tested, before any is
seen: the first ten that were recorded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from nbdyn.analysis.ledger.decide import METHODS, RELATIONS
from nbdyn.errors import QueryError, nearest
from nbdyn.query.clauses import read_scope, read_selector
from nbdyn.query.expressions import ExpressionParser
from nbdyn.query.language import parse
from nbdyn.query.tokens import caret
from nbdyn.query.tree import Compare, Measured, Scope, Show, Table, Weights, number_text

KEYS = ("measure", "test")
COMPARED = ("progress(loss)", "dist(w, init)")
"""Measures that only `compare` knows."""
MAX_RUNS = 10_000
_KEY = re.compile(r"([^\W\d_]+)\s*:(.*)", re.DOTALL)
_NAME = re.compile(r"[^\W_][\w.-]{0,99}")
_TOKEN = re.compile(
    r"(?P<number>[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)"
    r"|(?P<word>[^\W\d_]+)|(?P<pattern>\"[^\"\n]+\"|'[^'\n]+')|(?P<symbol>!=|>=|<=|==|[><=,])"
)


@dataclass(frozen=True)
class Cell:
    """What stands in a cell, as typed but for blanks."""

    claim: str
    measure: str
    test: str


@dataclass(frozen=True)
class Lca:
    """A sum of a stored loss change allocation; `mean` divides it by parameters times steps."""

    aggregate: str
    selector: str
    scope: Scope
    allocation: str | None

    def __str__(self) -> str:
        scope = str(self.scope) or "over all"
        return f"{self.aggregate} lca of {self.selector} {scope}" + (
            f" in {self.allocation}" if self.allocation else ""
        )


@dataclass(frozen=True)
class Compared:
    """A measure of `compare` at one step."""

    measure: str
    step: int

    def __str__(self) -> str:
        return f"{self.measure} at step {self.step}"


@dataclass(frozen=True)
class Shown:
    """What `show` answers with one number; `text` is the statement without its verb."""

    text: str

    def __str__(self) -> str:
        return self.text


Measure = Lca | Compared | Shown


@dataclass(frozen=True)
class Test:
    """The test of a hypothesis.

    Attributes:
        relation: what is claimed: ">", "<" or "!=".
        value: against this number; None where it is other runs.
        runs: the pattern of the other runs' names; None where it is a number.
        paired: whether runs are paired with the others.
        method: "t", "wilcoxon" or "permutation".
        count: runs (of each group) that are tested, fixed beforehand; None: all that match.
    """

    __test__ = False  # pytest takes it for a test by its name

    relation: str
    value: float | None
    runs: str | None
    paired: bool
    method: str
    count: int | None

    def __str__(self) -> str:
        against = f'"{self.runs}"' if self.value is None else number_text(self.value)
        count = "" if self.count is None else f"{self.count} "
        return f"{self.relation} {against}, {'paired ' * self.paired}{self.method} over {count}runs"


def check_name(name: str) -> str:
    """The name of a hypothesis, or an error that says what may be one."""
    if not _NAME.fullmatch(name):
        raise QueryError(
            f'"{name}" cannot name a hypothesis; type letters, digits, - _ and ., such as deeper-is-better.'
        )
    return name


def parse_cell(body: str) -> Cell:
    r"""The parts of a cell.

    Raises:
        QueryError: if a part is missing, there twice, or something follows the test.

    >>> parse_cell("It helps.\nmeasure: mean(loss)\ntest: < 1, t over runs")
    Cell(claim='It helps.', measure='mean(loss)', test='< 1, t over runs')
    """
    parts: dict[str, str] = {"claim": ""}
    last = "claim"
    for line in body.splitlines():
        match = _KEY.match(line)
        word = match[1].lower() if match else ""
        if word in KEYS:
            if word in parts:
                raise QueryError(f"the cell has two lines that begin with {word}: ; a hypothesis has one.")
            last, parts[word] = word, match[2] if match else ""
        elif last == "claim" or (line[:1].isspace() and line.strip()):
            parts[last] += f"\n{line}" if parts[last] else line
        elif line.strip():
            raise QueryError(
                f'"{line.strip()}" stands below {last}: ; the claim stands above, and a line continues if indented.'
                + _meant(word)
            )
    for key in KEYS:
        if not parts.get(key, "").strip():
            raise QueryError(f'the cell has no line "{key}: ..."{_example(key)}.' + _mistyped(body, key))
    claim = "\n".join(line.strip() for line in parts["claim"].strip().splitlines())
    if not claim:
        raise QueryError("the claim is missing: say in words what you expect, above measure: .")
    return Cell(claim, " ".join(parts["measure"].split()), " ".join(parts["test"].split()))


def _example(key: str) -> str:
    return {"measure": ", such as measure: mean(loss) during epoch 3", "test": ", such as test: > 0, t over runs"}[key]


def _meant(word: str) -> str:
    guess = nearest(word, KEYS) if word else None
    return f' Did you mean "{guess}:"?' if guess else ""


def _mistyped(body: str, key: str) -> str:
    words = [match[1].lower() for line in body.splitlines() if (match := _KEY.match(line))]
    guess = nearest(key, [word for word in words if word not in KEYS])
    return f' Did you mean "{key}:" by "{guess}:"?' if guess else ""


# The measure ------------------------------------------------------------------------------------------------------


def parse_measure(text: str) -> Measure:
    """The tree of a measure; `str` of it is its normal form.

    Raises:
        QueryError: if it is none, or gives more than one number a run; with a caret and the nearest word.

    >>> str(parse_measure("sum lca of fc1")), str(parse_measure("mean( loss )  during epoch 3"))
    ('sum lca of fc1 over all', 'mean(loss) during epoch 3')
    """
    parser = ExpressionParser(text)
    if parser.scanner.ahead(2) in (["sum", "lca"], ["mean", "lca"]):
        return _lca(parser)
    compact = re.sub(r"\s", "", text)
    if any(compact.startswith(re.sub(r"\s", "", word)) for word in COMPARED):
        return _compared(text)
    return _shown(text)


def _lca(parser: ExpressionParser) -> Lca:
    scanner = parser.scanner
    aggregate = scanner.advance().text
    scanner.advance()
    selector = read_selector(scanner).text if scanner.accept("of") else "all"
    scope = read_scope(parser) or Scope()
    allocation = None
    if scanner.accept("in"):
        token = scanner.advance()
        if token.kind not in ("name", "quoted"):
            raise scanner.error("the name of an allocation is needed here, such as train.", token.start)
        allocation = token.text.strip("`")
    if scanner.peek().kind != "end":
        raise scanner.unexpected('"of", a scope (over all, during epoch 3), "in" or the end')
    return Lca(aggregate, selector, scope, allocation)


def _compared(text: str) -> Compared:
    head = "compare a, b by "
    tree = parse(head + text)
    if not isinstance(tree, Compare) or len(tree.measures) != 1:
        raise QueryError(caret(text, 0, "a hypothesis has one measure."))
    if tree.scope.kind != "steps" or tree.scope.first != tree.scope.last:
        message = f"{tree.measures[0]} is a number for each step: say at which, {tree.measures[0]} at step 500."
        raise QueryError(caret(text, len(text), message))
    return Compared(tree.measures[0], tree.scope.first)


def _shown(text: str) -> Shown:
    tree = parse(f"show {text}")
    if not isinstance(tree, Show):
        raise QueryError(caret(text, 0, "a measure is what show answers with one number, such as mean(loss)."))
    what = "a measure is one number for each run"
    if len(tree.items) > 1:
        raise QueryError(caret(text, 0, f"{what}, and these are {len(tree.items)}."))
    if tree.per:
        raise QueryError(caret(text, text.find("per"), f"{what}: leave out per {tree.per[0]}."))
    item = next(iter(tree.items))
    if isinstance(item, Table | Weights):
        kind = "a table" if isinstance(item, Table) else "many cells"
        raise QueryError(caret(text, 0, f"{what}, and this is {kind}: take a sum |dw| of fc1.*, or mean(loss)."))
    if tree.within is not None and isinstance(item, Measured):
        raise QueryError(caret(text, text.find("approximately"), f"{what}, and exact: leave out approximately."))
    return Shown(str(tree).removeprefix("show "))


# The test ---------------------------------------------------------------------------------------------------------


def parse_test(text: str) -> Test:
    """The tree of a test; `str` of it is its normal form.

    Raises:
        QueryError: with a caret and the nearest word.

    >>> str(parse_test('>"plain-*",paired  t over 5 pairs'))
    '> "plain-*", paired t over 5 runs'
    """
    return _TestParser(text).test()


class _TestParser:
    """Reads the line of a test from left to right."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def test(self) -> Test:
        relation = self._word(tuple(RELATIONS), "symbol", "what is claimed (>, < or !=)")
        kind, found = self._next()
        value = runs = None
        if kind == "number":
            value = float(found)
        elif kind == "pattern":
            runs = found[1:-1]
        else:
            raise self._error('a number, or other runs in quotes ("plain-*"), is needed here')
        if value is not None and not abs(value) < float("inf"):
            raise self._error("this number is too large")
        self._take()
        self._word((",",), "symbol", '","')
        paired = self._next()[1] == "paired"
        if paired and runs is None:
            raise self._error('a number has no pairs; other runs have: > "plain-*", paired t over runs')
        if paired:
            self._take()
        method = self._word(METHODS, "word", f"a test ({', '.join(METHODS)})")
        self._word(("over",), "word", '"over"')
        count = self._count()
        self._word(("runs", "pairs") if paired else ("runs",), "word", '"runs"')
        if self._next()[0] != "end":
            raise self._error("the test ends before this")
        return Test(relation, value, runs, paired, method, count)

    def _count(self) -> int | None:
        kind, found = self._next()
        if kind != "number":
            return None
        if not found.isascii() or not found.isdigit() or not 2 <= int(found) <= MAX_RUNS:
            raise self._error(f"a whole number of runs from 2 to {MAX_RUNS} is needed here")
        self._take()
        return int(found)

    def _word(self, wanted: tuple[str, ...], kind: str, needed: str) -> str:
        here, found = self._next()
        if here != kind or found not in wanted:
            near = nearest(found, wanted) if here == "word" and kind == "word" else None
            guess = f'; did you mean "{near}"?' if near else "."
            what = f'found "{found}" where {needed} is needed' if found else f"the test ends here; {needed} is needed"
            raise QueryError(caret(self.text, self.at, what + guess))
        self._take()
        return found

    def _next(self) -> tuple[str, str]:
        """Kind and text of what stands here."""
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        match = _TOKEN.match(self.text, self.at)
        if match is None:
            return ("end", "") if self.at >= len(self.text) else ("other", self.text[self.at])
        return match.lastgroup or "", match.group()

    def _take(self) -> None:
        self.at += len(self._next()[1])

    def _error(self, message: str) -> QueryError:
        return QueryError(caret(self.text, self.at, message + "."))
