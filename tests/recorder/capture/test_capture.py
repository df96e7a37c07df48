"""What per-sample capture is asked for, what it refuses, what it says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import DataLoader

import nbdyn
from nbdyn.errors import Incompatible, NbdynError, NotRecorded, UnknownName
from nbdyn.recorder.arena import CHUNK_BYTES, Arena, joined
from nbdyn.store.direct import PAGE
from nbdyn.store.projection import relative_error
from tests import networks, problems


def trained(path: Path, model: nn.Module | None = None, steps: int = 6, **options: Any) -> tuple[nbdyn.Run, list[dict]]:
    """A recorded training of `steps` batches of 20, and the gradients that its loop saw."""
    torch.manual_seed(0)
    model = model or networks.mlp(12, 16, 4)
    optimizer, loss_fn = torch.optim.SGD(model.parameters(), 0.1), nn.CrossEntropyLoss()
    grads = []
    with nbdyn.record(path, model, optimizer, loss_fn, **options) as rec:
        for _ in range(-(-steps // 6)):
            for x, y in rec.watch(DataLoader(problems.data(), batch_size=20, shuffle=True)):
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
                optimizer.step()
    return nbdyn.open(path), grads


def test_the_batch_gradient_of_linear_layers_is_rebuilt_bit_for_bit(tmp_path: Path) -> None:
    run, grads = trained(tmp_path / "run", steps=12)
    for step, expected in enumerate(grads):
        for name, values in run.gradients.rebuild(step).items():
            np.testing.assert_array_equal(values, expected[name].numpy())


def test_sums_are_compared_with_the_gradient_at_snapshots(tmp_path: Path) -> None:
    run, _ = trained(tmp_path / "run", steps=12, snapshot_every=5)
    found = run.gradients.residuals
    assert found["step"].unique().tolist() == [0, 5, 10]
    assert len(found) == 12 and found["residual"].max() < 1e-6
    assert run.gradients.batch_only == {}


def test_layers_and_every_choose_what_is_captured(tmp_path: Path) -> None:
    run, _ = trained(tmp_path / "run", steps=12, layers=["2"], every=5)
    assert run.gradients.steps.tolist() == [0, 5, 10]
    assert len(run.gradients[5, "2.weight"].frame())
    with pytest.raises(NotRecorded, match=r"0\.weight"):
        run.gradients[5, "0.weight"].frame()
    with pytest.raises(NotRecorded, match="every"):
        run.gradients[6, "2.weight"].frame()


def test_fraction_takes_the_same_samples_at_every_step(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "whole", steps=12)
    part, _ = trained(tmp_path / "part", steps=12, fraction=0.3)
    later = range(1, 12)  # the first step is captured whole, to be compared with p.grad
    seen = [set(part.gradients[step, "2.bias"].dense().visits["sample"]) for step in later]
    batches = [set(whole.gradients[step, "2.bias"].visits["sample"]) for step in later]
    everyone = set().union(*seen)
    assert 15 < len(everyone) < 60
    assert all(chosen == batch & everyone for chosen, batch in zip(seen, batches, strict=True))
    sample = min(seen[3])
    np.testing.assert_array_equal(
        part.gradients[4, "0.weight", sample].dense().values, whole.gradients[4, "0.weight", sample].dense().values
    )


def test_projections_are_unbiased_with_the_error_that_is_stated(tmp_path: Path) -> None:
    errors, sums = [], 0.0
    for number in range(20):
        torch.manual_seed(number)
        model = nn.Sequential()
        model.add_module(f"fc{number}", nn.Linear(12, 16))  # the name seeds the projection
        model.add_module("out", nn.Linear(16, 4))
        exact, _ = trained(tmp_path / f"exact{number}", copy.deepcopy(model))
        run, _ = trained(tmp_path / f"run{number}", model, project=4)
        name = f"fc{number}.weight"
        truth, estimate = (r.gradients[2, name].dense().values.astype(np.float64) for r in (exact, run))
        errors.append(np.square(estimate - truth).sum(1) / np.square(truth).sum(1))
        sums = sums + (estimate * truth).sum() / np.square(truth).sum() / 20
        site = next(s for s in run.store.factors.sites if "project" in s.options and s.name == f"fc{number}")
    assert np.sqrt(np.mean(errors)) == pytest.approx(relative_error(site), rel=0.25)
    assert sums == pytest.approx(1.0, abs=0.25)
    assert "approximate" in str(run.gradients[2, name].frame().attrs["nbdyn"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"fraction": 0.0}, "fraction=0.0"),
        ({"fraction": 2}, "fraction=2"),
        ({"project": 0}, "project=0"),
        ({"layers": 3}, "layers=3"),
        ({"layers": []}, r"layers=\[\]"),
        ({"cells": -1}, "top=-1"),
        ({"cells": 1.5}, "cells=1.5"),
    ],
)
def test_wrong_options_say_what_is_wanted(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(NbdynError, match=message):
        trained(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_unknown_layers_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"0\.weight"):
        trained(tmp_path / "run", layers="0.wieght")
    with pytest.raises(Incompatible, match="part of a tensor"):
        trained(tmp_path / "run", layers="0.weight[1,:]")
    assert not (tmp_path / "run").exists()


def test_a_compiled_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = torch.compile(networks.mlp(12, 4), backend="eager")
    with pytest.raises(Incompatible, match="per_sample=False"):
        trained(tmp_path / "run", model)  # type: ignore[arg-type]


def test_an_epoch_above_the_budget_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(NbdynError, match=r"layers=.*every=.*fraction=.*project=.*per_sample=False") as error:
        trained(tmp_path / "run", budget="10 KB")
    assert "a visit" in str(error.value)
    assert not (tmp_path / "run").exists()
    trained(tmp_path / "run", per_sample=False)


def test_one_line_says_what_a_visit_and_an_epoch_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "run")
    # 12 + 16 numbers of the first layer, 16 + 4 of the second, 4 bytes each
    assert "per-sample gradients: 192 B a visit, 23.0 KB an epoch" in capsys.readouterr().out
    trained(tmp_path / "run", every=2, fraction=0.5, project=4)  # 4 + 4 and 4 + 4 numbers, of half of the samples
    assert "per-sample gradients: 32 B a visit, 1.9 KB an epoch" in capsys.readouterr().out


class Outside(nn.Module):
    """A parameter that only the loop uses, through no module."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.scale = nn.Linear(12, 4), nn.ParameterList([nn.Parameter(torch.ones(4))])

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_parameters_used_outside_modules_are_recorded_by_batch_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model, loss_fn = Outside(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn) as rec:
        for x, y in rec.watch(DataLoader(problems.data(), batch_size=20)):
            optimizer.zero_grad()
            loss_fn(model(x) * model.scale[0], y).backward()
            optimizer.step()
    said = capsys.readouterr().out
    assert said.count("scale.0 is recorded by batch only") == 1
    run = nbdyn.open(rec)
    assert set(run.store.factors.batch_only) == {"scale.0"}
    with pytest.raises(NotRecorded, match="outside the modules"):
        run.gradients[0, "scale.0"].frame()
    assert len(run.gradients[0, "body.weight"].frame())


