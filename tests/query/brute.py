"""Answers about cells by plain NumPy in float64, from dense cells: what statements are compared with.

Runs are trained here by ordinary loops that keep p.grad and the weights of every step themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

import nbdyn
from nbdyn.query import execute
from nbdyn.query.language import parse
from nbdyn.query.tree import Measure, Named, Scope, Show, Top
from nbdyn.store import Store, frames
from nbdyn.store.gradients import Gradients
from nbdyn.store.names import select

ROW_COLUMN = {"sample": "sample", "class": "class", "batch": "step", "step": "step", "epoch": "epoch"}
TIE = 2e-5
"""Values nearer than this, relative to the largest, may stand in either order: fp32 rounding."""


def flat(tensors: Iterable[torch.Tensor]) -> np.ndarray:
    """Tensors as one float64 vector, copied."""
    return np.concatenate([t.detach().double().reshape(-1).numpy() for t in tensors])


@dataclass
class Trained:
    """A recorded run and what its loop saw itself.

    Attributes:
        path: of the run.
        weights: (T + 1, P) before every step, and the final ones.
        grads: (T, P) p.grad after backward, zeros where it was None.
    """

    path: Path
    weights: np.ndarray
    grads: np.ndarray

    @property
    def store(self) -> Store:
        return Store(str(self.path))


def train(
    path: Path,
    model: nn.Module,
    data: Any,
    loss_fn: Any,
    *,
    batch: int = 10,
    epochs: int = 3,
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.SGD(p, lr=0.1),
    accumulate: int = 1,
    factor: Callable[[int], float] = lambda step: 1.0,
    before: Callable[[int], None] = lambda step: None,
    autocast: bool = False,
    scaler: Any = None,
    **options: Any,
) -> Trained:
    """An ordinary loop, recorded.

    Args:
        path: of the run.
        model, data, loss_fn: what is trained on what.
        batch, epochs: of the loop.
        optimizer: parameters -> optimizer.
        accumulate: batches a step.
        factor: what the loss of a step is multiplied by.
        before: called before each forward pass.
        autocast: bf16.
        scaler: a GradScaler.
        options: of nbdyn.record.
    """
    built = optimizer(model.parameters())
    loader = torch.utils.data.DataLoader(data, batch, shuffle=True, generator=torch.Generator().manual_seed(3))
    weights, grads, held = [flat(model.parameters())], [], 0
    with nbdyn.record(path, model, built, loss_fn, **options) as recorder:
        for _ in range(epochs):
            for x, y in recorder.watch(loader):
                step = len(grads)
                before(step)
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    output = model(x)
                    loss = loss_fn(output.float() if autocast else output, y) * factor(step)
                (loss if scaler is None else scaler.scale(loss)).backward()
                held += 1
                if held % accumulate:
                    continue
                grads.append(flat(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()))
                if scaler is None:
                    built.step()
                else:
                    scaler.step(built)
                    scaler.update()
                built.zero_grad()
                weights.append(flat(model.parameters()))
    return Trained(path, np.array(weights), np.array(grads))


@dataclass
class Table:
    """Every value of a question: (members, targets), and the labels of both; NaN where a pair has no cells."""

    values: np.ndarray
    rows: pd.DataFrame
    columns: pd.DataFrame
    scale: float


def parameter_table(store: Store) -> pd.DataFrame:
    """A row a parameter: parameter, tensor, layer, unit."""
    parts = []
    for t in store.config["tensors"]:
        each = max(1, t["size"] // max(1, (t["shape"] or [1])[0]))
        place = np.arange(t["size"])
        parts.append(pd.DataFrame({"parameter": t["first"] + place, "tensor": t["name"], "layer": t["layer"],
                                   "unit": place // each}))  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def own_cells(store: Store, start: int, stop: int) -> tuple[pd.DataFrame, np.ndarray]:
    """Visits with step, position, epoch, sample, class, loss, correct, and their own gradients (visits, parameters)."""
    steps = store.factors.steps
    steps = steps[(steps >= start) & (steps < stop)]
    cells = Gradients(store)[steps, :]
    known = not np.isnan(store.read_steps(0, store.steps_committed)["scale"]).any()
    dense = (cells.own() if known else cells).dense()
    values = np.full((len(dense.values), store.parameters), np.nan)
    values[:, dense.parameters] = dense.values
    visits = dense.visits.merge(frames.visits(store), on=["step", "position", "sample"], how="left", validate="1:1")
    return visits, values


def measure_of(measure: Measure, cells: np.ndarray, limits: np.ndarray | float) -> np.ndarray:
    """A measure of cells (n, ...) along the first axis."""
    x = np.abs(cells) if measure.magnitude else cells
    if measure.aggregate != "share":  # NaN are left out
        x = np.where(np.isnan(x), -np.inf if measure.aggregate == "max" else 0.0, x)
    match measure.aggregate:
        case "sum":
            found = x.sum(0)
        case "mean" | "var":
            numbers = np.ma.masked_where(np.isnan(cells), cells)
            numbers = abs(numbers) if measure.magnitude else numbers
            found = np.ma.filled(numbers.mean(0) if measure.aggregate == "mean" else numbers.var(0), np.nan)
        case "norm":
            found = np.sqrt((x**2).sum(0))
        case "count":
            found = (x != 0).sum(0).astype(float)
        case "max":
            found = np.where(np.isneginf(x.max(0)), np.nan, x.max(0))
        case "net":
            found = np.abs(x.sum(0))
        case "path":
            found = np.abs(x).sum(0)
        case _:
            operator = {">": np.greater, ">=": np.greater_equal, "<": np.less, "<=": np.less_equal}[
                measure.condition[0]  # pyright: ignore[reportOptionalSubscript]
            ]
            found = (operator(x, limits) | np.isnan(x)).mean(0)
    return np.abs(found) if measure.absolute else found


def table_of(trained: Trained, text: str, cells: tuple[pd.DataFrame, np.ndarray] | None = None) -> Table:
    """The values of a statement about cells.

    Args:
        trained: the run.
        text: the statement.
        cells: the visits and their own gradients, where they are not to be read from the run.
    """
    store = trained.store
    tree = parse(text)
    tree = tree.statement if isinstance(tree, Named) else tree
    measure, selector, kinds = _parts(tree)
    start, stop = span(store, tree.scope)  # pyright: ignore[reportAttributeAccessIssue]
    parameters = parameter_table(store)
    if selector != "all":
        parameters = parameters.iloc[np.unique(select(selector, store.config["tensors"]).indices)]
    if measure.quantity == "g":
        rows, values = cells if cells is not None else own_cells(store, start, stop)
        inside = ((rows["step"] >= start) & (rows["step"] < stop)).to_numpy()
        rows, values = rows.loc[inside].reset_index(drop=True), values[inside]
    else:
        rows, values = _of_steps(trained, measure.quantity, start, stop)
    where = tree.where  # pyright: ignore[reportAttributeAccessIssue]
    if where is not None:
        condition = str(where).replace(" = ", " == ").replace("class", "label")
        keep = rows.rename(columns={"class": "label"}).query(condition).index.to_numpy()
        rows, values = rows.iloc[keep], values[keep]
    if "class" in kinds:
        keep = (rows["class"] >= 0).to_numpy()
        rows, values = rows.loc[keep], values[keep]
    values = values[:, parameters["parameter"].to_numpy()]
    if measure.quantity in ("g", "grad"):
        known = np.isin(parameters["parameter"], Gradients(store)[:, :].parameters)
        parameters, values = parameters.loc[known], values[:, known]
    return _folded(measure, rows.reset_index(drop=True), parameters.reset_index(drop=True), values, kinds)


def _parts(tree: Any) -> tuple[Measure, str, tuple[str, ...]]:
    """Measure, selector and members of a statement."""
    if isinstance(tree, Show):
        item: Any = tree.items[0]
        return item.measure, item.selector.text, tree.per
    per = (tree.per,) if isinstance(tree, Top) and tree.per else ()
    return tree.by, tree.selector.text if tree.selector else "all", (*per, tree.what)


def span(store: Store, scope: Scope) -> tuple[int, int]:
    """First step and the one after the last."""
    if scope.kind == "all":
        return 0, store.steps_committed
    if scope.kind == "steps":
        return scope.first, min(store.steps_committed, scope.last + 1)
    epochs = frames.steps(store)["epoch"].to_numpy()
    inside = np.flatnonzero((epochs >= scope.first) & (epochs <= scope.last))
    return int(inside[0]), int(inside[-1]) + 1


def _of_steps(trained: Trained, quantity: str, start: int, stop: int) -> tuple[pd.DataFrame, np.ndarray]:
    store = trained.store
    steps = np.arange(start, stop)
    if quantity == "w":
        steps = np.append(steps, stop) if stop == store.steps_committed else steps
        epochs = frames.steps(store)["epoch"].to_numpy()[np.minimum(steps, stop - 1)]
        return pd.DataFrame({"step": steps, "epoch": epochs}), trained.weights[steps]
    if quantity == "grad":
        steps = steps[np.isin(steps, store.factors.steps)]
        values = trained.grads[steps]
    else:
        values = trained.weights[steps + 1] - trained.weights[steps]
    return pd.DataFrame({"step": steps, "epoch": frames.steps(store)["epoch"].to_numpy()[steps]}), values


def _folded(
    measure: Measure, rows: pd.DataFrame, parameters: pd.DataFrame, values: np.ndarray, kinds: tuple[str, ...]
) -> Table:
    by_row = list(dict.fromkeys(ROW_COLUMN[kind] for kind in kinds if kind in ROW_COLUMN))
    wanted = {"weight": ["parameter"], "unit": ["layer", "unit"], "tensor": ["tensor"], "layer": ["layer"]}
    by_column = list(dict.fromkeys(name for kind in kinds for name in wanted.get(kind, [])))
    row_code, row_labels = _numbered(rows, by_row)
    column_code, column_labels = _numbered(parameters, by_column)
    single = "weight" in kinds
    out = np.full((len(row_labels), len(column_labels)), np.nan)
    limit = measure.condition[1] if measure.condition else 0.0
    for r in range(len(row_labels)):
        part = values[row_code == r]
        if single:
            out[r, column_code] = measure_of(measure, part, limit)  # pyright: ignore[reportArgumentType]
            continue
        for c in range(len(column_labels)):
            out[r, c] = measure_of(measure, part[:, column_code == c].reshape(-1), limit)  # pyright: ignore
    # Sums may cancel: what rounding leaves is relative to the sum of magnitudes.
    big = Measure("norm" if measure.aggregate == "norm" else "sum", "g", magnitude=True)
    scale = float(np.nanmax(np.abs(out), initial=0.0))
    if measure.aggregate in ("sum", "net", "mean"):
        sums = [measure_of(big, values[row_code == r], 0) for r in range(len(out))]
        parts = np.array([np.bincount(column_code, some, len(column_labels)) for some in sums] or [[0.0]])
        if measure.aggregate == "mean" and len(out):
            parts = parts / np.outer(np.bincount(row_code), np.bincount(column_code))
        scale = max(scale, float(parts.max(initial=0)))
    return Table(out, row_labels, column_labels, scale)


def _numbered(frame: pd.DataFrame, names: list[str]) -> tuple[np.ndarray, pd.DataFrame]:
    if not names:
        return np.zeros(len(frame), int), pd.DataFrame(index=range(min(1, len(frame))))
    labels = frame[names].drop_duplicates().sort_values(names).reset_index(drop=True)
    keys = {tuple(row): n for n, row in enumerate(labels.itertuples(index=False, name=None))}
    return np.array([keys[row] for row in frame[names].itertuples(index=False, name=None)], int), labels


# Comparing --------------------------------------------------------------------------------------------------------


def check(
    trained: Trained,
    text: str,
    cells: tuple[pd.DataFrame, np.ndarray] | None = None,
    rtol: float = TIE,
    share_atol: float = 0.0,
) -> pd.DataFrame:
    """Run a statement and compare it with the brute-force answer; returns the frame.

    Args:
        trained: the run.
        text: `top`, `group` or `show` of a measure.
        cells: as for `table_of`.
        rtol: of values, relative to the largest.
        share_atol: of shares and counts, for cells that rounding brings over a threshold.
    """
    frame = execute(text, trained.store)
    tree = parse(text)
    table = table_of(trained, text, cells)
    measure = _parts(tree)[0]
    value = frame.columns[[str(c).startswith(str(measure)) for c in frame.columns]][0]
    found = frame[value].to_numpy(float)
    expected = _looked_up(frame, table)
    atol = share_atol if measure.aggregate in ("share", "count") else rtol * table.scale
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=text)
    if isinstance(tree, Top):
        check_lists(frame, str(value), table, tree, atol, text)
    elif isinstance(tree, Show):
        assert len(frame) == np.count_nonzero(~np.isnan(table.values)), text
    else:
        assert len(frame) == table.values.size, text
        check_bins(frame, str(value), tree.into)
    return frame


def _looked_up(frame: pd.DataFrame, table: Table) -> np.ndarray:
    """The brute-force value of each row of a frame."""
    places = []
    for labels in (table.rows, table.columns):
        names = list(labels.columns)
        keys = {row: n for n, row in enumerate(labels.itertuples(index=False, name=None))}
        asked = frame[names].astype(object).itertuples(index=False, name=None) if names else [()] * len(frame)
        places.append([keys[row] for row in asked] if names else [0] * len(frame))
    return table.values[np.array(places[0], int), np.array(places[1], int)]


def check_lists(frame: pd.DataFrame, value: str, table: Table, tree: Top, atol: float, text: str) -> None:
    """Each list has the largest values, in falling order, each member once, and is as long as it can be."""
    if not table.values.size:
        assert frame.empty, text
        return
    long = pd.concat(
        [
            table.rows.loc[table.rows.index.repeat(len(table.columns))].reset_index(drop=True),
            pd.concat([table.columns] * len(table.rows), ignore_index=True),
        ],
        axis=1,
    ).assign(value=table.values.reshape(-1))
    long = long.loc[~long["value"].isna()]
    own = {"weight": ["parameter"], "unit": ["layer", "unit"], "tensor": ["tensor"], "layer": ["layer"]}
    own |= {kind: [name] for kind, name in ROW_COLUMN.items()}
    keys = own[tree.per] if tree.per else []
    lists = dict(list(frame.groupby(keys))) if keys else {(): frame}
    every = dict(list(long.groupby(keys))) if keys else {(): long}
    for key, there in every.items():
        count = int(np.ceil(tree.count / 100 * len(there))) if tree.percent else int(tree.count)
        got = lists.get(key, frame.iloc[:0])
        values, expected = got[value].to_numpy(float), np.sort(there["value"].to_numpy())[::-1]
        # What is 0 in exact arithmetic may be listed or not.
        values, expected = values[np.abs(values) > atol], expected[np.abs(expected) > atol]
        short = len(got) < min(count, len(there))
        assert len(got) <= count and (not short or len(values) == len(expected)), (text, key)
        np.testing.assert_allclose(values, expected[: len(values)], rtol=TIE, atol=atol, err_msg=f"{text} {key}")
        assert (np.diff(got[value].to_numpy()) <= 0).all(), (text, key)
        assert list(got["rank"]) == list(range(1, len(got) + 1)), (text, key)
        names = [c for c in table.rows.columns.append(table.columns.columns) if c not in keys]
        assert not got.duplicated(names).any(), (text, key)
    assert set(lists) <= set(every), text


def check_bins(frame: pd.DataFrame, value: str, into: int) -> None:
    """Groups of equal width of the logarithm between the smallest and the largest magnitude."""
    x = frame[value].to_numpy(float)
    size = np.abs(x)
    usual = np.isfinite(size) & (size > 0)
    assert (frame["group"][x == 0] == 0).all() and (frame["group"][~np.isfinite(x)] == -1).all()
    if not usual.any():
        return
    ends = np.geomspace(size[usual].min(), size[usual].max(), into + 1)
    for row in np.flatnonzero(usual):
        group, low, high = frame.loc[row, ["group", "low", "high"]]
        number = abs(int(group))
        assert 1 <= number <= into and np.sign(group) == np.sign(x[row])
        np.testing.assert_allclose([low, high], ends[[number - 1, number]])
        assert low <= size[row] < high or (number == into and size[row] <= high * (1 + 1e-12))
