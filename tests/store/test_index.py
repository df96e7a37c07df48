"""Indexes against brute force over single samples' gradients in float64; what is left out; killed builds."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import nbdyn
from nbdyn.__main__ import main
from nbdyn.errors import CorruptRun, Incompatible, NbdynError, RunBusy
from nbdyn.recorder import sink
from nbdyn.recording import index
from nbdyn.schema import SUMMARY
from nbdyn.store import Store, lock, metadata, verify
from nbdyn.store.backend import context
from nbdyn.store.gradients import Gradients
from nbdyn.store.index import build as build_module
from nbdyn.store.index import entry, exponents, gather, plan
from nbdyn.store.index.build import Summary, build
from nbdyn.store.index.read import CLASS_FIELDS, EPOCH_FIELDS, Index, open_index
from tests import networks, problems
from tests.captures import Recording

SIZE, BATCH = 44, 8
STEPS = -(-SIZE // BATCH)


class Text(nn.Module):
    """Token ids (B, T): an embedding, a layer at every token, and that layer once more."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.inner(self.words(ids)))
        return self.head(torch.tanh(self.inner(x)).mean(1))


class Tied(nn.Module):
    """Three uses of one weight; three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = networks.TiedAutoencoder(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def image() -> nn.Module:
    layers = nn.Conv2d(1, 3, 3, padding=1, stride=2), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)
    return nn.Sequential(*layers)


def inputs_of(make: Callable[[], nn.Module]) -> torch.Tensor:
    if make is Text:
        return torch.randint(0, 9, (SIZE, 7))
    return torch.randn(SIZE, 1, 5, 5) if make is image else torch.randn(SIZE, 6)


def mlp() -> nn.Module:
    return networks.mlp(6, 5, 3)


def sequence() -> nn.Module:
    """A layer at each of two positions of a visit."""
    return nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Linear(3, 5), nn.Tanh(), nn.Flatten(), nn.Linear(10, 3))


class Training:
    """A network that is trained and recorded; what training saw is kept for the references.

    Attributes:
        step, label: of each visit.
        step_epoch: of each step.
        grads: p.grad of each step, flat.
    """

    def __init__(self, make: Callable[[], nn.Module], targets: torch.Tensor | None = None) -> None:
        torch.manual_seed(3)
        self.model, self.loss_fn = make(), nn.CrossEntropyLoss() if targets is None else nn.MSELoss()
        self.x = inputs_of(make)
        self.y = torch.randint(0, 3, (SIZE,)) if targets is None else targets
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.3)
        self.step, self.label, self.step_epoch, self.grads, self._seen = [], [], [], [], []

    def record(self, path: Path, epochs: int = 2, batches: int = STEPS, **options: Any) -> str:
        """Train so many epochs, of the last one so many batches."""
        with nbdyn.record(path, self.model, self.optimizer, self.loss_fn, **options) as rec:
            for number in range(epochs):
                order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(len(self.step_epoch))).tolist()
                loader = DataLoader(Subset(TensorDataset(self.x, self.y), order), BATCH)
                for place, (x, y) in enumerate(rec.watch(loader)):
                    if number == epochs - 1 and place == batches:
                        break
                    self._step(x, y)
                    self.step_epoch.append(number)
        return str(path)

    def _step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self._seen.append((copy.deepcopy(self.model), x, y))
        self.optimizer.zero_grad()
        self.loss_fn(self.model(x), y).backward()
        self.optimizer.step()
        self.grads.append(torch.cat([p.grad.reshape(-1) for p in self.model.parameters()]).numpy())
        self.label += y.tolist()
        self.step += [len(self._seen) - 1] * len(x)

    def own(self) -> np.ndarray:
        """Each sample's own gradient by autograd in float64, (visits, parameters)."""
        found = []
        for model, xs, ys in self._seen:
            exact, loss_fn = model.double(), type(self.loss_fn)()
            for x, y in zip(xs, ys, strict=True):
                exact.zero_grad()
                wide, target = (t.double() if t.is_floating_point() else t for t in (x[None], y[None]))
                loss_fn(exact(wide), target).backward()
                found.append(torch.cat([p.grad.reshape(-1) for p in exact.parameters()]).numpy())
        return np.stack(found)

    @property
    def epoch(self) -> np.ndarray:
        """Of each visit."""
        return np.array(self.step_epoch)[self.step]


