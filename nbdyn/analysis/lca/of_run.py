"""Loss change allocation of a recorded run: what `run.lca` does."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from nbdyn.analysis.lca.asked import Asked
from nbdyn.analysis.lca.compute import Split, Task, read
from nbdyn.analysis.lca.engine import StepAllocation
from nbdyn.analysis.lca.kept import Kept
from nbdyn.analysis.lca.losses import loss_of
from nbdyn.analysis.lca.motion import Motion
from nbdyn.analysis.lca.paths import Path, RunPath
from nbdyn.analysis.lca.precision import Precision
from nbdyn.analysis.lca.result import Allocation
from nbdyn.analysis.lca.rules import ADAPTIVE, RULES
from nbdyn.analysis.lca.totals import Rows, Sums
from nbdyn.errors import CorruptRun, Incompatible, NbdynError
from nbdyn.recorder.describe import named_parameters
from nbdyn.settings import say
from nbdyn.store import Store, allocations
from nbdyn.store.allocations import Archive

COUPLED = (
    "SGD", "ASGD", "Adagrad", "Adadelta", "Adam", "Adamax", "NAdam", "RAdam", "RMSprop",
)  # fmt: skip
"""Optimizers of torch.optim that add weight decay to the gradient, as a term (lambda/2) w^2 of the loss would."""


def lca(
    store: Store,
    data: Any,
    loss_fn: Any,
    model: nn.Module | None,
    asked: Asked,
    *,
    name: str | None = None,
    train_data: Any = None,
    motion: bool = False,
    steps: tuple[int, int] | None = None,
    save: bool = True,
    progress: bool = True,
    replace: bool = False,
) -> Allocation:
    """Allocate the change of a loss along a recorded run; see `nbdyn.Run.lca` for the arguments."""
    if model is None:
        raise Incompatible("LCA needs the network: nbdyn.open(path, model=model), or run.lca(data, loss_fn, model).")
    check_model(store, model)
    loss_fn = loss_of(store, loss_fn)
    objective = asked.objective(model, loss_fn, data, progress)
    start, stop = (0, store.steps_committed) if steps is None else map(operator.index, steps)
    path = RunPath(store, start, stop, model, loss_fn, train_data)
    task = Task(
        extent=path,
        objective=objective,
        precision=asked.precision or Precision(),
        tensors=store.config["tensors"],
        cells=asked.kept(store.parameters, stop - start),
        decay=decay_of(store),
        archive=Archive(store.uri, asked.name if name is None else name) if save else None,
    )
    if motion:
        task.parts, task.split = _split(store, path, task.precision)
    rows, sums = task.run(path, progress, replace)
    if path.residuals:
        off = max(path.residuals.values())
        say(f"weights between snapshots were {path.how}; off by at most {off:.2g} where snapshots were met.")
    found = Allocation(Kept(rows, sums, task.spec(), task.labels(), task.tensors, task.archive), store.name)
    found.warn()
    return found


def of_path(
    path: Path,
    model: nn.Module,
    data: Any,
    loss_fn: Any,
    tensors: Sequence[Mapping[str, Any]],
    name: str,
    asked: Asked,
    progress: bool,
) -> Allocation:
    """Allocate the change of a loss along any path of weights, in memory; see `Checkpoints.lca`."""
    objective = asked.objective(model, loss_fn, data, progress)
    kept = asked.kept(objective.parameters, len(path.steps) - 1)
    task = Task(path, objective, asked.precision or Precision(), tensors, kept)
    rows, sums = task.run(path, progress)
    found = Allocation(Kept(rows, sums, task.spec(), task.labels(), tensors, None), name)
    found.warn()
    return found


def check_model(store: Store, model: nn.Module) -> None:
    """Raise Incompatible unless a model has the parameters of a run."""
    mine = [(name, list(p.shape)) for name, p in named_parameters(model)]
    theirs = [(t["name"], t["shape"]) for t in store.config["tensors"]]
    for (name, shape), (other, wanted) in zip(mine, theirs, strict=False):
        if (name, shape) != (other, wanted):
            raise Incompatible(f"{name} {shape} stands where the run has {other} {wanted}; give the recorded model.")
    if len(mine) != len(theirs):
        raise Incompatible(f"this model has {len(mine)} tensors, the run {len(theirs)}; give the recorded model.")


def open_allocation(store: Store, name: str | None) -> Allocation:
    """An allocation that is stored with a run; the only one if no name is given.

    Raises:
        Incompatible: if there is none of this name, or none or several.
    """
    known = allocations.names(store.uri)
    if name is None and len(known) == 1:
        name = known[0]
    if name not in known:
        there = f"it has {', '.join(known)}" if known else "it has none"
        raise Incompatible(f"{store.name}: which allocation? {there}; run.lca(data, loss_fn) computes one.")
    archive = Archive(store.uri, name)
    entry = archive.entry()
    assert entry is not None
    if entry.status != "complete":
        say(f"{name!r} was not finished: it covers {entry.done:,} steps.")
    rows, sums = read(archive)
    _check_shapes(store, archive, rows, sums)
    try:
        found = Allocation(Kept(rows, sums, entry.spec, entry.labels, store.config["tensors"], archive), store.name)
        found.warn()
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise CorruptRun(f"{archive.uri} is damaged ({error}); compute it anew with replace=True.") from error
    return found


def _check_shapes(store: Store, archive: Archive, rows: Rows, sums: Sums) -> None:
    """Raise CorruptRun unless stored arrays are of this run's tensors and parameters."""
    tensors, parameters = len(store.config["tensors"]), store.parameters
    widths = {values.shape[1:] for values in rows.tensors.values()}
    widths |= {values.shape[2:] for values in (rows.groups, rows.parts)}
    if widths != {(tensors,)} or {values.shape for values in sums["parameters"].values()} != {(parameters,)}:
        raise CorruptRun(f"{archive.uri} is damaged (its shapes are not the run's); compute it anew with replace=True.")


def decay_of(store: Store) -> np.ndarray | None:
    """The L2 weight decay of each parameter, (P,); None without, or where it is decoupled from the gradient (AdamW).

    Options that a scheduler changed on the way are taken as they were at the start.
    """
    optimizer = store.config["optimizer"]
    rates = [group.get("weight_decay", 0.0) for group in optimizer["groups"]]
    decoupled = any(group.get("decoupled_weight_decay") for group in optimizer["groups"])
    if not any(rates) or decoupled or optimizer["name"] not in COUPLED:
        return None
    of_tensor = [rates[t["group"]] if t["group"] >= 0 else 0.0 for t in store.config["tensors"]]
    return np.repeat(of_tensor, [t["size"] for t in store.config["tensors"]])


def _split(store: Store, path: RunPath, precision: Precision) -> tuple[tuple[str, ...], Split]:
    """The parts of the motion, and what divides it at each step."""
    if precision.integrator != ADAPTIVE and 0.0 not in RULES[precision.integrator][0]:
        raise NbdynError(f"motion=True needs the gradient before each step, which {precision.integrator!r} leaves out.")
    motion = Motion(store, int(path.steps[0]), int(path.steps[-1]))

    def split(place: int, found: StepAllocation, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        assert found.grad is not None
        return motion.parts(int(path.steps[place]), before, after, found.grad).values

    return motion.names, split
