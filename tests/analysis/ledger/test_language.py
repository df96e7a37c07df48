"""The cell, the measure and the test: what is read, how it is printed, what is said of mistakes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdyn.analysis.ledger.language import Test as Parsed
from nbdyn.analysis.ledger.language import check_name, parse_cell, parse_measure, parse_test
from nbdyn.errors import QueryError

CELL = "The last layer's total LCA is positive.\nmeasure: sum lca of fc over all\ntest: > 0, t over runs"


def test_the_cell_of_the_docs():
    cell = parse_cell(CELL)
    assert cell.claim == "The last layer's total LCA is positive."
    assert (str(parse_measure(cell.measure)), str(parse_test(cell.test))) == (
        "sum lca of fc over all",
        "> 0, t over runs",
    )


def test_blanks_are_no_part_of_a_hypothesis():
    spaced = (
        "\n  The last layer's total LCA is positive.  \n\nMeasure:   sum lca of fc\n   over all\n\n"
        "test: > 0,\n\tt over runs\n\n"
    )
    assert parse_cell(spaced) == parse_cell(CELL)


def test_a_claim_of_several_lines_with_colons_and_other_letters():
    claim = "Überraschung: tiefer ist besser,\nи быстрее 深い\n\nNote: see (3)."
    assert parse_cell(f"{claim}\nmeasure: mean(loss)\ntest: < 1, t over runs").claim == claim


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("It helps.\ntest: > 0, t over runs", 'the cell has no line "measure: ..."'),
        ("It helps.\nmesure: mean(loss)\ntest: > 0, t over runs", 'Did you mean "measure:" by "mesure:"?'),
        ("It helps.\nmeasure: mean(loss)\n", 'the cell has no line "test: ..."'),
        ("It helps.\nmeasure: mean(loss)\ntset: > 0, t over runs", 'Did you mean "test:"?'),
        ("measure: mean(loss)\ntest: > 0, t over runs", "the claim is missing"),
        (
            "It helps.\nmeasure: mean(loss)\nmeasure: max(loss)\ntest: > 0, t over runs",
            "two lines that begin with measure",
        ),
        ("It helps.\nmeasure:\ntest: > 0, t over runs", 'no line "measure: ..."'),
        ("It helps.\nmeasure: mean(loss)\ntest: > 0, t over runs\nwell", '"well" stands below test:'),
        ("", 'no line "measure: ..."'),
    ],
)
def test_mistakes_in_a_cell(body: str, message: str):
    with pytest.raises(QueryError) as caught:
        parse_cell(body)
    assert message in str(caught.value)


@given(st.text(max_size=200))
def test_any_cell_is_read_or_refused(body: str):
    try:
        cell = parse_cell(body)
        parse_measure(cell.measure)
        parse_test(cell.test)
    except QueryError:
        pass


# Measures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("sum lca of fc over all", "sum lca of fc over all"),
        ("mean  lca", "mean lca of all over all"),
        ("sum lca of fc1.weight[3,:] during epochs 1..2", "sum lca of fc1.weight[3,:] during epochs 1..2"),
        ("sum lca of `my layer` at step 5 in validation", "sum lca of `my layer` at step 5 in validation"),
        ("sum lca in train", "sum lca of all over all in train"),
        ("progress( loss ) at step 500", "progress(loss) at step 500"),
        ("dist(w,init) at step 7", "dist(w, init) at step 7"),
        ("dist(w, init) during step 7", "dist(w, init) at step 7"),
        ("mean(loss) during epoch 3", "mean(loss) during epoch 3"),
        ("acc at step 5", "accuracy at step 5"),
        ("sum |g| of fc1.* over all", "sum |g| of fc1.*"),
        ("share(|grad| > 3) during epoch 0", "share(|grad| > 3) during epoch 0"),
        ("mean(loss) where class = 3", "mean(loss) where class = 3"),
    ],
)
def test_measures_and_their_normal_form(text: str, normal: str):
    found = parse_measure(text)
    assert str(parse_measure(str(found))) == str(found)
    assert parse_measure(str(found)) == found or str(found) == normal
    assert str(found).replace("accuracy", "acc") == normal.replace("accuracy", "acc")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean(los", '")" is needed'),
        ("loss, lr at step 3", "one number for each run, and these are 2"),
        ("mean(loss) per epoch", "leave out per epoch"),
        ("samples", "this is a table"),
        ("w of fc1.*", "this is many cells"),
        ("sum |g| of fc1 approximately within 5%", "leave out approximately"),
        ("progress(loss)", "say at which, progress(loss) at step 500"),
        ("dist(w, init) during steps 3..5", "say at which"),
        ("dist(w, init), loss at step 5", "one measure"),
        ("sum lca of fc during epoc 3", 'did you mean "epoch"'),
        ("sum lca of fc over all in 3", "the name of an allocation"),
        ("sum lca of", "a parameter"),
        ("sum lca of fc over all please", '"please"'),
    ],
)
def test_mistakes_in_a_measure_have_a_caret(text: str, message: str):
    with pytest.raises(QueryError) as caught:
        parse_measure(text)
    assert message in str(caught.value) and "^" in str(caught.value)


@given(st.text(alphabet="sumlcaeof over.*[]3,`|()<>=\n", max_size=60).map(lambda text: f"sum lca {text}"))
def test_any_lca_measure_is_read_or_refused(text: str):
    try:
        found = parse_measure(text)
    except QueryError:
        return
    assert str(parse_measure(str(found))) == str(found)


# Tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("> 0, t over runs", "> 0, t over runs"),
        ("<-1.5e-3,wilcoxon over 10 runs", "< -0.0015, wilcoxon over 10 runs"),
        ("!= .5 , permutation  over runs", "!= 0.5, permutation over runs"),
        ('> "plain-*", t over runs', '> "plain-*", t over runs'),
        ("< 'a b', paired wilcoxon over 8 pairs", '< "a b", paired wilcoxon over 8 runs'),
    ],
)
def test_tests_and_their_normal_form(text: str, normal: str):
    assert str(parse_test(text)) == normal
    assert parse_test(normal) == parse_test(text)


@pytest.mark.parametrize(
    ("text", "message", "place"),
    [
        ("= 0, t over runs", 'found "=" where what is claimed (>, < or !=) is needed', 0),
        (">= 0, t over runs", 'found ">="', 0),
        ("> zero, t over runs", "a number, or other runs in quotes", 2),
        ("> plain-*, t over runs", "a number, or other runs in quotes", 2),
        ("> 0 t over runs", '"," is needed', 4),
        ("> 0, anova over runs", "a test (t, wilcoxon, permutation) is needed.", 5),
        ("> 0, wilcoxen over runs", 'did you mean "wilcoxon"', 5),
        ("> 0, paired t over runs", "a number has no pairs", 5),
        ("> 0, t", 'the test ends here; "over" is needed', 6),
        ("> 0, t over", 'the test ends here; "runs" is needed', 11),
        ("> 0, t over samples", 'found "samples"', 12),
        ("> 0, t over 1 runs", "a whole number of runs from 2", 12),
        ("> 0, t over 2.5 runs", "a whole number of runs from 2", 12),
        ("> 0, t over runs, really", "the test ends before this", 16),
        ("> 1e999, t over runs", "too large", 2),
        ('> "a, t over runs', "a number, or other runs in quotes", 2),
        ("", "the test ends here", 0),
    ],
)
def test_mistakes_in_a_test_have_a_caret(text: str, message: str, place: int):
    with pytest.raises(QueryError) as caught:
        parse_test(text)
    assert message in str(caught.value)
    assert str(caught.value).splitlines()[-1] == "  " + " " * place + "^"


tests = st.builds(
    Parsed,
    relation=st.sampled_from([">", "<", "!="]),
    value=st.floats(allow_nan=False, allow_infinity=False),
    runs=st.none(),
    paired=st.just(False),
    method=st.sampled_from(["t", "wilcoxon", "permutation"]),
    count=st.none() | st.integers(2, 10_000),
)


@given(tests)
def test_what_is_printed_is_read_back(test: Parsed):
    assert parse_test(str(test)) == test


@given(st.text(max_size=40) | st.text(alphabet='><!=0.5, twilcoxoverunspaired"*-', max_size=40))
def test_any_test_is_read_or_refused(text: str):
    try:
        found = parse_test(text)
    except QueryError:
        return
    assert parse_test(str(found)) == found


# Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "last-layer-hurts", "v1.2", "größer_ist-besser", "глубже"])
def test_names(name: str):
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "a b", "../x", "-r", "_x", "a/b", "<b>", "a\nb", "x" * 101, "a|b", "`a`"])
def test_hostile_names_are_refused(name: str):
    with pytest.raises(QueryError, match="cannot name a hypothesis"):
        check_name(name)
