"""The loss of a whole data set and its gradient, against plain autograd of all samples at once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from nbdyn.analysis.lca.engine import Allocator
from nbdyn.analysis.lca.objective import Objective
from nbdyn.analysis.lca.precision import Precision
from nbdyn.analysis.lca.samples import samples_of
from nbdyn.errors import Incompatible, NbdynError
from tests.networks import CharLSTM

SIZE, CLASSES = 70, 4


def inputs(size: int = SIZE, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, 5, dtype=dtype, generator=torch.Generator().manual_seed(3))


def labels(size: int = SIZE) -> Tensor:
    return torch.randint(0, CLASSES, (size,), generator=torch.Generator().manual_seed(4))


def classifier(*middle: nn.Module, outputs: int = CLASSES, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), *(middle or (nn.Tanh(),)), nn.Linear(6, outputs)).to(dtype)


def flat(tensors: Any) -> np.ndarray:
    return torch.cat([t.detach().reshape(-1) for t in tensors]).numpy()


def elsewhere(model: nn.Module) -> np.ndarray:
    """Weights other than the model's own."""
    w = flat(model.parameters())
    return w + 0.3 * np.random.default_rng(1).normal(size=w.shape)


def put(model: nn.Module, weights: np.ndarray) -> None:
    nn.utils.vector_to_parameters(torch.from_numpy(weights).to(next(model.parameters()).dtype), model.parameters())


def plain(model: nn.Module, loss_fn: Any, x: Tensor, y: Tensor, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """The loss and its gradient in one pass over everything, in the modes that the model is in."""
    put(model, weights)
    loss = loss_fn(model(x), y)
    return float(loss.detach()), flat(torch.autograd.grad(loss, list(model.parameters())))


WEIGHT = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
IGNORING = torch.where(torch.arange(SIZE) % 3 == 0, -100, labels())
CASES: dict[str, tuple[Any, Any]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), labels()),
    "weighted": (nn.CrossEntropyLoss(weight=WEIGHT), labels()),
    "ignore": (nn.CrossEntropyLoss(ignore_index=-100), IGNORING),
    "weighted, ignore, smoothing": (nn.CrossEntropyLoss(WEIGHT, ignore_index=-100, label_smoothing=0.1), IGNORING),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), labels()),
    "weighted sum": (nn.CrossEntropyLoss(weight=WEIGHT, reduction="sum"), labels()),
    "probabilities": (nn.CrossEntropyLoss(), torch.softmax(inputs()[:, :4], 1)),
    "mse": (nn.MSELoss(), inputs()[:, :4]),
    "bce": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), (inputs()[:, :4] > 0).double()),
    "huber sum": (nn.HuberLoss(reduction="sum"), inputs()[:, :4]),
    "batchmean": (nn.KLDivLoss(reduction="batchmean"), torch.softmax(inputs()[:, :4], 1)),
    "functional": (F.cross_entropy, labels()),
    "partial": (functools.partial(F.cross_entropy, weight=WEIGHT), labels()),
    "own mean": (lambda o, t: (o[torch.arange(len(o)), t] ** 2).mean(), labels()),
}


@pytest.mark.parametrize("chunk", [None, 1, 7, 69, 1000])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_all_samples_at_once(case: str, chunk: int | None) -> None:
    loss_fn, y = CASES[case]
    model = classifier()
    objective = Objective(model, loss_fn, samples_of((inputs(), y)), chunk=chunk)
    w = elsewhere(model)
    value = objective(w)
    loss, grad = plain(model, loss_fn, inputs(), y, w)
    assert value.loss == pytest.approx(loss, rel=1e-13)
    assert value.grad is not None and np.abs(value.grad - grad).max() < 1e-12 * max(1, np.abs(grad).max())
    assert objective(w, gradient=False).loss == value.loss and objective(w, gradient=False).grad is None
    assert objective.evaluations == 3 and objective.gradients == 1


@pytest.mark.parametrize("case", ["cross-entropy", "weighted", "ignore", "weighted, ignore, smoothing", "sum",
                                  "weighted sum", "functional", "partial", "own mean"])  # fmt: skip
