"""Noise of a recorded run: what `run.noise` does, and the samples of data at fixed weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from nbdyn.analysis.lca.losses import loss_of
from nbdyn.analysis.lca.of_run import check_model
from nbdyn.analysis.lca.paths import RunPath
from nbdyn.analysis.lca.samples import Samples, samples_of
from nbdyn.analysis.noise.asked import Request, by_layer, places, whole_numbers
from nbdyn.analysis.noise.kinds import kind_of
from nbdyn.analysis.noise.measures import in_batches
from nbdyn.analysis.noise.probe import Probe
from nbdyn.analysis.noise.recorded import of_batch, of_coordinates, of_window
from nbdyn.analysis.noise.result import Noise
from nbdyn.analysis.noise.sampled import Source, choose, layers_of
from nbdyn.errors import NbdynError
from nbdyn.schema import PART_SNAPSHOT
from nbdyn.settings import format_size, say
from nbdyn.store import Store, state

MOST_BYTES = 2_000_000_000
"""Of the values that a result holds; beyond, it is refused."""
READERS = {"batch": of_batch, "steps": of_window, "iterates": of_window, "coordinates": of_coordinates}


def noise(
    store: Store, data: Any, loss_fn: Any, model: nn.Module | None, sampled: str, train_data: Any, **asked: Any
) -> Noise:
    """Gather the noise of a recorded run; see `nbdyn.Run.noise` for the arguments."""
    request = Request(kind_of(sampled), **asked)
    if request.batch is not None and sampled != "mini-batches":
        raise NbdynError(
            f'batch={request.batch} is for sampled="mini-batches"; batches of other samples: .index(batch=(1, 10)).'
        )
    if data is not None and sampled in READERS:
        raise NbdynError(f'data= is for sampled="samples" and "mini-batches"; {sampled!r} reads what was recorded.')
    if request.subset is not None and sampled in READERS:
        raise NbdynError(f"subset= takes a part of data=, and {sampled!r} reads what was recorded.")
    if sampled in READERS:
        found = READERS[sampled](store, request)
    else:
        found = _of_data(store, data, loss_fn, model, train_data, request)
    store.log_look(f"noise of {request.kind.name}" + ("" if request.steps is None else f" at {request.steps}"))
    return found


# Samples of data at fixed weights -------------------------------------------------------------------------------


def _of_data(store: Store, data: Any, loss_fn: Any, model: nn.Module | None, train_data: Any, asked: Request) -> Noise:
    if data is None or model is None:
        missing = " and ".join(name for name, value in (("data", data), ("model", model)) if value is None)
        raise NbdynError(
            f"gradients of single samples of the data need {missing}: nbdyn.open(path, model, data), or "
            'run.noise(data, loss_fn, model); sampled="batch" takes the recorded batch and needs neither.'
        )
    check_model(store, model)
    loss_fn = loss_of(store, loss_fn)
    everything = samples_of(data, progress=asked.progress)
    samples = _subset(everything, asked)
    size = whole_numbers(asked.of_batch, "batch")[0]
    if asked.kind.name == "mini-batches" and not 1 <= size <= len(samples) // 2:
        raise NbdynError(f"batch={asked.of_batch} of {len(samples):,} samples; give 1..{len(samples) // 2}.")
    trained = [tensor.get("trainable", True) for tensor in store.config["tensors"]]
    probe = Probe(model, loss_fn, samples, trained, asked.progress)
    layers = layers_of(store.config["tensors"])
    chosen = choose(layers, asked.coordinates, asked.seed)
    steps = places(store, asked.steps, [0, store.steps_committed], store.steps_committed)
    every = np.concatenate(list(chosen.values()))
    _check_size(len(samples) * len(every) * 4 * len(steps), "coordinates= or subset=, or fewer steps")
    found, sums, weights = [], [], {}
    for step in steps:
        weights[step] = _weights(store, step, model, loss_fn, train_data)
        probe.go_to(*weights[step])
        values, added = probe.pass_over(every, f"step {step}")
        sums.append(replace(added, step=step))
        found += by_layer(step, values, chosen, layers, probe.is_split(every))
    if asked.kind.name == "mini-batches":
        order = np.random.default_rng(asked.seed).permutation(len(samples))
        found = [replace(s, values=in_batches(s.values, asked.of_batch, order)) for s in found]
        sums = []
    source = Source(probe, weights, len(everything))
    batch = asked.of_batch if asked.kind.name == "mini-batches" else None
    return Noise(asked.kind, found, sums, store, asked.seed, batch, source, _notes(store, probe, steps))


def _subset(samples: Samples, asked: Request) -> Samples:
    if asked.subset is None:
        return samples
    if not 2 <= whole_numbers(asked.subset, "subset")[0] <= len(samples):
        raise NbdynError(f"subset={asked.subset}: at least 2 and at most the {len(samples):,} samples that there are.")
    chosen = np.sort(np.random.default_rng(asked.seed).permutation(len(samples))[: asked.subset])
    return Samples(samples.inputs[chosen], samples.targets[chosen])


def _notes(store: Store, probe: Probe, steps: list[int]) -> tuple[str, ...]:
    found = [f"{name} is left out: {why}" for name, why in probe.left_out.items()]
    if probe.has_batch_norm:
        found.append(
            "batch normalization uses the recorded running statistics: this is not the noise of the training, whose "
            "batches couple their samples"
        )
        between = np.setdiff1d(steps, state.places(store, PART_SNAPSHOT))
        if len(between):
            found.append(f"the running statistics at {', '.join(map(str, between))} are those of the snapshot before")
    if probe.is_random:
        found.append("dropout is off: the noise of its masks is not in it")
    if probe.is_uneven:
        found.append(
            "class weights or ignored targets: the loss of a batch divides by the weights of that batch, a mean over "
            "samples here by those of all, so that it is not quite the gradient of a batch"
        )
    return tuple(found)


def _weights(store: Store, step: int, model: nn.Module, loss_fn: Any, data: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """weights[step], rebuilt where they are not stored, and the buffers of that time."""
    end = store.steps_committed
    path = RunPath(store, step, step + 1, model, loss_fn, data) if step < end else (
        RunPath(store, step - 1, step, model, loss_fn, data)
    )  # fmt: skip
    place = 0 if step < end else 1
    rows = list(path.rows(0)) if not np.isin(step, store.weights.steps) else []
    row = rows[place] if rows else store.weights.row(step)
    if path.residuals:
        off = max(path.residuals.values())
        say(f"weights[{step}] were {path.how}; off by at most {off:.2g} where snapshots were met.")
    return row, path.buffers(0) | path.buffers(place)


def _check_size(nbytes: int, way_out: str) -> None:
    if nbytes > MOST_BYTES:
        raise NbdynError(
            f"the values would take {format_size(nbytes)}, over {format_size(MOST_BYTES)}; give a smaller {way_out}."
        )
