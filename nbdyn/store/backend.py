"""TileDB, imported late and politely: one context a process, the user's NumPy, SIGINT and fork left alone."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlparse

from nbdyn.errors import CorruptRun, NbdynError

_contexts: dict[tuple[int, bool, bool], Any] = {}


@functools.cache
def tiledb() -> ModuleType:
    """The tiledb module. Its import sets legacy NumPy print options; they are put back."""
    import numpy as np

    saved = np.get_printoptions()
    try:
        import tiledb as module
    finally:
        np.set_printoptions(**saved)
    # Up to Python 3.11 the first context would wrap os.fork to warn at every fork, also of DataLoader workers
    # that never touch TileDB. Ours is keyed by process (below), so a forked child cannot use an inherited one.
    module.ctx._needs_fork_wrapper = False
    return module


def configuration(uri: str = "", **extra: str) -> dict[str, str]:
    """TileDB settings for a URI: no SIGINT handler, a bounded memory; small reads unbatched on local disks.

    Batching reads over gaps of 500 KB pays on object stores; on a disk it made the trajectory of one weight
    13 to 45 times slower (it read everything between).
    """
    settings = {"sm.enable_signal_handlers": "false", "sm.mem.total_budget": str(2 << 30)}
    if is_local(uri):
        settings |= {"vfs.min_batch_gap": "0", "vfs.min_batch_size": "0"}
    return settings | extra


def context(uri: str = "", writing: bool = False) -> Any:
    """The reading or the writing context of this process; the writing one has a single thread on local disks.

    Contexts are kept for the life of the process: a forked child (a DataLoader worker) must never destroy one, as
    a garbage collection there would if one were garbage (it crashes: its threads do not exist in the child). A
    child that opens a run makes its own.
    """
    key = (os.getpid(), is_local(uri), writing)
    if key not in _contexts:
        one = {"sm.compute_concurrency_level": "1", "sm.io_concurrency_level": "1"} if writing and is_local(uri) else {}
        if writing:  # after each query it would give memory back to the system that training is about to use again
            one["sm.mem.malloc_trim"] = "false"
        _contexts[key] = tiledb().Ctx(configuration(uri, **one))
    return _contexts[key]


def is_local(uri: str) -> bool:
    """Whether the URI is a folder of this machine.

    >>> is_local("runs/fc"), is_local("s3://bucket/fc")
    (True, False)
    """
    return "://" not in uri or uri.startswith("file://")


def normalize(uri: str | os.PathLike[str]) -> str:
    """An absolute path for a local folder, the URI without a trailing slash for anything else."""
    text = os.fspath(uri)
    if text.startswith("file://"):
        text = unquote(urlparse(text).path)
    return os.path.abspath(os.path.expanduser(text)) if is_local(text) else text.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """A member of a group or folder.

    >>> join("s3://bucket/fc", "steps")
    's3://bucket/fc/steps'
    """
    return "/".join([uri.rstrip("/"), *parts])


def basename(uri: str) -> str:
    """The last part of a path or URI: the name of a run."""
    return uri.rstrip("/").rsplit("/", 1)[-1]


def parent(uri: str) -> str:
    """The folder that holds a run."""
    return uri.rstrip("/").rsplit("/", 1)[0]


def object_type(uri: str) -> str | None:
    """What TileDB sees at the URI: "group", "array" or None.

    Raises:
        NbdynError: if it cannot look: no such bucket, no permission, no network.
    """
    try:
        return tiledb().object_type(uri, ctx=context(uri))
    except tiledb().TileDBError as error:
        raise NbdynError(f"cannot reach {uri}: {_reason(error)}. Check the address and your permissions.") from error


@contextlib.contextmanager
def reading(uri: str) -> Iterator[None]:
    """Turn any failure of TileDB while reading `uri` into a CorruptRun that names it and the way out.

    Inside, our context is TileDB's default one, which its queries use: the one that it would make takes Ctrl-C.
    """
    try:
        with tiledb().scope_ctx(context(uri)):
            yield
    except tiledb().TileDBError as error:
        raise CorruptRun(
            f"cannot read {uri}: {_reason(error)}. Type `python -m nbdyn verify {parent(uri)}` to see what is damaged "
            "and what is still whole."
        ) from error


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
