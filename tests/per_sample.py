"""A small network, its data, a recorded training, and each sample's gradient by a backward pass of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nbdyn
from tests import networks, problems

BATCH = 20
LOSS = nn.CrossEntropyLoss()
DATA = TensorDataset(problems.data()[:][0].double(), problems.data()[:][1])


def net(**options: Any) -> nn.Sequential:
    return problems.mlp(12, 6, 4, **options).double()


def own_gradients(model: nn.Module, x: torch.Tensor, y: torch.Tensor, loss_fn: Any = LOSS) -> np.ndarray:
    """The gradient of each sample's own loss, one backward pass each, (samples, P)."""
    found = []
    for i in range(len(x)):
        model.zero_grad()
        loss_fn(model(x[i : i + 1]), y[i : i + 1]).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        found.append(torch.cat([g.reshape(-1) for g in grads]).numpy())
    return np.array(found)


def at(weights: torch.Tensor, **options: Any) -> nn.Module:
    """The network with some weights."""
    model = net(**options)
    nn.utils.vector_to_parameters(weights, model.parameters())
    return model


class Characters(networks.CharLSTM):
    """With the logits of a sample in one row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).unflatten(0, (len(x), -1)).transpose(1, 2)


def recorded(
    path: Path, model: nn.Module, epochs: int = 1, batch: int = BATCH, **options: Any
) -> tuple[str, list[torch.Tensor], list[Any], list[Any]]:
    """Record epochs of 6 steps; the run, and what the loop saw: weights, gradients and batches."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.2, momentum=0.5)
    loader = DataLoader(DATA, batch, shuffle=True, generator=torch.Generator().manual_seed(1))
    weights, grads, batches = [problems.flat(model)], [], []
    with nbdyn.record(path, model, optimizer, LOSS, **{"snapshot_every": 5, **options}) as rec:
        for _ in range(epochs):
            for x, y in rec.watch(loader):
                optimizer.zero_grad()
                LOSS(model(x), y).backward()
                batches.append((x, y))
                grads.append(torch.cat([p.grad.reshape(-1).clone() for p in model.parameters() if p.grad is not None]))
                optimizer.step()
                weights.append(problems.flat(model))
    return rec.uri, weights, grads, batches