def test_rows_that_fit_no_sample_make_a_layer_batch_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.body = nn.Linear(3, 4), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + self.positions(torch.ones(7, 3)).mean(0)

    run, _ = trained(tmp_path / "run", Odd())
    assert set(run.store.factors.batch_only) == {"positions.weight", "positions.bias"}
    assert "shape [7, 4] for a batch of 20" in capsys.readouterr().out


def test_a_loader_that_fills_one_buffer_again_and_again_is_recorded_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data, targets = problems.data().tensors
    buffer = torch.empty(20, 12)
    model, loss_fn = networks.mlp(12, 4), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    grads = []
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn) as rec:
        for step in range(5):
            buffer.copy_(data[20 * step : 20 * step + 20])
            rec.batch(ids=range(20 * step, 20 * step + 20))
            optimizer.zero_grad()
            loss_fn(model(buffer), targets[20 * step : 20 * step + 20]).backward()
            grads.append(model[0].weight.grad.clone())
            optimizer.step()
    run = nbdyn.open(rec)
    for step, grad in enumerate(grads):
        np.testing.assert_array_equal(run.gradients.rebuild(step)["0.weight"], grad.numpy())


def test_activations_are_recorded_as_they_were_when_the_gradient_arrived(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, loss_fn = networks.mlp(12, 16, 4), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    kept: list[Tensor] = []
    model[1].register_forward_hook(lambda module, args, output: kept.append(output))
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn) as rec:
        rec.batch(ids=range(20))
        x, y = problems.data()[:20]
        loss_fn(model(x), y).backward()
        with torch.no_grad():
            kept[0].zero_()
        grad = model[2].weight.grad
        assert grad is not None
        expected = grad.numpy().copy()
        optimizer.step()
    np.testing.assert_array_equal(nbdyn.open(tmp_path / "run").gradients.rebuild(0)["2.weight"], expected)


