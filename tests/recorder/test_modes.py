"""What `mode` does to what is there, who may write, and how a recording ends."""

from __future__ import annotations

import builtins
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from torch import nn

import nbdyn
from nbdyn.errors import CorruptRun, Incompatible, NbdynError, RecordingStopped, RunBusy
from nbdyn.recorder import session
from nbdyn.recorder.pipeline import Pipeline
from nbdyn.store import lock, verify
from nbdyn.store.backend import context, tiledb
from nbdyn.store.writer import SegmentWriter

SAMPLES, BATCH = 32, 4
ROOT = str(Path(__file__).parents[2])


class Training:
    """A small ordinary training whose batches follow from the number of the step."""

    def __init__(self, seed: int = 0, kind: Any = torch.optim.Adam, width: int = 6) -> None:
        generator = torch.Generator().manual_seed(5)
        self.inputs = torch.randn(SAMPLES, 5, generator=generator)
        self.targets = torch.randint(0, 3, (SAMPLES,), generator=generator)
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(width, 3))
        self.optimizer = kind(self.model.parameters(), lr=0.05)
        self.loss_fn = nn.CrossEntropyLoss()

    def record(self, path: Any, **options: Any) -> Any:
        return nbdyn.record(path, self.model, self.optimizer, self.loss_fn, **options)

    def ids(self, step: int) -> np.ndarray:
        return np.random.default_rng(step).permutation(SAMPLES)[:BATCH]

    def step(self, ids: np.ndarray) -> None:
        loss = self.loss_fn(self.model(self.inputs[ids]), self.targets[ids])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def run(self, rec: Any, start: int, stop: int) -> None:
        for number in range(start, stop):
            rec.batch(self.ids(number))
            self.step(self.ids(number))

    def flat(self) -> np.ndarray:
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()]).numpy().copy()


def reference(steps: int) -> np.ndarray:
    """Weights before every step of the training undisturbed, and after the last."""
    training = Training()
    rows = []
    for number in range(steps):
        rows.append(training.flat())
        training.step(training.ids(number))
    return np.stack([*rows, training.flat()])


@pytest.fixture(autouse=True)
def _no_recorder_left() -> Iterator[None]:
    yield
    left = list(session._open.values())
    for recorder in left:
        recorder.close()
    assert not left, "the test left a recorder open"
    assert [thread.name for thread in threading.enumerate() if thread.name == "nbdyn-writer"] == []


def recorded(path: Path, steps: int = 3, **options: Any) -> Training:
    training = Training()
    with training.record(path, **options) as rec:
        training.run(rec, 0, steps)
    return training


def fragments(path: Path) -> list[str]:
    return sorted(str(entry.relative_to(path)) for entry in path.rglob("*"))


# New ------------------------------------------------------------------------------------------------------------


def test_new_takes_the_next_free_name_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fc"
    recorded(path)
    (tmp_path / "fc-3").write_text("a file of the user")
    before = fragments(path)
    for expected in ("fc-2", "fc-4"):
        capsys.readouterr()
        with Training().record(path) as rec:
            assert rec.uri == str(tmp_path / expected)
        assert f"{path} exists; recording to {tmp_path / expected} instead." in capsys.readouterr().out
    assert fragments(path) == before
    assert (tmp_path / "fc-3").read_text() == "a file of the user"


@pytest.mark.parametrize("make", [lambda p: p.write_text("x"), lambda p: (p.mkdir(), (p / "x").write_text("x"))])
def test_new_leaves_what_is_no_run_alone(make: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "fc"
    make(path)
    before = fragments(path), path.is_file()
    with Training().record(path) as rec:
        assert rec.uri == f"{path}-2"
    assert (fragments(path), path.is_file()) == before


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "fc").mkdir()
    with Training().record(tmp_path / "fc") as rec:
        assert rec.uri == str(tmp_path / "fc")


# One writer -----------------------------------------------------------------------------------------------------

