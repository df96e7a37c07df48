"""What was acknowledged survives, the gradient of every sample too: SIGKILL at any moment, also while the journal is
written or compacted, a full disk; and `resume` goes on bit for bit.

This file is also the program that trains and is killed: it reads what to record from standard input, a line a
training, and forks a child for each (which saves importing torch for every one).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pkgutil
import random
import shutil
import signal
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
from torch import nn

STEPS = 400
SHORT = 90
EVERY = 30
SAMPLES, FEATURES, CLASSES, BATCH = 64, 20, 4, 8
KILLS = int(os.environ.get("NBDYN_KILLS", "4"))
COMPACTING = -1000
"""What a training says, instead of a number of steps, when it begins to compact its journal."""


def dataset() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
    return inputs, torch.randint(0, CLASSES, (SAMPLES,), generator=generator)


def network(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, nn.Module]:
    """An MLP with dropout and Adam: going on exactly needs generators and optimizer state too."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, CLASSES))
    return model, torch.optim.Adam(model.parameters(), 0.01), nn.CrossEntropyLoss()


def ids_of(step: int) -> np.ndarray:
    return np.random.default_rng(step).permutation(SAMPLES)[:BATCH]


def flat(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy().copy()


def gradient(model: nn.Module) -> np.ndarray:
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]).numpy().copy()


def child(path: str, weights: str, die_in: str, steps: int, journal_bytes: int) -> None:
    """Train, recorded, saying which steps are on disk, and when a compaction begins.

    With `die_in`, die at the third call of that method; with `journal_bytes`, compact the journal when it is as large.
    """
    import nbdyn
    from nbdyn.recorder import committer, pipeline, sink
    from nbdyn.store import compact
    from nbdyn.store.journal import JournalWriter
    from nbdyn.store.writer import SegmentWriter

    torch.set_num_threads(1)
    sink.SEGMENT_SECONDS = pipeline.WAKE_SECONDS = 0.02  # many commits
    compact.BLOCK_BYTES = 4000  # and many blocks in a compaction
    committer.JOURNAL_BYTES = journal_bytes or committer.JOURNAL_BYTES
    if steps == SHORT:
        nbdyn.options.memory = "60 KB"  # training waits for the writer: about eight steps a segment, on any computer
    if die_in == "finish_metadata":
        sink.finish_metadata = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    elif die_in:
        owner = SegmentWriter if hasattr(SegmentWriter, die_in) else JournalWriter
        original, calls = getattr(owner, die_in), []

        def dying(*args: object) -> None:
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            original(*args)

        setattr(owner, die_in, dying)

    def announced(*args: Any, **options: Any) -> compact.Compaction:
        print(f"flushed {rec.flushed}\ncompacting 0\n", end="", flush=True)
        return compact.compact(*args, **options)

    committer.compact = announced
    inputs, targets = dataset()
    model, optimizer, loss_fn = network(0)
    with nbdyn.record(path, model, optimizer, loss_fn, weights=weights, snapshot_every=EVERY) as rec:
        acknowledged = 0
        for step in range(steps):
            if rec.flushed > acknowledged:
                acknowledged = rec.flushed
                print(f"flushed {acknowledged}\n", end="", flush=True)
            time.sleep(0.001)
            ids = ids_of(step)
            rec.batch(ids)
            loss = loss_fn(model(inputs[ids]), targets[ids])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rec.log(twice=2 * loss.detach())
    print(f"flushed {rec.flushed}\n", end="", flush=True)


def serve() -> None:
    """Train in a child for every line; tell when it has ended, and how."""
    import nbdyn.query.execute
    import nbdyn.recorder.recorder
    import nbdyn.run  # noqa: F401  (before the fork: seconds)

    assert "tiledb" not in sys.modules  # its threads would not survive a fork
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(**json.loads(line))
            os._exit(0)
        print("started", pid, flush=True)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


