"""The parser: what statements mean, and errors with a caret that say what to type."""

from __future__ import annotations

import pytest

from nbdyn.errors import QueryError
from nbdyn.query import tree as t
from nbdyn.query.language import parse
from nbdyn.query.tokens import UnfinishedStatement

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
            'found "SHOW" where a verb (show, top, group, last, compare, from, explain, estimate) is needed; '
            'did you mean "show"?\n'
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
