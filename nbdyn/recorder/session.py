"""Recorders of this process: closing them when a cell fails or Python ends, and restoring a run to go on."""

from __future__ import annotations

import atexit
import os
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nbdyn.errors import NbdynError
from nbdyn.recorder.replay import advance, load_state
from nbdyn.settings import say
from nbdyn.store import Store, state

if TYPE_CHECKING:
    from nbdyn.recorder.recorder import Recorder

_open: dict[str, Recorder] = {}
_cell_start: dict[str, int] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_open.clear)  # the writer's thread stays with the parent


def recording() -> list[str]:
    """URIs of the runs that this process is recording."""
    return list(_open)


def register(recorder: Recorder) -> None:
    """Make sure that the recorder is closed, whatever ends its cell or process."""
    _open[recorder.uri] = recorder
    _cell_start[recorder.uri] = recorder.step
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)
    shell = _shell()
    if shell is not None:  # IPython keeps one entry, however often it is registered
        shell.events.register("pre_run_cell", _before_cell)
        shell.events.register("post_run_cell", _after_cell)


def _shell() -> Any:
    """The IPython shell of this process, None outside IPython."""
    if "IPython" not in sys.modules:
        return None
    from IPython.core.getipython import get_ipython

    return get_ipython()


def unregister(recorder: Recorder) -> None:
    """The recorder is closed."""
    if _open.get(recorder.uri) is recorder:
        del _open[recorder.uri]


def close_superseded(uri: str) -> None:
    """A recording cell is run again: the recorder that still holds the path is closed first."""
    earlier = _open[uri]
    say(f"the earlier recorder of {earlier.uri.rsplit('/', 1)[-1]} in this session was still open; closing it.")
    _close(earlier, "interrupted")


def _close(recorder: Recorder, status: str) -> None:
    """Close a recorder where nobody could catch its error."""
    try:
        recorder.close(status)
    except NbdynError as error:
        say(str(error))


def _before_cell(info: Any) -> None:
    for uri, recorder in list(_open.items()):
        _cell_start[uri] = recorder.step


def _after_cell(result: Any) -> None:
    """Close what the cell was recording, if it failed: an interrupt or exception leaves a `for` loop no other way."""
    if result.success:
        return
    for uri, recorder in list(_open.items()):
        if recorder.step > _cell_start.get(uri, 0):
            _close(recorder, "interrupted")


def _at_exit() -> None:
    # In IPython an error is any cell's, and `_after_cell` has seen to it; in a script it ended the script.
    failed = _shell() is None and getattr(sys, "last_value", None) is not None
    for recorder in list(_open.values()):
        _close(recorder, "interrupted" if failed else "complete")


def restore(store: Store, model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Any, data: Any) -> None:
    """Bring model, optimizer and generators to the run's last committed step, so that training goes on from there.

    A model that already holds weights[T] and whose optimizer has a state (a cell run again) is left alone. After a
    clean close the state at T is stored; after a kill it is rebuilt by replay from the last snapshot, which needs
    `data` and `loss_fn`.
    """
    end = store.steps_committed
    stored = store.weights.steps
    if end in stored and optimizer.state and _holds(model, store, end):
        say(f"resuming {store.name} at step {end}; the model holds its weights already.")
        return
    anchor = state.last_snapshot(store, end)
    if anchor is None:
        say(f"resuming {store.name} at step {end} with the model as it is: the run holds no snapshot.")
        return
    load_state(store, anchor, model, optimizer)
    if anchor == end:
        say(f"resuming {store.name} at step {end}; weights, optimizer and random generators are restored.")
    elif data is not None and loss_fn is not None:
        advance(store, anchor, end, model, optimizer, loss_fn, data)
        say(f"resuming {store.name} at step {end}: the snapshot at {anchor} and {end - anchor} replayed steps.")
    else:
        say(
            f"resuming {store.name} at step {end} with the weights of its last snapshot, step {anchor}: the run was "
            f"cut off. Pass data= and loss_fn= to have steps {anchor}..{end - 1} replayed instead."
        )


def _holds(model: nn.Module, store: Store, step: int) -> bool:
    flat = torch.cat([p.detach().reshape(-1).cpu().to(_dtype(store)) for p in model.parameters()])
    return bool(torch.equal(flat, torch.from_numpy(store.weights.row(step))))


def _dtype(store: Store) -> torch.dtype:
    return torch.float64 if store.config["row_dtype"] == "f8" else torch.float32
