"""Estimates from a sample of steps: the coverage of their intervals, and answers about a recorded run against exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import nbdyn
from nbdyn.errors import QueryError
from nbdyn.query import approximate_plan, execute, explain
from nbdyn.query.sampling import Design, Stratum, design, totals
from nbdyn.store import Store

# The estimator on arrays -------------------------------------------------------------------------------------------

STEPS, REPLICATES, AT_ONCE = 1000, 500, 10
"""Steps of a population, random samples drawn, and how many populations of each kind share a sample."""
TIME = np.arange(STEPS)[:, None]
KINDS: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "noise": lambda g: 10 + g.normal(size=(STEPS, AT_ONCE)),
    "signed": lambda g: g.normal(size=(STEPS, AT_ONCE)),
    "trend": lambda g: (10 * np.exp(-TIME / 200) + 1) * (1 + 0.3 * g.normal(size=(STEPS, AT_ONCE))),
    "slow waves": lambda g: 10 + 0.1 * np.cumsum(g.normal(size=(STEPS, AT_ONCE)), 0) + g.normal(size=(STEPS, AT_ONCE)),
    "skewed and falling": lambda g: np.exp(-TIME / 400) * g.gamma(2, size=(STEPS, AT_ONCE)),
    "lognormal 1": lambda g: np.exp(g.normal(size=(STEPS, AT_ONCE))),
    "lognormal 2": lambda g: np.exp(2 * g.normal(size=(STEPS, AT_ONCE))),
    "pareto 1.5": lambda g: 1 + g.pareto(1.5, size=(STEPS, AT_ONCE)),
    "one step in fifty": lambda g: (g.random((STEPS, AT_ONCE)) < 0.02).astype(float),
}
"""The totals of steps, (steps, AT_ONCE): what training looks like, and heavy tails."""


def sampled(y: np.ndarray, drawn: Design, doublings: int = 0) -> tuple[np.ndarray, np.ndarray, int]:
    """Estimated totals of y (steps, rows), half widths, and the size of the sample."""
    y, strata = np.add.reduceat(y, drawn.starts[:-1], axis=0), []
    for units, read in zip(drawn.strata, drawn.drawn(doublings), strict=True):
        stratum = Stratum.empty(np.array([0]), len(units), y.shape[1])
        for unit in read:
            stratum.add(np.array([0]), y[unit : unit + 1])
        strata.append(stratum)
    total, half = totals(strata, 1)
    return total[0], half[0], drawn.steps(doublings)


@pytest.fixture(scope="module", params=[0, 2], ids=["64 clusters", "256 clusters"])
def coverage(request: pytest.FixtureRequest) -> dict[str, float]:
    """Of each kind the share of the intervals that hold the exact total, over new populations and new samples."""
    generator, hits = np.random.default_rng(1), []
    for seed in range(REPLICATES):
        y = np.hstack([make(generator) for make in KINDS.values()])
        total, half, _ = sampled(y, design(np.zeros(STEPS), seed), request.param)
        hits.append((np.abs(total - y.sum(0)) <= half).reshape(len(KINDS), AT_ONCE))
    return dict(zip(KINDS, np.mean(hits, axis=(0, 2)).tolist(), strict=True)) | {"doublings": request.param}


def test_intervals_hold_the_total_as_often_as_they_say(coverage: dict[str, float]):
    for kind in ("noise", "signed", "trend", "slow waves", "skewed and falling"):
        assert 0.93 <= coverage[kind] <= 0.97, (kind, coverage)


def test_heavy_tails_are_held_less_often_as_the_docs_say(coverage: dict[str, float]):
    print(coverage)
    page = (Path(__file__).parents[2] / "docs" / "query.md").read_text(encoding="utf-8")
    for kind in ("lognormal 1", "lognormal 2", "pareto 1.5", "one step in fifty"):
        row = next(line for line in page.splitlines() if line.startswith(f"| {kind}"))
        said = [float(cell.strip(" %")) / 100 for cell in row.split("|")[-3:-1]]
        assert abs(said[coverage["doublings"] > 0] - coverage[kind]) <= 0.015, (kind, coverage)


def test_stopping_as_soon_as_intervals_are_narrow_costs_little_coverage():
    generator, hits, sizes = np.random.default_rng(2), [], set()
    for seed in range(600):
        y = 1 + 0.3 * generator.normal(size=(2000, 1))
        for doublings in range(4):
            total, half, size = sampled(y, design(np.zeros(2000), seed), doublings)
            if half[0] <= 0.05 * abs(total[0]):
                break
        hits.append(abs(total[0] - y.sum()) <= half[0])
        sizes.add(size)
    assert len(sizes) >= 2, "the sample must sometimes be doubled for this to test anything"
    assert 0.92 <= np.mean(hits) <= 0.97


def test_the_estimator_against_the_textbook():
    y = np.random.default_rng(3).gamma(2, size=(3000, 3)) * np.exp(-np.arange(3000) / 500)[:, None]
    drawn = design(np.zeros(3000), seed=4)
    total, half, _ = sampled(y, drawn)
    y = np.add.reduceat(y, drawn.starts[:-1], axis=0)
    assert set(np.diff(drawn.starts)) == {5}, "clusters of several steps"
    terms = []
    for units, read in zip(drawn.strata, drawn.drawn(0), strict=True):
        terms.append((len(units) * y[read].mean(0), len(units) * (len(units) - len(read)) / len(read) * y[read].var(0, ddof=1), len(read)))  # fmt: skip # noqa: E501
    np.testing.assert_allclose(total, sum(mean for mean, _, _ in terms))
    variance = sum(v for _, v, _ in terms)
    freedom = np.minimum(variance**2 / sum(v**2 / (n + 1) for _, v, n in terms) - 2, sum(n - 1 for _, _, n in terms))
    from scipy import stats

    np.testing.assert_allclose(half, stats.t.ppf(0.975, np.floor(freedom)) * np.sqrt(variance))


def test_estimates_are_unbiased_and_exact_when_all_is_read():
    y = np.random.default_rng(5).gamma(2, size=(100, 1)) * np.exp(-np.arange(100) / 30)[:, None]
    found = [sampled(y, design(np.zeros(100), seed))[0][0] for seed in range(1000)]
    assert abs(np.mean(found) - y.sum()) < 4 * np.std(found) / np.sqrt(1000)
    total, half, size = sampled(y, design(np.zeros(100), 0), doublings=5)
    assert size == 100
    assert half[0] == 0
    np.testing.assert_allclose(total, y.sum(0))


def test_designs_are_blocks_of_steps_nested_when_doubled_and_apart_for_epochs():
    epochs = np.repeat([0, 1, 2], [150, 3, 1400])
    one = design(epochs, seed=1)
    again, other = design(epochs, seed=1), design(epochs, seed=2)
    assert all((a == b).all() for a, b in zip(one.strata, again.strata, strict=True))
    assert any((a != b).any() for a, b in zip(one.strata, other.strata, strict=True))
    assert np.sort(np.concatenate(one.strata)).tolist() == list(range(len(one.starts) - 1))
    assert one.starts[0] == 0
    assert one.starts[-1] == len(epochs)
    assert set(np.diff(one.starts)) <= {2, 3}
    for units in one.strata:
        assert np.ptp(units) == len(units) - 1
        assert np.ptp(epochs[one.starts[units.min()] : one.starts[units.max() + 1]]) == 0
    for first, second in zip(one.drawn(0), one.drawn(1), strict=True):
        assert len(first) >= min(2, len(second))
        assert set(first.tolist()) <= set(second.tolist())
    assert one.steps(20) == len(epochs)


# Recorded runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """600 steps in six epochs, batches of 16."""
    path = tmp_path_factory.mktemp("runs") / "long"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1600, 10, generator=generator)
    data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    loss_fn = nn.CrossEntropyLoss()
    loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True, generator=generator)
    with nbdyn.record(path, model, optimizer, loss_fn, weights="every") as recorder:
        for _ in range(6):
            for inputs, targets in recorder.watch(loader):
                optimizer.zero_grad()
                loss_fn(model(inputs), targets).backward()
                optimizer.step()
    return Store(str(path))


@pytest.fixture(autouse=True)
def clusters_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small runs are read whole sooner than sampled; here they are sampled all the same."""
    monkeypatch.setattr(approximate_plan, "CLUSTER_SECONDS", 0.0)
    monkeypatch.setattr(approximate_plan, "WARM_SECONDS", 0.0)


