"""Whole networks under every condition: contributions against float64 per-sample autograd, sums against p.grad.

The reference runs the same batch in float64 from the same weights and generator, and asks autograd for the gradient of
each sample's own term of the loss. It shares no code with what is tested.
`python -m tests.recorder.capture.test_networks` prints the table of docs/per-sample.md.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nbdyn
from tests import networks

EXACT, HALF, SUM = 5e-6, 2e-2, 1e-6
BATCH, STEPS = 6, 3

Shares = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) -> each sample's own term of the batch's loss, (B,)."""


@dataclass
class Case:
    """A network, its data, its loss, and how the loop treats them.

    Attributes:
        model: a fresh model.
        inputs, targets: the data set.
        loss: the loss function of the loop.
        terms: each sample's term of it.
        forward: how the loop calls the model; the reference calls it so, too, or by `expected`.
        loop: the loop, by name.
        tolerance: max|err| / max|ref| per tensor.
        coupled: whether samples see each other (the sum alone is compared).
        missing: tensors that cannot be split, and are said to be recorded by batch only.
        options: arguments of `nbdyn.record`.
    """

    model: Callable[[], nn.Module]
    inputs: Tensor
    targets: Tensor
    loss: Any = None
    terms: Shares = lambda outputs, targets: F.cross_entropy(outputs, targets, reduction="none") / len(targets)
    forward: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x)
    expected: Callable[[nn.Module, Tensor], Tensor] | None = None
    loop: str = "plain"
    tolerance: float = EXACT
    coupled: bool = False
    missing: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Seen:
    """What a step was: the model before it, its batches, torch's generator before each forward pass, p.grad."""

    model: nn.Module
    batches: list[tuple[np.ndarray, Tensor, Tensor, Tensor]] = field(default_factory=list)
    grads: dict[str, Tensor] = field(default_factory=dict)


# Training ------------------------------------------------------------------------------------------------------------


class Training:
    """One recorded training; `seen` is what the loop saw of each step."""

    def __init__(self, case: Case, folder: Path) -> None:
        torch.manual_seed(0)
        self.case, self.model = case, case.model()
        self.loss = case.loss or nn.CrossEntropyLoss()
        self.optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.05)
        self.rec = nbdyn.record(folder, self.model, self.optimizer, self.loss, **case.options)
        self.seen: list[Seen] = []

    def run(self) -> None:
        for step in range(STEPS):
            self.seen.append(Seen(copy.deepcopy(self.model)))
            getattr(self, f"_{self.case.loop}")(step)
        self.rec.close()

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """The number-th batch, announced."""
        ids = (np.arange(BATCH) * 5 + 3 * number) % len(self.case.inputs)
        self.rec.batch(ids=ids)
        x, y = self.case.inputs[ids], self.case.targets[ids]
        self.seen[-1].batches.append((ids, x, y, torch.get_rng_state()))
        return x, y

    def outputs(self, x: Tensor) -> Tensor:
        return self.case.forward(self.model, x)

    def step(self) -> None:
        named = dict(self.model.named_parameters())
        self.seen[-1].grads = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        self.optimizer.step()

    def _plain(self, step: int) -> None:
        x, y = self.batch(step)
        self.optimizer.zero_grad()
        self.loss(self.outputs(x), y).backward()
        self.step()

    def _zeroed(self, step: int) -> None:
        """Gradients are zeroed in place, after the step, and a forward pass without backward comes between."""
        x, y = self.batch(step)
        self.loss(self.outputs(x), y).backward()
        self.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.model(x)

    def _accumulated(self, step: int) -> None:
        """Two batches a step, the loss divided by two."""
        self.optimizer.zero_grad()
        for part in range(2):
            x, y = self.batch(2 * step + part)
            (self.loss(self.outputs(x), y) / 2).backward()
        self.step()

    def _clipped(self, step: int) -> None:
        x, y = self.batch(step)
        self.optimizer.zero_grad()
        self.loss(self.outputs(x), y).backward()
        named = dict(self.model.named_parameters())
        self.seen[-1].grads = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.01)
        self.optimizer.step()

    def _twice(self, step: int) -> None:
        """Two forward passes of the same samples, one backward pass for each; an unrelated autograd.grad before."""
        x, y = self.batch(step)
        self.optimizer.zero_grad()
        torch.autograd.grad(self.model(x.clone().requires_grad_()).sum(), list(self.model.parameters()))
        self.loss(self.outputs(x), y).backward()
        self.loss(self.outputs(x), y).backward()
        self.step()

    def _two_optimizers(self, step: int) -> None:
        """A backward pass for another optimizer comes first; its gradients are cleared before ours."""
        other = torch.optim.SGD(self.model.parameters(), lr=0.0)
        x, y = self.batch(step)
        self.model(x).square().sum().backward()
        other.step()
        self.optimizer.zero_grad()
        self.loss(self.outputs(x), y).backward()
        self.step()

    def _bfloat16(self, step: int) -> None:
        x, y = self.batch(step)
        self.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.loss(self.outputs(x), y)
        loss.backward()
        self.step()

    def _scaled(self, step: int) -> None:
        """Half precision with a GradScaler whose scale overflows at first: the first steps are skipped."""
        if step == 0:
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1000)
        while True:
            x, y = self.batch(step)
            self.optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = self.loss(self.outputs(x).float(), y)
            self.scaler.scale(loss).backward()
            self.scaler.unscale_(self.optimizer)
            named = dict(self.model.named_parameters())
            self.seen[-1].grads = {name: p.grad.clone() for name, p in named.items()}
            before = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scaler.get_scale() >= before:
                return
            self.seen.append(Seen(copy.deepcopy(self.model)))


