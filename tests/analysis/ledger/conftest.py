"""Runs for the ledger: recorded once, copied for each test that writes to them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import nbdyn
from nbdyn.settings import options
from tests import problems

DATA = problems.data(60)


def record(path: Path, seed: int, lr: float = 0.3, lca: bool = False, epochs: int = 2, mode: str = "new") -> None:
    """A run of epochs of three steps each, without single samples."""
    model = problems.mlp(12, 5, 4, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loss_fn = nn.CrossEntropyLoss()
    loader = DataLoader(DATA, 20, shuffle=True, generator=torch.Generator().manual_seed(seed))
    extra = {"lca": DATA} if lca else {}
    with nbdyn.record(path, model, optimizer, loss_fn, per_sample=False, weights="every", mode=mode, **extra) as rec:
        for _ in range(epochs):
            for x, y in rec.watch(loader):
                optimizer.zero_grad()
                loss_fn(model(x), y).backward()
                optimizer.step()


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "quiet", True)


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs a-0 ... a-5 of seeds 0 ... 5, b-0 ... b-3 of seeds 3 ... 0, and two with an allocation: lca-0, lca-1."""
    path, before = tmp_path_factory.mktemp("recorded"), options.quiet
    options.quiet = True
    for number in range(6):
        record(path / f"a-{number}", number)
    for number in range(4):
        record(path / f"b-{number}", 3 - number, lr=0.2)
    for number in range(2):
        record(path / f"lca-{number}", 20 + number, lca=True)
    options.quiet = before
    return path


Give = Callable[..., Path]


@pytest.fixture
def give(recorded: Path, tmp_path: Path) -> Iterator[Give]:
    """Copies some of the runs into one folder of this test; `"a-0>c"` under another name."""

    def copy(*names: str) -> Path:
        folder = tmp_path / "runs"
        folder.mkdir(exist_ok=True)
        for name in names:
            source, _, target = name.partition(">")
            shutil.copytree(recorded / source, folder / (target or source))
        return folder

    yield copy