class Trainer:
    """The process that runs `serve`, seen from the tests."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        self.pid = self.status = 0

    def train(
        self, path: Path, weights: str, die_in: str = "", steps: int = STEPS, journal_bytes: int = 0
    ) -> Iterator[int]:
        """Start a training; how many steps it says are on disk, as it says it, until its end; COMPACTING, too."""
        assert self.process.stdin is not None and self.process.stdout is not None
        what = {"path": str(path), "weights": weights, "die_in": die_in, "steps": steps, "journal_bytes": journal_bytes}
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            word, _, value = line.partition(" ")
            if word == "started":
                self.pid = int(value)
                yield 0
            elif word == "flushed":
                yield int(value)
            elif word == "compacting":
                yield COMPACTING
            elif word == "ended":
                self.status = int(value)
                return
        raise AssertionError("the training process ended early")

    def train_and_kill(self, path: Path, weights: str, step: int, seconds: float, **more: int) -> int:
        """Kill the training some time after it acknowledged `step` (negative: at once; COMPACTING: when it begins to).

        Returns what it acknowledged.
        """
        said, acknowledged = self.train(path, weights, **more), 0
        for count in said:
            acknowledged = max(acknowledged, count)
            if count == step or count >= step > COMPACTING:
                break
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):  # it has come to its end
            os.kill(self.pid, signal.SIGKILL)
        return max([acknowledged, *said])


@pytest.fixture(scope="module")
def trainer() -> Iterator[Trainer]:
    made = Trainer()
    with made.process:
        yield made


class Reference:
    """The undisturbed training, without nbdyn."""

    def __init__(self) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        inputs, targets = dataset()
        model, optimizer, loss_fn = network(0)
        rows, losses, each, gradients = [], [], [], []
        for step in range(STEPS):
            rows.append(flat(model))
            ids = ids_of(step)
            outputs = model(inputs[ids])
            loss = loss_fn(outputs, targets[ids])
            each.append(nn.functional.cross_entropy(outputs.detach(), targets[ids], reduction="none").numpy())
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            gradients.append(gradient(model))
            optimizer.step()
        self.weights = np.stack([*rows, flat(model)])
        self.losses, self.sample_losses, self.gradients = np.array(losses), np.stack(each), np.stack(gradients)
        torch.set_num_threads(threads)

    def check(self, path: Path) -> int:
        """Every committed step of the run is bit for bit the reference's; returns how many there are."""
        import nbdyn

        run = nbdyn.open(path)
        count, stored = len(run), run.weights.steps
        np.testing.assert_array_equal(run.weights["all"], self.weights[stored])
        steps, visits = run.steps, run.visits
        np.testing.assert_array_equal(steps["step"], np.arange(count))
        np.testing.assert_array_equal(steps["loss"], self.losses[:count])
        np.testing.assert_array_equal(steps["twice"] if count else [], 2 * self.losses[:count])
        np.testing.assert_array_equal(visits["sample"], np.concatenate([*map(ids_of, range(count)), []]))
        np.testing.assert_array_equal(visits["loss"], self.sample_losses[:count].reshape(-1))
        if count:
            self.check_samples(run)
        return count

    def check_samples(self, run: Any) -> None:
        """The factors of every committed step are there: what they add up to is p.grad, bit for bit."""
        count, factors = len(run), run.store.factors
        assert [(site.name, site.form) for site in factors.sites] == [("3", "linear"), ("0", "linear")]
        assert factors.batch_only == {}
        np.testing.assert_array_equal(run.gradients.steps, np.arange(count))
        totals = run.gradients[:].total()
        assert totals.dtype == np.float32 and totals.tobytes() == self.gradients[:count].tobytes()
        for step in {0, count // 2, count - 1}:
            rebuilt = run.gradients.rebuild(step)
            assert list(rebuilt) == ["0.weight", "0.bias", "3.weight", "3.bias"]
            flat = np.concatenate([values.reshape(-1) for values in rebuilt.values()])
            assert flat.tobytes() == self.gradients[step].tobytes()
        step = count // 2
        cells = run.gradients[step].dense()
        assert cells.visits["sample"].tolist() == ids_of(step).tolist()
        largest = np.abs(self.gradients[step]).max()
        np.testing.assert_allclose(cells.values.sum(0), self.gradients[step], rtol=0, atol=1e-5 * largest)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def resume(path: Path, weights: str, seed: int, steps: int = STEPS) -> None:
    """Go on in this process, with a model of another seed, to the end."""
    import nbdyn

    inputs, targets = dataset()
    model, optimizer, loss_fn = network(seed)
    with nbdyn.record(
        path, model, optimizer, loss_fn, data=(inputs, targets), weights=weights, snapshot_every=EVERY, mode="resume"
    ) as rec:
        for step in range(rec.step, steps):
            ids = ids_of(step)
            rec.batch(ids)
            loss = loss_fn(model(inputs[ids]), targets[ids])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rec.log(twice=2 * loss.detach())


def leftovers(path: Path, timestamp: int) -> list[str]:
    """Fragments without a commit, and fragments or metadata of segments after the last committed one."""
    from nbdyn.store import journal

    found = []
    for array in ("weights", "state", "scalars", "visits", "steps"):
        commits = {entry.stem for entry in (path / array / "__commits").iterdir()}
        for folder in ("__fragments", "__meta"):
            for entry in (path / array / folder).iterdir():
                uncommitted = folder == "__fragments" and entry.name not in commits
                if uncommitted or int(entry.name.split("_")[2]) > timestamp:
                    found.append(f"{array}/{folder}/{entry.name}")
    found += [f"journal/{number}" for number in journal.numbers(str(path)) if number > timestamp]
    return found


def compact(path: Path, check: Callable[[Path], int], count: int) -> None:
    """What `python -m nbdyn compact` leaves: the same answers, and of the journal at most what was never committed."""
    from nbdyn.__main__ import main
    from nbdyn.store import Store, journal, verify

    assert main(["compact", str(path)]) == 0
    assert all(number > Store(path).timestamp for number in journal.numbers(str(path)))
    assert check(path) == count
    assert len(verify.verify(str(path))) == 0
    verify.gc(str(path))
    assert list(journal.numbers(str(path))) == [] and len(verify.gc(str(path))) == 0


def recover(
    path: Path, weights: str, acknowledged: int, reference: Reference, steps: int = STEPS, go_on_with_copy: bool = False
) -> list[str]:
    """All that must hold after a kill, from looking at the run to going on with it, or with a compacted copy of it.

    Returns the arrays that gc removed something from.
    """
    import nbdyn
    from nbdyn.store import verify

    run = nbdyn.open(path)
    assert len(run) >= acknowledged
    before = reference.check(path)
    assert len(verify.verify(str(path))) == 0
    copy = path.parent / "copy"
    shutil.copytree(path, copy)
    removed = verify.gc(str(path))
    assert leftovers(path, run.store.timestamp) == []
    assert len(verify.gc(str(path))) == 0
    assert len(verify.verify(str(path))) == 0
    assert reference.check(path) == before
    compact(copy, reference.check, before)  # it still has what gc removed
    path = copy if go_on_with_copy else path
    resume(path, weights, seed=99 if before else 0, steps=steps)  # without a step there is nothing to restore
    assert reference.check(path) == steps
    assert nbdyn.open(path).status == "complete"
    assert len(verify.verify(str(path))) == 0
    assert leftovers(path, nbdyn.open(path).store.timestamp) == []
    return removed["array"].tolist()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_any_moment(number: int, tmp_path: Path, reference: Reference, trainer: Trainer) -> None:
    """While training, or while it compacts its journal meanwhile."""
    from nbdyn.errors import NbdynError
    from nbdyn.store import Store

    chance = random.Random(1000 + number)
    weights = "snapshots" if number % 4 == 3 else "every"
    path = tmp_path / "run"
    moment = chance.randrange(-STEPS // 5, 3 * STEPS // 5), chance.uniform(0, 0.1)
    acknowledged = trainer.train_and_kill(path, weights, *moment, journal_bytes=60_000 * (number % 3))
    try:
        status = Store(path).status
    except NbdynError:  # killed before the run existed: nothing was promised
        assert acknowledged == 0
        return
    if status == "complete":  # this computer was faster than the kill
        assert reference.check(path) == STEPS
        return
    assert status == "killed"
    recover(path, weights, acknowledged, reference, go_on_with_copy=number % 2 == 1)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("number", range((KILLS + 1) // 2))
def test_killed_while_it_compacts(number: int, tmp_path: Path, reference: Reference, trainer: Trainer) -> None:
    """At close, where the run is complete already; or while training goes on."""
    from nbdyn.store import Store

    chance = random.Random(2000 + number)
    at_close = number % 2 == 0
    path = tmp_path / "run"
    limit = 0 if at_close else 30_000
    moment = COMPACTING, chance.uniform(0, 0.6)
    acknowledged = trainer.train_and_kill(path, "snapshots", *moment, steps=SHORT, journal_bytes=limit)
    assert acknowledged == SHORT or not at_close
    assert Store(path).status in (("complete",) if at_close else ("killed", "complete"))
    recover(path, "snapshots", acknowledged, reference, SHORT + 30, go_on_with_copy=number % 4 > 1)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("method", "weights", "orphans"),
    [
        ("_write_steps", "every", {"journal", "scalars", "visits", "weights"}),
        ("finish_metadata", "snapshots", set()),
        ("finish", "snapshots", {"journal"}),
    ],
)
def test_killed_inside_a_commit(
    method: str, weights: str, orphans: set[str], tmp_path: Path, reference: Reference, trainer: Trainer
) -> None:
    """All of a segment is written but `steps`; or all is written, but the run is not marked; or the journal is torn."""
    path = tmp_path / "run"
    acknowledged = max(trainer.train(path, weights, method, STEPS if weights == "every" else SHORT))
    assert trainer.status == -signal.SIGKILL
    assert acknowledged > 0
    removed = recover(path, weights, acknowledged, reference, go_on_with_copy=method == "finish")
    # While a journal is written, the segment before it may still be on its way.
    assert orphans <= set(removed) if method == "finish" else orphans == set(removed) - {"state"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command, so no small disk")
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here (it takes root): {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


class Wide:
    """A training whose steps leave 13 KB of factors (40 KB with a width of 600) each, recorded to a path.

    Attributes:
        rows, gradients: weights before each step, and p.grad, as the loop saw them.
        taken: how many steps were finished.
    """

    def __init__(self, path: Path, width: int = 200, **options: Any) -> None:
        import nbdyn

        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, CLASSES))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.loss_fn = nn.CrossEntropyLoss()
        dataset_ = torch.utils.data.TensorDataset(*dataset())
        self.loader = torch.utils.data.DataLoader(dataset_, batch_size=BATCH)
        self.path, self.taken = path, 0
        self.rows: list[np.ndarray] = []
        self.gradients: list[np.ndarray] = []
        self.rec = nbdyn.record(path, self.model, self.optimizer, self.loss_fn, **options)

    def train(self, epochs: int) -> None:
        for _ in range(epochs):
            for x, y in self.rec.watch(self.loader):
                self.rows.append(flat(self.model))
                loss = self.loss_fn(self.model(x), y)
                self.optimizer.zero_grad()
                loss.backward()
                self.gradients.append(gradient(self.model))
                self.optimizer.step()
                self.rec.log(twice=2 * loss.detach())
                self.taken += 1

    def check(self, path: Path) -> int:
        """The run at this path holds what the loop saw: weights, and of every step the factors; how many steps."""
        import nbdyn

        run = nbdyn.open(path)
        count = len(run)
        rows = [*self.rows, flat(self.model)]
        assert run.weights["all"].tobytes() == np.stack([rows[step] for step in run.weights.steps]).tobytes()
        assert len(run.visits) == count * BATCH
        np.testing.assert_array_equal(run.gradients.steps, np.arange(count))
        assert run.gradients[:].total().tobytes() == np.stack(self.gradients[:count]).tobytes()
        return count

    def stop(self, status: str = "stopped") -> None:
        """Train until the disk is full. What was acknowledged is there, and training can go on unrecorded."""
        import nbdyn
        from nbdyn.errors import RecordingStopped
        from nbdyn.store import lock, verify

        with pytest.raises(RecordingStopped, match="No space left on device") as error:
            self.train(2000)
        assert "acknowledged" in str(error.value) and "unrecorded" in str(error.value)
        self.error = error.value.__cause__
        rec = self.rec
        assert rec.state == "stopped" and writers() == [] and not lock.is_held(str(self.path))
        acknowledged, count = rec.flushed, self.taken
        assert 0 < acknowledged <= count
        self.train(1)  # goes on unrecorded
        assert self.taken == count + len(self.loader)
        rec.close()
        assert rec.flushed == acknowledged
        run = nbdyn.open(self.path)
        assert run.status == status
        assert self.check(self.path) == acknowledged
        assert len(verify.verify(str(self.path))) == 0
        assert leftovers(self.path, run.store.timestamp) == []
        assert list(nbdyn.runs(self.path.parent)["status"]) == [run.status]


def fill(disk: Path, room: int) -> None:
    """Leave so many bytes on a disk."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with open(disk / "other", "ab", buffering=0) as file:
        os.posix_fallocate(file.fileno(), file.tell(), free - room)


def writers() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name in ("nbdyn-writer", "nbdyn-committer")]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("weights", ["every", "snapshots"])
def test_disk_full(
    weights: str, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import nbdyn
    from nbdyn.__main__ import main

    monkeypatch.setattr(nbdyn.options, "memory", "500 KB")  # small segments
    training = Wide(small_disk / "run", 600, weights=weights, snapshot_every=2)
    training.stop()
    fill(small_disk, 0)
    assert main(["compact", str(training.path)]) == 1
    assert "No space left on device" in capsys.readouterr().err
    shutil.copytree(training.path, tmp_path / "run")
    compact(tmp_path / "run", training.check, training.rec.flushed)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("method", "status"), [("__init__", "killed"), ("finish", "stopped")])
def test_disk_full_while_the_journal_is_written(
    method: str, status: str, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of a journal fits, nor a mark; or all but the index, and what is removed makes room for the mark."""
    import nbdyn
    from nbdyn.store import journal

    monkeypatch.setattr(nbdyn.options, "memory", "500 KB")
    original, calls = getattr(journal.JournalWriter, method), []

    def on_a_full_disk(writer: journal.JournalWriter, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            committer = training.rec._sink._committer
            while committer.waiting:  # else it fails too, and what it leaves is removed, which makes room again
                committer.check()
                time.sleep(0.01)
            fill(small_disk, 0)
        original(writer, *arguments)

    monkeypatch.setattr(journal.JournalWriter, method, on_a_full_disk)
    training = Wide(small_disk / "run", snapshot_every=1000)
    training.stop(status)
    assert isinstance(training.error, OSError) and training.error.errno == errno.ENOSPC
    (small_disk / "other").unlink()
    compact(training.path, training.check, training.rec.flushed)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("room", [10_000, 100_000, 300_000])
def test_disk_full_while_it_compacts(
    room: int, small_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At close. The run is complete; what it says is what helps once there is room."""
    import nbdyn
    from nbdyn.__main__ import main
    from nbdyn.recorder import committer

    original = committer.compact

    def on_a_full_disk(*arguments: Any, **options: Any) -> Any:
        fill(small_disk, room)
        return original(*arguments, **options)

    monkeypatch.setattr(committer, "compact", on_a_full_disk)
    training = Wide(small_disk / "run", snapshot_every=1000)
    training.train(10)
    training.rec.close()
    said = capsys.readouterr().out
    assert "No space left on device" in said and "compaction did not finish (cannot compact " in said
    assert f"nothing is lost, `python -m nbdyn compact {training.path}` takes it up" in said
    assert f"complete: {training.path} holds 80 steps" in said
    assert training.rec.state == nbdyn.open(training.path).status == "complete"
    assert training.check(training.path) == 80
    assert main(["compact", str(training.path)]) == 1  # still full
    assert "still whole in its journal" in capsys.readouterr().err
    assert training.check(training.path) == 80
    (small_disk / "other").unlink()
    compact(training.path, training.check, training.rec.flushed)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("place", "number"), [("packer.Packer._write", 5), ("compact.write_metadata", 1), ("journal.remove", 2)]
)
def test_an_interrupt_while_it_compacts(
    place: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At close. Ctrl-C before a block's commit, or after it: the run is complete, what it says finishes the work."""
    import nbdyn
    from nbdyn.store import Store, verify
    from nbdyn.store import compact as compact_module

    where, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(f"nbdyn.store.{where}")
    original, calls = getattr(owner, name), []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(signal.SIGINT)  # not only an exception: TileDB, asked to, would cancel its queries
        return original(*arguments, **options)

    monkeypatch.setattr(nbdyn.options, "memory", "50 KB")
    monkeypatch.setattr(compact_module, "BLOCK_BYTES", 100_000)  # several blocks
    training = Wide(tmp_path / "run", snapshot_every=1000)
    training.train(4)
    monkeypatch.setattr(owner, name, interrupted)
    training.rec.close()
    said, command = capsys.readouterr().out, f"python -m nbdyn compact {training.path}"
    assert f"compaction did not finish (interrupted); nothing is lost, `{command}` takes it up." in said
    assert f"complete: {training.path} holds 32 steps" in said
    assert training.rec.state == Store(training.path).status == "complete"
    assert training.check(training.path) == 32 and len(verify.verify(str(training.path))) == 0
    compact(training.path, training.check, training.rec.flushed)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("error", [MemoryError(), ValueError("of some kind\nand more")])
def test_a_compaction_that_fails(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it is, at close everything is on disk already."""
    from nbdyn.recorder import committer

    def failing(*arguments: Any, **options: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(committer, "compact", failing)
        training = Wide(tmp_path / "run")
        training.train(2)
        training.rec.close()
    said = capsys.readouterr().out
    assert f"did not finish ({'MemoryError' if not str(error) else 'of some kind'}); nothing is lost" in said
    assert training.rec.state == "complete"
    compact(training.path, training.check, training.rec.flushed)


@pytest.mark.usefixtures("one_thread")
def test_going_on_with_a_large_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is compacted at close, although this recording adds little; what that saves is not counted as written."""
    from nbdyn.recorder import committer
    from nbdyn.store import Store, journal

    with monkeypatch.context() as patch:
        patch.setattr(committer, "compact", lambda *arguments, **options: sink_full())
        first = Wide(tmp_path / "run", snapshot_every=1000)
        first.train(20)
        first.rec.close()
    assert len(list(journal.numbers(str(first.path)))) == Store(first.path).timestamp
    size = journal.size(str(first.path))
    capsys.readouterr()
    second = Wide(tmp_path / "run", snapshot_every=1000, mode="resume", per_sample=False)
    second.train(1)
    second.rec.close()
    assert list(journal.numbers(str(first.path))) == []
    assert "this recording wrote 64 visits in" in capsys.readouterr().out
    assert second.rec._sink._committer.bytes_captured == 0
    third = Wide(tmp_path / "run", snapshot_every=1000, mode="resume")
    third.train(1)
    third.rec.close()
    assert 0 < third.rec._sink._committer.bytes_captured < size / 10


def sink_full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_disk_full_of_other_things(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a byte is left, so that the run cannot even be marked: it is readable, and its lock is free."""
    import nbdyn
    from nbdyn.errors import RecordingStopped
    from nbdyn.store import lock

    monkeypatch.setattr(nbdyn.options, "memory", "200 KB")  # small segments
    inputs, targets = dataset()
    model, optimizer, loss_fn = network(0)
    path = small_disk / "run"
    rec = nbdyn.record(path, model, optimizer, loss_fn)

    def fill() -> None:
        with open(small_disk / "other", "ab", buffering=0) as file:
            for size in (2**16, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    with pytest.raises(RecordingStopped):
        for step in range(100_000):
            if rec.flushed > 10:
                fill()
            ids = ids_of(step)
            rec.batch(ids)
            loss = loss_fn(model(inputs[ids]), targets[ids])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert not lock.is_held(str(path)) and writers() == []
    run = nbdyn.open(path)
    assert run.status in ("killed", "stopped")
    assert len(run) == rec.flushed > 10
    assert len(run.visits) == rec.flushed * BATCH
    fill()
    with pytest.raises(nbdyn.errors.NbdynError, match=r"cannot record to .*No space left"):
        nbdyn.record(small_disk / "another", model, optimizer, loss_fn)
    assert sorted(entry.name for entry in small_disk.iterdir()) == ["other", "run"]


if __name__ == "__main__":
    serve()
