"""Frames of what a run holds: plain pandas, tidy, each with its provenance in `attrs["nbdyn"]`."""

from __future__ import annotations

import numpy as np
import pandas as pd

from nbdyn.schema import GRAD_NORM, LOG, LR, SAMPLE_COLUMNS, STEP_COLUMNS, UPDATE_NORM, VISIT_COLUMNS, WEIGHT_NORM
from nbdyn.store.backend import context, join, reading, tiledb
from nbdyn.store.provenance import with_provenance
from nbdyn.store.store import Store


def steps(store: Store, start: int = 0, stop: int | None = None) -> pd.DataFrame:
    """One row a step.

    Columns: step; epoch; batch_size (visits); loss (as `loss_fn` returned it, nats for cross-entropy); accuracy
    (share of the batch classified right before the update, NaN where there are no classes); lr (of param group
    0; `lr_1`, ... for others); grad_norm (Euclidean, over all tensors, as the optimizer saw it); update_ratio
    (|dw| / |w|, Euclidean, every `every` steps, else NaN); seconds (since the run's first step, wall clock);
    skipped; then the logged values.

    Args:
        store: the run.
        start: first step.
        stop: end of the half-open range; None for all committed ones.
    """
    start, stop = _range(store, start, stop)
    rows, scalars = store.read_steps(start, stop), store.read_scalars(start, stop)
    count = len(rows["epoch"])
    frame = {
        "step": np.arange(start, start + count, dtype=np.int64),
        "epoch": rows["epoch"].astype(np.int64),
        "batch_size": rows["batch_size"].astype(np.int64),
        "loss": rows["loss"],
        "accuracy": rows["accuracy"],
        "lr": scalars.get(LR.format(0), np.full(count, np.nan)),
        "grad_norm": total_norm(scalars, GRAD_NORM, count),
        "update_ratio": total_norm(scalars, UPDATE_NORM, count) / total_norm(scalars, WEIGHT_NORM, count),
        "seconds": rows["seconds"],
        "skipped": rows["skipped"].astype(bool),
    }
    assert tuple(frame) == STEP_COLUMNS
    for column, values in scalars.items():
        kind, _, name = column.partition("/")
        if kind == "lr" and name != "0":
            frame[f"lr_{name}"] = values
        elif column.startswith(LOG.format("")):
            frame[name] = values
    return with_provenance(pd.DataFrame(frame), store, "steps")


def visits(store: Store, start: int = 0, stop: int | None = None) -> pd.DataFrame:
    """One row a visit (a sample at a position of a step's batch), in the order of training.

    Columns: step; position; epoch; sample (index in the data set, -1 where unknown); class (the sample's target,
    -1 where there are no classes, where it is ignored, and in runs of an older nbdyn); loss (of the sample, such
    that the batch's loss is their sum / scale); correct (1, 0, or -1 where there are no classes).

    Args:
        store: the run.
        start: first step.
        stop: end of the half-open range; None for all committed ones.
    """
    start, stop = _range(store, start, stop)
    cells = store.read_visits(start, stop)
    epochs = store.read_steps(start, stop)["epoch"].astype(np.int64)
    step = cells["step"].astype(np.int64)
    frame = pd.DataFrame(
        {
            "step": step,
            "position": cells["position"].astype(np.int64),
            "epoch": epochs[step - start],
            "sample": cells["sample"].astype(np.int64),
            "class": cells["target"].astype(np.int32),
            "loss": cells["loss"].astype(np.float32),
            "correct": cells["correct"].astype(np.int8),
        },
        columns=list(VISIT_COLUMNS),
    )
    return with_provenance(frame, store, "visits")


def norms(store: Store, start: int = 0, stop: int | None = None) -> pd.DataFrame:
    """One row a step and parameter tensor: grad_norm, weight_norm, update_norm (Euclidean; NaN where not measured).

    Weight and update norms are measured every `every` steps.

    Args:
        store: the run.
        start: first step.
        stop: end of the half-open range; None for all committed ones.
    """
    start, stop = _range(store, start, stop)
    scalars = store.read_scalars(start, stop)
    names = [t["name"] for t in store.config["tensors"]]
    count = max(0, stop - start)
    missing = np.full(count, np.nan)

    def column(pattern: str) -> np.ndarray:
        rows = [scalars.get(pattern.format(i), missing) for i in range(len(names))]
        return np.stack(rows, axis=1).reshape(-1) if rows else np.empty(0)

    frame = pd.DataFrame(
        {
            "step": np.repeat(np.arange(start, start + count), len(names)),
            "tensor": np.tile(np.array(names, dtype=object), count),
            "grad_norm": column(GRAD_NORM),
            "weight_norm": column(WEIGHT_NORM),
            "update_norm": column(UPDATE_NORM),
        }
    )
    return with_provenance(frame, store, "norms")


