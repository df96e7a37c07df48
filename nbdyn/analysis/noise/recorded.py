"""Noise that a run recorded: the samples of its batches, its batch gradients, its weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nbdyn.analysis.noise.asked import Request, by_layer, places, window
from nbdyn.analysis.noise.result import Noise
from nbdyn.analysis.noise.sampled import Sample, Sums, choose, layers_of
from nbdyn.analysis.noise.split import Part, add_along, add_squares, splits
from nbdyn.errors import Incompatible, NotRecorded
from nbdyn.store import Store
from nbdyn.store.gradients import Gradients
from nbdyn.store.projection import is_projected
from nbdyn.store.trajectory import trajectory

READ_BYTES = 2_000_000_000
"""A step's factors are read at once, up to this."""


def of_batch(store: Store, asked: Request) -> Noise:
    """The samples of the recorded batches, one place each: only they share their weights."""
    gradients, layers = Gradients(store), layers_of(store.config["tensors"])
    chosen = choose(layers, asked.coordinates, asked.seed)
    every = np.concatenate(list(chosen.values()))
    found, sums = [], []
    for step in places(store, asked.steps, [0, store.steps_committed - 1], store.steps_committed - 1):
        known = _captured(store)[every]
        dense = gradients[step, every[known]].own().dense()
        found += by_layer(step, _spread(dense.values, known), chosen, layers, known)
        sums.append(_sums_of_batch(store, step))
    notes = _left_out(gradients) + sorted({site.note for site in store.factors.sites if site.note})
    if _fraction(store) < 1.0:
        notes.append(f"of each batch a share of {_fraction(store):g} of its samples is recorded")
    return Noise(asked.kind, found, sums, store, asked.seed, notes=tuple(notes))


def _left_out(gradients: Gradients) -> list[str]:
    """Which tensors were recorded by batch only, and why."""
    return [f"{name} is left out: {why}" for name, why in gradients.batch_only.items()]


def _fraction(store: Store) -> float:
    """The share of the samples whose gradients are recorded."""
    return (store.config.get("per_sample") or {}).get("fraction", 1.0)


