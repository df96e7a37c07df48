"""One live writer a run, whatever else looks at it, forks, races for it or dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import nbdyn
from nbdyn.errors import NbdynError, RunBusy
from nbdyn.store import Store, lock
from tests import problems

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A closed run."""
    model = problems.mlp(12, 8, 4)
    nbdyn.record(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1)).close()
    return str(tmp_path / "run")


def elsewhere(code: str) -> str:
    """What a process without torch prints."""
    code = f"from nbdyn.store import Store, lock\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_lock_is_taken_once_and_given_back(run: str) -> None:
    assert not lock.is_held(run)
    first = lock.WriterLock(run)
    assert lock.is_held(run) and lock.holder(run) == "this process"
    with pytest.raises(RunBusy, match="run is being recorded by this process; close that recorder"):
        lock.WriterLock(run)
    first.release()
    first.release()
    assert not lock.is_held(run)
    lock.WriterLock(run).release()


def test_others_see_who_holds_it_and_cannot_take_it(run: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    held = lock.WriterLock(run)
    for where in (run, str(tmp_path / "link")):
        printed = elsewhere(
            f"print(lock.is_held({where!r}), lock.holder({where!r}))\n"
            f"try: lock.WriterLock({where!r})\n"
            "except ValueError as error: print(type(error).__name__)"
        )
        assert printed.splitlines() == [f"True process {os.getpid()} on {os.uname().nodename}", "RunBusy"]
    held.release()
    assert elsewhere(f"print(lock.is_held({run!r}))") == "False"


def test_nothing_that_this_process_does_to_the_run_frees_the_lock(run: str) -> None:
    """TileDB opens and closes every file of a group that it lists."""
    held = lock.WriterLock(run)
    store = Store(run)
    store.refresh()
    store.write_note(0, "note", "x")
    assert not lock.is_held(str(ROOT)) and nbdyn.runs(Path(run).parent)["status"].tolist() == ["complete"]
    with open(Path(run) / lock.LOCK_NAME) as file:
        assert json.load(file)["pid"] == os.getpid()
    assert elsewhere(f"print(lock.is_held({run!r}))") == "True"
    held.release()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_dies_with_its_process(how: signal.Signals, run: str) -> None:
    code = f"from nbdyn.store import lock; held = lock.WriterLock({run!r}); print('held', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert lock.is_held(run) and lock.holder(run).startswith(f"process {process.pid} on ")
        process.send_signal(how)
    assert not lock.is_held(run)
    lock.WriterLock(run).release()


def in_child(check: Callable[[], bool]) -> bool:
    """The check's answer in a forked child."""
    child = os.fork()
    if child == 0:
        answer = 1
        try:
            answer = 0 if check() else 1
        finally:
            os._exit(answer)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_forked_child_holds_nothing_and_takes_nothing(run: str) -> None:
    held = lock.WriterLock(run)
    assert in_child(lambda: not lock._held and lock.is_held(run))
    assert in_child(lambda: lock.holder(run).startswith(f"process {os.getppid()} on "))
    assert lock.is_held(run) and elsewhere(f"print(lock.is_held({run!r}))") == "True"
    held.release()
    assert in_child(lambda: not lock.is_held(run))


def test_looking_does_not_keep_a_writer_out(run: str) -> None:
    """Readers ask all the time whether the run is being recorded; a writer that comes then gets its lock."""
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            try:
                with open(Path(run) / lock.LOCK_NAME) as file:
                    import fcntl

                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    time.sleep(0.002)
            except BlockingIOError:
                pass  # the writer has it
            time.sleep(0.001)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(20):
            lock.WriterLock(run).release()
    finally:
        stop.set()
        looking.join()


def test_readers_do_not_take_each_other_for_a_writer(run: str) -> None:
    import fcntl

    with open(Path(run) / lock.LOCK_NAME) as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not lock.is_held(run)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", json.dumps({"pid": "<b>"})])
def test_a_holder_that_says_nonsense_is_still_one(text: str, run: str) -> None:
    """Between taking the lock and writing its name a writer may be seen, or die."""
    held = lock.WriterLock(run)
    (Path(run) / lock.LOCK_NAME).write_text(text)
    assert elsewhere(f"print(lock.is_held({run!r}), lock.holder({run!r}).split()[0])") == "True process"
    held.release()


RACE = """
import sys, torch, nbdyn, nbdyn.errors
from tests import problems
model = problems.mlp(12, 8, 4)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for number in range(5):
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        rec = nbdyn.record(f"{sys.argv[1]}/{number}", model, optimizer)
        rec.close()
        print(rec.uri, flush=True)
    except nbdyn.errors.RunBusy:
        print("busy", flush=True)
"""


def test_two_processes_that_want_one_name(tmp_path: Path) -> None:
    """Each gets a run of its own, or is told that the other has it; no run is damaged or deleted."""
    model = problems.mlp(12, 8, 4)
    optimizer, made = torch.optim.SGD(model.parameters(), 0.1), []
    with subprocess.Popen(
        [sys.executable, "-c", RACE, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin is not None and other.stdout is not None
        for number in range(5):
            while other.stdout.readline() != "ready\n":
                assert other.poll() is None
            other.stdin.write("go\n")
            other.stdin.flush()
            time.sleep(number / 1000)
            try:
                with nbdyn.record(tmp_path / str(number), model, optimizer) as rec:
                    made.append(rec.uri)
            except RunBusy:
                made.append("busy")
            while not (said := other.stdout.readline()).startswith((str(tmp_path), "busy")):
                assert said, "the other process ended early"
            made.append(said.strip())
    runs = [uri for uri in made if uri != "busy"]
    assert len(runs) == len(set(runs)) >= 5
    table = nbdyn.runs(tmp_path)
    assert sorted(f"{tmp_path}/{name}" for name in table["run"]) == sorted(runs)
    assert set(table["status"]) == {"complete"}


def test_a_lock_on_a_disk_that_is_full(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing one's name fails; the error comes once, and nothing stays held."""
    monkeypatch.setattr(lock.json, "dumps", lambda entry: (_ for _ in ()).throw(OSError("No space left on device")))
    model = problems.mlp(12, 8, 4)
    with pytest.raises(NbdynError, match="No space left on device"):
        nbdyn.record(run, model, torch.optim.SGD(model.parameters(), 0.1), mode="resume")
    assert not lock.is_held(run)
