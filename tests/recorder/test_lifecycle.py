"""The life of a recorder: names, modes, live writers, interrupts, budgets, readers beside it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import nbdyn
from nbdyn.errors import Incompatible, NbdynError, RecordingStopped, RunBusy
from nbdyn.store.writer import SegmentWriter
from tests import problems

ROOT = Path(__file__).parents[2]


def _setup(widths: tuple[int, ...] = (12, 8, 4), adam: bool = False) -> tuple[nn.Module, Any, Any]:
    model = problems.mlp(*widths)
    kind = torch.optim.Adam if adam else torch.optim.SGD
    return model, kind(model.parameters(), 0.05), nn.CrossEntropyLoss()


def _loader() -> DataLoader:
    return DataLoader(problems.data(), 20, shuffle=True, generator=torch.Generator().manual_seed(0))


def _record(path: Path, epochs: int = 1, **options: Any) -> nbdyn.Run:
    model, optimizer, loss_fn = _setup()
    with nbdyn.record(path, model, optimizer, loss_fn, **options) as rec:
        problems.train(rec, model, optimizer, loss_fn, _loader(), epochs)
    return nbdyn.open(rec)


def _python(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def _line(process: subprocess.Popen[str], word: str) -> str:
    """The child's first line with a word in it."""
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return line
    raise AssertionError(f"the child ended without saying {word}")


def test_a_new_run_takes_the_next_free_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [_record(tmp_path / "fc").name for _ in range(3)]
    assert names == ["fc", "fc-2", "fc-3"]
    assert f"{tmp_path}/fc exists; recording to {tmp_path}/fc-2 instead" in capsys.readouterr().out


def test_a_live_writer_of_another_process_is_named(tmp_path: Path) -> None:
    child = _python(f"""
        import nbdyn, torch
        from tests import problems
        model = problems.mlp(12, 8, 4)
        rec = nbdyn.record({str(tmp_path / "fc")!r}, model, torch.optim.SGD(model.parameters(), 0.1))
        print("ready", flush=True)
        input()
    """)
    try:
        _line(child, "ready")
        model, optimizer, loss_fn = _setup()
        for mode in ("new", "resume", "replace"):
            with pytest.raises(RunBusy, match=rf"is being recorded by process {child.pid} on "):
                nbdyn.record(tmp_path / "fc", model, optimizer, loss_fn, mode=mode)
        assert nbdyn.open(tmp_path / "fc").status == "recording"
    finally:
        child.kill()
        child.communicate()
    assert nbdyn.open(tmp_path / "fc").status == "killed"


def test_the_lock_dies_with_the_process_not_with_its_workers(tmp_path: Path) -> None:
    child = _python(f"""
        import os, time, nbdyn, torch
        from tests import problems
        model = problems.mlp(12, 8, 4)
        rec = nbdyn.record({str(tmp_path / "fc")!r}, model, torch.optim.SGD(model.parameters(), 0.1))
        if os.fork() == 0:  # as a DataLoader's worker is made
            time.sleep(30)
            os._exit(0)
        print("forked", flush=True)
        input()
    """)
    _line(child, "forked")
    assert nbdyn.open(tmp_path / "fc").status == "recording"
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):  # the worker lives on, with the other ends
        assert pipe is not None
        pipe.close()
    assert nbdyn.open(tmp_path / "fc").status == "killed"


def test_a_cell_run_again_closes_the_earlier_recorder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer, loss_fn = _setup()
    first = nbdyn.record(tmp_path / "fc", model, optimizer, loss_fn)
    problems.train(first, model, optimizer, loss_fn, _loader(), 1)
    second = nbdyn.record(tmp_path / "fc", model, optimizer, loss_fn)
    assert "the earlier recorder of fc in this session was still open; closing it" in capsys.readouterr().out
    problems.train(second, model, optimizer, loss_fn, _loader(), 1)
    second.close()
    assert (len(nbdyn.open(tmp_path / "fc")), len(nbdyn.open(tmp_path / "fc-2"))) == (6, 6)
    assert nbdyn.open(tmp_path / "fc").status == "interrupted"


