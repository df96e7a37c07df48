"""Small real problems that several tests share; `data` is deterministic, models are seeded."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

SIZE = 120


def data(size: int = SIZE, inputs: int = 12, classes: int = 4) -> TensorDataset:
    """Distinct rows, so that a batch tells which samples it holds; labels from a hidden linear rule."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(size, inputs, generator=generator)
    y = (x @ torch.rand(inputs, classes, generator=generator)).argmax(1)
    return TensorDataset(x, y)


def mlp(*widths: int, dropout: float = 0.0, batch_norm: bool = False, seed: int = 0) -> nn.Sequential:
    """An MLP of the given widths; names are those of nn.Sequential: 0.weight, 2.weight, ..."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths[:-1]):
        layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if batch_norm else []), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


def flat(model: nn.Module) -> torch.Tensor:
    """A copy of all parameters as one vector."""
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def train(rec: Any, model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Any, loader: Any, epochs: int) -> list:
    """An ordinary loop; returns what it saw: (weights before the step, inputs, targets, loss)."""
    seen = []
    for _ in range(epochs):
        for x, y in rec.watch(loader):
            before = flat(model)
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            seen.append((before, x, y, loss.detach().clone()))
    return seen
