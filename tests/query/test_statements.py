"""Methods of a run and statements of the language are one and the same."""

from __future__ import annotations

import pytest

from nbdyn.errors import QueryError
from nbdyn.query import statements
from nbdyn.query.language import parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (statements.top("1%", "weights", by="sum |grad|"), "top 1% weights by sum |grad|"),
        (
            statements.top(
                3, "classes", per="unit", of="fc1", by="norm g", step=(2, 5), where="correct = 0", within=0.05
            ),
            "top 3 classes per unit of fc1 by norm g during steps 2..5 where correct = 0 approximately within 5%",
        ),
        (statements.group("units", of="fc1.*", by="|sum g|", into=4, epoch=2),
         "group units of fc1.* by |sum g| into 4 during epoch 2"),
        (statements.show("mean(loss)", "share(correct = 1)", per=["epoch", "class"], epoch=(0, 2)),
         "show mean(loss), share(correct = 1) per epoch, class during epochs 0..2"),
        (statements.show("sum |g| of fc1.*", per="class", step=7), "show sum |g| of fc1.* per class at step 7"),
        (statements.last(5, "loss > 5", every=True, epoch=1), "last 5 samples before every loss > 5 during epoch 1"),
        (statements.compare(["a", "../runs/b"], "loss", step=4), "compare a, ../runs/b by loss at step 4"),
    ],
)  # fmt: skip
def test_arguments_make_the_statement(text: str, expected: str):
    assert str(parse(text)) == expected


def test_one_scope():
    with pytest.raises(QueryError, match="one scope"):
        statements.scope(1, 2)