def parameters(store: Store) -> pd.DataFrame:
    """One row a parameter tensor: name, layer, shape, size, first (global index), dtype, trainable, group."""
    columns = ["name", "layer", "shape", "size", "first", "dtype", "trainable", "group"]
    frame = pd.DataFrame(store.config["tensors"], columns=columns)
    frame["shape"] = ["x".join(map(str, shape)) or "scalar" for shape in frame["shape"]]
    return with_provenance(frame, store, "parameters")


def layers(store: Store) -> pd.DataFrame:
    """One row a module with parameters of its own: layer, type, parameters (count), tensors (count)."""
    types = {layer["name"]: layer["type"] for layer in store.config["layers"]}
    rows = [
        {
            "layer": name,
            "type": kind,
            "parameters": sum(t["size"] for t in store.config["tensors"] if t["layer"] == name),
            "tensors": sum(t["layer"] == name for t in store.config["tensors"]),
        }
        for name, kind in types.items()
    ]
    return with_provenance(pd.DataFrame(rows, columns=["layer", "type", "parameters", "tensors"]), store, "layers")


def samples(store: Store) -> pd.DataFrame:
    """One row a sample: how it was learned, over all its visits.

    Columns: sample; times_seen; first_step, last_step; first_loss, last_loss, mean_loss; first_learned (the step
    at which it was first classified right, NaN if never or no classes); forgotten (forgetting events: visits
    classified wrong whose previous visit was right; Toneva et al. 2019, arXiv 1812.05159). With several data
    sets a column `source` numbers them. Visits with unknown sample are left out.
    """
    table = visits(store)
    table["source"] = store.read_steps(0, store.steps_committed)["source"][table["step"].to_numpy()]
    table = table.loc[table["sample"] >= 0]
    keys = ["source", "sample"]
    table = table.sort_values(by=[*keys, "step", "position"])
    correct = table["correct"].to_numpy()
    same = np.zeros(len(table), dtype=bool)
    if len(table):
        same[1:] = (table[keys].to_numpy()[1:] == table[keys].to_numpy()[:-1]).all(axis=1)
    table["lost"] = same & (correct == 0) & (np.roll(correct, 1) == 1)
    table["learned"] = table["step"].where(table["correct"] == 1).astype(float)
    frame = table.groupby(keys, sort=True).agg(
        times_seen=("step", "size"),
        first_step=("step", "first"),
        last_step=("step", "last"),
        first_loss=("loss", "first"),
        last_loss=("loss", "last"),
        mean_loss=("loss", "mean"),
        first_learned=("learned", "min"),
        forgotten=("lost", "sum"),
    )
    frame = frame.reset_index()
    columns = ["source", *SAMPLE_COLUMNS] if len(np.unique(table["source"])) > 1 else list(SAMPLE_COLUMNS)
    return with_provenance(frame.loc[:, columns], store, "samples")


def notes(store: Store) -> pd.DataFrame:
    """The logbook: step, time, kind ("note", "alarm" or "statement"), text."""
    uri = join(store.uri, "notes")
    with reading(uri), tiledb().open(uri, ctx=context(store.uri)) as array:
        cells = array.query(order="U").multi_index[:, :] if array.nonempty_domain() else {}
    order = np.argsort(cells["time"], kind="stable") if cells else np.empty(0, int)
    frame = pd.DataFrame(
        {
            "step": np.asarray(cells.get("step", []), dtype=np.int64)[order],
            "time": pd.to_datetime(np.asarray(cells.get("time", []), dtype=np.int64)[order]),
            "kind": [bytes(cells["kind"][i]).decode() for i in order],
            "text": [bytes(cells["text"][i]).decode() for i in order],
        }
    )
    return with_provenance(frame, store, "notes")


def total_norm(scalars: dict[str, np.ndarray], pattern: str, count: int) -> np.ndarray:
    """Euclidean norm over all tensors from the norms of each, (count,); NaN where not measured or truly NaN."""
    prefix = pattern.format("")
    columns = [values for name, values in scalars.items() if name.startswith(prefix)]
    return np.sqrt(np.square(np.stack(columns)).sum(axis=0)) if columns else np.full(count, np.nan)


def _range(store: Store, start: int, stop: int | None) -> tuple[int, int]:
    start, stop, _ = slice(start, stop).indices(store.steps_committed)
    return start, max(start, stop)