def test_replace_deletes_runs_and_nothing_else(tmp_path: Path) -> None:
    first = _record(tmp_path / "fc", epochs=2)
    assert len(first) == 12
    assert len(_record(tmp_path / "fc", mode="replace")) == 6
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    model, optimizer, _ = _setup()
    with pytest.raises(NbdynError, match="is no run; nbdyn deletes nothing else"):
        nbdyn.record(tmp_path / "thesis", model, optimizer, mode="replace")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_resume_goes_on_bit_for_bit_in_a_fresh_process_state(tmp_path: Path) -> None:
    def train(rec: Any, model: nn.Module, optimizer: Any, loss_fn: Any, steps: range) -> None:
        x, y = problems.data().tensors
        for step in steps:
            ids = torch.arange(step, step + 20) % len(x)
            rec.batch(ids=ids, epoch=0)
            optimizer.zero_grad()
            loss_fn(model(x[ids]), y[ids]).backward()
            optimizer.step()

    model, optimizer, loss_fn = _setup(adam=True)
    with nbdyn.record(tmp_path / "whole", model, optimizer, loss_fn, weights="every") as rec:
        train(rec, model, optimizer, loss_fn, range(30))
    model, optimizer, loss_fn = _setup(adam=True)
    with nbdyn.record(tmp_path / "parts", model, optimizer, loss_fn, weights="every") as rec:
        train(rec, model, optimizer, loss_fn, range(17))
    model, optimizer, loss_fn = _setup(adam=True)
    with nbdyn.record(tmp_path / "parts", model, optimizer, loss_fn, mode="resume") as rec:
        assert rec.step == 17
        train(rec, model, optimizer, loss_fn, range(17, 30))
    whole, parts = nbdyn.open(tmp_path / "whole"), nbdyn.open(tmp_path / "parts")
    assert np.array_equal(whole.weights["all"], parts.weights["all"])
    assert whole.steps["loss"].tolist() == parts.steps["loss"].tolist()
    assert whole.visits["sample"].tolist() == parts.visits["sample"].tolist()
    assert (np.diff(parts.steps["seconds"]) > 0).all()


def test_resume_refuses_another_model(tmp_path: Path) -> None:
    _record(tmp_path / "fc")
    model, optimizer, loss_fn = _setup((12, 9, 4))
    with pytest.raises(Incompatible, match=r"cannot resume fc: .*0\.weight"):
        nbdyn.record(tmp_path / "fc", model, optimizer, loss_fn, mode="resume")
    assert nbdyn.open(tmp_path / "fc").status == "complete"


def test_resume_of_nothing_begins_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(_record(tmp_path / "fc", mode="resume")) == 6
    assert "nothing to resume" in capsys.readouterr().out


def test_an_unwritable_path_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model, optimizer, _ = _setup()
    with pytest.raises(NbdynError, match=r"cannot record to .*file/fc"):
        nbdyn.record(tmp_path / "file" / "fc", model, optimizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "evry"}, "weights='evry': did you mean \"every\""),
        ({"mode": "append"}, "one of new, resume, replace"),
        ({"every": 0}, "give a whole number from 1"),
        ({"budget": "a lot"}, "is no size"),
    ],
)
def test_wrong_arguments_say_what_to_type(tmp_path: Path, options: Any, message: str) -> None:
    model, optimizer, _ = _setup()
    with pytest.raises(NbdynError, match=message):
        nbdyn.record(tmp_path / "fc", model, optimizer, **options)
    assert not (tmp_path / "fc").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_exception_closes_the_run_and_goes_on(tmp_path: Path, error: type[BaseException]) -> None:
    model, optimizer, loss_fn = _setup()
    with pytest.raises(error), nbdyn.record(tmp_path / "fc", model, optimizer, loss_fn) as rec:
        problems.train(rec, model, optimizer, loss_fn, _loader(), 1)
        raise error
    run = nbdyn.open(tmp_path / "fc")
    assert (run.status, len(run)) == ("interrupted", 6)
    assert run.weights.steps.tolist() == [0, 6]


def test_a_cell_that_fails_closes_what_it_was_recording(tmp_path: Path) -> None:
    code = f"""
        from IPython.core.interactiveshell import InteractiveShell
        import nbdyn, torch
        shell = InteractiveShell.instance()
        shell.run_cell('''
        import nbdyn, torch
        from torch import nn
        from torch.utils.data import DataLoader
        from tests import problems
        model = problems.mlp(12, 8, 4)
        optimizer, loss_fn = torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss()
        rec = nbdyn.record({str(tmp_path / "fc")!r}, model, optimizer, loss_fn)
        problems.train(rec, model, optimizer, loss_fn, DataLoader(problems.data(), 20), 1)
        ''')
        shell.run_cell("a typo in another cell")
        print("after an unrelated error:", shell.user_ns["rec"].state)
        shell.run_cell("problems.train(rec, model, optimizer, loss_fn, DataLoader(problems.data(), 20), 1); 1 / 0")
        print("after an error in training:", shell.user_ns["rec"].state)
    """
    code = code.replace("'''\n        ", "'''").replace("\n        ", "\n")
    output = _python(code).communicate(timeout=100)[0]
    assert "after an unrelated error: recording" in output
    assert "after an error in training: interrupted" in output
    assert len(nbdyn.open(tmp_path / "fc")) == 12


