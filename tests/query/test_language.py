"""The parser: what statements mean, and errors with a caret that say what to type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nbdyn.errors import QueryError
from nbdyn.magic_options import statements
from nbdyn.query import language
from nbdyn.query import tree as t
from nbdyn.query.language import parse
from nbdyn.query.tokens import UnfinishedStatement
from nbdyn.query.words import VERBS

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
        ("top 20 sample per weights of fc1.* by sum(|g|) during epoch 7",
         "top 20 samples per weight of fc1.* by sum |g| during epoch 7"),
        ("top 1 % weights by sum |grad| over all", "top 1% weights by sum |grad|"),
        ("top 5 steps by | sum ( grad ) |", "top 5 batches by |sum grad|"),
        ("top 3 classes by max delta where epoch = 1 during epochs 1..2",
         "top 3 classes by max err during epochs 1..2 where epoch = 1"),
        ("top 5 epochs by loss", "top 5 epochs by loss"),
        ("top 5 batches by |grad|", "top 5 batches by |grad|"),
        ("top 5 epochs by (mean(|grad|))", "top 5 epochs by (mean(|grad|))"),
        ("group units by path(dw)", "group units by path dw into 8"),
        ("group samples by mean loss into 4 at step 3", "group samples by mean(loss) into 4 at step 3"),
        ("show sum |g| of fc1.* per batch, class", "show sum |g| of fc1.* per step, class"),
        ("show share(|grad| > 10%) of all", "show share(|grad| > 0.1) of all"),
        ("show max(|grad|) per batch", "show max(|grad|) per step"),
        ("show delta of fc1 at step 3", "show err of fc1 at step 3"),
        ("last 5 samples before every share(|grad|>explode)>10%",
         "last 5 samples before every share(|grad| > explode) > 10%"),
        ("last 5 samples before max |grad| of fc1.* >= -5", "last 5 samples before max |grad| of fc1.* >= -5"),
        ("last 5 samples before norm.weight[0] becomes 0", "last 5 samples before norm.weight[0] becomes 0 exactly"),
        ("show loss where sample not in hot and class in ( 3,-1 )",
         "show loss where not sample in hot and class in (3, -1)"),
        ("estimate top 5 samples by sum g approximately within 0.07 as x",
         "estimate top 5 samples by sum g approximately within 7% as x"),
        ("explain from hot as plan", "explain from hot as plan"),
    ],
)  # fmt: skip
def test_normal_form(text: str, normal: str):
    assert str(parse(text)) == normal
    assert parse(normal) == parse(text)


@pytest.mark.parametrize(
    ("text", "measure"),
    [
        ("sum |g|", t.Measure("sum", "g", True)),
        ("sum(|g|)", t.Measure("sum", "g", True)),
        ("|sum g|", t.Measure("sum", "g", absolute=True)),
        ("max g", t.Measure("max", "g")),
        ("net dw", t.Measure("net", "dw")),
        ("share(|grad| > explode)", t.Measure("share", "grad", True, condition=(">", "explode"))),
        ("share(dw <= -1e-3)", t.Measure("share", "dw", condition=("<=", -1e-3))),
    ],
)
def test_an_aggregate_of_a_quantity_is_a_measure_of_cells(text: str, measure: t.Measure):
    assert parse(f"top 5 weights by {text}") == t.Top(5, False, "weight", None, None, measure)
    assert parse(f"show {text} of all") == t.Show((t.Measured(measure, t.Selector("all")),))
    event = t.Exceeds(measure, None, ">", t.Number(10, True))
    assert parse(f"last 5 samples before {text} > 10%") == t.Last(5, event)


@pytest.mark.parametrize("text", ["mean(loss)", "(mean(|grad|))", "|grad|", "mean(`grad`)", "loss - mean(loss)", "net"])
def test_anything_else_is_an_expression_over_fields(text: str):
    tree = parse(f"top 5 epochs by {text}")
    assert isinstance(tree, t.Top) and not isinstance(tree.by, t.Measure)
    assert parse(str(tree)) == tree


def test_a_field_may_be_called_like_a_quantity():
    tree = parse("show sum(`g`), mean(`act`)")
    assert tree == t.Show((t.Aggregate("sum", t.Field("g")), t.Aggregate("mean", t.Field("act"))))
    assert parse(str(tree)) == tree


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
        ("show median(loss)", 'no function is called "median"; known: abs, log2, sqrt, sign, nan, inf, mean, min, max, '
                              "sum, var, count, share, first, last.\n  show median(loss)\n       ^"),
        ("show loss during steps 9..3", "this range ends before it begins; write 3..9.\n"
                                        "  show loss during steps 9..3\n                            ^"),
        ("show loss where 1 < loss < 2", "one comparison at a time: write a < b and b < c.\n"
                                         "  show loss where 1 < loss < 2\n                           ^"),
        ("show max(mean(loss)) per epoch", "max is already taken of many rows; one inside it has no meaning.\n"
                                           "  show max(mean(loss)) per epoch\n           ^"),
        ("top 5 wieghts by sum g", 'found "wieghts" where one of samples, classes, batches, epochs, tokens, positions, '
                                   'weights, units, layers, tensors, steps is needed; did you mean "weights"?\n'
                                   "  top 5 wieghts by sum g\n        ^"),
        ("top weights by sum g", 'found "weights" where how many (20) or what part (1%) is needed.\n'
                                 "  top weights by sum g\n      ^"),
        ("top 0.5 weights by sum g", "a whole number from 1 on, or a percentage, is needed here.\n"
                                     "  top 0.5 weights by sum g\n      ^"),
        ("top 200% weights by sum g", "a percentage above 0 and up to 100 is needed here, such as 1%.\n"
                                      "  top 200% weights by sum g\n      ^"),
        ("top 5 weights by |g|", "weights are ranked by a measure of their cells: by sum |g|, max |g|, norm g.\n"
                                 "  top 5 weights by |g|\n                   ^"),
        ("top 5 samples per unit by loss", "units are ranked by a measure of their cells: by sum |g|, max |g|, norm g."
                                           "\n  top 5 samples per unit by loss\n                            ^"),
        ("top 5 samples by |act|", "act has many cells; say what is made of them: by sum |act|, max |act|, norm act.\n"
                                   "  top 5 samples by |act|\n                   ^"),
        ("top 5 classes by summ |g|", 'nothing is called "summ" that is made of cells; did you mean "sum"?\n'
                                      "  top 5 classes by summ |g|\n                   ^"),
        ("top 5 epochs by mean(|grad|) / 2", "a measure of cells stands alone; an expression over recorded fields "
                                             "stands in brackets.\n"
                                             "  top 5 epochs by mean(|grad|) / 2\n                  ^"),
        ("top 5 samples per sample by sum g", "samples are ranked among all of them; leave out per sample.\n"
                                              "  top 5 samples per sample by sum g\n                ^"),
        ("top 5 weights by net g", "net and path are displacements of weights: net dw.\n"
                                   "  top 5 weights by net g\n                       ^"),
        ("show sum |g| per class", 'found "per" where "of" and parameters (sum |g| of fc1.*, sum |g| of all) is needed.'
                                   "\n  show sum |g| per class\n               ^"),
        ("show sum |g| of all, loss", "a measure of cells comes as a frame of its own: ask for it alone.\n"
                                      "  show sum |g| of all, loss\n       ^"),
        ("show loss per run", "a statement asks one run; several are set side by side: compare a, b by loss.\n"
                              "  show loss per run\n                ^"),
        ("show loss approximately within 5%", "only measures of cells are approximated (top 20 samples by sum |g| "
                                              "approximately within 5%); this is read exactly: leave it out.\n"
                                              "  show loss approximately within 5%\n            ^"),
        ("group layers by sum g approximately within 100%", "an error between 0 and 100 % is needed here, such as 5%.\n"
         "  group layers by sum g approximately within 100%\n                                             ^"),
        ("last 5 samples before share(|grad| > 1) > 1 and loss > 3", "an event of cells is one measure and one number: "
         "share(|grad| > explode) > 10%.\n  last 5 samples before share(|grad| > 1) > 1 and loss > 3\n"
         "                                              ^"),
        ("show loss where loss in hot", "only sample, class, step, epoch may be in something: sample in hot.\n"
                                        "  show loss where loss in hot\n                  ^"),
        ("show loss as class", '"class" cannot be the name of a variable; type another, such as hot.\n'
                               "  show loss as class\n               ^"),
        ("last 2.5 samples before loss > 1", "a whole number from 1 on is needed here.\n"
                                             "  last 2.5 samples before loss > 1\n       ^"),
    ],
)  # fmt: skip
def test_messages(text: str, message: str):
    with pytest.raises(QueryError) as caught:
        parse(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "show",
        "show loss,",
        "show loss where",
        "last 5",
        "compare a,",
        "compare a, b by",
        "top",
        "top 5",
        "top 5 samples",
        "top 5 samples by",
        "top 5 samples by sum",
        "group weights by sum |g",
        "show sum |g| of",
        "from",
        "show loss as",
        "show loss where sample in",
        "show loss where sample in (1,",
        "last 5 samples before share(|grad| > explode)",
    ],
)
def test_an_unfinished_statement_says_so(text: str):
    with pytest.raises(UnfinishedStatement, match="the statement ends here"):
        parse(text)


# The page -----------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "query.md").read_text(encoding="utf-8")


def examples() -> list[str]:
    """Each statement of the page: the lines of its plain blocks, without what is said beside them."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line for tag, block in blocks if not tag and ":=" not in block for line in statements(block)]
    return [re.split(r" {4,}", line.removeprefix("%dyn "))[0] for line in lines if not line.startswith("%%")]


@pytest.mark.parametrize("text", [*examples(), *VERBS.values()])
def test_the_examples_can_be_read(text: str):
    assert parse(str(parse(text))) == parse(text)


def test_the_page_and_the_parser_show_one_grammar():
    (page,) = re.findall(r"^```\n(statement :=.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    rules = set(re.findall(r"^(\w+) +:=", page, re.MULTILINE))
    assert rules == set(re.findall(r"^    (\w+) +:=", language.__doc__ or "", re.MULTILINE)) - {"quantity"}
    for verb in VERBS:
        assert f'"{verb}"' in page