@pytest.mark.parametrize("norm", ["none", "batch", "running"])
def test_classes_sum_to_the_whole(case: str, norm: str) -> None:
    """sum_c share_c A^c = A, and the parts are what each class's samples say by themselves."""
    loss_fn, y = CASES[case]
    model = classifier(*([] if norm == "none" else [nn.BatchNorm1d(6), nn.ReLU()]))
    modes = {} if norm == "none" else {"batch_norm": norm}
    samples = samples_of((inputs(), y), classes=True)
    objective = Objective(model, loss_fn, samples, chunk=None if norm == "batch" else 16, **modes)
    whole = Objective(model, loss_fn, samples_of((samples.inputs, samples.targets)), **modes)
    a, b = elsewhere(model), flat(model.parameters())
    step = Allocator(objective, Precision("simpson")).step(a, b)
    plainly = Allocator(whole, Precision("simpson")).step(a, b)
    assert step.groups is not None
    by_class = step.groups * step.motion
    assert np.abs(objective.shares @ by_class - step.cells).max() < 1e-10
    assert np.abs(step.cells - plainly.cells).max() < 1e-10 * max(1, np.abs(step.cells).max())
    value = objective(a)
    assert objective.shares @ value.losses == pytest.approx(value.loss, rel=1e-12)
    put(model, a)
    model.train(norm == "batch")
    outputs = model(samples.inputs)
    for number, name in enumerate(samples.names):
        mine = samples.targets == name
        if name == -100:
            assert value.losses[number] == objective.shares[number] == 0
            continue
        loss = loss_fn(outputs[mine], samples.targets[mine])
        scale = 1 / int(mine.sum()) if "sum" in case else 1.0
        grads = flat(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))
        assert value.losses[number] == pytest.approx(float(loss.detach()) * scale, rel=1e-12)
        assert value.grads is not None and np.abs(value.grads[number] - grads * scale).max() < 1e-12


@pytest.mark.parametrize("chunk", [None, 24, 35])
def test_batch_statistics_are_those_of_fixed_chunks(chunk: int | None) -> None:
    model = classifier(nn.BatchNorm1d(6), nn.ReLU())
    x, y, w = inputs(), labels(), elsewhere(model)
    value = Objective(model, nn.CrossEntropyLoss(), samples_of((x, y)), chunk=chunk)(w)
    model.train()
    put(model, w)
    parts = [nn.functional.cross_entropy(model(x[a:b]), y[a:b], reduction="sum") for a, b in
             ((i, min(i + (chunk or SIZE), SIZE)) for i in range(0, SIZE, chunk or SIZE))]  # fmt: skip
    loss = torch.stack(parts).sum() / SIZE
    assert value.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    assert np.abs(value.grad - flat(torch.autograd.grad(loss, list(model.parameters())))).max() < 1e-12


def test_a_last_chunk_of_one_sample_joins_the_one_before() -> None:
    model = classifier(nn.BatchNorm1d(6), nn.ReLU())
    w = elsewhere(model)
    objective = Objective(model, nn.CrossEntropyLoss(), samples_of((inputs(), labels())), chunk=23)  # 23 + 23 + 23 + 1
    model.train()
    put(model, w)
    parts = [
        F.cross_entropy(model(inputs()[a:b]), labels()[a:b], reduction="sum") for a, b in ((0, 23), (23, 46), (46, 70))
    ]
    assert objective(w).loss == pytest.approx(float(torch.stack(parts).sum().detach()) / SIZE, rel=1e-12)


def test_running_statistics_are_those_loaded_and_stay() -> None:
    model = classifier(nn.BatchNorm1d(6), nn.ReLU())
    objective = Objective(model, nn.CrossEntropyLoss(), samples_of((inputs(), labels())), batch_norm="running", chunk=9)
    w, before = elsewhere(model), {k: v.clone() for k, v in model.named_buffers()}
    first = objective(w).loss
    other = {"1.running_mean": torch.full((6,), 0.3, dtype=torch.float64), "elsewhere": torch.zeros(3)}
    assert objective.load_buffers(other) and not objective.load_buffers(other)
    model.eval()
    assert first == pytest.approx(plain(model, nn.CrossEntropyLoss(), inputs(), labels(), w)[0], rel=1e-13)
    model[1].running_mean.fill_(0.3)
    second, grad = plain(model, nn.CrossEntropyLoss(), inputs(), labels(), w)
    found = objective(w)
    assert found.loss == pytest.approx(second, rel=1e-13) != first and np.abs(found.grad - grad).max() < 1e-12
    model[1].running_mean.copy_(before["1.running_mean"])


def test_a_norm_without_running_statistics_couples_samples_in_any_mode() -> None:
    model = classifier(nn.BatchNorm1d(6, track_running_stats=False), nn.ReLU())
    for mode in ("batch", "running"):
        objective = Objective(model, nn.CrossEntropyLoss(), samples_of((inputs(), labels())), batch_norm=mode)
        assert objective.coupled and objective.chunk == SIZE