# The reference -------------------------------------------------------------------------------------------------------


def reference(case: Case, seen: Seen, repeats: int = 1) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Sample ids (V,), and name -> each visit's contribution to p.grad, (V, *shape), in float64."""
    model = copy.deepcopy(seen.model).double()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found: dict[str, list[np.ndarray]] = {name: [] for name in named}
    for _, x, y, generator in seen.batches:
        torch.set_rng_state(generator)
        x = x.double() if x.is_floating_point() else x
        terms = repeats * case.terms((case.expected or case.forward)(model, x), y) / len(seen.batches)
        for term in terms:
            gradients = torch.autograd.grad(term, list(named.values()), retain_graph=True, allow_unused=True)
            for (name, p), g in zip(named.items(), gradients, strict=True):
                found[name].append(np.zeros(tuple(p.shape)) if g is None else g.numpy())
    ids = np.concatenate([ids for ids, *_ in seen.batches])
    return ids, {name: np.stack(values) for name, values in found.items()}


def errors(case: Case, folder: Path) -> Iterator[tuple[int, str, float, float]]:
    """Step, tensor, error of the cells, error of their sum against p.grad; both relative to the largest reference."""
    training = Training(case, folder)
    training.run()
    run = nbdyn.open(training.rec)
    assert set(run.store.factors.batch_only) == set(case.missing)
    assert len(run) == len(training.seen)
    for step, seen in enumerate(training.seen):
        if not all(bool(g.isfinite().all()) for g in seen.grads.values()):
            assert run.steps["skipped"][step]
            continue
        ids, expected = reference(case, seen, 2 if case.loop == "twice" else 1)
        for name, values in expected.items():
            if name in case.missing:
                continue
            dense = run.gradients[step, name, :].dense()
            np.testing.assert_array_equal(dense.visits["sample"], ids)
            cells, values = dense.values.astype(np.float64), values.reshape(len(ids), -1)
            # Gradients that are zero by symmetry (biases of keys) are compared with those of the layer's weight.
            weight = expected.get(f"{name.rpartition('.')[0]}.weight", values)
            of = values if np.abs(values).max() > 1e-12 else weight
            cell_error = 0.0 if case.coupled else relative(cells - values, of)
            if case.loop in ("bfloat16", "scaled"):
                sum_error = 0.0  # p.grad itself is rounded to half precision
            else:
                grad = seen.grads[name].double().numpy().reshape(-1)
                scale = np.concatenate([grad, cells.reshape(-1), of.reshape(-1)])
                sum_error = relative(cells.sum(0) - grad, scale)
                if relative(cells.sum(0) - values.sum(0), scale) < relative(grad - values.sum(0), scale):
                    sum_error = min(sum_error, SUM)  # nearer to the float64 gradient than p.grad is
            yield step, name, cell_error, sum_error


def relative(error: np.ndarray, of: np.ndarray) -> float:
    """max|error| / max|of|."""
    return float(np.abs(error).max() / max(np.abs(of).max(), 1e-30))


# The cases -----------------------------------------------------------------------------------------------------------


def rand(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(2))


