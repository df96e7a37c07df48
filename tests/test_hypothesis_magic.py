"""%%hypothesis and %dyn hypotheses in a real shell."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from torch.utils.data import DataLoader, TensorDataset

import nbdyn.run
from nbdyn import magics
from nbdyn.magic_hypothesis import _asked
from nbdyn.settings import options

BODY = "It learns.\nmeasure: mean(loss) during epoch 1\ntest: < 2, t over runs\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two runs, and the working directory beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options, "quiet", True)
    for seed in range(2):
        torch.manual_seed(seed)
        model = torch.nn.Linear(3, 2)
        optimizer, loss_fn = torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.CrossEntropyLoss()
        loader = DataLoader(TensorDataset(torch.randn(8, 3), torch.arange(8) % 2), batch_size=4)
        with nbdyn.record(tmp_path / "runs" / f"a-{seed}", model, optimizer, loss_fn, per_sample=False) as recorder:
            for _ in range(2):
                for x, y in recorder.watch(loader):
                    optimizer.zero_grad()
                    loss_fn(model(x), y).backward()
                    optimizer.step()
    return tmp_path / "runs"


def cell(shell: InteractiveShell, line: str, body: str = BODY) -> Any:
    return shell.run_cell_magic("hypothesis", line, body)


def error(shell: InteractiveShell, line: str, body: str = BODY) -> str:
    with pytest.raises(UsageError) as caught:
        cell(shell, line, body)
    assert type(caught.value) is UsageError  # a subclass would print a traceback
    return str(caught.value)


def test_the_cell_declares_then_tests_and_the_table_shows_it(shell: InteractiveShell, folder: Path):
    line = 'learns -r "runs/a-*" --level 0.01'
    assert cell(shell, line).state == "declared"
    found = cell(shell, line)
    assert (found.state, found.level, found.kind) == ("tested", 0.01, "confirmatory")
    for asked in ("hypotheses", "hypotheses runs", f"hypotheses '{folder}'"):
        table = shell.run_line_magic("dyn", asked)
        assert table["name"].tolist() == ["learns"] and table["state"].tolist() == ["tested"]
    nbdyn.run.open(folder / "a-1")
    os.chdir("/")
    assert len(shell.run_line_magic("dyn", "hypotheses")) == 1  # beside the run that was opened last


def test_a_statement_in_between_is_seen(shell: InteractiveShell, folder: Path):
    shell.run_line_magic("dyn", "-r runs/a-0 show loss")
    assert cell(shell, "learns -r runs/a-*").reasons == ("data of a-0 was asked for before",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "a name is missing"),
        ("learns", "-r RUNS is missing"),
        ("-r runs/a-*", "a name is missing"),
        ("learns -r", "-r needs a value"),
        ("learns --runz x", 'unknown option "--runz"; did you mean "--runs"?'),
        ("learns more -r runs/a-*", 'a hypothesis has one name, and found "learns" and "more"'),
        ("learns -r runs/a-* --level high", '--level needs a number such as 0.05, not "high"'),
        ("learns -r runs/a-* --level 2", "is not in 0..0.5"),
        ('learns -r "runs/a-*', "a quote opens and none closes it"),
        ("../x -r runs/a-*", '"../x" cannot name a hypothesis'),
        ("learns -r r*ns/a-*", "only the last part may have"),
        ("learns -r s3://bucket/a-*", "a ledger needs a folder of this machine"),
        ("learns -r ''", "-r RUNS is missing"),
    ],
)
def test_mistakes_in_the_line(shell: InteractiveShell, line: str, message: str):
    assert message in error(shell, line)


def test_mistakes_in_the_body_leave_no_ledger(shell: InteractiveShell, folder: Path):
    assert "^" in error(shell, "learns -r runs/a-*", BODY.replace("< 2, t", "< 2 t"))
    assert "^" in error(shell, "learns -r runs/a-*", BODY.replace("mean(loss)", "mean(loss"))
    assert not (folder / "hypotheses.jsonl").exists()


def test_tampering_is_an_error_without_a_traceback(shell: InteractiveShell, folder: Path):
    cell(shell, "learns -r runs/a-*")
    path = folder / "hypotheses.jsonl"
    path.write_text(path.read_text().replace("It learns", "It earns"))
    assert 'entry 0 ("learns", declared) was changed' in error(shell, "learns -r runs/a-*")
    with pytest.raises(UsageError, match="was changed"):
        shell.run_line_magic("dyn", "hypotheses runs")


def test_options_in_any_order_and_quoted():
    expected = ("x", "my runs/a-*", "0.1")
    for line in ('x -r "my runs/a-*" -l 0.1', "--level=0.1 x --runs='my runs/a-*'", "-l 0.1 -r 'my runs/a-*' x"):
        found = _asked(line)
        assert (found.name, found.runs, found.level) == expected


@given(st.text(max_size=40))
def test_any_line_is_read_or_a_usage_error(line: str):
    try:
        found = _asked(line)
    except UsageError:
        return
    assert found.name and found.runs


def test_braces_and_dollars_stay_as_typed(shell: InteractiveShell, folder: Path):
    shell.user_ns["loss"] = "gone"
    assert cell(shell, "x -r runs/a-*", BODY.replace("It learns", "It {loss} $loss")).claim == "It {loss} $loss."


def test_unload_takes_the_magic_back_and_nothing_else(shell: InteractiveShell):
    magics.load_ipython_extension(shell)  # twice changes nothing
    magics.unload_ipython_extension(shell)
    assert "hypothesis" not in shell.magics_manager.magics["cell"]
    assert "HypothesisMagics" not in shell.magics_manager.registry and "time" in shell.magics_manager.magics["cell"]
    magics.load_ipython_extension(shell)
    shell.register_magic_function(lambda line, cell: "mine", "cell", "hypothesis")
    magics.unload_ipython_extension(shell)
    assert cell(shell, "x") == "mine"
