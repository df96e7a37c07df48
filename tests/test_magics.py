"""%dyn and %%dyn in a real shell: options, results, errors, completion, and an unload that leaves the rest alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.completer import context_matcher, provisionalcompleter
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

import nbdyn.run
from nbdyn import magic_names, magics
from nbdyn.errors import NbdynError
from nbdyn.magic_options import split_options, statements


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recorded runs, `fc` and `fc-2`, of two epochs with three steps each."""
    import torch

    path = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(["fc", "fc-2"]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss_fn = torch.nn.CrossEntropyLoss()
        data = torch.utils.data.TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)
        order = torch.Generator().manual_seed(seed)
        loader = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, generator=order)
        with nbdyn.record(path / name, model, optimizer, loss_fn, weights="every") as recorder:
            for _ in range(2):
                for x, y in recorder.watch(loader):
                    optimizer.zero_grad()
                    loss_fn(model(x), y).backward()
                    optimizer.step()
    return path


@pytest.fixture
def run(shell: InteractiveShell, folder: Path) -> nbdyn.run.Run:
    """The run `fc`, opened, so that a bare %dyn speaks to it."""
    return nbdyn.run.open(folder / "fc")


def dyn(shell: InteractiveShell, line: str) -> Any:
    return shell.run_line_magic("dyn", line)


def error(shell: InteractiveShell, line: str) -> str:
    with pytest.raises(UsageError) as caught:
        dyn(shell, line)
    # A subclass would print a traceback.
    assert type(caught.value) is UsageError
    return str(caught.value)


# Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "run", "out", "rest"),
    [
        ("show loss", None, None, "show loss"),
        ("-o hot show  loss   where lr > 1", None, "hot", "show  loss   where lr > 1"),
        ("--out=hot --run runs/fc show it's \"odd", "runs/fc", "hot", "show it's \"odd"),
        ("-r 'my runs/fc' show `a b` -- {x} $y", "my runs/fc", None, "show `a b` -- {x} $y"),
        ("-r fc", "fc", None, ""),
    ],
)
def test_options_first_then_the_query_as_typed(line: str, run: str | None, out: str | None, rest: str):
    options, query = split_options(line)
    assert (options.run, options.out, query) == (run, out, rest)


@given(st.text(max_size=40))
def test_any_line_is_options_and_a_rest_or_a_usage_error(line: str):
    try:
        _, rest = split_options(line)
    except UsageError:
        return
    assert line.strip().endswith(rest) and not rest.startswith("-")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--runn x show loss", 'unknown option "--runn"; did you mean "--run"?'),
        ("-o", "-o needs a name for the result: -o result."),
        ("-r", "-r needs a variable or path: -r runs/fc."),
        ("-o 2x show loss", '"2x" is no name for a variable; write -o result.'),
        ("-o class show loss", '"class" is no name for a variable; write -o result.'),
        ("--save", "--save needs a name for the statement: --save hot."),
        ("-s a.b show loss", '"a.b" is no name for a variable; write --save hot.'),
        ("- show", 'unknown option "-"; did you mean'),
    ],
)
def test_wrong_options(shell: InteractiveShell, line: str, message: str):
    assert error(shell, line).startswith(message)


def test_statements_of_a_cell():
    cell = "# first\nshow loss  # now\n\ncompare a, b\n    by loss,\nacc\nshow acc\n"
    assert statements(cell) == ["show loss  # now", "compare a, b\n    by loss,\nacc", "show acc"]


# Results ----------------------------------------------------------------------------------------------------------


def test_a_line_returns_a_frame(shell: InteractiveShell, run: nbdyn.run.Run):
    frame = dyn(shell, "show loss, |grad| during epoch 1")
    assert isinstance(frame, pd.DataFrame) and list(frame["step"]) == [3, 4, 5]
    pd.testing.assert_series_equal(frame["loss"], run.steps["loss"][3:].reset_index(drop=True))
    shell.run_cell("x = %dyn show loss at step 2")
    assert list(shell.user_ns["x"]["step"]) == [2]


def test_out_stores_and_returns_nothing(shell: InteractiveShell, run: nbdyn.run.Run):
    assert dyn(shell, "-o hot show loss") is None
    assert len(shell.user_ns["hot"]) == 6


def test_braces_and_dollars_belong_to_the_query(shell: InteractiveShell, run: nbdyn.run.Run):
    shell.user_ns["loss"] = "acc"
    # Seen by the parser as typed: run_cell would have put "acc" there without no_var_expand.
    assert "{loss}" in str(shell.run_cell("%dyn show {loss}").error_in_exec)