OTHER = """
import sys, torch, nbdyn
from torch import nn
model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.1), nn.Linear(6, 3))
optimizer, loss_fn = torch.optim.Adam(model.parameters(), 0.05), nn.CrossEntropyLoss()
rec = nbdyn.record({path!r}, model, optimizer, loss_fn)
for step in range(5):
    rec.batch(range(4))
    loss_fn(model(torch.ones(4, 5)), torch.zeros(4).long()).backward()
    optimizer.step()
print("recording", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that records to `fc` until a line comes on its standard input."""
    with subprocess.Popen(
        [sys.executable, "-c", OTHER.format(path=str(tmp_path / "fc"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": ROOT},
    ) as process:
        assert process.stdout is not None
        while (line := process.stdout.readline()) != "recording\n":
            assert line, "the other process ended early"
        yield process
        process.kill()


def test_a_live_writer_in_another_process(other_process: subprocess.Popen[str], tmp_path: Path) -> None:
    """New, resume and replace name it; readers see what it commits; when it dies, the run is free."""
    path = tmp_path / "fc"
    link = tmp_path / "link"
    link.symlink_to(path)
    for where in (path, link):
        for mode in ("new", "resume", "replace"):
            with pytest.raises(RunBusy, match=f"process {other_process.pid} on "):
                Training().record(where, mode=mode)
    with pytest.raises(RunBusy, match=f"process {other_process.pid} on "):
        verify.gc(str(path))
    run = nbdyn.open(path)
    assert run.status == "recording"
    wait_until(lambda: (run.refresh(), len(run) == 4)[1])  # the fifth may still be logged for
    assert len(run.steps) == len(run.visits) // BATCH == 4
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["fc", "link"]
    other_process.kill()
    other_process.wait(timeout=30)
    assert run.status == "killed"
    with Training().record(path, mode="resume") as rec:
        assert rec.step == 4


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_a_look_at_the_run_does_not_free_its_lock(tmp_path: Path) -> None:
    """POSIX locks go when any handle of the process on the file is closed: also one opened under another name."""
    path, link = tmp_path / "fc", tmp_path / "link"
    training = Training()
    with training.record(path) as rec:
        link.symlink_to(path)
        for where in (path, link):
            assert nbdyn.open(where).status == "recording"
            assert lock.holder(str(where)) == "this process"
        code = f"from nbdyn.store import Store; print(Store({str(path)!r}).status)"
        environment = {**os.environ, "PYTHONPATH": ROOT}
        seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert seen.stdout == "recording\n"
        training.run(rec, 0, 1)


def test_a_run_open_in_this_process_is_closed_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "fc"
    first, second = Training(), Training(1)
    earlier = first.record(path)
    first.run(earlier, 0, 4)
    with second.record(path) as rec:
        assert "the earlier recorder of fc in this session was still open; closing it." in capsys.readouterr().out
        assert earlier.state == "interrupted"
        assert rec.uri == f"{path}-2"
        first.step(first.ids(9))  # its hooks are gone
    assert len(nbdyn.open(path)) == 4
    assert nbdyn.open(path).status == "interrupted"


# Replace --------------------------------------------------------------------------------------------------------


def test_replace_replaces_a_run(tmp_path: Path) -> None:
    path = tmp_path / "fc"
    recorded(path, 5)
    recorded(path, 2, mode="replace")
    assert len(nbdyn.open(path)) == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["fc"]


def test_replace_after_a_creation_that_was_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "fc"
    recorded(path)
    for entry in (path / "__meta").iterdir():
        entry.unlink()
    with pytest.raises(CorruptRun, match="creation was cut short"):
        nbdyn.open(path)
    recorded(path, mode="replace")
    assert len(nbdyn.open(path)) == 3


def a_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("x")


def an_array(path: Path) -> None:
    tiledb().from_numpy(str(path), np.arange(4), ctx=context(str(path))).close()


def a_group(path: Path) -> None:
    tiledb().Group.create(str(path), ctx=context(str(path)))
    an_array(path / "steps")
    with tiledb().Group(str(path), "w", ctx=context(str(path))) as group:
        group.add("steps", name="steps", relative=True)
        group.meta["schema"] = 1


def a_run_with_a_file_of_the_user(path: Path) -> None:
    recorded(path)
    (path / "thesis.tex").write_text("x")


@pytest.mark.parametrize(
    "make", [a_folder, an_array, a_group, a_run_with_a_file_of_the_user, lambda path: path.write_text("x")]
)
def test_replace_deletes_nothing_but_runs(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "fc"
    make(path)
    before = fragments(tmp_path)
    with pytest.raises(NbdynError, match=r"deletes nothing else|did not write"):
        Training().record(path, mode="replace")
    assert fragments(tmp_path) == before


def test_nothing_is_deleted_before_all_arguments_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "fc"
    recorded(path)
    before = fragments(tmp_path)
    for wrong in ({"budget": "plenty"}, {"every": 0}, {"weights": "all"}):
        with pytest.raises(NbdynError):
            Training().record(path, mode="replace", **wrong)
        assert fragments(tmp_path) == before


def test_a_run_that_appears_in_the_last_moment_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process records a whole run between our look at the path and our lock."""
    from nbdyn.recorder import target

    path = tmp_path / "fc"
    recorded(tmp_path / "other")

    class Late(lock.WriterLock):
        def __init__(self, uri: str) -> None:
            shutil.copytree(tmp_path / "other", path, dirs_exist_ok=True)
            super().__init__(uri)

    monkeypatch.setattr(target, "WriterLock", Late)
    with pytest.raises(RunBusy, match="just now"):
        Training().record(path)
    assert len(nbdyn.open(path)) == 3 and not lock.is_held(str(path))


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_creation_that_fails_leaves_nothing(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbdyn.store import layout

    def fail(*arguments: Any, **entries: Any) -> None:
        raise error("no luck")

    monkeypatch.setattr(layout, "write_metadata", fail)
    with pytest.raises(NbdynError if error is OSError else error, match="no luck"):
        Training().record(tmp_path / "fc")
    assert fragments(tmp_path) == [] and not lock.is_held(str(tmp_path / "fc"))


# Resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "weights"), [(torch.optim.Adam, "every"), (torch.optim.Adam, "snapshots"), (torch.optim.SGD, "snapshots")]
)
def test_resume_in_a_fresh_model_goes_on_bit_for_bit(kind: Any, weights: str, tmp_path: Path) -> None:
    path = tmp_path / "fc"
    whole = Training(0, kind)
    with whole.record(tmp_path / "whole", weights="every") as rec:
        whole.run(rec, 0, 20)
    first = Training(0, kind)
    with first.record(path, weights=weights, snapshot_every=8) as rec:
        first.run(rec, 0, 11)
        rec.log(mark=1.0)
    second = Training(77, kind)
    with second.record(path, weights=weights, snapshot_every=8, mode="resume") as rec:
        assert rec.step == 11
        second.run(rec, 11, 20)
    run, other = nbdyn.open(path), nbdyn.open(tmp_path / "whole")
    assert run.status == "complete" and len(run) == 20
    steps = run.weights.steps
    assert steps.tolist() == (list(range(21)) if weights == "every" else [0, 8, 11, 16, 20])
    np.testing.assert_array_equal(run.weights["all"], other.weights["all"][steps])
    np.testing.assert_array_equal(run.steps["loss"], other.steps["loss"])
    assert (np.diff(run.steps["seconds"]) >= 0).all()
    assert run.steps["mark"].notna().sum() == 1
    assert len(verify.verify(str(path))) == 0


def test_resume_with_the_live_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cell is run again in the same kernel: nothing is reset, epochs and steps go on."""
    path, training = tmp_path / "fc", Training()
    for start, stop in ((0, 6), (6, 9), (9, 15)):
        with training.record(path, mode="resume", weights="every") as rec:
            training.run(rec, start, stop)
    assert "the model holds its weights already" in capsys.readouterr().out
    run = nbdyn.open(path)
    np.testing.assert_array_equal(run.weights["all"], reference(15))


def test_resume_restores_the_optimizer_of_a_model_that_holds_the_weights(tmp_path: Path) -> None:
    """Loaded by hand into a fresh model: the weights are there, Adam's moments are not."""
    path = tmp_path / "fc"
    recorded(path, 6, weights="every")
    fresh = Training(3)
    nbdyn.open(path).at(-1).load_into(fresh.model)
    with fresh.record(path, mode="resume", weights="every") as rec:
        fresh.run(rec, 6, 12)
    np.testing.assert_array_equal(nbdyn.open(path).weights["all"], reference(12))


def test_resume_of_nothing_begins_a_new_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path / "fc", mode="resume")
    assert "nothing to resume" in capsys.readouterr().out
    assert len(nbdyn.open(tmp_path / "fc")) == 3


def test_resume_of_another_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fc"
    recorded(path)
    before = fragments(tmp_path)
    with pytest.raises(Incompatible, match=r"0\.weight, 0\.bias, 3\.weight"):
        Training(width=7).record(path, mode="resume")
    with pytest.raises(Incompatible, match="Adam trained, with SGD"):
        Training(kind=torch.optim.SGD).record(path, mode="resume")
    doubled = Training()
    doubled.model.double()
    with pytest.raises(Incompatible, match="dtype"):
        doubled.record(path, mode="resume")
    assert fragments(tmp_path) == before and not lock.is_held(str(path))
    recorded(tmp_path / "swapped")
    assert nbdyn.open(path).status == "complete"


def test_resume_with_tensors_in_another_order_is_refused(tmp_path: Path) -> None:
    def training(*order: str) -> Training:
        made = Training()
        made.model = nn.ModuleDict({name: nn.Linear(5, 5) for name in order})
        made.optimizer = torch.optim.Adam(made.model.parameters())
        return made

    training("a", "b").record(tmp_path / "fc").close()
    with pytest.raises(Incompatible, match="order of its tensors"):
        training("b", "a").record(tmp_path / "fc", mode="resume")


def test_resume_keeps_the_settings_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path / "fc", weights="every")
    recorded(tmp_path / "fc", mode="resume", weights="snapshots", snapshot_every=7)
    assert "was begun with weights='every' and snapshot_every=50, and goes on so" in capsys.readouterr().out
    assert nbdyn.open(tmp_path / "fc").weights.steps.tolist() == list(range(7))


@pytest.mark.parametrize("make", [a_folder, an_array, lambda path: path.write_text("x")])
def test_resume_of_what_is_no_run(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "fc")
    before = fragments(tmp_path)
    with pytest.raises(NbdynError, match=r"no run at .*is there"):
        Training().record(tmp_path / "fc", mode="resume")
    assert fragments(tmp_path) == before


# Places and arguments -------------------------------------------------------------------------------------------


def test_a_path_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NbdynError, match=r"cannot record to .*file/fc"):
        Training().record(tmp_path / "file" / "fc")
    assert fragments(tmp_path) == ["file"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="there is no /proc here")
def test_a_place_that_cannot_be_written() -> None:
    with pytest.raises(NbdynError, match="cannot record to /proc/nbdyn/fc"):
        Training().record("/proc/nbdyn/fc")


def test_a_read_only_disk(tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a disk cannot be mounted here (it takes root): {mounted.stderr.strip()}")
    try:
        recorded(place / "fc")
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        for options in ({"mode": "new"}, {"mode": "resume"}):
            with pytest.raises(NbdynError, match=r"cannot record to .*Read-only file system"):
                Training().record(place / "fc", **options)
        run = nbdyn.open(place / "fc")
        assert run.status == "complete" and len(run.visits) == 3 * BATCH
        assert len(verify.verify(run.uri)) == 0
        with pytest.raises(NbdynError, match="cannot write to the logbook"):
            run.note("x")
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "append"}, "mode='append'.*new, resume, replace"),
        ({"mode": "resum"}, 'did you mean "resume"'),
        ({"weights": "all"}, "weights='all'.*snapshots, every"),
        ({"snapshot_every": 0}, "snapshot_every=0"),
        ({"snapshot_every": 2.5}, r"snapshot_every=2\.5"),
        ({"budget": "lots"}, "'lots' is no size"),
        ({"budget": "-1 GB"}, "is no size"),
    ],
)
def test_bad_arguments_leave_nothing_behind(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(NbdynError, match=message):
        Training().record(tmp_path / "fc", **options)
    assert fragments(tmp_path) == []


def test_a_failed_restoration_frees_the_run(tmp_path: Path) -> None:
    """Two param groups instead of one: the snapshot does not fit. Nobody holds the run after the error."""
    path = tmp_path / "fc"
    recorded(path)
    training = Training()
    first, second = list(training.model.parameters())[:2], list(training.model.parameters())[2:]
    training.optimizer = torch.optim.Adam([{"params": first}, {"params": second}])
    with pytest.raises(Incompatible, match="param groups"):
        training.record(path, mode="resume")
    assert not lock.is_held(str(path)) and nbdyn.open(path).status == "complete"
    recorded(path, mode="resume")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rec: rec.log(value=torch.zeros(2)), "value"),
        (lambda rec: rec.log(value="high"), "value"),
        (lambda rec: rec.batch(["a", "b"]), "ids"),
        (lambda rec: rec.batch([0.5]), "ids"),
        (lambda rec: rec.batch(3), "ids"),
    ],
)
def test_a_wrong_value_is_refused_at_once_and_recording_goes_on(
    call: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    training = Training()
    with training.record(tmp_path / "fc") as rec:
        training.run(rec, 0, 2)
        with pytest.raises(NbdynError, match=message):
            call(rec)
        training.run(rec, 2, 4)
    assert len(nbdyn.open(tmp_path / "fc")) == 4


def test_ids_are_those_at_the_call(tmp_path: Path) -> None:
    """Loops shuffle one array in place and hand out views of it; samplers fill one list again and again."""
    training, order = Training(), np.arange(SAMPLES)
    generator, expected = np.random.default_rng(0), []
    with training.record(tmp_path / "fc") as rec:
        for _ in range(5):
            generator.shuffle(order)
            rec.batch(order[:BATCH])
            expected += order[:BATCH].tolist()
            training.step(order[:BATCH])
    assert nbdyn.open(tmp_path / "fc").visits["sample"].tolist() == expected


class OneList:
    """A batch sampler that yields the same list object every time."""

    def __iter__(self) -> Iterator[list[int]]:
        ids: list[int] = []
        for first in range(0, SAMPLES, BATCH):
            ids[:] = range(first, first + BATCH)
            yield ids

    def __len__(self) -> int:
        return SAMPLES // BATCH


@pytest.mark.parametrize("workers", [0, 1])
def test_ids_of_a_sampler_that_fills_one_list(workers: int, tmp_path: Path) -> None:
    training = Training()
    dataset = torch.utils.data.TensorDataset(training.inputs, training.targets)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=OneList(), num_workers=workers)
    with training.record(tmp_path / "fc") as rec:
        for _ in rec.watch(loader):
            training.step(np.arange(BATCH))
    assert nbdyn.open(tmp_path / "fc").visits["sample"].tolist() == list(range(SAMPLES))


