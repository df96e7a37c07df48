"""What is offered at a cursor."""

from __future__ import annotations

import pytest
from query_problems import MemoryStore

from nbdyn.query.complete import complete


def words(text: str, store: MemoryStore | None = None) -> list[str]:
    return [word.text for word in complete(text, store, runs=lambda: ["tiny", "my run"], names=lambda: ["hot"])]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("", ["explain", "estimate", "show", "top", "group", "last", "compare", "from"]),
        ("sh", ["show"]),
        ("explain s", ["show"]),
        ("show lo", ["loss", "log2("]),
        ("show |gr", ["|grad|", "grad_norm"]),
        ("show loss du", ["during"]),
        ("show loss during ep", ["epoch", "epochs"]),
        ("show loss per e", ["epoch"]),
        ("last 5 ", ["samples", "sample"]),
        ("last 5 samples before ev", ["every"]),
        ("last 5 samples before fc1.we", ["fc1.weight"]),
        ("last 5 samples before fc1.weight[0,1] be", ["becomes"]),
        ("last 5 samples before fc1.weight[0,1] becomes 0 wi", ["within"]),
        ("show w of fc", ["fc1.weight", "fc1.bias", "fc1.*"]),
        ("show w of fc1.", ["fc1.weight", "fc1.bias", "fc1.*"]),
        ("show `val", ["`val loss`"]),
        ("estimate t", ["top"]),
        ("top 5 w", ["weights"]),
        ("top 5 samples per w", ["weight"]),
        ("top 5 samples per weight of fc1.", ["fc1.weight", "fc1.bias", "fc1.*"]),
        ("top 5 samples by n", ["norm(", "net dw", "nan("]),
        ("top 5 samples by sum |gr", ["|grad|", "grad", "grad_norm"]),
        ("top 5 samples by share(|grad| > e", ["explode"]),
        ("group weights by sum |g| in", ["into"]),
        ("top 5 samples by sum |g| app", ["approximately"]),
        ("show err", ["err of"]),
        ("show sum |g| o", ["of"]),
        ("show sum |g| of all per l", ["layer"]),
        ("last 5 samples before share(|grad| > explode) o", ["of"]),
        ("show loss where sample ", ["in", "not", "and", "or", "during", "at", "over", "as"]),
        ("show loss where sample in h", ["hot"]),
        ("compare ti", ["tiny"]),
        ("compare `my", ["`my run`"]),
        ("compare tiny, b by di", ["dist(w, init)"]),
        ("compare tiny, b by loss at ", ["step"]),
    ],
)
def test_offers(store: MemoryStore, text: str, first: list[str]):
    assert words(text, store) == first


@pytest.mark.parametrize(
    "text",
    [
        "show loss)",
        "show loss bogus ",
        "nonsense ",
        "show w of fc1.weight[0,",
        "x" * 5000,
        "show loss as h",
        "show loss per l",
        "show loss app",
    ],
)
def test_nothing_where_nothing_fits(store: MemoryStore, text: str):
    assert words(text, store) == []


def test_without_a_run_the_words_of_the_language(store: MemoryStore):
    assert "loss" in words("show l") and "fc1.weight" not in words("show w of ")


def test_where_the_word_begins(store: MemoryStore):
    (word,) = complete("show w of fc1.we", store)
    assert (word.text, word.start, word.kind) == ("fc1.weight", 10, "parameter")
