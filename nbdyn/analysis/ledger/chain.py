"""The ledger on disk: a line of JSON for each entry, which holds the hash of the entry before it.

Each line is `{"entry": {...}, "hash": "..."}` in one canonical spelling: keys sorted, no blanks, ASCII. The hash is
SHA-256 of the canonical entry, and the entry holds the hash of the one before it as `previous`. Whoever changes,
removes or moves an entry breaks the chain there, unless they compute all later hashes anew; that, and lines cut off at
the end, is found by what the logbooks of the runs say (`nbdyn.analysis.ledger.looks`). It is evidence of tampering, not
a protection from someone who rewrites the ledger and all logbooks.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbdyn.errors import NbdynError

FILE = "hypotheses.jsonl"
"""The name of the ledger in the folder of runs."""
START = "0" * 64
"""What stands for the hash before the first entry."""
WAIT = 30.0
"""Seconds that a process waits for another one that is writing."""
_HEAD = ("n", "previous", "ledger", "time", "event", "name")


class Tampered(NbdynError):
    """A ledger that is not as nbdyn wrote it; the message names the entry."""


@dataclass(frozen=True)
class Chain:
    """The entries of a ledger, checked.

    Attributes:
        entries: each a dict of n (from 0), previous, ledger, time, event, name, and what the event adds.
        hashes: theirs.
        torn: bytes at the end that are no whole entry: an append that was cut short.
        open_end: whether the last entry is whole, but the line break behind it is missing.
    """

    entries: tuple[dict[str, Any], ...] = ()
    hashes: tuple[str, ...] = ()
    torn: bytes = b""
    open_end: bool = False

    @property
    def identity(self) -> str:
        """The ledger's own id, "" before the first entry."""
        return self.entries[0]["ledger"] if self.entries else ""


def canonical(value: Any) -> bytes:
    r"""The one spelling of a JSON value that is hashed.

    Raises:
        ValueError: for NaN and infinity, which JSON has not.

    >>> canonical({"b": 1, "a": "é"})
    b'{"a":"\\u00e9","b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def digest(entry: dict[str, Any]) -> str:
    """The hash of an entry."""
    return hashlib.sha256(canonical(entry)).hexdigest()


def read(path: str) -> Chain:
    """The entries of a ledger; an empty chain where there is no file.

    Cost: reads and hashes the whole file, some 10 µs an entry.

    Raises:
        Tampered: if an entry was changed, moved or removed; names the first.
        NbdynError: if the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return check(file.read(), path)
    except FileNotFoundError:
        return Chain()
    except OSError as error:
        raise NbdynError(f"cannot read {path}: {error.strerror}.") from error


def check(data: bytes, path: str) -> Chain:
    """The entries in the bytes of a ledger.

    Raises:
        Tampered: names the first entry that is not as it was written.
    """
    *lines, tail = data.split(b"\n")
    entries: list[dict[str, Any]] = []
    hashes: list[str] = []
    for line in lines:
        _take(line, entries, hashes, path)
    if not tail:
        return Chain(tuple(entries), tuple(hashes))
    try:
        _take(tail, entries, hashes, path)
    except Tampered:
        if _is_whole(tail):  # no append that was cut short leaves a whole record
            raise
        return Chain(tuple(entries), tuple(hashes), torn=tail)
    return Chain(tuple(entries), tuple(hashes), open_end=True)


def _is_whole(tail: bytes) -> bool:
    """Whether it begins with a whole JSON value."""
    try:
        json.JSONDecoder().raw_decode(tail.decode(errors="replace"))
    except (ValueError, RecursionError):
        return False
    return True


def _take(line: bytes, entries: list[dict[str, Any]], hashes: list[str], path: str) -> None:
    """Check a line against those before it, and add it."""
    place = len(entries)
    try:
        record = json.loads(line)
        entry, found = record["entry"], record["hash"]
        if canonical(record) != line or set(record) != {"entry", "hash"} or not set(_HEAD) <= set(entry):
            raise ValueError("not in the spelling that nbdyn writes")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _tampered(path, place, f"cannot be read ({error})", entries) from error
    if digest(entry) != found:
        raise _tampered(path, place, f'("{entry["name"]}", {entry["event"]}) was changed: its hash differs', entries)
    before = hashes[-1] if hashes else START
    if entry["n"] != place or entry["previous"] != before:
        what = f"stands where entry {place} is due" if entry["n"] != place else "does not follow the one before it"
        raise _tampered(path, place, f'(number {entry["n"]}, "{entry["name"]}") {what}', entries)
    if entries and entry["ledger"] != entries[0]["ledger"]:
        raise _tampered(path, place, "is of another ledger", entries)
    entries.append(entry)
    hashes.append(found)


def _tampered(path: str, place: int, what: str, entries: list[dict[str, Any]]) -> Tampered:
    whole = f"the {len(entries)} before it are whole" if entries else "nothing is before it"
    return Tampered(f"{path}: entry {place} {what}; {whole}. Restore the file from a copy.")


def append(path: str, make: Callable[[Chain], dict[str, Any] | None]) -> tuple[Chain, bool]:
    """Add an entry: other processes wait meanwhile, and when this returns it is on disk.

    What an earlier append that was cut short left at the end is removed first.

    Args:
        path: the ledger; created if it is not there.
        make: gives the entry (event, name, ...) out of the chain as it is now, or None to add nothing.

    Returns:
        The chain as it is then, and whether an entry was added.

    Raises:
        Tampered: if the ledger is not as nbdyn wrote it; nothing is added.
        NbdynError: if the place cannot be written, or another process does not let go of it.
    """
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise NbdynError(f"cannot write {path}: {error.strerror}.") from error
    try:
        _lock(file, path)
        with open(path, "rb") as seen:
            data = seen.read()
        chain = check(data, path)
        made = make(chain)
        if made is None:
            return chain, False
        added = _headed(made, chain)
        line = canonical({"entry": added, "hash": digest(added)}) + b"\n"
        whole = len(data) - len(chain.torn)
        _write(file, whole, (b"\n" if chain.open_end else b"") + line)
        return Chain((*chain.entries, added), (*chain.hashes, digest(added))), True
    except OSError as error:
        raise NbdynError(f"cannot write {path}: {error.strerror}; the entries before are kept.") from error
    finally:
        os.close(file)


def _headed(made: dict[str, Any], chain: Chain) -> dict[str, Any]:
    return {
        **made,
        "n": len(chain.entries),
        "previous": chain.hashes[-1] if chain.hashes else START,
        "ledger": chain.identity or uuid.uuid4().hex[:16],
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
    }


def _write(file: int, whole: int, data: bytes) -> None:
    """Write behind the first `whole` bytes, all or nothing."""
    os.ftruncate(file, whole)
    left = memoryview(data)
    try:
        while left:
            left = left[os.write(file, left) :]
        os.fsync(file)
    except OSError:  # a full disk
        os.ftruncate(file, whole)
        raise


def _lock(file: int, path: str) -> None:
    """Wait for the right to write; the system takes it back when the file is closed, however the process ends."""
    import fcntl

    until = time.monotonic() + WAIT
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise NbdynError(f"another process has held {path} for {WAIT:.0f} s; end it, then try again.") from None
            time.sleep(0.01)