def test_odd_notes_are_kept(tmp_path: Path) -> None:
    texts = ["", "ü 漢 🎉", "a\x00b", "lone \ud800 surrogate", "x" * 100_000]
    with Training().record(tmp_path / "fc", note="first") as rec:
        for text in texts:
            rec.note(text)
        rec.note(12)
    notes = nbdyn.open(tmp_path / "fc").notes["text"].tolist()
    assert notes == ["first", *texts[:3], "lone ? surrogate", texts[4], "12"]


# Ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_exception_inside_with_goes_on(error: type[BaseException], tmp_path: Path) -> None:
    training = Training()
    with pytest.raises(error, match="of the user"), training.record(tmp_path / "fc", weights="every") as rec:
        training.run(rec, 0, 7)
        raise error("of the user")
    run = nbdyn.open(tmp_path / "fc")
    assert run.status == "interrupted" == rec.state
    np.testing.assert_array_equal(run.weights["all"], reference(7))


def interrupt_at(line: int) -> Callable[..., Any]:
    """A trace function that raises KeyboardInterrupt at the n-th line executed inside the recorder."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if f"nbdyn{os.sep}recorder{os.sep}" not in frame.f_code.co_filename:
            return None
        if event == "line":
            count += 1
            if count == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    return trace


@pytest.mark.parametrize("weights", ["every", "snapshots"])
@pytest.mark.parametrize("line", range(11, 700, 69))
def test_an_interrupt_anywhere_in_the_recorder(line: int, weights: str, tmp_path: Path) -> None:
    """Ctrl-C strikes in a hook as well as in the loop: no step is lost, doubled or shifted."""
    training = Training()
    taken = 0
    with pytest.raises(KeyboardInterrupt), training.record(tmp_path / "fc", weights=weights, snapshot_every=3) as rec:
        try:
            for number in range(40):
                if number == 5:
                    sys.settrace(interrupt_at(line))
                training.run(rec, number, number + 1)
                taken += 1
        finally:
            sys.settrace(None)
    run, expected = nbdyn.open(tmp_path / "fc"), reference(40)
    assert run.status == "interrupted"
    count = len(run)
    assert taken <= count <= taken + 1
    steps, values = run.weights.steps, run.weights["all"]
    np.testing.assert_array_equal(values[:-1], expected[steps[:-1]])
    # The last row is the model as it stands: a step that the interrupt struck may have moved it, or not.
    assert steps[-1] == count
    np.testing.assert_array_equal(values[-1], training.flat())
    ids = np.concatenate([training.ids(number) for number in range(taken)])
    np.testing.assert_array_equal(run.visits["sample"][: len(ids)], ids)
    assert len(verify.verify(run.uri)) == 0


@pytest.mark.parametrize("method", ["_wait_for_room", "check"])
def test_an_interrupt_while_a_step_is_handed_over(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above all while training waits for the writer: an interrupt is no failure of the writer."""
    original, calls = getattr(Pipeline, method), []

    def interrupted(self: Pipeline, *arguments: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            calls.append(1)
            if len(calls) == 20:
                raise KeyboardInterrupt
        original(self, *arguments)

    monkeypatch.setattr(Pipeline, method, interrupted)
    monkeypatch.setattr(nbdyn.options, "memory", "1 B")
    training, taken = Training(), 0
    with pytest.raises(KeyboardInterrupt), training.record(tmp_path / "fc", weights="every") as rec:
        while True:
            training.run(rec, taken, taken + 1)
            taken += 1
    run = nbdyn.open(tmp_path / "fc")
    assert run.status == "interrupted" and len(run) == taken > 5
    np.testing.assert_array_equal(run.weights["all"], reference(taken))


def test_two_backward_passes_on_one_batch_keep_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sharpness-aware minimization does; memory of what was written is used again at once."""
    monkeypatch.setattr("nbdyn.recorder.sink.SEGMENT_SECONDS", 0.0)
    monkeypatch.setattr("nbdyn.recorder.pipeline.WAKE_SECONDS", 0.001)
    training, losses = Training(), []
    with training.record(tmp_path / "fc", weights="every") as rec:
        for number in range(40):
            ids = training.ids(number)
            rec.batch(ids)
            for each in range(2):
                loss = training.loss_fn(training.model(training.inputs[ids]), training.targets[ids])
                training.optimizer.zero_grad()
                loss.backward()
                losses += [float(loss.detach())] * (each == 0)  # the one before the first backward pass
            training.optimizer.step()
            time.sleep(0.002)
    run = nbdyn.open(tmp_path / "fc")
    np.testing.assert_allclose(run.steps["loss"], losses, rtol=1e-6)
    expected = np.concatenate([training.ids(number) for number in range(40)])
    np.testing.assert_array_equal(run.visits["sample"], expected)


def test_a_step_that_fails_is_no_step(tmp_path: Path) -> None:
    """The optimizer raises once; the loop catches that and goes on."""
    training = Training(kind=torch.optim.SGD)

    def fail() -> torch.Tensor:
        raise ZeroDivisionError

    with training.record(tmp_path / "fc", weights="every") as rec:
        training.run(rec, 0, 3)
        with pytest.raises(ZeroDivisionError):
            training.optimizer.step(fail)
        rows = [training.flat()]
        for number in range(3, 6):
            training.run(rec, number, number + 1)
            rows.append(training.flat())
    run = nbdyn.open(tmp_path / "fc")
    assert len(run) == 6
    np.testing.assert_array_equal(run.weights["all", 3:7], np.stack(rows))


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[InteractiveShell]:
    """A real IPython shell, alone in this process."""
    output = builtins.print
    InteractiveShell.clear_instance()
    made = InteractiveShell.instance()
    made.user_ns.update(Training=Training, path=tmp_path / "fc", nbdyn=nbdyn)
    yield made
    for event, handler in (("pre_run_cell", session._before_cell), ("post_run_cell", session._after_cell)):
        if handler in made.events.callbacks[event]:
            made.events.unregister(event, handler)
    made.history_manager.end_session()
    InteractiveShell.clear_instance()
    builtins.print = output


CELL = """
training = Training()
rec = training.record(path, weights="every")
training.run(rec, 0, 5)
{end}
"""


@pytest.mark.parametrize("error", ["1 / 0", "raise KeyboardInterrupt"])
def test_a_cell_that_fails_closes_what_it_recorded(error: str, shell: InteractiveShell, tmp_path: Path) -> None:
    result = shell.run_cell(CELL.format(end=error))
    assert isinstance(result.error_in_exec, (ZeroDivisionError, KeyboardInterrupt))
    assert shell.user_ns["rec"].state == "interrupted"
    run = nbdyn.open(tmp_path / "fc")
    assert run.status == "interrupted"
    np.testing.assert_array_equal(run.weights["all"], reference(5))


def test_a_failing_cell_closes_no_recorder_that_it_did_not_use(shell: InteractiveShell, tmp_path: Path) -> None:
    assert shell.run_cell(CELL.format(end="")).success
    assert not shell.run_cell("1 / 0").success
    assert shell.user_ns["rec"].state == "recording"
    assert shell.run_cell("training.run(rec, 5, 8); rec.close()").success
    assert nbdyn.open(tmp_path / "fc").status == "complete"
    np.testing.assert_array_equal(nbdyn.open(tmp_path / "fc").weights["all"], reference(8))


def test_training_over_several_cells_and_the_last_one_fails(shell: InteractiveShell, tmp_path: Path) -> None:
    assert shell.run_cell(CELL.format(end="")).success
    assert not shell.run_cell("training.run(rec, 5, 6); 1 / 0").success
    assert shell.user_ns["rec"].state == "interrupted"
    assert len(nbdyn.open(tmp_path / "fc")) == 6


def test_a_forked_child_leaves_the_recording_alone(tmp_path: Path) -> None:
    """It ends with Python's exit handlers: they must not close the parent's recorder."""
    training = Training()
    with training.record(tmp_path / "fc") as rec:
        training.run(rec, 0, 2)
        code = os.fork()
        if code == 0:
            session._at_exit()
            os._exit(0 if not session.recording() else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(code, 0)[1]) == 0
        assert lock.is_held(rec.uri)
        training.run(rec, 2, 4)
    assert nbdyn.open(tmp_path / "fc").status == "complete"
    assert len(nbdyn.open(tmp_path / "fc")) == 4


# Limits ---------------------------------------------------------------------------------------------------------


def test_the_budget_stops_the_recording_not_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbdyn.options, "memory", "20 KB")
    training = Training()
    rec = training.record(tmp_path / "fc", budget="100 KB")
    with pytest.raises(RecordingStopped, match="budget of 100 KB") as error:
        training.run(rec, 0, 5000)
    for way_out in ("budget=", "every=", 'weights="snapshots"'):
        assert way_out in str(error.value)
    assert rec.state == "stopped"
    training.run(rec, 0, 3)  # unrecorded
    rec.close()
    run = nbdyn.open(tmp_path / "fc")
    assert run.status == "stopped" and 0 < len(run) == rec.flushed
    size = sum(entry.stat().st_size for entry in (tmp_path / "fc").rglob("*") if entry.is_file())
    assert size < 300_000
    assert size > 20_000
    with pytest.raises(RecordingStopped, match=r"budget of 20\.0 KB"):  # what is there already counts
        again = training.record(tmp_path / "fc", mode="resume", budget="20 KB")
        training.run(again, 0, 5000)
    assert len(nbdyn.open(tmp_path / "fc")) == len(run)


def test_memory_is_bounded_and_nothing_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer slower than training: training waits, and what waits never exceeds the bound by more than a step."""
    commit = SegmentWriter.commit
    monkeypatch.setattr(SegmentWriter, "commit", lambda self, segment: (time.sleep(0.02), commit(self, segment))[1])
    monkeypatch.setattr(nbdyn.options, "memory", "60 KB")
    training = Training()
    waiting = []
    with training.record(tmp_path / "fc", weights="every") as rec:
        pipeline = rec._sink._pipeline
        for number in range(80):
            training.run(rec, number, number + 1)
            waiting.append(pipeline._given - pipeline._released)
    assert 0 < max(waiting) <= 60_000
    assert pipeline.seconds_waited > 0.05
    run = nbdyn.open(tmp_path / "fc")
    np.testing.assert_array_equal(run.weights["all"], reference(80))
    assert len(run.visits) == 80 * BATCH


def test_a_bound_below_one_step_still_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbdyn.options, "memory", "1 B")
    recorded(tmp_path / "fc", 12, weights="every")
    np.testing.assert_array_equal(nbdyn.open(tmp_path / "fc").weights["all"], reference(12))