def test_a_cell_of_statements(shell: InteractiveShell, run: nbdyn.run.Run, monkeypatch: pytest.MonkeyPatch):
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    cell = "# two answers\nshow loss at step 1\nshow acc\n  during epoch 0\n"
    last = shell.run_cell_magic("dyn", "", cell)
    assert [list(frame.columns) for frame in shown] == [["step", "loss"]]
    assert list(last.columns) == ["step", "acc"] and len(last) == 3
    assert shell.run_cell_magic("dyn", "-o kept", cell) is None
    assert len(shell.user_ns["kept"]) == 3


def test_notes_are_one_line(shell: InteractiveShell, run: nbdyn.run.Run, capsys: pytest.CaptureFixture[str]):
    dyn(shell, "last 5 samples before loss > 1e9")
    assert capsys.readouterr().out.startswith("nbdyn: no step in 0..5 where loss > 1000000000; nearest loss = ")


def test_explain(shell: InteractiveShell, run: nbdyn.run.Run):
    assert list(dyn(shell, "explain show loss")["array"]) == ["steps"]


# Names ------------------------------------------------------------------------------------------------------------


def test_as_stores_a_result_and_shows_nothing(
    shell: InteractiveShell, run: nbdyn.run.Run, monkeypatch: pytest.MonkeyPatch
):
    assert dyn(shell, "show loss at step 2 as low") is None
    assert list(shell.user_ns["low"]["step"]) == [2]
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    last = shell.run_cell_magic("dyn", "", "show loss as low\nshow acc\nexplain show lr as plan\nshow |grad|\n")
    assert [list(frame.columns) for frame in shown] == [["step", "acc"]] and list(last.columns) == ["step", "|grad|"]
    assert len(shell.user_ns["low"]) == 6 and list(shell.user_ns["plan"]["array"]) == ["steps"]
    assert dyn(shell, "-o kept show loss at step 1 as low") is None
    pd.testing.assert_frame_equal(shell.user_ns["kept"], shell.user_ns["low"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("number", '"number" holds a int, no frame; type another name after "as", or del number first.'),
        ("list", '"list" is a word of Python; type another name after "as".'),
        ("if", '"if" cannot be the name of a variable; type another, such as hot.'),
    ],
)
def test_as_overwrites_frames_only(shell: InteractiveShell, run: nbdyn.run.Run, name: str, message: str):
    shell.user_ns["number"] = 3
    notes = len(run.notes)
    assert error(shell, f"show loss as {name}").startswith(message)
    assert shell.user_ns["number"] == 3 and len(run.notes) == notes


def test_save_and_from(shell: InteractiveShell, run: nbdyn.run.Run, capsys: pytest.CaptureFixture[str]):
    before = len(run.notes)
    dyn(shell, "-s first show loss during epoch 1")
    assert "saved with fc; %dyn from first runs it again" in capsys.readouterr().out
    pd.testing.assert_frame_equal(dyn(shell, "from first"), dyn(shell, "show loss during epoch 1"))
    assert list(dyn(shell, "explain from first")["array"]) == ["steps"]
    assert dyn(shell, "from first as again") is None and len(shell.user_ns["again"]) == 3
    assert list(run.notes["kind"][before:]) == ["statement", "saved", *["statement"] * 3]
    assert error(shell, "from frist").endswith('did you mean "first"?')


def test_a_cell_is_saved_whole(shell: InteractiveShell, run: nbdyn.run.Run, monkeypatch: pytest.MonkeyPatch):
    shell.run_cell_magic("dyn", "--save both", "show loss as low\nshow acc\n  at step 1\nshow lr")
    del shell.user_ns["low"]
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    assert list(dyn(shell, "from both").columns) == ["step", "lr"]
    assert [list(frame["step"]) for frame in shown] == [[1]] and len(shell.user_ns["low"]) == 6
    assert "both holds 3 statements" in error(shell, "explain from both")


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("# nothing", "there is no statement to save"),
        ("from other", "save the statement itself"),
        ("show los,", "ends here"),
    ],
)
def test_what_cannot_be_saved(shell: InteractiveShell, run: nbdyn.run.Run, cell: str, message: str):
    before = len(run.notes)
    with pytest.raises(UsageError, match=message):
        shell.run_cell_magic("dyn", "--save bad", cell)
    assert len(run.notes) == before


def test_a_named_result_in_a_condition(shell: InteractiveShell, run: nbdyn.run.Run):
    cell = "show mean(loss) per sample where sample in (3, 7, 9) as hot\nshow count per sample where sample in hot\n"
    assert list(shell.run_cell_magic("dyn", "", cell)["sample"]) == [3, 7, 9]
    shell.user_ns["ids"] = {2, 5}
    assert list(dyn(shell, "show count per sample where sample in ids")["sample"]) == [2, 5]
    assert len(dyn(shell, "show count per sample where sample not in ids")) == 10
    assert error(shell, "show loss where sample in idz").startswith('no variable is called "idz"; did you mean "ids"?')


