"""`show g`, `grad`, `act` and `err`, and measures of act and err, against autograd a sample at a time."""

from __future__ import annotations

import operator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import nbdyn
from nbdyn.errors import NotRecorded, QueryError, UnknownName
from nbdyn.query import cell_rows, execute
from nbdyn.query.language import parse
from nbdyn.query.tree import Group, Measure, Show, Top
from nbdyn.store import Store, frames
from nbdyn.store.gradients import Gradients
from tests.query.brute import own_cells, parameter_table, train
from tests.query.unit_cells import VISIT, Case, Pictures, Words, make


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(1)
    x, y = torch.randn(18, 4, 3, 3), torch.randint(4, (18,))
    return make(tmp_path_factory.mktemp("cells") / "pictures", Pictures, x, y, ("conv", "fc1", "fc2"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(2)
    x, y = torch.randint(20, (18, 3)), torch.randint(5, (18,))
    return make(tmp_path_factory.mktemp("cells") / "words", Words, x, y, ("embed", "mix", "head"))


def sorted_like(frame: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    return frame.sort_values(names, kind="stable").reset_index(drop=True)


def assert_same(found: pd.DataFrame, expected: pd.DataFrame, keys: list[str]) -> None:
    """The same rows, whose values agree to rounding in fp32."""
    assert len(found) == len(expected)
    found, expected = sorted_like(found, keys), sorted_like(expected, keys)
    pd.testing.assert_frame_equal(found[keys], expected[keys], check_dtype=False)
    scale = np.abs(expected["value"]).max()
    np.testing.assert_allclose(found["value"], expected["value"], rtol=1e-5, atol=1e-5 * scale)


# The cells themselves -----------------------------------------------------------------------------------------------


def test_g_has_a_row_for_every_cell_other_than_zero(pictures: Case) -> None:
    frame = execute("show g of fc1.weight[:,5] during epoch 1", pictures.store)
    assert list(frame.columns) == [*VISIT, "parameter", "tensor", "value"]
    visits, cells = own_cells(pictures.store, 3, 6)
    parameters = parameter_table(pictures.store)
    first = int(parameters.loc[parameters["tensor"] == "fc1.weight", "parameter"].min())
    row, column = np.nonzero(cells[:, first + 5 + 72 * np.arange(12)])
    expected = visits.iloc[row][VISIT].reset_index(drop=True)
    expected["parameter"] = first + 5 + 72 * column
    expected["value"] = cells[row, expected["parameter"]]
    assert_same(frame, expected, [*VISIT, "parameter"])
    assert set(frame["tensor"]) == {"fc1.weight"}
    assert frame[["step", "position"]].apply(tuple, axis=1).is_monotonic_increasing


@pytest.mark.parametrize("condition", ["sample in (3, 4)", "class = 2 and correct = 0", "value > 0.01", "loss > 1.3",
                                       "not (value < 0) and sample < 9", "sample = 3 and parameter > 350"])  # fmt: skip
def test_where_speaks_of_visits_and_values(pictures: Case, condition: str) -> None:
    whole = execute("show g of fc2", pictures.store)
    found = execute(f"show g of fc2 where {condition}", pictures.store)
    table = whole.merge(frames.visits(pictures.store)[["step", "position", "loss", "correct"]], on=["step", "position"])
    code = condition.replace(" = ", " == ").replace("class", "label")
    expected = table.rename(columns={"class": "label"}).query(code).rename(columns={"label": "class"})
    assert 0 < len(expected) < len(whole)
    pd.testing.assert_frame_equal(found, expected[list(found.columns)].reset_index(drop=True))


def test_contributions_are_told_where_the_scale_is_unknown(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(12, 4, 3, 3), torch.randint(4, (12,))
    trained = train(tmp_path / "run", Pictures(), TensorDataset(x, y), nn.CrossEntropyLoss(), epochs=1)
    model, path = Pictures(), tmp_path / "blind"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with nbdyn.record(path, model, optimizer) as recorder:
        for a, b in recorder.watch(torch.utils.data.DataLoader(TensorDataset(x, y), 6)):
            (nn.functional.cross_entropy(model(a), b) * torch.tensor(3.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
    store = Store(str(path))
    assert "note" not in execute("show g of fc2", trained.store).attrs["nbdyn"]
    if not np.isnan(store.read_steps(0, store.steps_committed, ("scale",))["scale"]).any():
        pytest.skip("the scale was found without a loss function")
    frame = execute("show g of fc2", store)
    assert "contribution" in frame.attrs["nbdyn"]["note"]
    expected = Gradients(store)[:, "fc2"].frame()
    np.testing.assert_array_equal(frame["value"], expected["value"])
    assert "unknown" in execute("show err of fc2", store).attrs["nbdyn"]["note"]
    assert "note" not in execute("show act of fc2", store).attrs["nbdyn"]


def test_grad_has_all_cells_of_p_grad(pictures: Case) -> None:
    frame = execute("show grad of fc*", pictures.store)
    assert list(frame.columns) == ["step", "parameter", "tensor", "value"]
    parameters = parameter_table(pictures.store)
    some = parameters.loc[parameters["layer"].isin(["fc1", "fc2"])]
    expected = pictures.trained.grads[:, some["parameter"]]
    assert list(frame["parameter"]) == list(some["parameter"]) * 6
    assert list(frame["tensor"]) == list(some["tensor"]) * 6
    assert list(frame["step"]) == np.repeat(np.arange(6), len(some)).tolist()
    np.testing.assert_allclose(frame["value"], expected.reshape(-1), atol=5e-6 * np.abs(expected).max())
    late = execute("show grad of fc* where epoch = 1 and value != 0", pictures.store)
    assert len(late) == np.count_nonzero(frame.loc[frame["step"] >= 3, "value"])


def test_act_of_a_convolution_is_its_channels_by_place(pictures: Case) -> None:
    frame = execute("show act of conv at step 2", pictures.store)
    assert list(frame.columns) == [*VISIT, "layer", "place", "unit", "value"]
    expected = pictures.act.query("layer == 'conv' and step == 2")
    assert_same(frame, expected, [*VISIT, "layer", "place", "unit"])


def test_err_of_several_layers_in_the_order_of_the_model(pictures: Case) -> None:
    frame = execute("show err of fc*", pictures.store)
    assert "place" not in frame and list(dict.fromkeys(frame["layer"])) == ["fc1", "fc2"]
    assert_same(frame, pictures.err.query("layer != 'conv'"), [*VISIT, "layer", "unit"])
    some = execute("show err of all where sample = 5 and value > 0", pictures.store)
    assert_same(some, pictures.err.query("sample == 5 and value > 0"), [*VISIT, "layer", "place", "unit"])


def test_calls_and_places_of_sequences(words: Case) -> None:
    frame = execute("show act of mix during epoch 0", words.store)
    assert list(frame.columns) == [*VISIT, "layer", "call", "place", "unit", "value"]
    assert_same(frame, words.act.query("layer == 'mix' and epoch == 0"), [*VISIT, "call", "place", "unit"])
    frame = execute("show err of embed where class = 1", words.store)
    assert_same(
        frame, words.err[(words.err["layer"] == "embed") & (words.err["class"] == 1)], [*VISIT, "place", "unit"]
    )


def test_units_read_for_few_samples_are_the_same_as_from_memory(words: Case) -> None:
    cold = execute("show err of mix where sample = 7", words.store)
    store = words.store
    execute("show sum err of mix", store)  # now in memory
    pd.testing.assert_frame_equal(execute("show err of mix where sample = 7", store), cold)


# Measures of act and err --------------------------------------------------------------------------------------------

COLUMNS = {"sample": ["sample"], "class": ["class"], "batch": ["step"], "step": ["step"], "epoch": ["epoch"],
           "unit": ["layer", "unit"], "layer": ["layer"]}  # fmt: skip


def value_of(measure: Measure, cells: np.ndarray) -> float:
    x = np.abs(cells) if measure.magnitude else cells
    compare = {"=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt,
               ">=": operator.ge}  # fmt: skip
    match measure.aggregate:
        case "norm":
            found = np.sqrt((x**2).sum())
        case "count":
            found = np.count_nonzero(x)
        case "share":
            assert measure.condition is not None
            sign, limit = measure.condition
            found = compare[sign](x, limit).mean()
        case name:
            found = getattr(x, name)()
    return float(abs(found) if measure.absolute else found)


def expected_of(case: Case, text: str) -> tuple[pd.DataFrame, list[str], str]:
    """Every value of a statement, the columns that name its members, and the name of the measure."""
    tree = parse(text)
    match tree:
        case Top(_, _, what, per, selector, Measure() as measure):
            kinds = [*([per] if per else []), what]
        case Group(what, selector, Measure() as measure):
            kinds = [what]
        case Show(items, per):
            measure, selector, kinds = items[0].measure, items[0].selector, list(per)  # pyright: ignore
        case _:
            raise TypeError(text)
    cells = case.cells(measure.quantity)
    if selector is not None and selector.text != "all":
        layers = {"fc*": ["fc1", "fc2"]}.get(selector.text, [selector.text.removesuffix(".*")])
        cells = cells[cells["layer"].isin(layers)]
    if tree.where is not None:
        cells = cells.rename(columns={"class": "label"}).query(
            str(tree.where).replace(" = ", " == ").replace("class", "label")
        )
        cells = cells.rename(columns={"label": "class"})
    if tree.scope.kind == "epochs":
        cells = cells[cells["epoch"].between(tree.scope.first, tree.scope.last)]
    keys = list(dict.fromkeys(name for kind in kinds for name in COLUMNS[kind]))
    if not keys:
        return pd.DataFrame({str(measure): [value_of(measure, cells["value"].to_numpy())]}), keys, str(measure)
    values = cells.groupby(keys)["value"].agg(lambda x: value_of(measure, x.to_numpy()))
    return values.rename(str(measure)).reset_index(), keys, str(measure)


STATEMENTS = [
    "show mean |act| of fc1 per unit, class",
    "show sum err of conv per layer, epoch",
    "show var act of conv",
    "show var |act| of fc* per unit",
    "show norm err of all per class, layer",
    "show |mean act| of conv per unit, sample",
    "show max err of conv per unit during epoch 1",
    "show count act of fc2 per step",
    "show share(act = 0) of fc2 per unit where sample < 9",
    "show share(|err| >= 0.001) of fc* per layer, class",
    "show share(err < 0) of conv per unit",
    "show share(act != 0) of all per layer",
    "group units of fc1 by mean act into 8",
    "group samples of fc* by max |err|",
]


def check_values(case: Case, text: str) -> None:
    """Every value is as expected, and there is a row for each."""
    expected, keys, name = expected_of(case, text)
    found = execute(text, case.store)
    assert len(found) == len(expected)
    both = found.merge(expected, on=keys, validate="1:1") if keys else found.merge(expected, how="cross")
    assert len(both) == len(expected)
    scale = np.abs(expected[name]).max()
    np.testing.assert_allclose(both[f"{name}_x"], both[f"{name}_y"], rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("text", STATEMENTS)
def test_measures_of_units(pictures: Case, text: str) -> None:
    check_values(pictures, text)


PLACES = [
    "show mean act of mix per unit",
    "show var err of all per layer",
    "show mean |err| of embed",
    "show share(act > 0) of mix per class",
    "show sum |err| of mix per sample, unit",
]


@pytest.mark.parametrize("text", PLACES)
def test_places_and_calls_are_cells_of_their_own(words: Case, text: str) -> None:
    check_values(words, text)


@pytest.mark.parametrize(
    "text",
    [
        "top 10 units of fc2.* by share(act = 0)",
        "top 5 samples of fc2 by norm err",
        "top 20% units of fc1 by mean |act|",
        "top 3 samples per unit of fc* by max |err|",
        "top 2 units per class of fc1 by var act during epoch 0",
        "top 2 classes per layer by sum |err|",
        "top 4 units per layer by norm err",
        "top 3 batches of conv by mean err",
    ],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_rankings_of_units(pictures: Case, text: str, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not at_once:
        monkeypatch.setattr("nbdyn.query.ranked.UNITS_AT_ONCE", 0)
        monkeypatch.setattr("nbdyn.query.reduce.ranking.MATRIX_CELLS", 100)
    expected, keys, name = expected_of(pictures, text)
    tree = parse(text)
    assert isinstance(tree, Top)
    found = execute(text, pictures.store)
    lists = COLUMNS[tree.per] if tree.per else []
    for key, there in expected.groupby(lists) if lists else [((), expected)]:
        values = np.sort(there.loc[there[name] != 0, name])[::-1]
        count = int(np.ceil(tree.count / 100 * len(there))) if tree.percent else int(tree.count)
        got = found
        for column, value in zip(lists, key, strict=True):
            got = got[got[column] == value]
        assert list(got["rank"]) == list(range(1, min(count, len(values)) + 1))
        np.testing.assert_allclose(got[name], values[:count], rtol=1e-5, atol=1e-6 * np.abs(values).max(initial=0))
    both = found.merge(expected, on=keys, validate="1:1")
    np.testing.assert_allclose(both[f"{name}_x"], both[f"{name}_y"], rtol=1e-5, atol=1e-6 * expected[name].abs().max())


# Events, errors, and what is said ------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["max |err|", "mean act", "share(act > 0.5)"])
def test_events_of_units(pictures: Case, measure: str) -> None:
    expected, _, name = expected_of(pictures, f"show {measure} of fc2 per step")
    limit = float(np.median(expected[name]) * 1.0001)
    over = expected[name].to_numpy() > limit
    rising = np.flatnonzero(over & ~np.append(False, over[:-1]))
    frame = execute(f"last 4 samples before every {measure} of fc2 > {limit}", pictures.store)
    assert list(dict.fromkeys(frame["event_step"])) == [step for step in rising if step > 0]
    assert (frame.groupby("event_step").size() == 4).all()


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("show act of fc1.weight[3,5]", QueryError, "act is of the units of whole layers, not of single weights"),
        ("show act of fc7", UnknownName, 'no parameter tensor "fc7"'),
        ("show g of fc1, loss", QueryError, "cells come as a frame of their own"),
        ("show err of fc1 where unti = 3", QueryError, 'did you mean "unit"?'),
        ("show mean act of fc1 per tensor", QueryError, "act has one value a unit of a layer, not a tensor"),
        ("top 3 weights by mean act", QueryError, "act has one value a unit of a layer, not a weight"),
        ("show mean act of fc1 per token", QueryError, "tokens are of g"),
        ("show share(|err| > explode) of fc1", QueryError, "explode is a threshold of gradients"),
    ],
)
def test_errors_say_what_to_type(pictures: Case, text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("(", "\\(").replace("?", "\\?")):
        execute(text, pictures.store)


def test_layers_without_factors(words: Case) -> None:
    with pytest.raises(NotRecorded, match="embed: its input is token ids"):
        execute("show act of embed", words.store)
    with pytest.raises(NotRecorded, match="norm: samples' gradients are stored instead of factors"):
        execute("show mean err of norm", words.store)
    frame = execute("show act of all at step 0", words.store)
    assert set(frame["layer"]) == {"mix", "head"}
    assert "without embed: its input is token ids" in frame.attrs["nbdyn"]["note"]


def test_too_many_rows_are_refused(pictures: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cell_rows, "MAX_ROWS", 100)
    for text in ("show grad of fc1", "show act of conv", "show g of fc1", "show err of fc1 where value != 7"):
        with pytest.raises(QueryError, match="at most 100; name fewer parameters"):
            execute(text, pictures.store)
    assert len(execute("show err of fc2 at step 0", pictures.store)) == 24
    monkeypatch.undo()
    assert execute("show g of fc1 where sample = 99", pictures.store).columns.tolist()[-1] == "value"


@pytest.mark.parametrize("text", ["show g of fc1", "show grad of fc1", "show act of conv", "show err of fc1",
                                  "show mean act of fc1 per unit"])  # fmt: skip
def test_explain_names_arrays_and_columns(pictures: Case, text: str) -> None:
    frame = execute(f"explain {text}", pictures.store)
    layer = "conv" if "conv" in text else "fc1"
    assert list(frame["array"]) == (["visits"] if "grad" not in text else []) + [f"factors of {layer}"]
    assert (frame["bytes"] > 0).all() and (frame["seconds"] > 0).all()
    columns = frame.attrs["nbdyn"]["note"].split("result columns: ")[1].split(", ")
    assert columns == list(execute(text, pictures.store).columns)