SPAN = "during steps 5..594"
"""No whole epochs, so that no index answers."""


def both(text: str, store: Store, within: str) -> tuple[pd.DataFrame, pd.DataFrame, str]:
    """The approximate answer beside the exact one of the same rows, the latter as `exact`; and the note."""
    frame = execute(f"{text} {SPAN} approximately within {within}", store)
    wide = text.replace("top 3 ", "top 1000 ")
    exact = execute(f"{wide} {SPAN}", store)
    value = str(frame.columns[frame.columns.get_loc("low") - 1])
    keys = [name for name in exact.columns if name not in (value, "rank")]
    exact = exact[[*keys, value]].rename(columns={value: "exact"})
    joined = frame.merge(exact, on=keys) if keys else pd.concat([frame, exact], axis=1)
    assert len(joined) == len(frame)
    return joined, frame, frame.attrs["nbdyn"].get("note", "")


CASES = {
    "show sum |g| of all per unit": "20%",
    "show mean |g| of all per class, layer": "20%",
    "show norm g of all per tensor": "10%",
    "show norm g of all per epoch": "15%",
    "show count g of all per class, unit": "25%",
    "show share(|g| > 0.05) of all per layer, epoch": "25%",
    "show share(|grad| > 0.02) of all per unit": "20%",
    "show sum |grad| of all per tensor": "10%",
    "show |sum g| of 0.bias": "40%",
    "show mean |g| of 2.weight per weight": "25%",
    "show path dw of all per unit": "15%",
    "show path dw of all per class": "25%",
    "show mean w of 2.* per tensor": "10%",
    "top 3 units of 0.* by sum |g|": "15%",
    "top 3 classes per layer by norm g": "15%",
    "top 3 weights by sum |grad|": "20%",
}