OF = {"sum": lambda x: x, "sum_abs": np.abs, "sum_sq": np.square}
TOLERANCE = 5e-6
"""Of float32 training against float64, relative to the largest sum of |.| of a tensor; the indexes add 1e-7."""


def assert_close(found: np.ndarray | None, values: np.ndarray, how: str, sizes: list[int]) -> None:
    """Compare sums over the first axis of `values` (n, parameters)."""
    assert found is not None
    expected, scale = OF[how](values).sum(0), OF["sum_sq" if how == "sum_sq" else "sum_abs"](values).sum(0)
    cuts = np.cumsum(sizes)[:-1]
    for got, want, largest in zip(*(np.split(x, cuts) for x in (found, expected, scale)), strict=True):
        assert np.abs(got - want).max() <= TOLERANCE * np.abs(largest).max()


def brute_exponents(grads: np.ndarray, sizes: list[int]) -> np.ndarray:
    """(steps, tensors, 64), from numpy's frexp."""
    place = np.clip(np.frexp(grads)[1] - 1, -48, 13) + 49
    place = np.where(grads == 0, 0, np.where(np.isfinite(grads), place, 63))
    tensors = np.split(place, np.cumsum(sizes)[:-1], axis=1)
    return np.array([[np.bincount(tensor[t], minlength=64) for tensor in tensors] for t in range(len(grads))])


def opened(path: Path | str) -> Index:
    found = open_index(Store(path))
    assert found is not None
    return found


NETWORKS = {"mlp": mlp, "image": image, "text": Text, "tied": Tied, "sequence": sequence}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of torch cost more than they give where everything is so small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Training, str]]:
    """A recorded and indexed run of a network of NETWORKS, made once."""
    known: dict[str, tuple[Training, str]] = {}

    def run(name: str) -> tuple[Training, str]:
        if name not in known:
            training = Training(NETWORKS[name])
            path = training.record(tmp_path_factory.mktemp(name) / "run", weights="every")
            build(path, progress=False)
            known[name] = training, path
        return known[name]

    return run


@pytest.fixture
def mlp_run(runs: Any, tmp_path: Path) -> tuple[Training, str]:
    """A copy of the run of the MLP, with its indexes."""
    training, path = runs("mlp")
    shutil.copytree(path, tmp_path / "run")
    return training, str(tmp_path / "run")


def files(path: Path | str) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in (Path(path) / SUMMARY).rglob("*") if p.is_file()}


# What they hold ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [32_000_000, 3000], ids=["one window", "many windows"])
@pytest.mark.parametrize("name", NETWORKS)
def test_against_brute_force(name: str, window: int, runs: Any, tmp_path: Path, monkeypatch: Any) -> None:
    training, path = runs(name)
    if window < 10_000:
        monkeypatch.setattr(gather, "WINDOW_BYTES", window)
        monkeypatch.setattr(build_module, "WRITE_BYTES", window)
        shutil.copytree(path, tmp_path / "run")
        path = str(tmp_path / "run")
        entry.drop(path)
        build(path, progress=False)
    found, sizes = opened(path), [p.numel() for p in training.model.parameters()]
    assert found.own and found.steps == 2 * STEPS and not found.left_out
    own, grads, epoch = training.own(), np.stack(training.grads).astype(float), training.epoch
    for first, last in ((0, 0), (1, 1), (0, 1)):
        visits, steps = (epoch >= first) & (epoch <= last), slice(first * STEPS, (last + 1) * STEPS)
        for how in OF:
            assert_close(found.epochs(f"{how}_g", first, last), own[visits], how, sizes)
            assert_close(found.epochs(f"{how}_grad", first, last), grads[steps], how, sizes)
        for how in ("sum", "sum_abs"):
            classes = found.classes(f"{how}_g", first, last)
            assert classes is not None and len(classes) == 3
            for label in range(3):
                assert_close(classes[label], own[visits & (np.array(training.label) == label)], how, sizes)
    counts = found.exponents(0, 2 * STEPS)
    rebuilt = Gradients(Store(path))[:, :].total()  # equal to p.grad but for rounding, which may change an exponent
    assert np.array_equal(counts, brute_exponents(rebuilt, sizes))
    if name == "mlp":
        assert np.array_equal(counts, brute_exponents(np.stack(training.grads), sizes))


