"""The recorder knows which samples every batch held, whatever the loader."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, Subset, random_split

import nbdyn
from nbdyn.errors import Incompatible
from tests import problems


class EveryThird(Sampler[int]):
    """0, 3, 6, ..., 1, 4, ..."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Any:
        return iter([i for start in range(3) for i in range(start, self.size, 3)])

    def __len__(self) -> int:
        return self.size


class Stream(IterableDataset):
    """The rows of the data, in order, without indices."""

    def __iter__(self) -> Any:
        return iter(problems.data())


def _subset() -> Subset:
    half = Subset(problems.data(), list(range(119, 20, -2)))
    return Subset(half, list(range(5, 45)))


LOADERS = {
    "in order": lambda: DataLoader(problems.data(), 20),
    "shuffled": lambda: DataLoader(problems.data(), 20, shuffle=True),
    "generator": lambda: DataLoader(problems.data(), 20, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "ragged": lambda: DataLoader(problems.data(), 32, shuffle=True),
    "drop_last": lambda: DataLoader(problems.data(), 32, shuffle=True, drop_last=True),
    "sampler": lambda: DataLoader(problems.data(), 20, sampler=EveryThird(problems.SIZE)),
    "replacement": lambda: DataLoader(problems.data(), 20, sampler=RandomSampler(problems.data(), replacement=True)),
    "batch_sampler": lambda: DataLoader(
        problems.data(), batch_sampler=BatchSampler(EveryThird(problems.SIZE), 25, drop_last=False)
    ),
    "batches by sampler": lambda: DataLoader(
        problems.data(), sampler=BatchSampler(EveryThird(problems.SIZE), 25, drop_last=False), batch_size=None
    ),
    "two workers": lambda: DataLoader(problems.data(), 20, shuffle=True, num_workers=2),
    "persistent workers": lambda: DataLoader(
        problems.data(), 20, shuffle=True, num_workers=2, persistent_workers=True, prefetch_factor=3
    ),
    "subset": lambda: DataLoader(_subset(), 16, shuffle=True),
    "random_split": lambda: DataLoader(random_split(problems.data(), [70, 50])[1], 16, shuffle=True),
}


def _record(tmp_path: Path, loaders: list[Any], stop_after: int | None = None) -> tuple[nbdyn.Run, list[Any]]:
    model = problems.mlp(12, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_fn = nn.CrossEntropyLoss()
    seen: list[Any] = []
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn) as rec:
        for loader in loaders:
            watched = rec.watch(loader)
            assert len(watched) == len(loader)
            for batch in itertools.islice(watched, stop_after):
                x, y = batch
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()
                seen.append(batch)
    return nbdyn.open(tmp_path / "run"), seen


def _assert_ids_reproduce(run: nbdyn.Run, seen: list[Any]) -> None:
    x, y = problems.data().tensors
    visits = run.visits
    assert len(run) == len(seen)
    for step, (inputs, targets) in enumerate(seen):
        ids = visits[visits["step"] == step]["sample"].to_numpy(copy=True)
        assert torch.equal(x[ids], inputs), step
        assert torch.equal(y[ids], targets), step


@pytest.mark.parametrize("name", LOADERS)
def test_ids_reproduce_every_batch_over_several_epochs(tmp_path: Path, name: str) -> None:
    loader = LOADERS[name]()
    run, seen = _record(tmp_path, [loader] * 3)
    _assert_ids_reproduce(run, seen)
    assert run.steps["epoch"].tolist() == sorted(run.steps["epoch"]) and run.steps["epoch"].max() == 2


@pytest.mark.parametrize("name", ["shuffled", "two workers", "persistent workers"])
def test_an_early_break_leaves_no_trace_in_the_next_pass(tmp_path: Path, name: str) -> None:
    run, seen = _record(tmp_path, [LOADERS[name]()] * 3, stop_after=2)
    _assert_ids_reproduce(run, seen)
    assert run.steps["epoch"].tolist() == [0, 0, 1, 1, 2, 2]


def test_two_loaders_one_after_the_other(tmp_path: Path) -> None:
    run, seen = _record(tmp_path, [LOADERS["subset"](), LOADERS["shuffled"]()])
    _assert_ids_reproduce(run, seen)
    assert len(run.config["sources"]) == 2  # two data sets: the second factory call made another one


def test_batches_pass_through_unchanged(tmp_path: Path) -> None:
    batches = [(torch.rand(4, 12), torch.randint(0, 4, (4,))) for _ in range(3)]
    _, seen = _record(tmp_path, [batches])
    assert all(given is got for given, got in zip(batches, seen, strict=True))


def test_streams_are_counted_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = problems.mlp(12, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_fn = nn.CrossEntropyLoss()
    rec = nbdyn.record(tmp_path / "run", model, optimizer, loss_fn)
    seen = problems.train(rec, model, optimizer, loss_fn, DataLoader(Stream(), 50), epochs=2)
    rec.close()
    _assert_ids_reproduce(nbdyn.open(rec), [(x, y) for _, x, y, _ in seen])
    assert "Stream has no indices; sample ids are positions in its stream" in capsys.readouterr().out


def test_ids_given_by_hand(tmp_path: Path) -> None:
    x, y = problems.data().tensors
    model = problems.mlp(12, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with nbdyn.record(tmp_path / "run", model, optimizer) as rec:
        for epoch in range(2):
            for ids in (torch.tensor([5, 3, 9]), [7, 7], np.array([1])):
                rec.batch(ids=ids, epoch=epoch)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
                optimizer.step()
    run = nbdyn.open(tmp_path / "run")
    assert run.visits["sample"].tolist() == [5, 3, 9, 7, 7, 1] * 2
    assert run.steps["epoch"].tolist() == [0, 0, 0, 1, 1, 1]


def test_a_batch_without_backward_is_no_part_of_the_step(tmp_path: Path) -> None:
    model = problems.mlp(12, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_fn = nn.CrossEntropyLoss()
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn) as rec:
        for number, (x, y) in enumerate(rec.watch(DataLoader(problems.data(), 30))):
            loss = loss_fn(model(x), y)
            if number == 1:
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    visits = nbdyn.open(tmp_path / "run").visits
    assert visits["sample"].tolist() == [*range(30), *range(60, 120)]


def test_accumulated_batches_belong_to_one_step(tmp_path: Path) -> None:
    model = problems.mlp(12, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_fn = nn.CrossEntropyLoss()
    losses = []
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn) as rec:
        for number, (x, y) in enumerate(rec.watch(DataLoader(problems.data(), 30))):
            loss = loss_fn(model(x), y)
            (loss / 2).backward()
            losses.append(loss.item())
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
    run = nbdyn.open(tmp_path / "run")
    assert run.steps["batch_size"].tolist() == [60, 60]
    assert run.visits["position"].tolist() == [*range(60)] * 2
    np.testing.assert_allclose(run.steps["loss"], [np.mean(losses[:2]), np.mean(losses[2:])], rtol=1e-7)
    with pytest.raises(nbdyn.errors.NotRecorded, match="accumulates 2 batches"):
        run.replay(0, 2, model, loss_fn, problems.data())


def test_a_step_that_the_scaler_skips_keeps_its_visits(tmp_path: Path) -> None:
    model = problems.mlp(12, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss_fn = nn.CrossEntropyLoss()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with nbdyn.record(tmp_path / "run", model, optimizer, loss_fn, weights="every") as rec:
        for number, (x, y) in enumerate(rec.watch(DataLoader(problems.data(), 30))):
            optimizer.zero_grad()
            loss = loss_fn(model(x), y) * (float("inf") if number == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    run = nbdyn.open(tmp_path / "run")
    assert run.steps["skipped"].tolist() == [False, True, False, False]
    assert run.visits["sample"].tolist() == list(range(120))
    assert np.array_equal(run.weights["all", 1], run.weights["all", 2])
    assert not np.array_equal(run.weights["all", 0], run.weights["all", 1])


def test_out_of_order_workers_are_refused(tmp_path: Path) -> None:
    loader = DataLoader(problems.data(), 20, num_workers=2, in_order=False)
    with pytest.raises(Incompatible, match=r"in_order=False.*rec\.batch\(ids"):
        _record(tmp_path, [loader])


def test_keys_that_are_no_integers_are_refused(tmp_path: Path) -> None:
    class Named(torch.utils.data.Dataset):
        def __getitem__(self, key: str) -> Any:
            return problems.data()[ord(key)]

        def __len__(self) -> int:
            return 3

    with pytest.raises(Incompatible, match="the sampler yields str keys"):
        _record(tmp_path, [DataLoader(Named(), batch_size=2, sampler=["\x01", "\x02", "\x03"])])
