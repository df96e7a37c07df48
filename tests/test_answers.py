"""Each kind of answer gets the picture that fits it, with the values of the frame in it; what has none is said."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

import nbdyn
import nbdyn.accessor  # registers df.dyn
from nbdyn.errors import NbdynError
from nbdyn.plots.grids import reduce_blocks
from nbdyn.plots.labels import places


def answer(query: str, **columns: Any) -> pd.DataFrame:
    """A frame as the language gives it."""
    frame = pd.DataFrame(columns)
    frame.attrs["nbdyn"] = {"run": "fc", "query": query, "what": query.split()[0], "steps": "0..9"}
    return frame


def drawn(chart: Any, *needed: str) -> list[dict[str, Any]]:
    """The rows of the tables in a chart that have these columns."""
    tables = chart.to_dict()["datasets"].values()
    return [row for table in tables for row in table if set(needed) <= set(row)]


def marks(chart: Any) -> set[str]:
    """The kinds of marks anywhere in a chart."""
    found: set[str] = set()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "mark" in node:
                found.add(node["mark"]["type"] if isinstance(node["mark"], dict) else node["mark"])
            for child in node.values():
                walk(child)
        elif isinstance(node, list):
            for child in node:
                walk(child)

    walk({name: part for name, part in chart.to_dict().items() if name != "datasets"})
    return found


def texts(chart: Any) -> str:
    return str(chart.to_dict().get("title"))


def labels(n: int, columns: int) -> list[str]:
    return [f"fc.weight[{i // columns},{i % columns}]" for i in range(n)]


def test_one_list_is_bars_in_order_of_rank():
    frame = answer("top 3 samples by sum |g|", rank=[1, 2, 3], sample=[9, 4, 7], **{"sum |g|": [3.0, 2.0, 1.0]})
    chart = frame.dyn.plot()
    rows = drawn(chart, "name", "value")
    assert [(row["name"], row["value"]) for row in rows] == [("sample 9", 3.0), ("sample 4", 2.0), ("sample 7", 1.0)]
    assert "bar" in marks(chart) and "top 3 samples by sum |g|" in texts(chart)
    assert chart._repr_mimebundle_()[0]["image/png"].startswith(b"\x89PNG")


def test_a_long_list_is_a_curve_that_keeps_its_ends():
    values = np.geomspace(1e3, 1e-3, 7000)
    frame = answer("top 7000 samples by g", rank=np.arange(1, 7001), sample=np.arange(7000), value=values)
    rows = drawn(frame.dyn.plot(), "low", "high")
    assert len(rows) <= 5000 and max(r["high"] for r in rows) == values[0] and min(r["low"] for r in rows) == values[-1]


def test_few_lists_are_panels_of_bars():
    frame = answer("top 2 classes per layer by norm g", layer=["a", "a", "b", "b"], rank=[1, 2] * 2,
                   **{"class": [8, 1, 8, 3], "norm g": [4.0, 3.0, 2.0, 1.0]})  # fmt: skip
    chart = frame.dyn.plot()
    assert [panel["title"]["text"] for panel in chart.to_dict()["concat"]] == ["a", "b"]
    assert {(row["name"], row["value"]) for row in drawn(chart, "name", "value")} == {
        ("class 8", 4.0), ("class 1", 3.0), ("class 8", 2.0), ("class 3", 1.0)
    }  # fmt: skip


def test_many_lists_are_a_heat_map_of_the_largest():
    unit = np.repeat(np.arange(100), 2)
    value = np.where(np.arange(200) % 2, 0.5, 1.0) * (unit + 1)
    frame = answer("top 2 samples per unit by sum |g|", layer="fc", unit=unit, rank=np.tile([1, 2], 100),
                   sample=np.arange(200), **{"sum |g|": value})  # fmt: skip
    chart = frame.dyn.plot()
    rows = drawn(chart, "row", "column", "value")
    assert {row["row"] for row in rows} == {f"fc[{i}]" for i in range(40, 100)}
    assert next(r for r in rows if r["row"] == "fc[70]" and r["column"] == 2)["text"] == "sample 141"
    assert "the 60 of 100 lists" in texts(chart)


def test_a_list_of_each_weight_is_a_map_of_the_first_values_and_a_count():
    n = 12
    frame = answer("top 2 samples per weight by sum |g|", parameter=np.repeat(np.arange(n), 2),
                   weight=pd.Categorical(np.repeat(labels(n, 4), 2)), rank=np.tile([1, 2], n),
                   sample=[5, 6] * 11 + [5, 9], **{"sum |g|": np.arange(2.0 * n)})  # fmt: skip
    chart = frame.dyn.plot()
    cells = {(row["row"], row["column"]): row["value"] for row in drawn(chart, "row", "column", "value")}
    assert cells == {(i // 4, i % 4): 2.0 * i for i in range(n)}
    counts = {row["name"]: row["value"] for row in drawn(chart, "name", "value")}
    assert counts == {"sample 5": 12, "sample 6": 11, "sample 9": 1}


def test_a_large_map_keeps_the_largest_of_each_block():
    high, wide = 500, 700
    values = np.random.default_rng(0).normal(size=high * wide)
    frame = answer("show sum g per weight", parameter=np.arange(values.size), weight=labels(values.size, wide),
                   **{"sum g": values})  # fmt: skip
    chart = frame.dyn.plot()
    rows = drawn(chart, "row", "column", "value")
    assert len(rows) <= 5000
    down, across = (int(word) for word in texts(chart).split("largest of each ")[1].split(" weights")[0].split(" x "))
    grid = values.reshape(high, wide)
    for row in rows[::97]:
        block = grid[row["row"] : row["row"] + down, row["column"] : row["column"] + across]
        assert row["value"] == block.flat[np.abs(block).argmax()]


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (71, 71), (3, 160), (5000, 5000)])
def test_blocks_are_few_and_cover_all(shape: tuple[int, int]):
    rng = np.random.default_rng(1)
    n = min(shape[0] * shape[1], 30_000)
    table = pd.DataFrame({"row": rng.integers(0, shape[0], n), "column": rng.integers(0, shape[1], n), "value": 1.0})
    table = pd.concat([table, pd.DataFrame({"row": [shape[0] - 1], "column": [shape[1] - 1], "value": [-9.0]})])
    small, (down, across) = reduce_blocks(table.drop_duplicates(["row", "column"], keep="last"))
    assert len(small) <= 5000 and small["value"].min() == -9.0
    assert -(-shape[0] // down) <= 160 and -(-shape[1] // across) <= 160


def test_places_of_weights():
    names = pd.Series(["a.weight[1,2]", "c.weight[0,1,2,2]", "c.weight[3,0,0,1]", "scale", "a.bias[7]"], index=[4] * 5)
    found = places(names)
    assert found["tensor"].tolist() == ["a.weight", "c.weight", "c.weight", "scale", "a.bias"]
    assert found["row"].tolist() == [1, 0, 3, 0, 7]
    # the other indices of c.weight reach (1, 2, 2): (1, 2, 2) is number 1 * 9 + 2 * 3 + 2
    assert found["column"].tolist() == [2, 17, 1, 0, 0]
    assert found.index.tolist() == [4] * 5


def test_groups_are_counted_with_zeros_first_and_nan_last():
    frame = answer("group weights by sum g", parameter=range(6), weight=["a.b[0]"] * 4 + ["a.w[0,0]"] * 2,
                   **{"sum g": [0.0, -3.0, 2.0, 2.5, 30.0, np.nan]}, group=[0, -1, 1, 1, 2, -1],
                   low=[0, 2, 2, 2, 20, np.nan], high=[0, 20, 20, 20, 200, np.nan])  # fmt: skip
    # a negative group and the group of NaN have the same number, -1; their bounds differ
    chart = frame[frame["sum g"].ne(-3.0)].dyn.plot()
    totals = {row["name"]: row["count"] for row in drawn(chart, "name", "count") if "of" not in row}
    assert list(totals.items()) == [("0", 1), ("2.00 to 20.0", 2), ("20.0 to 200", 1), ("NaN, Inf", 1)]
    both = frame.dyn.plot()
    assert {r["name"]: r["count"] for r in drawn(both, "name", "count") if "of" not in r}["-2.00 to -20.0"] == 1
    assert {row["of"] for row in drawn(both, "of")} == {"a.b", "a.w"}


def events(n: int, k: int) -> pd.DataFrame:
    before = np.tile(np.arange(k, 0, -1), n)
    return answer("last 3 samples before every loss > 2", event=np.repeat(np.arange(n), k),
                  event_step=np.repeat(10 * np.arange(n) + 9, k), before=before, step=8, position=0, epoch=0,
                  sample=before, **{"class": before % 3 - 1, "loss": before / 2, "correct": before % 2})  # fmt: skip


def test_events_are_strips_with_the_nearest_at_the_right():
    chart = events(2, 3).dyn.plot()
    rows = drawn(chart, "event", "before", "value")
    assert {(r["event"], r["before"]): r["value"] for r in rows} == {
        (f"step {step}", k): k / 2 for step in (9, 19) for k in (1, 2, 3)
    }
    assert chart.to_dict()["layer"][0]["encoding"]["x"]["sort"] == "descending"
    assert {row["before"] for row in rows if row["wrong"]} == {2}
    assert {row["before"]: row["class"] for row in rows} == {1: "0", 2: "1", 3: ""}  # -1 is no class
    assert "the first 40 of 60 events" in texts(events(60, 4).dyn.plot())
    assert len(drawn(events(2, 9000).dyn.plot(), "before")) <= 5000
    # at one step, two weights: two strips
    weights = events(2, 3).assign(event_step=9, weight="a.w[0]")
    assert {row["event"] for row in drawn(weights.dyn.plot(), "before")} == {"0: a.w[0], step 9", "1: a.w[0], step 9"}


def test_values_over_labels():
    cells = answer(
        "show sum |g| of all per class, layer",
        layer=["a", "b"] * 2,
        **{"class": [0, 0, 1, 1], "sum |g|": [1.0, 2, 3, 4]},
    )
    chart = cells.dyn.plot()
    assert {(row["row"], row["column"]): row["value"] for row in drawn(chart, "row", "column")} == {
        ("a", "class 0"): 1, ("b", "class 0"): 2, ("a", "class 1"): 3, ("b", "class 1"): 4
    }  # fmt: skip
    epochs = answer(
        "show mean(loss) per epoch, tensor", epoch=[0, 0, 1, 1], tensor=["a", "b"] * 2, value=[1.0, 2, 3, 4]
    )
    lines = drawn(epochs.dyn.plot(), "series", "mean")
    assert {(row["series"], row["x_first"], row["mean"]) for row in lines} == {
        ("a", 0, 1),
        ("b", 0, 2),
        ("a", 1, 3),
        ("b", 1, 4),
    }
    classes = answer(
        "show mean(loss), count per class", **{"class": [0, 1], "mean(loss)": [0.5, 0.25], "count": [3, 4]}
    )
    assert [row["value"] for row in drawn(classes.dyn.plot(), "name")] == [0.5, 0.25, 3, 4]
    samples = answer("show mean(loss) per sample", sample=np.arange(9000), **{"mean(loss)": np.arange(9000.0)})
    assert max(row["high"] for row in drawn(samples.dyn.plot(), "high")) == 8999
    assert "area" in marks(samples.dyn.plot())


def test_two_runs_at_a_step_are_points_with_their_intervals():
    frame = answer("compare a, b by loss, acc at step 5", run=["a", "b"], step=5, loss=[1.0, 2.0], acc=[0.5, 0.75],
                   loss_se=[0.1, 0.5], acc_low=[0.25, 0.5], acc_high=[0.75, 1.0], n=32)  # fmt: skip
    rows = drawn(frame.dyn.plot(), "run", "low")
    assert [(r["low"], r["high"]) for r in rows] == [(0.9, 1.1), (1.5, 2.5), (0.25, 0.75), (0.5, 1.0)]
    over = pd.concat([frame, frame.assign(step=6)])
    over.attrs = frame.attrs
    assert len(over.dyn.plot().vconcat) == 2  # neither n nor the errors have a panel


def test_what_has_no_picture_says_so():
    for frame, words in [
        (answer("explain show loss", array=["steps"], rows=[3]), "no picture of explain: ask the statement after it"),
        (answer("show sum g of all", **{"sum g": [1.0]}), "One number has no picture; `per epoch`"),
        (answer("show g of w[0] at step 7", step=[7], parameter=[0], tensor=["fc"], value=[1.0]), "One number"),
        (answer("top 3 samples by loss", rank=[], sample=[], loss=[]), "the answer has no rows"),
        (answer("show x", **{"class": [0, 1], "layer": ["a", "b"], "sample": [0, 1], "x": [1.0, 2]}),
         r"over 3 labels \(class, layer, sample\); choose one value .*df\[df\['sample'\] == "),
    ]:  # fmt: skip
        with pytest.raises(NbdynError, match=words):
            frame.dyn.plot()
    empty = events(1, 3).iloc[:0]
    empty.attrs["nbdyn"] = empty.attrs["nbdyn"] | {"note": "nearest loss = 1.9 at step 3"}
    with pytest.raises(NbdynError, match=r"\(nearest loss = 1\.9 at step 3\)"):
        empty.dyn.plot()


def test_pictures_of_a_recorded_run(tmp_path):
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), lr=0.5), torch.nn.CrossEntropyLoss()
    data = torch.utils.data.TensorDataset(torch.randn(24, 4), torch.arange(24) % 3)
    loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    with nbdyn.record(str(tmp_path / "run"), model, optimizer, loss_fn, weights="every") as rec:
        for _ in range(6):
            for x, y in rec.watch(loader):
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
    run = nbdyn.open(rec, data=data)
    for statement, mark in [
        ("top 3 samples per weight of 0.* by sum |g| during epoch 1", "rect"),
        ("top 2 classes per layer by sum |g|", "bar"),
        ("top 3 samples per unit by sum |g|", "bar"),
        ("group weights by sum |grad| into 4", "bar"),
        ("last 5 samples before every loss < 1.09", "rect"),
        ("show sum |g| of all per class, layer", "rect"),
        ("show norm grad of all per step", "line"),
        ("show loss", "line"),
    ]:
        chart = run.query(statement).dyn.plot()
        assert mark in marks(chart), statement
        assert chart._repr_mimebundle_()[0]["image/png"]
    firsts = run.query("top 3 samples by sum |g|")
    with pytest.raises(NbdynError, match="no picture; shown are"):  # rows of 4 numbers are no 2 x 2 digits
        run.thumbnails(firsts)