def test_steps_after_a_resume_use_the_same_sites(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, loss_fn = networks.mlp(12, 16, 4), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    grads = []
    for _ in range(2):
        with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn, mode="resume") as rec:
            for x, y in rec.watch(DataLoader(problems.data(), batch_size=20)):
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                grads.append(model[0].weight.grad.clone())
                optimizer.step()
    run = nbdyn.open(rec)
    assert len(run.store.factors.sites) == 2
    assert run.gradients.steps.tolist() == list(range(12))
    np.testing.assert_array_equal(run.gradients.rebuild(10)["0.weight"], grads[10].numpy())


def test_per_sample_false_leaves_no_trace(tmp_path: Path) -> None:
    run, _ = trained(tmp_path / "run", per_sample=False)
    assert {"journal", "factors", "calls", "gradients"}.isdisjoint(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(NotRecorded, match="per_sample"):
        run.gradients[0, "0.weight"].frame()


def test_activations_of_accumulated_batches_do_not_stay_alive(tmp_path: Path) -> None:
    """Only copies wait for the step: memory would else grow with the number of batches that are accumulated."""
    model, loss_fn = networks.mlp(12, 16, 4), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    activations: list[StorageWeakRef] = []
    model[1].register_forward_hook(lambda *found: activations.append(StorageWeakRef(found[2].untyped_storage())))
    grads = []
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn) as rec:
        for number, (x, y) in enumerate(rec.watch(DataLoader(problems.data(), 20))):
            alive = [not activation.expired() for activation in activations]
            assert alive == [False] * number
            loss_fn(model(x), y).backward()
            if number % 3 == 2:
                grads.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]).numpy())
                optimizer.step()
                optimizer.zero_grad()
    run = nbdyn.open(rec)
    assert len(run) == 2 and run.steps["batch_size"].tolist() == [60, 60]
    for step, grad in enumerate(grads):
        np.testing.assert_allclose(run.gradients[step].total().reshape(-1), grad, rtol=1e-5, atol=1e-7)


def test_arena_uses_its_memory_again_but_never_what_a_record_holds() -> None:
    arena = Arena(torch.device("cpu"))
    held, values = [], []
    for number in range(40):  # two tensors of 1.2 MB each; three fit into a chunk, so that some hold two records
        values.append([arena.keep(torch.full((300_000,), float(number + k)), shared=False) for k in range(2)])
        held.append(arena.hold())
        if len(held) > 3:
            for k, t in enumerate(values.pop(0)):
                assert (t == number - 3 + k).all()
            arena.release(held.pop(0))
    chunks = {id(span.chunk) for spans in held for span in spans}
    # At most four records, eight tensors in a row, are held at a time: three to a chunk, they touch four at most.
    assert len(chunks) + len(arena._free) == 4
    big = arena.keep(torch.zeros(CHUNK_BYTES), shared=False)
    assert big.shape == (CHUNK_BYTES,)


def test_records_in_the_arena_lie_in_whole_pages_which_are_joined() -> None:
    arena, expected = Arena(torch.device("cpu")), []
    spans = []
    for number in range(5):
        kept = arena.keep(torch.arange(700.0 + number), shared=False)
        spans += arena.hold()
        expected.append(kept)
    [piece] = joined(spans)
    assert all((span.stop - span.start) % PAGE == 0 == span.start % PAGE for span in spans)
    at = [kept.__array_interface__["data"][0] - piece.__array_interface__["data"][0] for kept in expected]
    assert all(place % PAGE == 0 for place in at)
    assert [piece[place : place + 4 * 700].view(np.float32)[699] for place in at] == [699.0] * 5
    assert not piece[at[0] + 4 * 700 : at[1]].any()  # nothing of what the memory held before


def test_the_arena_copies_and_keeps_what_several_sites_see_once() -> None:
    arena, t = Arena(torch.device("cpu")), torch.ones(5)
    kept = arena.keep(t, shared=True)
    assert arena.keep(t.detach(), shared=True) is kept
    assert arena.keep(t, shared=False) is not kept
    t.add_(1)
    assert (kept == 1).all() and (arena.keep(t, shared=True) == 2).all()
    for forget in (arena.hold, arena.forget_shared):
        again = arena.keep(t, shared=True)
        assert arena.keep(t, shared=True) is again is not kept
        forget()
        assert arena.keep(t, shared=True) is not again
    half = torch.tensor([1.5, -2.0], dtype=torch.bfloat16)
    np.testing.assert_array_equal(arena.keep(half, shared=False), half.view(torch.int16).numpy().view(np.uint16))
    strided = torch.arange(6.0).view(2, 3).t()
    np.testing.assert_array_equal(arena.keep(strided, shared=False), strided.numpy())