def test_a_writer_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error arrives in the loop, once; hooks, thread and lock are gone; what was acknowledged is readable."""
    commit, calls = SegmentWriter.commit, []

    def failing(self: SegmentWriter, segment: Any) -> None:
        calls.append(segment)
        if len(calls) == 4:
            raise OSError("the cable was pulled")
        commit(self, segment)

    monkeypatch.setattr(SegmentWriter, "commit", failing)
    monkeypatch.setattr(nbdyn.options, "memory", "10 KB")
    training = Training()
    rec = training.record(tmp_path / "fc", weights="every")
    with pytest.raises(RecordingStopped, match=r"the cable was pulled.*acknowledged.*unrecorded"):
        training.run(rec, 0, 1000)
    assert rec.state == "stopped" and not lock.is_held(rec.uri)
    assert not training.optimizer._optimizer_step_pre_hooks and not training.optimizer._optimizer_step_post_hooks
    assert not training.loss_fn._forward_hooks
    training.run(rec, 0, 2)
    rec.log(value=1.0)
    rec.note("into the void")
    rec.close()
    run = nbdyn.open(tmp_path / "fc")
    assert run.status == "stopped" and 0 < len(run) == rec.flushed
    np.testing.assert_array_equal(run.weights["all"], reference(len(run))[:-1])


def test_a_view_that_fails_does_not_stop_the_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class View:
        calls = 0

        def feed(self, columns: dict[str, np.ndarray]) -> None:
            self.calls += 1
            if self.calls > 1:
                raise ZeroDivisionError("of the view")

        def finish(self, status: str) -> None:
            self.status = status

    class Good(View):
        def __init__(self) -> None:
            self.seen: list[int] = []

        def feed(self, columns: dict[str, np.ndarray]) -> None:
            self.seen += columns["step"].tolist()

    training, view, good = Training(), View(), Good()
    with training.record(tmp_path / "fc") as rec:
        training.run(rec, 0, 5)
        wait_until(lambda: rec.flushed == 4)  # the fifth is open: it may still be logged for
        rec.listen(view)
        rec.listen(good)
        training.run(rec, 5, 60)
    late = Good()
    rec.listen(late)
    assert "a live view failed and is no longer fed: ZeroDivisionError: of the view" in capsys.readouterr().out
    assert good.seen == late.seen == list(range(60))
    assert good.status == late.status == "complete"
    assert nbdyn.open(tmp_path / "fc").status == "complete"


# Reading while recording ----------------------------------------------------------------------------------------


def test_a_reader_sees_every_acknowledged_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the writer works, what `flushed` promises is there, exact, in the order of a segment or not at all."""
    monkeypatch.setattr(nbdyn.options, "memory", "30 KB")
    expected = reference(160)
    training, run, fresh = Training(), None, []
    with training.record(tmp_path / "fc", weights="every") as rec:
        for number in range(160):
            training.run(rec, number, number + 1)
            if number % 20 == 19:
                acknowledged = rec.flushed
                run = run or nbdyn.open(rec)
                before = len(run)
                fresh.append(run.refresh())
                assert len(run) >= acknowledged and fresh[-1] == (len(run) > before)
                assert run.status == "recording"
                np.testing.assert_array_equal(run.weights["all"], expected[: len(run)])
                assert len(run.visits) == len(run) * BATCH
                assert run.steps["loss"].notna().all()
    assert sum(fresh) > 2
    assert run is not None and run.refresh() and not run.refresh()
    assert len(run) == 160 and run.status == "complete"


def test_a_closed_recorder_says_that_it_records_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Running only the loop's cell again, after an interrupt, must not train unrecorded in silence."""
    training = Training()
    rec = training.record(tmp_path / "fc")
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(training.inputs, training.targets))
    rec.close()
    capsys.readouterr()
    assert len(list(rec.watch(loader))) == len(loader)
    assert "not recorded" in capsys.readouterr().out