@pytest.mark.parametrize(("ending", "status"), [("", "complete"), ("1 / 0", "interrupted")])
def test_the_end_of_python_closes_the_run(tmp_path: Path, ending: str, status: str) -> None:
    child = _python(f"""
        import sys, nbdyn, torch
        sys.stderr = sys.stdout
        from torch.utils.data import DataLoader
        from tests import problems
        model = problems.mlp(12, 8, 4)
        optimizer, loss_fn = torch.optim.SGD(model.parameters(), 0.1), torch.nn.CrossEntropyLoss()
        rec = nbdyn.record({str(tmp_path / "fc")!r}, model, optimizer, loss_fn)
        problems.train(rec, model, optimizer, loss_fn, DataLoader(problems.data(), 20), 1)
        {ending}
    """)
    child.communicate(timeout=100)
    run = nbdyn.open(tmp_path / "fc")
    assert (run.status, len(run)) == (status, 6)


def test_the_budget_stops_recording_and_training_goes_on(tmp_path: Path) -> None:
    model, optimizer, loss_fn = _setup()
    rec = nbdyn.record(tmp_path / "fc", model, optimizer, loss_fn, weights="every", budget="60 KB")
    with pytest.raises(RecordingStopped, match=r"budget of 60\.0 KB .*every=.*snapshots"):
        for _ in range(500):
            problems.train(rec, model, optimizer, loss_fn, _loader(), 1)
        rec.close()
    before = problems.flat(model)
    problems.train(rec, model, optimizer, loss_fn, _loader(), 1)
    assert not torch.equal(before, problems.flat(model))
    run = nbdyn.open(tmp_path / "fc")
    assert rec.state == run.status == "stopped" and rec.flushed == len(run)
    assert not optimizer._optimizer_step_pre_hooks and not loss_fn._forward_hooks
    rec.close()


def test_a_slow_writer_makes_training_wait_and_nothing_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = SegmentWriter.commit
    monkeypatch.setattr(SegmentWriter, "commit", lambda self, segment: (time.sleep(0.1), commit(self, segment)))
    monkeypatch.setattr(nbdyn.options, "memory", "40 KB")
    run = _record(tmp_path / "fc", epochs=8, weights="every")
    assert len(run) == 48 and len(run.weights.steps) == 49
    assert "training waited" in capsys.readouterr().out


def test_a_failing_writer_stops_recording_with_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, segment: Any) -> None:
        raise OSError("the disk is gone")

    model, optimizer, loss_fn = _setup()
    rec = nbdyn.record(tmp_path / "fc", model, optimizer, loss_fn)
    monkeypatch.setattr(SegmentWriter, "commit", fail)
    with pytest.raises(RecordingStopped, match=r"the disk is gone.*training can go on unrecorded"):
        problems.train(rec, model, optimizer, loss_fn, _loader(), 1)
        rec.close()
    assert rec.state == "stopped"
    assert not [t for t in threading.enumerate() if t.name.startswith("nbdyn-")]


def test_a_reader_beside_the_recorder_sees_every_acknowledged_step(tmp_path: Path) -> None:
    model, optimizer, loss_fn = _setup()
    rec = nbdyn.record(tmp_path / "fc", model, optimizer, loss_fn, weights="every")
    rec.note("before the first step")
    run = nbdyn.open(rec)
    assert len(run) == 0 and run.status == "recording" and run.steps.empty and run.visits.empty
    deadline = time.monotonic() + 60
    while len(run) < 6 and time.monotonic() < deadline:
        problems.train(rec, model, optimizer, loss_fn, _loader(), 1)
        time.sleep(0.3)
        acknowledged = rec.flushed
        run.refresh()
        assert len(run) >= acknowledged
    committed = len(run)
    assert committed >= 6 and len(run.weights["0.weight"]) == committed
    assert len(run.visits) == 20 * committed
    rec.close()
    assert run.refresh() or len(run) == committed
    assert run.status == "complete" and run.notes["text"].tolist()[0] == "before the first step"


def test_a_run_without_steps_can_be_closed_and_opened(tmp_path: Path) -> None:
    model, optimizer, loss_fn = _setup()
    nbdyn.record(tmp_path / "fc", model, optimizer, loss_fn).close()
    run = nbdyn.open(tmp_path / "fc")
    assert len(run) == 0 and run.status == "complete"
    assert run.samples.empty and run.norms.empty and len(run.parameters) == 4 and "fc" in run._repr_html_()