def sequence_terms(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of (B * T, C) outputs and (B, T) targets."""
    return F.cross_entropy(outputs, targets.reshape(-1), reduction="none").reshape(len(targets), -1).mean(1) / len(
        targets
    )


class Sequences(nn.Module):
    """Mean cross-entropy over (B * T, C) outputs and (B, T) targets."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets.reshape(-1))


def mlp() -> nn.Module:
    return networks.mlp(12, 16, 8, 4)


def tabular(**changes: Any) -> Case:
    return Case(**({"model": mlp, "inputs": rand(40, 12), "targets": integers(4, 40)} | changes))


def pictures(model: Callable[[], nn.Module], **changes: Any) -> Case:
    return Case(model, rand(30, 1, 28, 28), integers(10, 30), **changes)


def texts(model: Callable[[], nn.Module], **changes: Any) -> Case:
    options = {"loss": Sequences(), "terms": sequence_terms} | changes
    return Case(model, integers(20, 30, 10), integers(20, 30, 10), **options)


def transformer(dropout: float = 0.0) -> nn.Module:
    return networks.Transformer(tokens=20, length=10, width=16, depth=2, heads=2, dropout=dropout)


def frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model


def augmented(model: nn.Module, x: Tensor) -> Tensor:
    """Noise and a random flip in the loop."""
    return model((x + 0.1 * torch.randn(x.shape)).flip(-1))


def checkpointed(reentrant: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        x = model[0](x)
        return model[4](checkpoint(model[1:4], x, use_reentrant=reentrant))

    return forward


WEIGHT = torch.tensor([1.0, 0.2, 3.0, 0.5])


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    kept = targets != 2
    total = WEIGHT.to(outputs)[targets[kept]].sum()
    return F.cross_entropy(outputs, targets, WEIGHT.to(outputs), ignore_index=2, reduction="none") / total


CASES: dict[str, Case] = {
    "LeNet": pictures(networks.LeNet),
    "ResNet, BatchNorm": Case(
        lambda: networks.ResNet(1, 4, "batch"), rand(30, 3, 16, 16), integers(10, 30), coupled=True
    ),
    "ResNet, GroupNorm": Case(lambda: networks.ResNet(1, 4, "group"), rand(30, 3, 16, 16), integers(10, 30)),
    "ViT, class token": pictures(networks.ViT),
    "ViT, class token, dropout": pictures(lambda: networks.ViT(dropout=0.2)),
    "char-LSTM": texts(lambda: networks.CharLSTM(20, 8, 12)),
    "transformer": texts(transformer),
    "transformer, dropout in attention": texts(lambda: transformer(0.3)),
    "embedding bag": Case(networks.BagOfWords, integers(50, 40, 7), integers(4, 40)),
    "MLP, tied weights": tabular(model=networks.TiedAutoencoder, targets=integers(12, 40)),
    "MLP, zeroed in place": tabular(loop="zeroed"),
    "MLP, reduction sum": tabular(
        loss=nn.CrossEntropyLoss(reduction="sum"), terms=lambda o, y: F.cross_entropy(o, y, reduction="none")
    ),
    "MLP, class weights and ignore_index": tabular(loss=nn.CrossEntropyLoss(WEIGHT, ignore_index=2), terms=weighted),
    "MLP, gradient accumulation": tabular(loop="accumulated"),
    "MLP, clipping": tabular(loop="clipped"),
    "MLP, frozen layers": tabular(model=frozen),
    "MLP, augmentation in the loop": tabular(forward=augmented),
    "MLP, two passes and autograd.grad": tabular(loop="twice"),
    "MLP, two optimizers": tabular(loop="two_optimizers"),
    "MLP, checkpointing": tabular(forward=checkpointed(False)),
    "MLP, reentrant checkpointing": tabular(forward=checkpointed(True), expected=checkpointed(False)),
    "MLP, autocast bfloat16": tabular(loop="bfloat16", tolerance=HALF),
    "MLP, float16 and GradScaler": tabular(loop="scaled", tolerance=HALF),
    "transformer, autocast bfloat16": texts(transformer, loop="bfloat16", tolerance=HALF),
}


@pytest.mark.parametrize("name", CASES)
def test_contributions_are_exact(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    compared = 0
    for step, tensor, cells, total in errors(case, tmp_path / "run"):
        assert cells <= case.tolerance, f"{tensor} at step {step}: {cells:.2g}"
        assert total <= SUM, f"sum of {tensor} at step {step}: {total:.2g}"
        compared += 1
    assert compared >= 2


def table() -> None:
    """Print the table of docs/per-sample.md."""
    print("| network and condition | tensors | worst cell error | worst error of the sum |\n|---|---|---|---|")
    nbdyn.options.quiet = True
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            found = list(errors(case, Path(folder) / "run"))
        cells = "coupled" if case.coupled else f"{max(e[2] for e in found):.1e}"
        total = "-" if case.loop in ("bfloat16", "scaled") else f"{max(e[3] for e in found):.1e}"
        print(f"| {name} | {len({e[1] for e in found})} | {cells} | {total} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    table()