def test_parts(mlp_run: Any) -> None:
    _, path = mlp_run
    found, chosen = opened(path), np.array([40, 3, 52, 3])
    for name in EPOCH_FIELDS:
        whole, part = found.epochs(name, 0, 1), found.epochs(name, 0, 1, chosen)
        assert whole is not None and part is not None and np.array_equal(part, whole[chosen])
    for name in CLASS_FIELDS:
        whole, part = found.classes(name, 1, 1), found.classes(name, 1, 1, chosen)
        assert whole is not None and part is not None and np.array_equal(part, whole[:, chosen])
    assert found.epochs("sum_g", 0, 1, np.empty(0, int)) is not None
    whole, part = found.exponents(0, 12), found.exponents(5, 9)
    assert whole is not None and part is not None and np.array_equal(part, whole[5:9])
    assert found.epochs("sum_g", 0, 2) is None and found.epochs("sum_g", 1, 0) is None
    assert found.exponents(0, 13) is None and found.zones(7) is None
    with pytest.raises(Incompatible, match='did you mean "sum_abs_g"'):
        found.epochs("sum_absg", 0, 1)
    assert repr(found) == "indexes of run: epochs, classes, exponents, zones, events; steps 0..11"


def test_far_apart_parameters(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("nbdyn.store.index.read.READ_GAP", 2)
    path = Training(mlp).record(tmp_path / "run", 1)
    build(path)
    whole, part = opened(path).epochs("sum_g", 0, 0), opened(path).epochs("sum_g", 0, 0, np.array([50, 1, 2, 30, 31]))
    assert whole is not None and part is not None and np.array_equal(part, whole[[50, 1, 2, 30, 31]])


def test_several_batches_a_step(tmp_path: Path) -> None:
    """Accumulated batches: their contributions add up before |grad| and its square are taken."""
    training = Training(mlp)
    loader = DataLoader(TensorDataset(training.x, training.y), 4)
    with nbdyn.record(tmp_path / "run", training.model, training.optimizer, training.loss_fn) as rec:
        for place, (x, y) in enumerate(rec.watch(loader)):
            (training.loss_fn(training.model(x), y) / 2).backward()
            if place % 2:
                training.grads.append(torch.cat([p.grad.reshape(-1).clone() for p in training.model.parameters()]))
                training.optimizer.step()
                training.optimizer.zero_grad()
    build(tmp_path / "run")
    sizes = [p.numel() for p in training.model.parameters()]
    for how in OF:
        found = opened(tmp_path / "run").epochs(f"{how}_grad", 0, 0)
        assert_close(found, torch.stack(training.grads).double().numpy(), how, sizes)


@pytest.mark.parametrize("weights", ["every", "snapshots"])
def test_zones(weights: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("nbdyn.store.index.zones.READ_BYTES", 1)
    path = Training(lambda: networks.mlp(6, 200, 3)).record(tmp_path / "run", 4, weights=weights, snapshot_every=5)
    build(path)
    found, store = opened(path), Store(path)
    rows = store.weights.read(np.arange(store.parameters))[1]
    assert found.zone_rows == len(rows) == (25 if weights == "every" else 6) and store.parameters == 2003
    for level, height in ((0, 16), (1, 256))[: 2 if weights == "every" else 1]:
        zones = found.zones(level)
        assert zones is not None and zones.low.shape == (-(-len(rows) // height), 2)
        for block, zone in np.ndindex(*zones.low.shape):
            part = rows[block * height : (block + 1) * height + 1, zone * 1024 : (zone + 1) * 1024]
            crossings = int((np.diff(np.sign(part), axis=0) != 0).sum())  # no weight is 0 here
            expected = part.min(), part.max(), np.abs(part).min(), crossings
            assert tuple(x[block, zone] for x in zones.columns().values()) == expected
    assert found.zones(len(rows) // 16 + 1) is None


def test_zones_of_zeros_and_nan() -> None:
    from nbdyn.store.index.zones import _of_rows

    rows = np.array([[1, -1, np.nan], [0, np.nan, np.nan], [0, 2, np.nan], [-1, 0, np.nan]], dtype=float)
    found = _of_rows(rows)  # the language's `crosses 0`: 1 -> 0 and 2 -> 0; not 0 -> -1, nor over NaN
    assert [found[name].tolist() for name in ("low", "high", "nearest", "crossings")] == [[-1.0], [2.0], [0.0], [2]]
    wide = np.array([[1 / 3], [2 / 3]])
    low, high = (_of_rows(wide)[name][0] for name in ("low", "high"))
    assert low.dtype == np.float32 and float(low) <= 1 / 3 and float(high) >= 2 / 3 > float(high) - 1e-7


def brute_events(path: str) -> list[tuple[int, int, int]]:
    """(step, parameter, kind) one by one."""
    store, found = Store(path), []
    rows = store.weights.read(np.arange(store.parameters))[1]
    for step, row in enumerate(rows):
        for parameter, after in enumerate(row):
            before = rows[step - 1, parameter] if step else np.nan
            kind = (3 if np.isnan(before) else 2 * int(before != 0)) if after == 0 else int(before * after < 0)
            found += [(step, parameter, kind)] if kind else []
    return found


def test_events(tmp_path: Path, monkeypatch: Any) -> None:
    training = Training(mlp)
    with torch.no_grad():
        training.model[0].bias.zero_()  # pyright: ignore[reportIndexIssue]
    path = training.record(tmp_path / "run", 3, weights="every")
    monkeypatch.setattr("nbdyn.store.index.events.WRITE_EVENTS", 3)
    monkeypatch.setattr("nbdyn.store.index.zones.READ_BYTES", 1)
    for _ in range(2):
        build(path)
        found, expected = opened(path).events(0, Store(path).steps_committed + 1), brute_events(path)
        assert found is not None and list(zip(*map(np.ndarray.tolist, vars(found).values()), strict=True)) == expected
        assert {kind for _, _, kind in expected} == {1, 3}
        some = opened(path).events(2, 15, np.array([1, 40, 41, 30]))
        wanted = [event for event in expected if 2 <= event[0] < 15 and event[1] in (1, 40, 41, 30)]
        assert some is not None and list(zip(*map(np.ndarray.tolist, vars(some).values()), strict=True)) == wanted
        assert opened(path).events(0, Store(path).steps_committed + 2) is None
        training.record(tmp_path / "run", 1, weights="every", mode="resume")  # and once more


def test_too_many_events(tmp_path: Path, monkeypatch: Any) -> None:
    for module in ("build", "events"):
        monkeypatch.setattr(f"nbdyn.store.index.{module}.MOST", 4)
    monkeypatch.setattr("nbdyn.store.index.events.WRITE_EVENTS", 2)
    training = Training(mlp)
    path = training.record(tmp_path / "run", weights="every")
    assert build(path).left_out == {"events": "there are more than 4"}
    assert opened(path).events(0, 3) is None and not (Path(path) / SUMMARY / "events").exists()
    training.record(tmp_path / "run", 1, weights="every", mode="resume")
    assert build(path).first == 12
    assert verify.verify(path).empty and opened(path).left_out == {"events": "there are more than 4"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponents(dtype: torch.dtype) -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=5000) * 2.0 ** generator.integers(-70, 30, 5000)
    x[:9] = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-40, 2.0**-48, 2.0**13, 2.0**14]
    values = torch.tensor(x, dtype=dtype)
    found, x = exponents.counts(values), values.numpy()
    assert np.array_equal(found, brute_exponents(x[None], [5000])[0, 0])
    size = np.where(np.isfinite(x), np.abs(x), np.inf)
    for threshold in (0.0, 2.0**-48, 2.0**-5, 1.0, 0.3, 1e-3, 2.0**13, 1e4, 1e5, 1e-20):
        least, most = exponents.above(found, threshold)
        assert least <= (size > threshold).sum() <= (size >= threshold).sum() <= most or threshold == 0
    assert exponents.above(found, 0.0) == ((size > 0).sum(),) * 2
    assert exponents.above(found, 1.0)[1] == (size >= 1).sum()


def test_an_index_is_plain_tiledb(mlp_run: Any) -> None:
    import tiledb

    _, path = mlp_run
    with tiledb.Group(path, ctx=context()) as group:
        assert SUMMARY in {member.name for member in group}
    with tiledb.Group(f"{path}/{SUMMARY}", ctx=context()) as group:
        assert {member.name for member in group} == set(entry.NAMES)
    with tiledb.open(f"{path}/{SUMMARY}/epochs", ctx=context()) as array:
        assert array[0, 0:10]["norm_grad"].dtype == np.float32


# What is left out ---------------------------------------------------------------------------------------------------


def compare_with_cells(path: str, last: int) -> Index:
    """Sums of own gradients against the run's cells, of the epochs 0..last."""
    found, store = opened(path), Store(path)
    cells = Gradients(store)[:, :].own().dense()
    epoch = store.read_steps(0, store.steps_committed)["epoch"][cells.visits["step"]]
    for how in OF:
        some = found.epochs(f"{how}_g", 0, last, cells.parameters)
        assert_close(some, cells.values[epoch <= last].astype(float), how, [len(cells.parameters)])
    return found


def test_every_other_step(tmp_path: Path) -> None:
    training = Training(mlp)
    path = training.record(tmp_path / "run", every=2)
    build(path)
    found = compare_with_cells(path, 1)
    counts = found.exponents(0, 12)
    assert counts is not None and (counts[1::2] == -1).all() and (counts[::2].sum((1, 2)) == 53).all()
    assert [span.captured for span in found.spans] == [3, 3]
    assert_close(found.epochs("sum_abs_grad", 0, 1), np.stack(training.grads)[::2].astype(float), "sum_abs", [53])


def test_a_share_of_the_samples(tmp_path: Path) -> None:
    path = Training(mlp).record(tmp_path / "run", fraction=0.5)
    assert "without exponents: only a share of 0.5" in str(build(path))
    found = compare_with_cells(path, 1)
    assert set(found.left_out) == {"grad", "exponents", "events"}
    assert found.epochs("sum_abs_grad", 0, 1) is None and found.exponents(0, 3) is None
    classes, whole = found.classes("sum_abs_g", 0, 1), found.epochs("sum_abs_g", 0, 1)
    assert classes is not None and whole is not None and np.allclose(classes.sum(0), whole, rtol=1e-5, atol=0)


def test_projections(tmp_path: Path) -> None:
    """Estimates are summed up as the cells have them; batch gradients are not to be had."""
    path = Training(mlp).record(tmp_path / "run", project=3)
    build(path)
    found = compare_with_cells(path, 1)
    assert found.left_out["grad"] == "random projections were recorded (project=)" == found.left_out["exponents"]


def test_some_layers(tmp_path: Path) -> None:
    path = Training(mlp).record(tmp_path / "run", layers="2.*")
    build(path)
    found = compare_with_cells(path, 1)
    whole, counts = found.epochs("sum_g", 0, 1), found.exponents(0, 12)
    assert whole is not None and np.isnan(whole[:35]).all() and not np.isnan(whole[35:]).any()
    assert counts is not None and (counts[:, :2] == -1).all() and (counts[:, 2:] >= 0).all()


def test_batch_coupled(tmp_path: Path) -> None:
    path = Training(lambda: problems.mlp(6, 5, 3, batch_norm=True)).record(tmp_path / "run")
    build(path)
    compare_with_cells(path, 1)


def test_no_classes(tmp_path: Path) -> None:
    training = Training(mlp, torch.randn(SIZE, 3))
    path = training.record(tmp_path / "run")
    build(path)
    found = compare_with_cells(path, 1)
    assert found.left_out["classes"] == "the visits have no classes" and found.classes("sum_g", 0, 1) is None


def test_too_many_classes(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(plan, "INDEX_CLASSES", 2)
    path = Training(mlp).record(tmp_path / "run")
    build(path)
    assert compare_with_cells(path, 1).left_out["classes"] == "3 classes are more than 2"


def test_classes_of_a_large_layer(tmp_path: Path, monkeypatch: Any) -> None:
    path = Training(mlp).record(tmp_path / "run")
    monkeypatch.setattr(plan, "SUMS_BYTES", 16 * 3 * 35 - 1)  # the first layer has 35 parameters
    assert "too much memory" in build(path).left_out["classes"]


def test_too_large(tmp_path: Path, monkeypatch: Any) -> None:
    path = Training(mlp).record(tmp_path / "run", weights="every")
    monkeypatch.setattr(plan, "LARGEST_BYTES", 53 * 2 * 24)
    build(path)
    assert opened(path).left_out == {}
    monkeypatch.setattr(plan, "LARGEST_BYTES", 53 * 2 * 24 - 1)
    entry.drop(path)
    assert set(build(path).left_out) == {"epochs", "classes", "exponents"}
    assert opened(path).zones() is not None and opened(path).epochs("sum_g", 0, 1) is None


def test_ignored_targets(tmp_path: Path) -> None:
    """Visits of no class count in the sums of an epoch and in no class."""
    training = Training(mlp)
    training.y[::3] = -100
    path = training.record(tmp_path / "run")
    build(path)
    found = opened(path)
    classes, whole = found.classes("sum_abs_g", 0, 1), found.epochs("sum_abs_g", 0, 1)
    assert classes is not None and whole is not None and len(classes) == 3
    assert np.allclose(classes.sum(0), whole, rtol=1e-5, atol=0)


def test_unknown_scale(tmp_path: Path) -> None:
    """Without a loss function sums are of contributions, and say so."""
    training = Training(mlp)
    path, loss_fn = tmp_path / "run", training.loss_fn
    with nbdyn.record(path, training.model, training.optimizer) as rec:
        for x, y in rec.watch(DataLoader(TensorDataset(training.x, training.y), BATCH)):
            training.optimizer.zero_grad()
            loss_fn(training.model(x), y).backward()
            training.optimizer.step()
    build(path)
    found, cells = opened(path), Gradients(Store(path))[:, :].dense()
    assert not found.own
    assert_close(found.epochs("sum_abs_g", 0, 0), cells.values.astype(float), "sum_abs", [53])


def test_without_single_samples(tmp_path: Path) -> None:
    path = Training(mlp).record(tmp_path / "run", per_sample=False)
    done = build(path)
    assert set(done.sizes) == {"zones"} and set(done.left_out) == {"epochs", "classes", "exponents", "events"}
    assert "without epochs: no per-sample gradients were recorded" in str(done)
    assert opened(path).zones() is not None and opened(path).exponents(0, 1) is None


def test_no_steps(tmp_path: Path) -> None:
    with pytest.raises(NbdynError, match="run holds no steps yet"):
        build(Recording(tmp_path / "run", []).uri)


# Growing, killed, damaged -------------------------------------------------------------------------------------------


def test_resumed(tmp_path: Path) -> None:
    """An epoch cut short, its index, more epochs: what is missing is added, and equals what is built at once."""
    training = Training(mlp)
    path = training.record(tmp_path / "run", 2, 3, weights="every")
    assert build(path).first == 0
    before = opened(path)
    training.record(tmp_path / "run", 2, 4, mode="resume", weights="every")
    store = Store(path)
    late = opened(path)
    assert late.steps == before.steps < store.steps_committed and late.epochs("sum_g", 0, 0) is not None
    known = set(store.read_steps(before.steps, store.steps_committed)["epoch"].tolist())
    for epoch in known:
        assert late.epochs("sum_g", 0, epoch) is None and late.classes("sum_g", 0, epoch) is None
    assert late.exponents(0, before.steps + 1) is None
    written = files(path)
    assert build(path).first == before.steps
    assert files(path).items() >= {name: x for name, x in written.items() if "__group" not in name}.items()
    added = opened(path)
    last = max(known)
    compare_with_cells(path, last)
    shutil.copytree(path, tmp_path / "anew")
    entry.drop(str(tmp_path / "anew"))
    build(tmp_path / "anew")
    anew = opened(tmp_path / "anew")
    for name in EPOCH_FIELDS:
        a, b = added.epochs(name, 0, last), anew.epochs(name, 0, last)
        assert a is not None and b is not None and np.allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(a).max())
    assert np.array_equal(added.exponents(0, store.steps_committed), anew.exponents(0, store.steps_committed))
    for level in (0, 1):
        a, b = added.zones(level), anew.zones(level)
        assert a is not None and b is not None
        assert all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))
    assert "up to date" in str(build(path))


def test_a_new_class_builds_anew(tmp_path: Path) -> None:
    training = Training(mlp)
    training.y.clamp_(max=1)
    path = training.record(tmp_path / "run", 1)
    build(path)
    training.y[0] = 2
    training.record(tmp_path / "run", 1, mode="resume")
    assert build(path).first == 0
    classes = opened(path).classes("sum_abs_g", 0, 0)
    assert classes is not None and len(classes) == 3


class Killed(BaseException):
    """Not an error that anything catches."""


@pytest.mark.parametrize("place", ["_write_zones", "commit"])
def test_killed(place: str, mlp_run: Any, monkeypatch: Any) -> None:
    """A killed build leaves the former indexes, or none; gc removes what it left, and the next build is whole."""
    training, path = mlp_run
    before = opened(path)
    sums = before.epochs("sum_abs_g", 0, 1)

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    def build_killed() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(entry if place == "commit" else build_module, place, kill)
            with pytest.raises(Killed):
                build(path)

    training = copy.deepcopy(training)
    training.record(Path(path), 1, mode="resume")
    build_killed()  # what it would have added is invisible
    late = opened(path)
    assert late.steps == before.steps and np.array_equal(late.epochs("sum_abs_g", 0, 1), sums)
    assert verify.verify(path).empty
    verify.gc(path)
    assert opened(path).steps == before.steps and len(verify.gc(path)) == 0
    assert build(path).first == before.steps
    entry.drop(path)
    build_killed()  # the first build
    assert open_index(Store(path)) is None and verify.verify(path).empty
    assert len(verify.gc(path)) == 1 and not (Path(path) / SUMMARY).exists() and len(verify.gc(path)) == 0
    assert build(path).first == 0
    compare_with_cells(path, 1)


def test_killed_again_and_again(mlp_run: Any, monkeypatch: Any) -> None:
    """Without gc between: a build removes what a killed one left."""
    training, path = mlp_run
    copy.deepcopy(training).record(Path(path), 1, mode="resume")
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(build_module, "levels_of", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                build(path)
    build(path)
    compare_with_cells(path, 1)
    assert len(verify.gc(path)) == 0


@pytest.mark.parametrize("name", entry.NAMES)
def test_damaged(name: str, mlp_run: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("nbdyn.store.index.read.CHECK_BYTES", 1)
    _, path = mlp_run
    data = max((Path(path) / SUMMARY / name / "__fragments").rglob("a*.tdb"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 255
    data.write_bytes(content)
    with pytest.raises(CorruptRun, match=f"`python -m nbdyn index {path}` builds them anew"):
        opened(path).check()
    assert verify.verify(path)["array"].tolist() == [SUMMARY]
    assert build(path).first == 0
    assert verify.verify(path).empty
    compare_with_cells(path, 1)


def test_lost_array(mlp_run: Any) -> None:
    _, path = mlp_run
    shutil.rmtree(Path(path) / SUMMARY / "exponents")
    with pytest.raises(CorruptRun, match="builds them anew"):
        opened(path).exponents(0, 5)
    build(path)
    assert opened(path).exponents(0, 5) is not None


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 1}', '{"version": 1, "steps": -1}', "7"])
def test_damaged_entry(text: str, mlp_run: Any) -> None:
    _, path = mlp_run
    metadata.write_metadata(path, context(path), **{SUMMARY: text})
    with pytest.raises(CorruptRun, match="builds them anew"):
        open_index(Store(path))
    assert verify.verify(path)["array"].tolist() == [SUMMARY] and len(verify.gc(path)) == 0
    build(path)
    compare_with_cells(path, 1)


def test_another_version(mlp_run: Any, monkeypatch: Any) -> None:
    _, path = mlp_run
    monkeypatch.setattr(entry, "VERSION", 2)
    assert open_index(Store(path)) is None and verify.verify(path).empty and len(verify.gc(path)) == 0
    assert build(path).first == 0


def test_at_close_if_it_does_not_take_long(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """The time is of the visits' cells, and of layers with several positions of each of them."""
    monkeypatch.setattr(sink, "INDEX_BYTES", 0)
    monkeypatch.setattr(plan, "CELL_SECONDS", 1e-3)
    monkeypatch.setattr(plan, "PLACE_SECONDS", 1.0)
    monkeypatch.setattr(sink, "INDEX_SECONDS", SIZE * 53e-3 * 1.01)  # an MLP of (6 + 1) x 5 + (5 + 1) x 3 weights
    store = Store(Training(mlp).record(tmp_path / "short", 1))
    assert plan.seconds(store) == pytest.approx(SIZE * 53e-3) and open_index(store) is not None
    monkeypatch.setattr(nbdyn.options, "quiet", False)
    store = Store(Training(mlp).record(tmp_path / "long", 2))
    assert open_index(store) is None and f"python -m nbdyn index {tmp_path / 'long'}" in capsys.readouterr().out
    of_inner, of_head = SIZE * (3 + 1) * 5 * 2, SIZE * (10 + 1) * 3 * 1e-3  # two positions; one
    assert plan.seconds(Store(Training(sequence).record(tmp_path / "two", 1))) == pytest.approx(of_inner + of_head)


def test_a_live_writer(mlp_run: Any) -> None:
    _, path = mlp_run
    held = lock.WriterLock(path)
    with pytest.raises(RunBusy, match="this process"):
        build(path)
    build(path, locked=True)
    held.release()


def test_the_run_can_be_deleted(mlp_run: Any) -> None:
    _, path = mlp_run
    verify.delete(path)
    assert not Path(path).exists()


def test_command(tmp_path: Path, capsys: Any) -> None:
    path = Training(mlp).record(tmp_path / "run", weights="every")
    capsys.readouterr()
    assert main(["index", path]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("indexes of steps 0..11: epochs ") and "zones" in shown and shown.endswith(" s).\n")
    assert main(["index", path]) == 0
    assert capsys.readouterr().out.endswith("; they are up to date.\n")
    done = index(path)
    assert isinstance(done, Summary) and done.first == done.steps == 12
    assert main(["index", str(tmp_path)]) == 1