def test_names_in_conditions_are_variables(shell: InteractiveShell):
    shell.user_ns |= {"hot": pd.DataFrame({"sample": [1]}), "ids": [3, 4], "number": 3}
    assert magic_names.collection(shell, "ids") == [3, 4]
    assert magic_names.collection(shell, "hot") is shell.user_ns["hot"]
    shell.user_ns["seen"] = {4, 1}
    assert magic_names.collection(shell, "seen") == [1, 4]
    with pytest.raises(NbdynError, match='no variable is called "hto"; did you mean "hot"'):
        magic_names.collection(shell, "hto")
    with pytest.raises(NbdynError, match='"number" holds a int; a frame with a column "sample", or a list of ids'):
        magic_names.collection(shell, "number")


# Runs -------------------------------------------------------------------------------------------------------------


def test_open_and_runs(shell: InteractiveShell, folder: Path):
    opened = dyn(shell, f'open "{folder / "fc"}"')
    assert opened.name == "fc" and nbdyn.run.current() is opened
    assert list(dyn(shell, "runs")["run"]) == ["fc", "fc-2"]
    assert list(dyn(shell, f"runs {folder}")["run"]) == ["fc", "fc-2"]


def test_the_run_option_speaks_for_its_statement_only(shell: InteractiveShell, run: nbdyn.run.Run, folder: Path):
    other = nbdyn.run.Run(type(run.store)(folder / "fc-2"))
    shell.user_ns["other"] = other
    for name in ("other", folder / "fc-2"):
        assert dyn(shell, f"-r {name} show loss").attrs["nbdyn"]["run"] == "fc-2"
    assert dyn(shell, "show loss").attrs["nbdyn"]["run"] == "fc"


def test_two_runs_compared(shell: InteractiveShell, run: nbdyn.run.Run):
    frame = dyn(shell, "compare fc, fc-2 by progress(loss), dist(w, init), acc at step 5")
    assert list(frame["run"]) == ["fc", "fc-2"]
    expected = run.weights["all", 5].astype(float) - run.weights["all", 0].astype(float)
    assert frame["dist(w, init)"][0] == pytest.approx((expected**2).sum() ** 0.5)


def test_help(shell: InteractiveShell, capsys: pytest.CaptureFixture[str], folder: Path):
    dyn(shell, "")
    assert "no run is open; type %dyn open PATH" in capsys.readouterr().out
    nbdyn.run.open(folder / "fc")
    dyn(shell, "")
    told = capsys.readouterr().out
    assert told.startswith("%dyn speaks to fc (")
    for verb in ("show", "top", "group", "last", "compare", "from", "explain", "estimate", "open", "runs"):
        assert f"  {verb:8} %dyn {verb}" in told


# Errors -----------------------------------------------------------------------------------------------------------


def test_errors_are_usage_errors(shell: InteractiveShell, folder: Path):
    assert error(shell, "show loss") == "no run is open; type %dyn open PATH, or name one: %dyn -r runs/fc ..."
    assert error(shell, "open").startswith("%dyn open needs the path of a run")
    assert "nothing is there" in error(shell, f"open {folder / 'nowhere'}")
    nbdyn.run.open(folder / "fc")
    assert error(shell, "show los") == 'unknown field "los" of steps; did you mean "loss"?\n  show los\n       ^'
    assert error(shell, "show loss,").endswith("\nFor a statement of several lines use %%dyn.")
    assert error(shell, "-r bogus show loss").startswith('no variable and no folder is called "bogus"')
    shell.user_ns["number"] = 3
    assert error(shell, "-r number show loss").startswith('"number" holds a int, not a run')


def test_an_error_prints_no_traceback(shell: InteractiveShell, run: nbdyn.run.Run, capsys: pytest.CaptureFixture[str]):
    shell.run_cell("%dyn show los")
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    assert 'UsageError: unknown field "los"' in captured.err


def test_the_line_of_a_cell_takes_options_only(shell: InteractiveShell, run: nbdyn.run.Run):
    with pytest.raises(UsageError, match="options only"):
        shell.run_cell_magic("dyn", "show loss", "show acc")


# Completion -------------------------------------------------------------------------------------------------------


def completions(shell: InteractiveShell, text: str) -> list[str]:
    """What a press of Tab at the end of some text would make of its last line."""
    with provisionalcompleter():
        found = list(shell.Completer.completions(text, len(text)))
    return [(text[: word.start] + word.text).split("\n")[-1] for word in found]


