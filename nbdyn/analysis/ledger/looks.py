"""What is known of the runs of a hypothesis before it is tested: which there are, and who has looked at their data.

The logbook of a run (`run.notes`) holds every statement that was asked of it, each `run.lca` and `run.noise`, and each
test of the ledger that read it. These are looks. Frames taken by hand (`run.steps`, `run.weights`) are not logged, so
they are not known; an allocation that is stored before the declaration counts as a look at it.

The logbooks also hold the hash of each entry of the ledger that concerns the run. So entries that were cut off the
ledger's end are missed there.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbdyn.analysis.ledger.chain import Chain, Tampered
from nbdyn.errors import Incompatible, NbdynError
from nbdyn.query.runs import siblings
from nbdyn.store import Store, allocations, frames
from nbdyn.store.backend import basename, is_local, join, normalize, parent

KIND = "hypothesis"
"""The kind of the ledger's lines in a logbook: "tested NAME; ledger ID entry N HASH"."""
_READS = ("tested ", "replicated ")
_ANCHOR = re.compile(r"; ledger ([0-9a-f]{16}) entry ([0-9]{1,9}) ([0-9a-f]{64})$")
_WILD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Known:
    """A run as the ledger knows it at a moment.

    Attributes:
        name: of its folder.
        created: when it was recorded; with the name it is the run's identity.
        steps: committed by then.
        looks: lines in its logbook that tell of a look at its data.
        allocations: names of its stored allocations.
        early: whether one of the looks was at fewer steps than there are now.
    """

    name: str
    created: str
    steps: int
    looks: int
    allocations: tuple[str, ...] = ()
    early: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """What stays the same of a run."""
        return self.name, self.created

    def as_entry(self) -> dict[str, Any]:
        """What the ledger keeps of it."""
        return {"run": self.name, "created": self.created, "steps": self.steps, "looks": self.looks,
                "allocations": list(self.allocations)}  # fmt: skip


def split_pattern(pattern: str) -> tuple[str, str]:
    """The folder of runs and the pattern of their names: "runs/resnet-*".

    Raises:
        Incompatible: if the folder is no folder of this machine, or has wildcards in it.
    """
    text = os.fspath(pattern).rstrip("/")
    if not text:
        raise Incompatible('no runs are named; write a path or a pattern, such as -r "runs/resnet-*".')
    check_local(text)
    uri = normalize(text)
    folder, names = parent(uri), basename(uri)
    if _WILD.search(folder) and not os.path.isdir(folder):
        raise Incompatible(f'"{pattern}": only the last part may have * ? [ ]; the ledger lies beside the runs.')
    return folder or "/", names


def check_local(uri: str) -> None:
    """Raise Incompatible for an object store: nothing there can be appended to by several processes."""
    if not is_local(uri):
        raise Incompatible(
            f"{uri}: a ledger needs a folder of this machine, to append to and to lock; copy the runs to one."
        )


def stores(folder: str, names: str) -> list[Store]:
    """The runs of a folder that match a pattern, by name; [] where the folder is not there."""
    found = siblings(join(folder, "x")) if os.path.isdir(folder) else []
    return [Store(join(folder, name)) for name in found if fnmatch.fnmatchcase(name, names)]


def known(store: Store) -> Known:
    """What the ledger knows of a run now."""
    notes = frames.notes(store)
    kinds, texts = notes["kind"].to_numpy(), notes["text"].to_numpy()
    looked = np.array([
        kind == "statement" or (kind == KIND and str(text).startswith(_READS))
        for kind, text in zip(kinds, texts, strict=True)
    ], bool)  # fmt: skip
    early = bool((notes["step"].to_numpy()[looked] < store.steps_committed).any())
    there = tuple(allocations.names(store.uri))
    return Known(store.name, str(store.config["created"]), store.steps_committed, int(looked.sum()), there, early)


