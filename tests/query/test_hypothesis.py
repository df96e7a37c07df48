"""The parser under random trees and random text: trees print back to themselves, all else is an error with a caret."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdyn.errors import QueryError
from nbdyn.query import tokens
from nbdyn.query import tree as t
from nbdyn.query.language import expected_at_end, parse
from nbdyn.query.words import (
    AGGREGATES,
    CELL_UNITS,
    DISPLACEMENTS,
    IN_FIELDS,
    MEASURE_AGGREGATES,
    MEASURES,
    MEMBERS,
    ONLY_CELLS,
    QUANTITIES,
    UNITS,
    WITHOUT_FIELDS,
)

# Trees ------------------------------------------------------------------------------------------------------------

FIELD_NAMES = ["loss", "acc", "grad", "val loss", "first", "share", "not", "per", "samples", "0.weight", "ü", "class",
               "in", "as", "w", "g", "delta", "norm", "net", "explode", "weights"]  # fmt: skip
names = st.one_of(
    st.sampled_from(FIELD_NAMES),
    st.text(string.ascii_letters + " ./-", min_size=1, max_size=8).filter(lambda name: name.strip() == name != ""),
)
identifiers = st.sampled_from(["hot", "x1", "Ünï", "where", "by", "during", "samples", "_", "explode"])
positive = st.one_of(
    st.integers(0, 10**6).map(float),
    st.floats(0, 1e300, allow_nan=False, allow_infinity=False),
)
signed = st.builds(lambda value, sign: value * sign, positive, st.sampled_from([1, -1]))
numbers = st.builds(t.Number, positive, st.booleans())
fields = names.map(t.Field)
operators = st.sampled_from(["<", "<=", ">", ">=", "=", "!="])


def arithmetic(leaves: st.SearchStrategy) -> st.SearchStrategy:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(t.Negative, inner),
            st.builds(t.Binary, st.sampled_from("+-*/"), inner, inner),
            st.builds(t.Call, st.sampled_from(["abs", "log2", "sqrt"]), inner),
        ),
        max_leaves=6,
    )


values = arithmetic(st.one_of(numbers, fields))
memberships = st.one_of(
    st.builds(t.In, st.sampled_from(IN_FIELDS), identifiers),
    st.builds(t.OneOf, st.sampled_from(IN_FIELDS), st.lists(st.integers(-9, 10**6), min_size=1, max_size=4).map(tuple)),
)
conditions = st.recursive(
    st.one_of(
        st.builds(t.Comparison, operators, values, values),
        st.builds(t.Call, st.sampled_from(["nan", "inf"]), values),
        fields,
        memberships,
    ),
    lambda inner: st.one_of(
        st.builds(t.Logic, st.sampled_from(["and", "or"]), inner, inner),
        st.builds(t.Not, inner),
    ),
    max_leaves=4,
)
aggregates = st.one_of(
    st.builds(t.Aggregate, st.sampled_from(sorted(set(AGGREGATES) - {"share"})), values),
    st.builds(t.Aggregate, st.just("share"), conditions),
    st.just(t.Aggregate("count", None)),
)
items = arithmetic(st.one_of(numbers, fields, aggregates))
quantities = st.sampled_from(sorted(QUANTITIES))
measures = st.one_of(
    st.builds(t.Measure, st.sampled_from(sorted({*MEASURE_AGGREGATES} - {"share", *DISPLACEMENTS})),
              quantities, st.booleans(), st.booleans()),
    st.builds(t.Measure, st.sampled_from(DISPLACEMENTS), st.just("dw"), st.just(False), st.booleans()),
    st.builds(t.Measure, st.just("share"), quantities, st.booleans(), st.just(False),
              st.tuples(operators, st.one_of(signed, st.just("explode")))),
)  # fmt: skip
selectors = st.from_regex(
    r"\A(`[a-z0-9. ]{1,6}`|[a-z][a-z0-9]{0,3}(\.[a-z*]{1,4})?)(\[[0-9:]{1,3}(,[0-9:]{1,2})?\])?\Z"
).map(t.Selector)
scopes = st.one_of(
    st.just(t.Scope()),
    st.builds(
        lambda kind, first, more: t.Scope(kind, first, first + more),
        st.sampled_from(["epochs", "steps"]), st.integers(0, 10**5), st.integers(0, 9),
    ),
)  # fmt: skip
withins = st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True)
wheres = st.none() | conditions


def units(known: tuple[str, ...]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(known), max_size=3, unique=True).map(tuple)


shows = st.one_of(
    st.builds(t.Show, st.lists(items, min_size=1, max_size=3).map(tuple), units(UNITS), scopes, wheres),
    st.builds(t.Show, st.builds(t.Weights, quantities, selectors).map(lambda item: (item,)), st.just(()), scopes,
              wheres),
    st.builds(t.Show, st.sampled_from(["samples", "visits"]).map(lambda name: (t.Table(name),)), st.just(()), scopes),
    st.builds(t.Show, st.builds(t.Measured, measures, selectors).map(lambda item: (item,)), units(CELL_UNITS), scopes,
              wheres, withins),
)  # fmt: skip


def may_be_ranked(by: t.Expression) -> bool:
    """Whether an expression is more than the bare name of a quantity that has only cells."""
    bare = by.argument if isinstance(by, t.Call) and by.function == "abs" else by
    return not (isinstance(bare, t.Field) and bare.name in (*ONLY_CELLS, "delta"))


ranked = items.filter(may_be_ranked)
counts = st.one_of(
    st.tuples(st.integers(1, 10**9).map(float), st.just(False)),
    st.tuples(st.floats(0, 100, exclude_min=True), st.just(True)),
)


@st.composite
def tops(draw: st.DrawFn) -> t.Top:
    what = draw(st.sampled_from(sorted(MEMBERS)))
    per = draw(st.none() | st.sampled_from(sorted(set(MEMBERS) - {what})))
    cells = {what, per} & set(WITHOUT_FIELDS) or draw(st.booleans())
    by = draw(measures if cells else ranked)
    within = draw(withins) if cells else None
    selector = draw(st.none() | selectors)
    return t.Top(*draw(counts), what, per, selector, by, draw(scopes), draw(wheres), within)


@st.composite
def groups(draw: st.DrawFn) -> t.Group:
    top = draw(tops().filter(lambda top: top.per is None))
    into = draw(st.integers(2, 10**6))
    return t.Group(top.what, top.selector, top.by, into, top.scope, top.where, top.within)


events = st.one_of(
    st.builds(t.Becomes, selectors, st.floats(-1e9, 1e9), st.none() | positive),
    st.builds(t.Crosses, selectors, st.floats(-1e9, 1e9)),
    st.builds(t.Exceeds, measures, st.none() | selectors, operators, st.builds(t.Number, signed, st.booleans())),
    conditions,
)
runs = st.text(string.ascii_letters + string.digits + "./-_ ", min_size=1, max_size=8).map(t.RunName)
bare = st.one_of(
    shows,
    tops(),
    groups(),
    st.builds(t.Last, st.integers(1, 10**6), events, st.booleans(), scopes),
    st.builds(t.Compare, st.lists(runs, min_size=2, max_size=3).map(tuple),
              st.lists(st.sampled_from(sorted(MEASURES)), min_size=1, unique=True).map(tuple), scopes),
    st.builds(t.From, identifiers),
)  # fmt: skip
told = st.one_of(bare, st.builds(t.Explain, bare), st.builds(t.Estimate, bare))
trees = st.one_of(told, st.builds(t.Named, told, identifiers))


@given(trees)
def test_a_tree_prints_back_to_itself(tree: t.Statement):
    assert parse(str(tree)) == tree


@given(trees, st.integers(0, 200))
def test_every_beginning_of_a_statement_is_a_tree_or_an_error(tree: t.Statement, length: int):
    beginning = str(tree)[:length]
    try:
        parse(beginning)
    except QueryError as error:
        assert "^" in str(error)


# Text -------------------------------------------------------------------------------------------------------------

WORDS = ["show", "last", "compare", "explain", "estimate", "top", "group", "from", "loss", "per", "epoch", "where",
         "during", "not", "and", "of", "w", "|", "(", ")", ",", "..", "5", "10%", "`a b`", "fc1.weight[3,5]", "becomes",
         "before", "samples", "weights", "class", "at", "by", "-", "crosses", "every", "mean", "share", "norm", "net",
         "sum |g|", "share(|grad| > explode)", "dw", "grad", "explode", ">", "in", "in (1, 2)", "as", "hot", "into 8",
         "approximately within 5%", "within", "[", "`", "\n", "#", "<", "dist(w, init)", "all", "over all"]  # fmt: skip
soup = st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join)
openings = st.sampled_from(["", "top 5 samples by ", "group weights by ", "show ", "last 5 samples before ",
                            "top 1% weights per class of fc1 by sum g where "])  # fmt: skip


@given(st.one_of(st.text(max_size=80), st.builds(str.__add__, openings, soup)))
def test_any_text_is_a_tree_or_an_error(text: str):
    try:
        tree = parse(text)
    except QueryError as error:
        assert error.args[0]
    else:
        assert parse(str(tree)) == tree
    expected_at_end(text)


@pytest.mark.parametrize(
    "text",
    ["show " + "(" * 3000, "show " + "-" * 3000 + "1", "show " + "1+" * 1500 + "1", "x" * 5000,
     "top 5 samples by " + "|" * 3000, "show loss where " + "not " * 900 + "skipped"],
)  # fmt: skip
def test_a_deep_or_long_statement_is_an_error(text: str):
    with pytest.raises(QueryError, match="at most"):
        parse(text)


class CountedMatches:
    """A pattern that counts how often it is tried."""

    def __init__(self, pattern) -> None:
        self.pattern, self.tries = pattern, 0

    def match(self, *where):
        self.tries += 1
        return self.pattern.match(*where)


LONG = ["show " + "max(|grad|+1), " * 260 + "1", "show " + ", ".join(["loss"] * 600),
        "show " + ", ".join(["sum(|g|)"] * 390),
        "show loss where sample in (" + "1, " * 1300 + "1)", "show loss where " + " or ".join(["loss > 1"] * 60),
        "compare " + "a, " * 1300 + "b by loss", "show " + "|sum " * 700, "top 5 samples by " + "(" * 60 + "sum g",
        "last 5 samples before " + "share(" * 500, "show loss per " + "class, " * 500 + "step", "#" * 4000,
        "`" * 3999, "show " + "\n" * 3000]  # fmt: skip


@given(st.one_of(trees.map(str), st.text(max_size=80), st.builds(str.__add__, openings, soup), st.sampled_from(LONG)))
def test_the_work_grows_with_the_length(text: str):
    """No place of a text is read more than a few times, so that a limit of time holds on any machine."""
    counted = CountedMatches(tokens._TOKEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_TOKEN", counted)
        try:
            parse(text)
        except QueryError:
            pass  # refused after as little work
    assert counted.tries <= 6 * (len(text) + 4)