def test_dropout_is_off_or_the_same_everywhere() -> None:
    model = classifier(nn.Tanh(), nn.Dropout(0.5))
    data, w = samples_of((inputs(), labels())), elsewhere(model)
    model.eval()
    without = plain(model, nn.CrossEntropyLoss(), inputs(), labels(), w)
    model.train()
    state = torch.get_rng_state()
    off = Objective(model, nn.CrossEntropyLoss(), data, chunk=20)
    assert off(w).loss == pytest.approx(without[0], rel=1e-13)
    fixed = Objective(model, nn.CrossEntropyLoss(), data, dropout="fixed", chunk=20, seed=5)
    values = [fixed(w) for _ in range(3)]
    assert values[0].loss == values[1].loss == values[2].loss != without[0]
    assert np.array_equal(values[0].grad, values[2].grad)
    again = Objective(model, nn.CrossEntropyLoss(), data, dropout="fixed", chunk=20, seed=5)
    other = Objective(model, nn.CrossEntropyLoss(), data, dropout="fixed", chunk=20, seed=6)
    assert again(w).loss == values[0].loss != other(w).loss
    assert torch.equal(torch.get_rng_state(), state)  # the user's numbers go on as if nothing had been
    own_mean = Objective(model, lambda o, t: F.cross_entropy(o, t), data, dropout="fixed", chunk=20, seed=5)
    assert own_mean(w).loss == pytest.approx(values[0].loss, rel=1e-12)
    step = Allocator(fixed, Precision("gauss", 4)).step(w, flat(model.parameters()))
    assert abs(step.residual) < 1e-8  # one smooth function


class Noisy(nn.Module):
    """Random whatever the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.fc(x), 0.5, training=True)


class Tied(nn.Module):
    """One matrix at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_a_network_that_is_random_in_eval_mode_is_refused() -> None:
    with pytest.raises(Incompatible, match="random in eval mode"):
        Objective(Noisy(), nn.CrossEntropyLoss(), samples_of((inputs(dtype=torch.float32), labels())))


@pytest.mark.parametrize("loss_fn", [
    lambda o, t: F.cross_entropy(o, t, reduction="sum"),
    lambda o, t: F.cross_entropy(o, t) ** 2,
    lambda o, t: torch.logsumexp(F.cross_entropy(o, t, reduction="none"), 0),
])  # fmt: skip
def test_a_loss_that_is_no_mean_is_refused(loss_fn: Callable[..., Tensor]) -> None:
    with pytest.raises(Incompatible, match="not the mean of its parts"):
        Objective(classifier(), loss_fn, samples_of((inputs(), labels())))


def test_tied_and_frozen_weights() -> None:
    torch.manual_seed(0)
    model = Tied().double()
    model.c.weight.requires_grad_(False)
    objective = Objective(model, nn.CrossEntropyLoss(), samples_of((inputs(), labels())))
    assert objective.parameters == 25 + 5 + 5 + 20 + 4
    w = elsewhere(model)
    value = objective(w)
    assert not model.c.weight.requires_grad
    other = copy.deepcopy(model).requires_grad_(True)
    loss, grad = plain(other, nn.CrossEntropyLoss(), inputs(), labels(), w)
    assert value.loss == pytest.approx(loss, rel=1e-13) and np.abs(value.grad - grad).max() < 1e-12


def test_sequences_of_integers_into_an_lstm() -> None:
    torch.manual_seed(0)
    model = CharLSTM(9, 4, 5).double()
    x = torch.randint(0, 9, (30, 6))
    y = torch.roll(x, -1, 1)
    for loss_fn in (lambda o, t: F.cross_entropy(o, t.flatten()), nn.CrossEntropyLoss()):
        rows = x if not isinstance(loss_fn, nn.Module) else x[:, :1]
        targets = y if not isinstance(loss_fn, nn.Module) else y[:, 0]
        objective = Objective(model, loss_fn, samples_of((rows, targets)), chunk=8)
        w = elsewhere(model)
        loss, grad = plain(copy.deepcopy(model), loss_fn, rows, targets, w)
        value = objective(w)
        assert value.loss == pytest.approx(loss, rel=1e-12) and np.abs(value.grad - grad).max() < 1e-12


def test_nothing_of_the_user_changes() -> None:
    model = classifier(nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2))
    model.train()
    model[1].eval()
    model[0].bias.requires_grad_(False)
    loss_fn = nn.CrossEntropyLoss()
    seen = []
    loss_fn.register_forward_hook(lambda *_: seen.append(1))
    loss_fn(model(inputs()), labels()).backward()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes, seen[:] = [m.training for m in model.modules()], []
    rng = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):  # nor does it change anything here
        found = Objective(model, loss_fn, samples_of((inputs(), labels())), dropout="fixed")(elsewhere(model))
    assert not seen and torch.equal(rng, torch.get_rng_state()) and modes == [m.training for m in model.modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    for p, g in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None and g is None) or torch.equal(p.grad, g)
    assert (
        found.loss
        == Objective(model, loss_fn, samples_of((inputs(), labels())), dropout="fixed")(elsewhere(model)).loss
    )