def test_errors_are_as_asked_and_exact_answers_lie_in_most_intervals(store: Store):
    """Rows of one answer share their steps, so that they miss together: they are counted over all answers."""
    inside = []
    for text, within in CASES.items():
        joined, frame, note = both(text, store, within)
        assert note.startswith("approximate: "), (text, note)
        value = joined[frame.columns[frame.columns.get_loc("low") - 1]]
        half, slack = (joined["high"] - joined["low"]) / 2, 1e-5 * joined["exact"].abs()
        assert (half <= float(within.rstrip("%")) / 100 * value.abs() * (1 + 1e-9)).all(), text
        assert (half > 0).any(), text
        assert (np.abs(value - joined["exact"]) <= 2.5 * half + slack).all(), joined
        inside.append((joined["low"] - slack <= joined["exact"]) & (joined["exact"] <= joined["high"] + slack))
    print([(t, i.mean()) for t, i in zip(CASES, inside, strict=True)], pd.concat(inside).mean(), len(pd.concat(inside)))
    assert pd.concat(inside).mean() >= 0.85


def test_the_answer_is_that_of_the_estimator_and_covers_recorded_values(store: Store):
    """Totals of every step, read exactly, go through the same sample; and through 500 others."""
    by_step = execute(f"show sum |g| of all per step, unit {SPAN}", store)
    y = by_step.pivot_table(index="step", columns=["layer", "unit"], values="sum |g|").to_numpy()
    text = f"show sum |g| of all per unit {SPAN} approximately within 20%"
    frame = execute(text, store)
    seed = int(frame.attrs["nbdyn"]["note"].rpartition(" ")[2])
    total, half, size = sampled(y, design(np.zeros(len(y)), seed))
    assert frame.attrs["nbdyn"]["note"].startswith(f"approximate: {size} of 590 steps read")
    np.testing.assert_allclose(frame["sum |g|"], total, rtol=1e-5)
    np.testing.assert_allclose(frame["high"] - frame["low"], 2 * half, rtol=1e-4)
    hits = []
    for number in range(500):
        total, half, _ = sampled(y, design(np.zeros(len(y)), number))
        hits.append(np.abs(total - y.sum(0)) <= half)
    assert 0.93 <= np.mean(hits) <= 0.97


def test_the_same_question_gives_the_same_answer_and_the_note_says_the_seed(store: Store):
    text = f"show sum |g| of all per layer {SPAN} approximately within 20%"
    first, second = execute(text, store), execute(text, store)
    pd.testing.assert_frame_equal(first, second)
    note = first.attrs["nbdyn"]["note"]
    assert " of 590 steps read, 95 % intervals per row; seed " in note
    other = execute(text.replace("20%", "19%"), store)
    assert other.attrs["nbdyn"]["note"].partition("seed")[2] != note.partition("seed")[2]


def test_a_smaller_error_reads_more_steps_until_the_answer_is_exact(store: Store):
    text = f"show sum |g| of all per unit {SPAN}"
    read = []
    for within in ("40%", "8%"):
        note = execute(f"{text} approximately within {within}", store).attrs["nbdyn"]["note"]
        read.append(int(note.split()[1]))
    assert read[0] < read[1]
    exact = execute(text, store)
    found = execute(f"{text} approximately within 0.1%", store)
    assert "exact: all 590 steps read" in found.attrs["nbdyn"]["note"]
    assert list(found.columns) == ["layer", "unit", "sum |g|", "low", "high"]
    pd.testing.assert_frame_equal(found[exact.columns.tolist()], exact)
    assert (found["low"] == exact["sum |g|"]).all()
    assert (found["high"] == exact["sum |g|"]).all()


