"""The parser: trees print back to themselves, and anything else is an error with a caret."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdyn.errors import QueryError
from nbdyn.query import tree as t
from nbdyn.query.language import expected_at_end, parse
from nbdyn.query.tokens import UnfinishedStatement
from nbdyn.query.words import AGGREGATES, MEASURES, UNITS

# Trees ------------------------------------------------------------------------------------------------------------

names = st.one_of(
    st.sampled_from(["loss", "acc", "grad", "val loss", "first", "share", "not", "per", "samples", "0.weight", "ü"]),
    st.text(string.ascii_letters + " ./-", min_size=1, max_size=8).filter(lambda name: name.strip() == name != ""),
)
positive = st.one_of(
    st.integers(0, 10**6).map(float),
    st.floats(0, 1e300, allow_nan=False, allow_infinity=False),
)
numbers = st.builds(t.Number, positive, st.booleans())
fields = names.map(t.Field)


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
comparisons = st.builds(t.Comparison, st.sampled_from(["<", "<=", ">", ">=", "=", "!="]), values, values)
conditions = st.recursive(
    st.one_of(comparisons, st.builds(t.Call, st.sampled_from(["nan", "inf"]), values), fields),
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
events = st.one_of(
    st.builds(t.Becomes, selectors, st.floats(-1e9, 1e9), st.none() | positive),
    st.builds(t.Crosses, selectors, st.floats(-1e9, 1e9)),
    conditions,
)
runs = st.text(string.ascii_letters + string.digits + "./-_ ", min_size=1, max_size=8).map(t.RunName)
bare = st.one_of(
    st.builds(t.Show, st.lists(items, min_size=1, max_size=3).map(tuple),
              st.lists(st.sampled_from(UNITS), max_size=2, unique=True).map(tuple), scopes, st.none() | conditions),
    st.builds(t.Show, st.builds(t.Weights, st.sampled_from(["w", "dw"]), selectors).map(lambda item: (item,)),
              st.just(()), scopes, st.none() | conditions),
    st.builds(t.Show, st.sampled_from(["samples", "visits"]).map(lambda name: (t.Table(name),)), st.just(()), scopes),
    st.builds(t.Last, st.integers(1, 10**6), events, st.booleans(), scopes),
    st.builds(t.Compare, st.lists(runs, min_size=2, max_size=3).map(tuple),
              st.lists(st.sampled_from(sorted(MEASURES)), min_size=1, unique=True).map(tuple), scopes),
)  # fmt: skip
trees = st.one_of(bare, st.builds(t.Explain, bare))


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


WORDS = ["show", "last", "compare", "explain", "loss", "per", "epoch", "where", "during", "not", "and", "of", "w", "|",
         "(", ")", ",", "..", "5", "10%", "`a b`", "fc1.weight[3,5]", "becomes", "before", "samples", "at", "by", "-",
         "crosses", "every", "mean", "share", "[", "`", "\n", "#", "<", "dist(w, init)"]  # fmt: skip


@given(st.one_of(st.text(max_size=80), st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join)))
def test_any_text_is_a_tree_or_an_error(text: str):
    try:
        tree = parse(text)
    except QueryError as error:
        assert error.args[0]
    else:
        assert parse(str(tree)) == tree
    expected_at_end(text)


@pytest.mark.parametrize(
    "text", ["show " + "(" * 3000, "show " + "-" * 3000 + "1", "show " + "1+" * 1500 + "1", "x" * 5000]
)
def test_a_deep_or_long_statement_is_an_error(text: str):
    with pytest.raises(QueryError, match="at most"):
        parse(text)


# Meaning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("show  loss ,acc", "show loss, acc"),
        ("show mean loss per epoch", "show mean(loss) per epoch"),
        ("show abs(loss - 1)", "show |loss - 1|"),
        ("show ||a| - b|", "show ||a| - b|"),
        ("show a - (b - c) * 2", "show a - (b - c) * 2"),
        ("show (a * b) - c", "show a * b - c"),
        ("show loss where acc < 10% and not (skipped or nan(loss))",
         "show loss where acc < 10% and not (skipped or nan(loss))"),
        ("show loss where lr == 0.1 during epochs 1..2", "show loss during epochs 1..2 where lr = 0.1"),
        ("show loss during epochs 3", "show loss during epoch 3"),
        ("show loss during step 3", "show loss at step 3"),
        ("show loss over all # everything", "show loss"),
        ("show w of fc1.weight [3, :]", "show w of fc1.weight[3,:]"),
        ("show w of `0.weight`[3,5]", "show w of `0.weight`[3,5]"),
        ("last 5 samples before first a.b[3,5] becomes 0", "last 5 samples before a.b[3,5] becomes 0 exactly"),
        ("last 1 sample before every loss>5", "last 1 samples before every loss > 5"),
        ("last 5 samples before a crosses -.5", "last 5 samples before a crosses -0.5"),
        ("compare a,runs/b-2 by dist(w,init),|grad| at step 5",
         "compare a, runs/b-2 by dist(w, init), |grad| at step 5"),
    ],
)  # fmt: skip
def test_normal_form(text: str, normal: str):
    assert str(parse(text)) == normal
    assert parse(normal) == parse(text)


def test_percent_is_a_hundredth():
    tree = parse("show loss where acc < 10%")
    assert isinstance(tree, t.Show) and isinstance(tree.where, t.Comparison) and isinstance(tree.where.right, t.Number)
    assert tree.where.right.value == 0.1


# Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "show loss durring epoch 3",
            'found "durring" where the end of the statement is needed; did you mean "during"?\n'
            "  show loss durring epoch 3\n"
            "            ^",
        ),
        (
            "SHOW loss",
            'found "SHOW" where a verb (show, top, group, last, compare, from, explain, estimate) is needed; did you mean "show"?\n'
            "  SHOW loss\n  ^",
        ),
        (
            "last 50 samples before fc1.weight[3,5] becoms 0",
            'found "becoms" where "becomes", "crosses" or a comparison is needed; did you mean "becomes"?\n'
            "  last 50 samples before fc1.weight[3,5] becoms 0\n"
            "                                         ^",
        ),
        (
            "last 50 samples before mean(loss) > 3",
            "an event speaks of the values of one step (loss > 5, |grad| > 10, nan(loss)) or of its cells "
            "(share(|grad| > explode) > 10%, max |g| of fc1.* > 3).\n"
            "  last 50 samples before mean(loss) > 3\n"
            "                         ^",
        ),
        (
            "compare a, b by progres(loss) at step 5",
            'unknown measure "progres(loss)"; did you mean "progress(loss)"?\n'
            "  compare a, b by progres(loss) at step 5\n"
            "                  ^",
        ),
        ("compare a by loss", 'found "by" where "," and a second run is needed.\n  compare a by loss\n            ^'),
        ("show loss,", "the statement ends here; a field or a number is needed.\n  show loss,\n            ^"),
        ("show `val loss", "a backtick opens a name here and none closes it.\n  show `val loss\n       ^"),
        ("show\tloss;", '";" has no meaning here; a name with such a character is written in backticks.\n'
                        "  show loss;\n           ^"),
        ("show loss per layer", "cells are told apart per layer (show sum |g| of all per layer), recorded fields per "
                                "step, epoch, sample, tensor, class.\n  show loss per layer\n                ^"),
        ("show median(loss)", 'no function is called "median"; known: abs, log2, sqrt, nan, inf, mean, min, max, sum, '
                              "count, share, first, last.\n  show median(loss)\n       ^"),
        ("show loss during steps 9..3", "this range ends before it begins; write 3..9.\n"
                                        "  show loss during steps 9..3\n                            ^"),
        ("show loss where 1 < loss < 2", "one comparison at a time: write a < b and b < c.\n"
                                         "  show loss where 1 < loss < 2\n                           ^"),
        ("show max(mean(loss)) per epoch", "max is already taken of many rows; one inside it has no meaning.\n"
                                           "  show max(mean(loss)) per epoch\n           ^"),
        ("last 2.5 samples before loss > 1", "a whole number from 1 on is needed here.\n"
                                             "  last 2.5 samples before loss > 1\n       ^"),
    ],
)  # fmt: skip
def test_messages(text: str, message: str):
    with pytest.raises(QueryError) as caught:
        parse(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text", ["", "show", "show loss,", "show loss where", "last 5", "compare a,", "compare a, b by"]
)
def test_an_unfinished_statement_says_so(text: str):
    with pytest.raises(UnfinishedStatement, match="the statement ends here"):
        parse(text)