def test_autocast_around_it_changes_nothing() -> None:
    model = classifier(dtype=torch.float32)
    objective = Objective(model, nn.CrossEntropyLoss(), samples_of((inputs(dtype=torch.float32), labels())), chunk=SIZE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = objective(elsewhere(model))
    outside = objective(elsewhere(model))
    assert inside.loss == outside.loss and np.array_equal(inside.grad, outside.grad)
    assert objective.dtype == np.float32 == outside.grad.dtype


def test_what_defines_the_loss_is_told_apart() -> None:
    """A result is taken up, or read, only if the loss is the same."""

    def spec(loss_fn: Any = None, seed: int = 0, classes: bool = False, x: Tensor | None = None, **modes: Any) -> Any:
        model = classifier(nn.BatchNorm1d(6), nn.Dropout(0.1))
        samples = samples_of((inputs() if x is None else x, labels()), classes=classes)
        return Objective(model, loss_fn or nn.CrossEntropyLoss(), samples, seed=seed, **modes).describe()

    specs = [
        spec(), spec(nn.CrossEntropyLoss(weight=WEIGHT)), spec(nn.CrossEntropyLoss(weight=WEIGHT * 2)),
        spec(nn.CrossEntropyLoss(label_smoothing=0.1)), spec(nn.CrossEntropyLoss(reduction="sum")),
        spec(functools.partial(F.cross_entropy, label_smoothing=0.1)), spec(F.cross_entropy), spec(chunk=30),
        spec(dropout="fixed"), spec(dropout="fixed", seed=1), spec(batch_norm="running"), spec(classes=True),
        spec(x=inputs() + 1e-9),
    ]  # fmt: skip
    assert [(n, m) for n, a in enumerate(specs) for m, b in enumerate(specs[:n]) if a == b] == []
    assert spec() == specs[0] == spec(seed=1) and spec(nn.CrossEntropyLoss(weight=WEIGHT.clone())) == specs[1]


# Samples --------------------------------------------------------------------------------------------------------


def test_data_in_every_form() -> None:
    pair = TensorDataset(inputs(), labels())
    for data in (pair, (inputs().numpy(), labels().numpy()), [inputs(), labels()], Subset(pair, range(SIZE))):
        found = samples_of(data)
        assert torch.equal(found.inputs, inputs()) and torch.equal(found.targets, labels()) and not found.groups
    found = samples_of(pair, classes=True)
    assert found.names == (0, 1, 2, 3) and found.edges.tolist() == [0, *np.bincount(labels()).cumsum()]
    assert torch.equal(found.targets, labels().sort(stable=True).values)
    found = samples_of(pair, subset=47, seed=1)
    assert len(found) == 40 == len(found.inputs.unique(dim=0)) and found.of == SIZE and found.groups == 10
    assert not torch.equal(found.inputs, samples_of(pair, subset=47, seed=2).inputs)


@pytest.mark.parametrize(
    ("data", "options", "error", "match"),
    [
        (DataLoader(TensorDataset(inputs(), labels())), {}, Incompatible, "give the data set"),
        (iter([1]), {}, Incompatible, "the data set itself"),
        ((inputs(), labels()[:3]), {}, Incompatible, "one target for each input"),
        ((inputs()[:0], labels()[:0]), {}, Incompatible, "one target for each input"),
        ((inputs(), inputs()), {"classes": True}, Incompatible, "class numbers"),
        ((inputs(), labels()), {"classes": True, "subset": 30}, NbdynError, "exclude each other"),
        ((inputs(), labels()), {"subset": 10}, NbdynError, "at least 20"),
        ((inputs(), labels()), {"subset": 71}, NbdynError, "at most the 70"),
    ],
)
def test_data_that_cannot_be_used(data: Any, options: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        samples_of(data, **options)


def test_modes_and_networks_that_cannot_be_used() -> None:
    data = samples_of((inputs(), labels()))
    with pytest.raises(NbdynError, match="'batch', 'running'"):
        Objective(classifier(), nn.CrossEntropyLoss(), data, batch_norm="eval")
    with pytest.raises(NbdynError, match="'off', 'fixed'"):
        Objective(classifier(), nn.CrossEntropyLoss(), data, dropout="on")
    mixed = classifier()
    mixed[0].float()
    with pytest.raises(Incompatible, match="several types"):
        Objective(mixed, nn.CrossEntropyLoss(), data)
