"""Gradients of single samples at fixed weights are autograd's, whatever the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nbdyn.analysis.lca.samples import samples_of
from nbdyn.analysis.noise.probe import Probe
from nbdyn.errors import Incompatible
from tests import networks, problems
from tests.per_sample import DATA, LOSS, Characters, net, own_gradients


def own_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A loss without a form for single samples."""
    return nn.functional.cross_entropy(outputs, targets)


class Tied(nn.Module):
    """An embedding whose table is the last layer's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 5), nn.Linear(5, 9)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.table(x)).mean(1))


def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, 1, 28, 28).double(), torch.randint(0, 10, (count,))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Any, Any]]] = {
    "mlp": lambda: (net(), DATA[:], LOSS),
    "a loss of one's own": lambda: (net(), DATA[:], own_loss),
    "batch norm and dropout": lambda: (net(batch_norm=True, dropout=0.3), DATA[:], nn.CrossEntropyLoss()),
    "convolutions": lambda: (networks.LeNet(), images(37), LOSS),
    "attention": lambda: (networks.ViT(width=8, depth=1, heads=2), images(9), LOSS),
    "group norm": lambda: (networks.ResNet(1, 4, "group", 1), images(9), LOSS),
    "LSTM": lambda: (Characters(65, 8, 8), (torch.randint(0, 65, (20, 9)), torch.randint(0, 65, (20, 9))), LOSS),
    "tied": lambda: (Tied(), (torch.randint(0, 9, (40, 4)), torch.randint(0, 9, (40,))), LOSS),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_autograds(name: str) -> None:
    torch.manual_seed(0)
    model, data, loss_fn = NETWORKS[name]()
    model = model.double().eval()
    found = Probe(model, loss_fn, samples_of(data), [True] * len(list(model.parameters())))
    weights = problems.flat(model)
    chosen = np.random.default_rng(0).permutation(len(weights))[:200]
    found.go_to(weights.numpy(), {})
    values, sums = found.pass_over(chosen, "")
    gradients = own_gradients(model, *data, loss_fn)
    mean = gradients.mean(axis=0)
    assert not found.left_out
    assert np.abs(values - gradients[:, chosen]).max() < 1e-13 * np.abs(gradients).max()
    layers: dict[str, list[np.ndarray]] = {}
    first = 0
    for tensor, p in model.named_parameters():
        layers.setdefault(tensor.rpartition(".")[0], []).append(np.arange(first, first + p.numel()))
        first += p.numel()
    assert sums.layers == tuple(layers)
    for number, parts in enumerate(layers.values()):
        some = gradients[:, np.concatenate(parts)]
        assert np.allclose(sums.squares[:, number], np.square(some).sum(axis=1), rtol=1e-10, atol=1e-25)
        assert np.allclose(sums.along[:, number], some @ mean[np.concatenate(parts)], rtol=1e-9, atol=1e-16)
        assert np.isclose(sums.mean_square[number], np.square(mean[np.concatenate(parts)]).sum())
    some = np.arange(5)
    assert np.allclose(found.gradient(some), gradients[:5].mean(axis=0))


def test_class_weights_and_ignored_targets_count_as_in_the_whole() -> None:
    x, y = DATA[:]
    y = torch.where(torch.arange(len(y)) % 7 == 0, -100, y)
    loss_fn = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0, 4.0]).double())
    model = net()
    found = Probe(model, loss_fn, samples_of((x, y)), [True] * 4)
    found.go_to(problems.flat(model).numpy(), {})
    values, sums = found.pass_over(np.arange(106), "")
    loss_fn(model(x), y).backward()
    whole = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]).numpy()
    assert np.allclose(values.mean(axis=0), whole) and np.isclose(sums.mean_square.sum(), np.square(whole).sum())
    assert not values[::7].any()


def test_batch_norm_without_running_statistics_has_no_samples() -> None:
    model = nn.Sequential(nn.Linear(12, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 4)).double()
    with pytest.raises(Incompatible, match="1 normalizes with the statistics of each batch"):
        Probe(model, LOSS, samples_of(DATA), [True] * 6)


def test_dropout_of_nothing_is_not_mentioned() -> None:
    for module, is_random in ((nn.Identity(), False), (nn.Dropout(0.0), False), (nn.Dropout(0.1), True)):
        model = net()
        model[1].dropout = module
        assert Probe(model, LOSS, samples_of(DATA), [True] * 4).is_random is is_random
