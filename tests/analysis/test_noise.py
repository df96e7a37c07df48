"""Noise of recorded runs: every kind of sample against autograd, what is said of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

import nbdyn
from nbdyn.analysis.noise import gather
from nbdyn.analysis.noise import result as results
from nbdyn.analysis.noise import words as said
from nbdyn.analysis.noise.kinds import KINDS, kind_of
from nbdyn.analysis.noise.result import Noise
from nbdyn.analysis.noise.sampled import Sample
from nbdyn.errors import Incompatible, NbdynError, NotRecorded, UnknownName
from nbdyn.store.gradients import Gradients
from tests import problems
from tests.per_sample import BATCH, DATA, LOSS, Characters, at, net, own_gradients, recorded

STEPS = 12
LAYERS = {"0": slice(0, 78), "2": slice(78, 106)}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return recorded(tmp_path_factory.mktemp("noise") / "run", net(), 2)


@pytest.fixture
def run(seen: Any) -> nbdyn.Run:
    return nbdyn.open(seen[0], model=net(), data=DATA)


# The kinds ------------------------------------------------------------------------------------------------------


def test_samples_at_recorded_and_rebuilt_weights(run: nbdyn.Run, seen: Any) -> None:
    _, weights, _, _ = seen
    noise = run.noise(steps=[0, 7, -1], coordinates=30, progress=False)
    assert noise.steps == [0, 7, STEPS] and noise.layers == ["0", "2"]
    for sample in noise.samples:
        gradients = own_gradients(at(weights[sample.step]), *DATA[:])
        assert sample.values.shape == (120, min(30, sample.size)) and len(sample.parameters) == sample.values.shape[1]
        assert np.abs(sample.values - gradients[:, sample.parameters]).max() < 1e-9
    frame = noise.frame()
    assert len(frame) == 3 * (30 + 28) and frame["n"].eq(120).all()
    row = frame.query("step == 7 and layer == '0'").iloc[4]
    column = own_gradients(at(weights[7]), *DATA[:])[:, int(row["parameter"])]
    assert np.isclose(row["mean"], column.mean()) and np.isclose(row["std"], column.std(ddof=1))
    assert np.isclose(row["kurtosis"], stats.kurtosis(column)) and np.isclose(row["zeros"], (column == 0).mean())
    assert row["index"].startswith("0.") and "single samples" in frame.attrs["nbdyn"]["sampled"]
    assert "noise of samples" in run.notes["text"].iloc[-1] and run.notes["kind"].iloc[-1] == "statement"


def test_the_noise_scale_is_that_of_the_gradients(run: nbdyn.Run, seen: Any) -> None:
    gradients = own_gradients(at(seen[1][5]), *DATA[:])
    noise = run.noise(steps=5, coordinates=5, progress=False)
    frame, sentences = noise.scale().set_index("layer"), noise.verdict()
    for i, (layer, columns) in enumerate({**LAYERS, "all": slice(None)}.items()):
        some = gradients[:, columns]
        trace = float(np.trace(np.cov(some.T)))
        signal = float(np.square(some.mean(0)).sum()) - trace / len(some)
        assert np.isclose(frame.loc[layer, "trace"], trace) and np.isclose(frame.loc[layer, "signal"], signal)
        if frame.loc[layer, "resolved"]:
            assert np.isclose(frame.loc[layer, "scale"], trace / signal)
        if layer != "all":
            said = "samples (" if frame.loc[layer, "resolved"] else "not resolved"
            assert "noise scale" in sentences[i] and said in sentences[i]


def test_norms_are_those_of_single_gradients(run: nbdyn.Run, seen: Any) -> None:
    gradients = own_gradients(at(seen[1][5]), *DATA[:])
    frame = run.noise(steps=5, coordinates=5, progress=False).norms()
    for layer, columns in {**LAYERS, "all": slice(None)}.items():
        rows = frame[frame["layer"] == layer]
        assert list(rows["row"]) == list(range(len(DATA)))
        np.testing.assert_allclose(rows["norm"], np.linalg.norm(gradients[:, columns], axis=1), rtol=1e-9)


def test_the_recorded_batch(run: nbdyn.Run, seen: Any) -> None:
    _, weights, _, batches = seen
    noise = run.noise(sampled="batch", steps=[3, 11], coordinates=40)
    for sample in noise.samples:
        gradients = own_gradients(at(weights[sample.step]), *batches[sample.step])
        assert np.abs(sample.values - gradients[:, sample.parameters]).max() < 1e-12
    row = noise.scale().query("layer == 'all' and step == 11").iloc[0]
    gradients = own_gradients(at(weights[11]), *batches[11])
    assert np.isclose(row["trace"], np.trace(np.cov(gradients.T))) and row["n"] == BATCH
    assert "one recorded batch" in noise.sampled and "20 samples" in noise.sampled
    assert nbdyn.open(run.uri).noise(sampled="batch").steps == [0, STEPS - 1]  # needs neither model nor data


def test_batches_captured_in_parts(tmp_path: Path) -> None:
    """Two batches a step and sequences of several lengths: the samples of all of them."""
    model = Characters(65, 4, 4).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(0)
    data = [(torch.randint(0, 65, (6, length)), torch.randint(0, 65, (6, length))) for length in (5, 8)]
    loss_fn, before = nn.CrossEntropyLoss(), problems.flat(model)
    twin = Characters(65, 4, 4).double()
    nn.utils.vector_to_parameters(before, twin.parameters())
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn) as rec:
        optimizer.zero_grad()
        for x, y in rec.watch(data):
            (loss_fn(model(x), y) / 2).backward()
        optimizer.step()
    noise = nbdyn.open(rec.uri).noise(sampled="batch", steps=0, coordinates=1_000)
    gradients = np.concatenate([own_gradients(twin, x, y, loss_fn) for x, y in data])
    for sample in noise.samples:
        expected = gradients[:, sample.parameters]
        assert np.abs(sample.values - expected).max() < 1e-6 * np.abs(expected).max()
    row = noise.scale().query("layer == 'all'").iloc[0]
    assert np.isclose(row["trace"], np.trace(np.cov(gradients.T)), rtol=1e-5)


def test_mini_batches_are_means_of_a_partition(run: nbdyn.Run, seen: Any) -> None:
    noise = run.noise(sampled="mini-batches", batch=7, steps=0, coordinates=10, progress=False)
    gradients = own_gradients(at(seen[1][0]), *DATA[:])
    order = np.random.default_rng(0).permutation(120)
    for sample in noise.samples:
        expected = gradients[order[:119]][:, sample.parameters].reshape(17, 7, -1).mean(axis=1)
        assert np.allclose(sample.values, expected)
    assert "mini-batches of 7 samples" in noise.sampled and "17 mini-batches" in noise.sampled


def test_steps_iterates_and_coordinates(run: nbdyn.Run, seen: Any) -> None:
    _, weights, grads, _ = seen
    steps = run.noise(sampled="steps", steps=(2, 9), coordinates=9)
    iterates = run.noise(sampled="iterates", steps=(2, 9), coordinates=9)
    for sample in steps.samples:
        assert np.allclose(sample.values, torch.stack(grads).numpy()[2:9, sample.parameters])
    for sample in iterates.samples:
        assert np.allclose(sample.values, torch.stack(weights).numpy()[2:9, sample.parameters])
    assert "2..8" in steps.sampled and any("scales mix" in text for text in steps.warnings)
    assert any("were rebuilt" in text for text in iterates.warnings)
    coordinates = run.noise(sampled="coordinates", steps=3)
    assert [s.layer for s in coordinates.samples] == ["0", "2"]
    for sample, columns in zip(coordinates.samples, LAYERS.values(), strict=True):
        assert np.allclose(sample.values[:, 0], grads[3].numpy()[columns])
    frame = coordinates.frame()
    assert len(frame) == 2 and frame["n"].tolist() == [78, 28] and frame["parameter"].eq(-1).all()


def test_what_is_sampled_is_named_everywhere(run: nbdyn.Run) -> None:
    words = set()
    for name, kind in KINDS.items():
        options = {"steps": (0, 12)} if kind.in_order else {"steps": 5}
        options |= {"batch": 2} if name == "mini-batches" else {}
        noise = run.noise(sampled=name, coordinates=12, progress=False, **options)
        words.add(noise.sampled)
        if name in ("samples", "coordinates"):  # with a noise scale and without
            title = noise.plot().title.to_dict()
            assert noise.sampled in title["subtitle"][0] and kind.warning in ["", *title["subtitle"]]
        assert noise.sampled in repr(noise) and noise.sampled in noise.methods()
        assert kind.warning in noise.methods() and kind.warning in repr(noise)
        for frame in (noise.frame(), noise.index(), noise.normality()):
            assert frame.attrs["nbdyn"]["sampled"] == noise.sampled
            assert set(frame["layer"]) == {"0", "2"}
    assert len(words) == len(KINDS)


def test_subsets_and_seeds(run: nbdyn.Run, seen: Any) -> None:
    noise, again, other = (run.noise(steps=0, subset=50, coordinates=8, seed=s, progress=False) for s in (3, 3, 4))
    first, some = noise.samples[0], np.sort(np.random.default_rng(3).permutation(120)[:50])
    assert "50 samples of 120" in noise.sampled and np.array_equal(again.samples[0].values, first.values)
    assert np.allclose(first.values, own_gradients(at(seen[1][0]), *DATA[some])[:, first.parameters])
    assert not np.array_equal(other.samples[0].parameters, first.parameters)


def test_recorded_batches_of_several_sizes(tmp_path: Path) -> None:
    uri, *_ = recorded(tmp_path / "run", net(), batch=50)
    noise = nbdyn.open(uri).noise(sampled="batch", steps=[0, 2])
    assert "20 to 50 samples" in noise.sampled
    with pytest.raises(Incompatible, match="20 samples make 20 means of at most 1"):
        noise.index(batch=2)
    assert set(noise.surrogate(draws=19)["n"]) == {20, 50}


def test_the_panel_shows_kurtosis_below_that_of_a_gaussian(run: nbdyn.Run) -> None:
    noise = made(run, "samples", np.random.default_rng(0).uniform(size=(200, 6)))
    chart = json.loads(noise.plot().to_json())
    rows = [row for table in chart["datasets"].values() for row in table if str(row.get("batch")).startswith("step")]
    assert len(rows) == 1 and rows[0]["value"] == pytest.approx(1.8, abs=0.1) and rows[0]["low"] > 0
    assert noise.kurtosis()["median"].iloc[0] == pytest.approx(rows[0]["value"] - 3)


# Notes ----------------------------------------------------------------------------------------------------------


def test_layers_that_couple_samples_are_labelled(tmp_path: Path) -> None:
    uri, *_ = recorded(tmp_path / "run", net(batch_norm=True, dropout=0.2), weights="every")
    run = nbdyn.open(uri, model=net(batch_norm=True, dropout=0.2), data=DATA)
    noise = run.noise(steps=[0, 6], coordinates=10, progress=False)
    assert any("running statistics" in text for text in noise.warnings) and "dropout is off" in repr(noise)
    model = net(batch_norm=True, dropout=0.2)
    run.at(5).load_into(model)
    gradients = own_gradients(model.eval(), *DATA[:])
    at_snapshot = run.noise(steps=5, coordinates=200, progress=False)
    for sample in at_snapshot.samples:
        assert np.abs(sample.values - gradients[:, sample.parameters]).max() < 1e-12
    assert any("coupled" in text for text in run.noise(sampled="batch", steps=0).warnings)
    assert not any("snapshot before" in text for text in at_snapshot.warnings)
    between = run.noise(steps=[0, 3], coordinates=5, progress=False)
    assert any("statistics at 3 are those of the snapshot before" in text for text in between.warnings)


def test_class_weights_are_mentioned(run: nbdyn.Run) -> None:
    loss_fn = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0, 4.0]).double())
    noise = run.noise(loss_fn=loss_fn, steps=0, coordinates=5, progress=False)
    assert any("class weights" in text for text in noise.warnings)
    assert not run.noise(steps=0, coordinates=5, progress=False).warnings


@pytest.mark.parametrize("kind", ["batch", "coordinates", "steps"])
def test_tensors_recorded_by_batch_only_are_named(run: nbdyn.Run, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gradients, "batch_only", {"0.bias": "no reason"})
    assert "0.bias is left out: no reason" in run.noise(sampled=kind).warnings


def test_what_was_not_trained_has_no_noise(tmp_path: Path) -> None:
    model = net()
    model[0].requires_grad_(False)
    uri, *_ = recorded(tmp_path / "run", model)
    run = nbdyn.open(uri, model=net(), data=DATA)
    for noise in (run.noise(steps=0, progress=False), run.noise(sampled="batch", steps=0)):
        assert noise.layers == ["2"] and set(noise.scale()["layer"]) == {"2", "all"}
        norms = noise.norms().pivot(index="row", columns="layer", values="norm")
        assert list(norms) == ["2", "all"] and norms["2"].equals(norms["all"].rename("2"))


def test_a_bias_that_is_not_trained_takes_no_layer_with_it(tmp_path: Path) -> None:
    model = net()
    model[0].bias.requires_grad_(False)
    uri, weights, grads, batches = recorded(tmp_path / "run", model)
    run = nbdyn.open(uri)
    gradients = own_gradients(at(weights[3]), *batches[3])[:, :72]
    row = run.noise(sampled="batch", steps=3).scale().query("layer == '0'").iloc[0]
    assert np.isclose(row["trace"], np.trace(np.cov(gradients.T)))
    found = run.noise(sampled="coordinates", steps=3).samples[0]
    assert found.layer == "0" and np.allclose(found.values[:, 0], grads[3].numpy()[:72])


# Measures through the result ------------------------------------------------------------------------------------


def made(run: nbdyn.Run, kind: str, values: np.ndarray) -> Noise:
    return Noise(kind_of(kind), [Sample(0, 1, "0", values, np.arange(values.shape[1]), 78)], [], run.store, 0)


def test_verdicts_say_what_the_numbers_carry(run: nbdyn.Run) -> None:
    rng = np.random.default_rng(0)
    laws = {
        "a stable law keeps its index": rng.standard_t(3, (12_000, 20)),
        "no change can be told, which a stable law would show, too": stats.levy_stable.rvs(
            1.5, 0, size=(12_000, 20), random_state=rng
        ),
        "both as Gaussian": rng.normal(size=(12_000, 20)),
    }
    for words, values in laws.items():
        noise = made(run, "samples", values)
        n, left = (noise.index((1, 10, 100))[name] for name in ("n", "finite_population"))
        assert words in noise.verdict()[0] and n.tolist() == [12_000, 1_200, 120] and np.allclose(left, 1 - 1 / n)
    assert "that of a stable law (1) is not excluded" in made(run, "samples", laws[list(laws)[1]]).verdict()[0]
    assert "it settles" in made(run, "samples", laws["both as Gaussian"]).verdict()[0]
    alone = made(run, "steps", laws["both as Gaussian"][:500]).verdict()[0]
    assert "does not tell a stable law from another" in alone


def test_a_rise_to_a_batch_before_the_last_is_said() -> None:
    """Of the last batch there are few means, whose interval may hold anything."""
    ends = [("0", 1, 1.5, 1.4, 1.6), ("0", 10, 1.95, 1.9, 2.0), ("0", 600, 1.9, 1.5, 2.0)]
    rows = pd.DataFrame(ends, columns=["layer", "batch", "median", "low", "high"])
    assert "1.95 (1.90..2.00) for 10: it rises" in said._of_index(rows)
    assert "no change can be told" in said._of_index(rows.iloc[[0, 2]])


def test_order_matters_only_in_time(run: nbdyn.Run) -> None:
    """Samples sorted by size: pieces of them are random; the rows of a window stay in their order."""
    values = np.sort(np.random.default_rng(0).normal(size=(2_000, 5)), axis=0)
    exchangeable = made(run, "samples", values).kurtosis((200, 2_000))["median"]
    assert abs(exchangeable.iloc[0]) < 0.3
    assert made(run, "iterates", values).kurtosis((200, 2_000))["median"].iloc[0] < -0.5


def test_dead_coordinates_are_counted_and_left_out(run: nbdyn.Run) -> None:
    values = np.random.default_rng(0).normal(size=(500, 6))
    values[:, [1, 4]] = 0.0
    noise = made(run, "samples", values)
    row = noise.index((1,)).iloc[0]
    assert row["dead"] == 2 and row["coordinates"] == 4 and row["median"] > 1.9
    assert noise.normality((1,))["coordinates"].iloc[0] == 4
    frame = noise.frame()
    assert frame["alpha"].isna().tolist() == [False, True, False, False, True, False]
    assert "2 were zero" in noise.methods()


def test_surrogates_of_a_run(run: nbdyn.Run) -> None:
    noise = run.noise(steps=[0, 5], coordinates=10, progress=False)
    frame = noise.surrogate(batch=4, batches=20, draws=19)
    assert set(frame["statistic"]) == {
        "stable index", "excess kurtosis", "share not normal at 0.01", "block log-moments"
    }  # fmt: skip
    log_moments = frame[frame["statistic"] == "block log-moments"]
    assert log_moments["layer"].tolist() == ["0", "2", "all"] * 2 and (log_moments["n"] == 20).all()
    assert (frame.query("statistic == 'stable index'")["n"] == 30).all() and frame["p"].between(0, 1).all()
    assert any("gradient-noise paper's estimator" in text for text in noise.verdict(frame))
    assert set(run.noise(sampled="batch", steps=0).surrogate(batch=1, draws=19)["layer"]) == {"0", "2"}


# What is refused ------------------------------------------------------------------------------------------------


def test_measures_that_would_mix_are_refused(run: nbdyn.Run) -> None:
    steps = run.noise(sampled="steps")
    with pytest.raises(Incompatible, match="single samples at fixed weights"):
        steps.index(batch=(1, 10))
    with pytest.raises(Incompatible, match="rows at fixed weights"):
        steps.surrogate()
    batches = run.noise(sampled="mini-batches", batch=3, steps=0, progress=False)
    with pytest.raises(Incompatible, match="gradients of single samples"):
        batches.scale()
    with pytest.raises(Incompatible, match="norms are of gradients of single samples, not gradients of mini-batches"):
        batches.norms()
    with pytest.raises(Incompatible, match="means over 3 samples"):
        batches.surrogate(batch=5)
    samples = run.noise(steps=0, coordinates=5, progress=False)
    with pytest.raises(Incompatible, match="at most 6"):
        samples.index(batch=(1, 7))
    for n in ((10,), (121,)):
        with pytest.raises(Incompatible, match=r"20\.\.120"):
            samples.kurtosis(n)
    for options in ({"batch": 0}, {"batch": 121}, {"batch": 2.5}, {"batch": (1, 2)}, {"batches": 0}, {"draws": 18}):
        with pytest.raises(Incompatible, match=r"means of at most|whole numbers|one size|or more"):
            samples.surrogate(**options)
    for ask in (lambda: samples.index(batch=(2.5,)), lambda: samples.index(batch=()), lambda: samples.kurtosis(n=())):
        with pytest.raises(Incompatible, match="as whole numbers"):
            ask()
    with pytest.raises(Incompatible, match="between 0 and 1"):
        samples.normality(level=2.0)
    assert samples.kurtosis(60)["n"].tolist() == [60, 60]


def test_requests_that_cannot_be_met(run: nbdyn.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (UnknownName, 'did you mean "mini-batches"', {"sampled": "minibatches"}),
        (NbdynError, "reads what was recorded", {"sampled": "steps", "data": DATA}),
        (NbdynError, 'is for sampled="mini-batches"', {"batch": 4}),
        (NbdynError, "takes a part of data=", {"sampled": "batch", "subset": 10}),
        (NbdynError, "give 1..60", {"sampled": "mini-batches", "batch": 61}),
        (Incompatible, "batch=2.5", {"sampled": "mini-batches", "batch": 2.5}),
        (Incompatible, "subset=2.5", {"subset": 2.5}),
        (Incompatible, "steps=\\[\\]", {"steps": []}),
        (NbdynError, "at most the 120 samples", {"subset": 121}),
        (NotRecorded, "step 13 is not there", {"steps": [0, 13]}),
        (NotRecorded, "step 12 is not there", {"sampled": "batch", "steps": 12}),
        (NotRecorded, r"3\.\.12 are not there", {"sampled": "iterates", "steps": (3, 13)}),
        (Incompatible, "as whole numbers", {"steps": [0.5]}),
        (Incompatible, "first, last", {"sampled": "steps", "steps": 3}),
        (Incompatible, "coordinates=0", {"coordinates": 0}),
        (Incompatible, "give the recorded model", {"model": problems.mlp(12, 7, 4)}),
        (Incompatible, "not the mean of its samples' losses", {"loss_fn": lambda o, y: LOSS(o, y) ** 2}),
    ]
    for error, words, options in refused:
        with pytest.raises(error, match=words):
            run.noise(**options)
    for missing in (nbdyn.open(run.uri), nbdyn.open(run.uri, model=net())):
        with pytest.raises(NbdynError, match="need data"):
            missing.noise()
    monkeypatch.setattr(gather, "MOST_BYTES", 1_000)
    with pytest.raises(NbdynError, match="give a smaller coordinates="):
        run.noise()
    monkeypatch.undo()
    noise = run.noise(steps=0, progress=False)
    monkeypatch.setattr(results, "MOST_BYTES", 1_000)
    with pytest.raises(Incompatible, match="batches=1 or fewer"):
        noise.surrogate(batch=1)


def test_runs_that_did_not_record_it(tmp_path: Path) -> None:
    sparse, *_ = recorded(tmp_path / "sparse", net(), per_sample=False)
    for name in ("batch", "coordinates", "steps"):
        with pytest.raises(NotRecorded, match="without per-sample gradients"):
            nbdyn.open(sparse).noise(sampled=name)
    assert len(nbdyn.open(sparse, net(), DATA).noise(steps=[0, 3], progress=False).steps) == 2  # trained again
    projected, *_ = recorded(tmp_path / "projected", net(), project=3)
    with pytest.raises(NotRecorded, match="random projections"):
        nbdyn.open(projected).noise(sampled="batch", steps=2)
    part, *_ = recorded(tmp_path / "part", net(), fraction=0.5)
    with pytest.raises(NotRecorded, match="does not make batch gradients"):
        nbdyn.open(part).noise(sampled="steps")
    noise = nbdyn.open(part).noise(sampled="batch", steps=4)
    assert len(noise.samples[0].values) < BATCH and "a share of 0.5" in noise.warnings[0]
