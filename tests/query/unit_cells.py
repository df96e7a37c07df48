"""Two networks, and what every unit of their layers got and was sent back, by autograd in float64, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from nbdyn.store import Store, frames
from tests.query.brute import Trained, train

VISIT = ["step", "position", "epoch", "sample", "class"]


class Pictures(nn.Module):
    """A convolution with several output channels and groups, and two linear layers, one of dead units."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.fc1, self.fc2 = nn.Linear(8 * 9, 12), nn.Linear(12, 4)
        with torch.no_grad():
            self.fc1.bias[:3] = -50.0

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x)).flatten(1)
        return self.fc2(torch.relu(self.fc1(x)))


class Words(nn.Module):
    """Tokens of sequences; a layer that is called twice, a norm whose factors are not stored."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(20, 12), nn.Linear(12, 12)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(torch.relu(self.mix(self.embed(x))))
        return self.head(self.norm(x).mean(1))


@dataclass
class Case:
    """A run, and what every unit of its layers got and was sent back, by autograd in float64, a sample at a time."""

    trained: Trained
    act: pd.DataFrame
    err: pd.DataFrame

    @property
    def store(self) -> Store:
        return self.trained.store

    def cells(self, quantity: str) -> pd.DataFrame:
        return self.act if quantity == "act" else self.err


def make(path: Path, build: Callable[[], nn.Module], x: Tensor, y: Tensor, layers: tuple[str, ...]) -> Case:
    torch.manual_seed(0)
    loss = nn.CrossEntropyLoss()
    trained = train(path, build(), TensorDataset(x, y), loss, batch=6, epochs=2)
    model = build().double()
    visits = frames.visits(trained.store)
    found: dict[str, list[pd.DataFrame]] = {"act": [], "err": []}
    for visit in visits.itertuples():
        nn.utils.vector_to_parameters(torch.from_numpy(trained.weights[visit.step]), model.parameters())
        sample = x[visit.sample : visit.sample + 1]
        passed = _pass(model, sample.double() if sample.is_floating_point() else sample, y[visit.sample], loss, layers)
        for quantity, layer, call, values in passed:  # (places, units)
            place, unit = np.indices(values.shape).reshape(2, -1)
            labels = {name: visits.loc[visit.Index, name] for name in VISIT}
            found[quantity].append(pd.DataFrame({**labels, "layer": layer, "call": call, "place": place, "unit": unit,
                                                 "value": values.reshape(-1)}))  # fmt: skip
    act, err = (pd.concat(found[quantity], ignore_index=True) for quantity in ("act", "err"))
    return Case(trained, act, err)


def _pass(
    model: nn.Module, x: Tensor, y: Tensor, loss: nn.Module, layers: tuple[str, ...]
) -> list[tuple[str, str, int, np.ndarray]]:
    """Each call of each layer for one sample: its input, and the gradient of the sample's own loss at its output."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls.append((name, inputs[0], output))

        return keep

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in layers]
    value = loss(model(x), y[None])
    gradients = torch.autograd.grad(value, [output for *_, output in calls])
    for handle in handles:
        handle.remove()
    found = []
    for place, ((name, given, _), gradient) in enumerate(zip(calls, gradients, strict=True)):
        call = sum(other == name for other, *_ in calls[place + 1 :])  # backward meets the last one first
        for quantity, tensor in (("act", given), ("err", gradient)):
            found.append((quantity, name, call, _by_unit(tensor[0].detach(), model.get_submodule(name))))
    return found


def _by_unit(tensor: Tensor, layer: nn.Module) -> np.ndarray:
    if isinstance(layer, nn.Conv2d):
        return tensor.flatten(1).T.numpy()
    return tensor.reshape(-1, tensor.shape[-1]).numpy()