def test_the_exact_answer_is_given_where_it_is_cheaper(store: Store):
    for text, reason in [
        ("show sum |g| of all per layer during steps 5..30", "fewer than 32 steps"),
        (f"show net dw of all per layer {SPAN}", "of net dw a sample tells little"),
        (f"show sum |g| of all per layer {SPAN} where sample = 3", "fewer than 32 steps"),
    ]:
        frame = execute(f"{text} approximately within 5%", store)
        assert f"exact: {reason}" in frame.attrs["nbdyn"]["note"]
        assert (frame["low"] == frame.iloc[:, 1]).all()
        assert (frame["high"] == frame.iloc[:, 1]).all()


def test_small_runs_are_read_whole_because_that_takes_less(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    text = f"show sum |g| of all per layer {SPAN} approximately within 20%"
    frame = execute(text, store)
    assert "exact: to read all steps takes about" in frame.attrs["nbdyn"]["note"]
    assert (frame["low"] == frame["high"]).all()
    assert "exact: to read all steps" in explain(text, store).attrs["nbdyn"]["note"]


def test_groups_keep_their_bounds_beside_the_intervals(store: Store):
    frame = execute(f"group units by sum |g| into 3 {SPAN} approximately within 20%", store)
    assert list(frame.columns) == ["layer", "unit", "sum |g|", "value_low", "value_high", "group", "low", "high"]
    assert ((frame["low"] <= frame["sum |g|"] * (1 + 1e-12)) & (frame["sum |g|"] <= frame["high"] * (1 + 1e-12))).all()
    assert (frame["value_low"] < frame["value_high"]).all()


def test_lists_say_how_sure_they_are_of_their_members(store: Store):
    text = f"top 3 units of 0.* by sum |g| {SPAN} approximately within 20%"
    frame, wide = execute(text, store), execute(text.replace("top 3", "show").replace(" units", "")
                                                .replace("show of 0.* by sum |g|", "show sum |g| of 0.* per unit"), store)  # fmt: skip # noqa: E501
    assert len(wide) == 6
    assert frame["rank"].tolist() == [1, 2, 3]
    assert frame["sum |g|"].is_monotonic_decreasing
    note = frame.attrs["nbdyn"]["note"]
    assert "ranks and membership are those of the estimates" in note
    assert "3 rows have intervals that reach the next place's" in note or "no row's interval reaches" in note


def test_explain_says_what_the_first_sample_reads(store: Store):
    text = f"show sum |g| of all per layer {SPAN}"
    exact, first = explain(text, store), explain(f"{text} approximately within 5%", store)
    factors = first["array"] != "visits"
    assert first.loc[factors, "how"].str.endswith("first sample: 64 of 590 steps").all()
    np.testing.assert_allclose(first.loc[factors, "bytes"], exact.loc[factors, "bytes"] * 64 / 590, atol=1)
    assert (first.loc[~factors, "bytes"] == exact.loc[~factors, "bytes"]).all()
    whole = execute(f"estimate {text}", store)
    assert execute(f"estimate {text} approximately within 5%", store)["bytes"].item() < whole["bytes"].item()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("top 5 samples by sum |g|", "in which most samples are missing; leave"),
        ("show sum |g| of all per step", "in which most batches are missing"),
        ("top 5 batches by sum |grad|", "in which most batches are missing"),
        ("top 5 units by max |g|", "a sample tells nothing of the largest cell that it missed"),
        ("show var g of all per layer", "var is had exactly"),
    ],
)
def test_what_cannot_be_sampled_is_refused(store: Store, text: str, says: str):
    with pytest.raises(QueryError, match="leave \"approximately within 5%\" out") as caught:  # fmt: skip
        execute(f"{text} approximately within 5%", store)
    assert says in str(caught.value)


def test_members_that_the_sample_did_not_meet_are_not_taken_for_zero(tmp_path: Path):
    """A class that two of 64 batches hold: the sample grows until it is met, or all is read."""
    torch.manual_seed(0)
    x, y = torch.randn(512, 4), torch.zeros(512, dtype=torch.int64)
    y[[100, 400]] = 1
    model, loss_fn = nn.Linear(4, 2), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with nbdyn.record(tmp_path / "rare", model, optimizer, loss_fn) as recorder:
        for inputs, targets in recorder.watch(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8)):
            optimizer.zero_grad()
            loss_fn(model(inputs), targets).backward()
            optimizer.step()
    store = Store(str(tmp_path / "rare"))
    text = "show norm g of all per class during steps 1..63"
    frame = execute(f"{text} approximately within 90%", store)
    pd.testing.assert_frame_equal(frame[["class", "norm g"]], execute(text, store))
    assert "exact: all 63 steps read" in frame.attrs["nbdyn"]["note"]