@pytest.mark.parametrize(
    ("text", "completed"),
    [
        ("%dyn sho", "%dyn show"),
        ("%dyn op", "%dyn open"),
        ("%dyn show loss dur", "%dyn show loss during"),
        ("x = %dyn show gra", "x = %dyn show grad_norm"),
        ("%dyn -o hot show lo", "%dyn -o hot show loss"),
        ("%dyn last 5 samples before 0.we", "%dyn last 5 samples before 0.weight"),
        ("%dyn show w of ", "%dyn show w of 2.*"),
        ("%dyn compare fc, fc", "%dyn compare fc, fc-2"),
        ("%dyn compare fc, fc-2 by pro", "%dyn compare fc, fc-2 by progress(loss)"),
        ("%%dyn\nshow loss\nlast 5 samples be", "last 5 samples before"),
        ("%%dyn -o x\ncompare fc, fc-2\n  by di", "  by dist(w, init)"),
        ("%%dyn\ncompare fc, fc-2 by\nlo", "loss"),
        ("%dyn top 5 we", "%dyn top 5 weights"),
        ("%dyn top 5 weights of 0.", "%dyn top 5 weights of 0.weight"),
        ("%dyn top 5 weights by sum |g", "%dyn top 5 weights by sum |grad|"),
        ("%dyn show loss where sample in ho", "%dyn show loss where sample in hot"),
        ("%dyn --sa", "%dyn --save"),
        ("%dyn --ru", "%dyn --run"),
        ("%%dyn --ou", "%%dyn --out"),
    ],
)
def test_completion(shell: InteractiveShell, run: nbdyn.run.Run, text: str, completed: str):
    shell.user_ns["hot"] = [1, 2]
    assert completed in completions(shell, text)


def test_completion_of_saved_statements(shell: InteractiveShell, run: nbdyn.run.Run):
    dyn(shell, "-s latest show loss")
    assert "%dyn from latest" in completions(shell, "%dyn from lat")


def test_completion_of_runs(shell: InteractiveShell, run: nbdyn.run.Run, monkeypatch: pytest.MonkeyPatch, folder: Path):
    monkeypatch.chdir(folder.parent)
    shell.user_ns["mine"] = run
    assert completions(shell, "%dyn -r mi") == ["%dyn -r mine"]
    assert f"%dyn -r {folder.name}/fc-2" in completions(shell, f"%dyn -r {folder.name}/f")


def test_other_lines_are_left_to_others(shell: InteractiveShell, run: nbdyn.run.Run):
    shell.user_ns["shower"] = 1
    assert "shower" in completions(shell, "sho")
    assert "show" not in completions(shell, "sho")
    assert "show" not in completions(shell, "%%time\nsho")


# Loading and unloading --------------------------------------------------------------------------------------------


def test_loading_twice_is_harmless(shell: InteractiveShell):
    matchers = list(shell.Completer.custom_matchers)
    magics.load_ipython_extension(shell)
    assert shell.Completer.custom_matchers == matchers
    assert len(list(shell.strdispatchers["complete_command"].s_matches("%dyn"))) == 1


def test_unload_takes_back_its_own_and_nothing_else(shell: InteractiveShell):
    magics.unload_ipython_extension(shell)
    before = _state(shell)

    def hook(_shell: InteractiveShell, event: SimpleNamespace) -> list[str]:
        return ["theirs"]

    matcher = context_matcher(identifier="theirs")(lambda context: {"completions": []})
    shell.set_hook("complete_command", hook, str_key="%dyn")
    shell.Completer.custom_matchers.append(matcher)
    magics.load_ipython_extension(shell)
    assert shell.find_line_magic("dyn") and shell.find_cell_magic("dyn")
    magics.unload_ipython_extension(shell)
    assert shell.find_line_magic("dyn") is None and shell.find_cell_magic("dyn") is None
    assert matcher in shell.Completer.custom_matchers
    (kept,) = shell.strdispatchers["complete_command"].s_matches("%dyn")
    assert kept.__func__ is hook
    shell.strdispatchers["complete_command"].strs.pop("%dyn")
    shell.Completer.custom_matchers.remove(matcher)
    assert _state(shell) == before
    magics.unload_ipython_extension(shell)


def test_unload_leaves_a_later_magic_of_the_same_name(shell: InteractiveShell):
    shell.register_magic_function(lambda line: "theirs", "line", "dyn")
    magics.unload_ipython_extension(shell)
    assert dyn(shell, "") == "theirs"


def _state(shell: InteractiveShell) -> tuple[Any, ...]:
    dispatchers = shell.strdispatchers["complete_command"]
    return (
        {kind: sorted(names) for kind, names in shell.magics_manager.magics.items()},
        sorted(shell.magics_manager.registry),
        sorted(dispatchers.strs),
        list(shell.Completer.custom_matchers),
    )
