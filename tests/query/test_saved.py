"""Statements kept with a run under a name."""

from __future__ import annotations

from pathlib import Path

import pytest

import nbdyn
from nbdyn.errors import QueryError, UnknownName
from nbdyn.query.complete import complete
from nbdyn.query.saved import save, saved, saved_names, unfold
from nbdyn.store import Store


@pytest.fixture
def recorded(tmp_path: Path) -> Store:
    """A run of two steps."""
    import torch

    model = torch.nn.Linear(2, 2)
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.CrossEntropyLoss()
    data = torch.utils.data.TensorDataset(torch.ones(4, 2), torch.tensor([0, 1] * 2))
    with nbdyn.record(tmp_path / "fc", model, optimizer, loss_fn) as recorder:
        for x, y in recorder.watch(torch.utils.data.DataLoader(data, batch_size=2)):
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
    return nbdyn.open(tmp_path / "fc").store


def test_the_latest_under_a_name_is_read_again(recorded: Store):
    save(recorded, "hot", ["show  loss"])
    save(recorded, "cold", ["show acc", "top 5 samples  by sum(|g|) as x"])
    save(recorded, "hot", ["show lr"])
    assert saved(recorded, "hot") == "show lr"
    assert saved(recorded, "cold") == "show acc\ntop 5 samples by sum |g| as x"
    assert saved_names(recorded) == ["hot", "cold"]
    assert [word.text for word in complete("from ", recorded)] == ["hot", "cold"]


def test_from_stands_for_the_statement(recorded: Store):
    save(recorded, "hot", ["show loss as kept"])
    for text, meant in [
        ("from hot", "show loss as kept"),
        ("from hot as mine", "show loss as mine"),
        ("explain from hot", "explain show loss"),
        ("estimate from hot as x", "estimate show loss as x"),
        ("show acc", "show acc"),
    ]:
        assert str(unfold(text, recorded)[0]) == meant


def test_unknown_names(recorded: Store):
    with pytest.raises(UnknownName, match='no statement is saved as "hot" with fc; nothing is yet: %%dyn --save hot'):
        saved(recorded, "hot")
    save(recorded, "hot", ["show loss"])
    with pytest.raises(UnknownName) as caught:
        unfold("explain from hto", recorded)
    assert str(caught.value) == (
        'no statement is saved as "hto" with fc; did you mean "hot"?\n  explain from hto\n               ^'
    )


@pytest.mark.parametrize(
    ("name", "statements", "message"),
    [
        ("a b", ["show loss"], '"a b" cannot name statements'),
        ("if", ["show loss"], '"if" cannot name statements'),
        ("hot", [], "there is no statement to save"),
        ("hot", ["show loss", "explain from hot"], 'save the statement itself, not "from hot"'),
        ("hot", ["show loss,"], "the statement ends here"),
    ],
)
def test_what_cannot_be_saved(recorded: Store, name: str, statements: list[str], message: str):
    with pytest.raises(QueryError, match=message):
        save(recorded, name, statements)
    assert saved_names(recorded) == []