def _spread(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Columns at their places among all, of which some are not known: these are NaN."""
    if known.all():
        return values
    found = np.full((len(values), len(known)), np.nan, values.dtype)
    found[:, known] = values
    return found


def _captured(store: Store) -> np.ndarray:
    """Which parameters have factors, (P,) bool."""
    held = np.zeros(store.parameters, bool)
    for site in store.factors.sites:
        if is_projected(site):
            raise NotRecorded(
                f"{store.name} holds random projections of the gradients of single samples (project=), which have a "
                'noise of their own; sampled="samples" computes them anew from data and model.'
            )
        held[site.indices()] = True
    for tensor in store.config["tensors"]:
        if tensor["name"] in store.factors.batch_only:
            held[tensor["first"] : tensor["first"] + tensor["size"]] = False
    return held


def _sums_of_batch(store: Store, step: int) -> Sums:
    """Norms and inner products of the samples of a recorded batch, from its factors."""
    tensors, factors = [t for t in store.config["tensors"] if t.get("trainable", True)], store.factors
    layers = list(dict.fromkeys(t["layer"] for t in tensors))
    layer_of = np.array([layers.index(t["layer"]) for t in tensors])
    layer_at = np.full(store.parameters, -1)  # of what is not trained
    for tensor, layer in zip(tensors, layer_of, strict=True):
        layer_at[tensor["first"] : tensor["first"] + tensor["size"]] = layer
    firsts = np.array([t["first"] for t in tensors])
    scale = float(store.read_steps(step, step + 1)["scale"][0])
    parts = [
        (site, block)
        for number, site in enumerate(factors.sites)
        for block in factors.blocks(number, step, step + 1, max_bytes=READ_BYTES)
    ]
    captured = _captured(store)
    cells = Gradients(store)[step, np.flatnonzero(captured)]
    positions = np.unique(np.concatenate([block.position for _, block in parts]))
    mean = np.zeros(store.parameters)
    mean[captured] = cells.total()[0].astype(np.float64) * scale / len(positions)
    squares, along = (np.zeros((len(positions), len(layers))) for _ in range(2))
    for rows, together in _together(parts, positions):
        for split in splits(together, firsts, layer_of):
            for add, out in ((add_squares, squares), (lambda s, at, o: add_along(s, at, mean, o), along)):
                some = np.zeros((len(rows), len(layers)))
                add(split, layer_at, some)
                out[rows] += some
    trained = layer_at >= 0
    mean_square = np.bincount(layer_at[trained], np.square(mean[trained]), len(layers))
    holes = np.unique(layer_at[trained & ~captured])
    squares[:, holes], along[:, holes], mean_square[holes] = np.nan, np.nan, np.nan
    return Sums(step, tuple(layers), squares * scale**2, along * scale, mean_square)


def _together(parts: list[Part], positions: np.ndarray) -> list[tuple[np.ndarray, list[Part]]]:
    """The factors cut so that all of a group have the same samples: rows of the result, and the uses of each group."""
    cuts = np.unique([block.position[0] for _, block in parts])
    found = []
    for first, last in zip(cuts, [*cuts[1:], positions[-1] + 1], strict=True):
        group = [(site, block.take((block.position >= first) & (block.position < last))) for site, block in parts]
        group = [(site, block) for site, block in group if len(block)]
        rows = np.searchsorted(positions, group[0][1].position)
        if any(not np.array_equal(block.position, group[0][1].position) for _, block in group):
            raise Incompatible("the layers of this run were captured for different samples; use sampled='samples'.")
        found.append((rows, group))
    return found


def of_coordinates(store: Store, asked: Request) -> Noise:
    """All coordinates of the recorded batch gradients."""
    gradients, found = Gradients(store), []
    for step in places(store, asked.steps, [0, store.steps_committed - 1], store.steps_committed - 1):
        rebuilt = gradients.rebuild(step)
        for layer, indices in layers_of(store.config["tensors"]).items():
            mine = [t for t in store.config["tensors"] if t["layer"] == layer]
            names = [t["name"] for t in mine if t.get("trainable", True)]
            if all(name in rebuilt for name in names):
                values = np.concatenate([rebuilt[name].reshape(-1) for name in names])
                found.append(Sample(step, step + 1, layer, values[:, None], indices, len(indices)))
    return Noise(asked.kind, found, [], store, asked.seed, notes=tuple(_left_out(gradients)))


def of_window(store: Store, asked: Request) -> Noise:
    """Batch gradients, or weights, at the steps of one window."""
    start, stop = (0, store.steps_committed) if asked.steps is None else window(asked.steps)
    if not 0 <= start < stop <= store.steps_committed:
        raise NotRecorded(f"{store.name} has steps 0..{store.steps_committed - 1}; {start}..{stop - 1} are not there.")
    layers = layers_of(store.config["tensors"])
    chosen = choose(layers, asked.coordinates, asked.seed)
    every = np.concatenate(list(chosen.values()))
    read = _iterates if asked.kind.name == "iterates" else _totals
    values, known, notes = read(store, every, start, stop)
    found = [replace(sample, stop=stop) for sample in by_layer(start, values, chosen, layers, known)]
    return Noise(asked.kind, found, [], store, asked.seed, notes=notes)


def _iterates(store: Store, every: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Weights at the steps of a window, (steps, k); all are known."""
    path = trajectory(store, every, start, stop)
    off = f"{path.rebuilt} of {stop - start} steps were rebuilt, off by at most {path.residual:.2g}"
    return path.values, np.ones(len(every), bool), (off,) if path.rebuilt else ()


def _totals(store: Store, every: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Recorded batch gradients at the steps of a window, (steps, k), and which coordinates are known."""
    if _fraction(store) < 1.0:
        raise NotRecorded(
            f"{store.name} holds a share of {_fraction(store):g} of the samples (fraction=), which does not make batch "
            "gradients."
        )
    known, gradients = _captured(store)[every], Gradients(store)
    totals = gradients[start:stop, every[known]].total()
    notes = _left_out(gradients)
    if len(totals) < stop - start:
        notes.append(f"{len(totals)} of {stop - start} steps were captured")
    return _spread(totals, known), known, tuple(notes)