def check_distinct(groups: Sequence[Sequence[Store]]) -> None:
    """Raise Incompatible if a run is a copy of another one: it is no further run.

    A copy has the same loss at every step; within a group also if it was then trained further, or shorter. Runs of two
    groups may begin alike: a treatment may set in later. Runs whose losses are all NaN cannot be told apart.

    Raises:
        Incompatible: names both.
    """
    losses = {
        store.name: store.read_steps(0, store.steps_committed, ("loss",))["loss"] for group in groups for store in group
    }
    losses = {name: values for name, values in losses.items() if not np.isnan(values).all()}
    _check_beginnings(losses, whole=True)
    for group in groups:
        _check_beginnings({store.name: losses[store.name] for store in group if store.name in losses}, whole=False)


def _check_beginnings(losses: dict[str, np.ndarray], *, whole: bool) -> None:
    """Raise Incompatible if a series of losses is equal to another one, or (not `whole`) to its beginning."""
    for length in {len(values) for values in losses.values()}:
        seen: dict[str, str] = {}
        for name, values in losses.items():
            if len(values) < length or (whole and len(values) > length):
                continue
            other = seen.setdefault(hashlib.sha256(values[:length].tobytes()).hexdigest(), name)
            if other != name and length in (len(values), len(losses[other])):
                steps = "at every step" if len(values) == len(losses[other]) else f"at the {length} steps of one"
                raise Incompatible(
                    f"{name} and {other} have the same loss {steps}: a copy, or the same seed twice. "
                    "It would count twice; move one of them out of the folder, or name the runs by another pattern."
                )


def anchor(found: list[Store], chain: Chain) -> list[str]:
    """Write the last entry's hash to the logbooks of its runs; the names of runs that cannot be written."""
    entry, head = chain.entries[-1], chain.hashes[-1]
    text = f"{entry['event']} {entry['name']}; ledger {entry['ledger']} entry {entry['n']} {head}"
    failed = []
    for store in found:
        try:
            store.write_note(store.steps_committed, KIND, text)
        except (NbdynError, OSError, RuntimeError):
            failed.append(store.name)
    return failed


@dataclass(frozen=True)
class Logbooks:
    """What the logbooks of a folder's runs say of ledgers.

    Attributes:
        lines: the ledger's lines in that of each run.
        silent: names of runs that cannot be read.
    """

    lines: dict[str, list[str]]
    silent: list[str]


def logbooks(folder: str) -> Logbooks:
    """Read the logbooks of all runs of a folder.

    Cost: some 10 ms a run.
    """
    lines: dict[str, list[str]] = {}
    silent = []
    for name in siblings(join(folder, "x")) if os.path.isdir(folder) else []:
        try:
            notes = frames.notes(Store(join(folder, name)))
        except NbdynError:
            silent.append(name)
        else:
            lines[name] = [str(text) for text in notes.loc[notes["kind"] == KIND, "text"]]
    return Logbooks(lines, silent)


def check_anchors(books: Logbooks, chain: Chain, path: str) -> list[str]:
    """Compare the ledger with what the logbooks say of it.

    Args:
        books: read before the chain: another process writes an entry first, and then the logbooks.
        chain: the ledger.
        path: of the ledger, for messages.

    Returns:
        Sentences on runs that cannot be read, and on those that speak of other ledgers, which are not here.

    Raises:
        Tampered: if a logbook tells of an entry that is missing or has another hash.
    """
    others: dict[str, list[str]] = {}
    for name, texts in books.lines.items():
        for text in texts:
            match = _ANCHOR.search(text)
            if match is None:
                continue
            identity, place, head = match[1], int(match[2]), match[3]
            if identity != chain.identity:
                others.setdefault(identity, []).append(name)
            elif place >= len(chain.hashes):
                raise Tampered(
                    f"{path}: entry {place} is missing. {len(chain.hashes)} are there, and the logbook of {name} "
                    f"says: {text[: match.start()]}. Restore the file from a copy."
                )
            elif chain.hashes[place] != head:
                raise Tampered(
                    f"{path}: entry {place} is not the one that the logbook of {name} knows "
                    f"({text[: match.start()]}). Restore the file from a copy."
                )
    said = [f"{name}: its logbook cannot be read, and cannot tell whether the ledger is whole" for name in books.silent]
    return said + [
        f"{', '.join(dict.fromkeys(names))}: known to another ledger ({identity}), which is not in this folder"
        for identity, names in others.items()
    ]
