"""The loss of a whole data set as a function of a network's weights, and its gradient: what LCA integrates."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from nbdyn.analysis.lca.network import copied, flatten, live_buffers, unhooked
from nbdyn.analysis.lca.samples import Samples
from nbdyn.errors import Incompatible, NbdynError
from nbdyn.recorder.describe import clean_name
from nbdyn.recorder.losses import Evaluator

BATCH_NORM = ("batch", "running")
DROPOUT = ("off", "fixed")
FIRST_CHUNK, LARGEST_CHUNK = 256, 16_384
"""Chunks are tried from the smallest on, doubled while that is faster."""
FASTER = 0.97
COUPLED_CHUNK = 5_000
"""Samples whose batch statistics are taken together, where none is given: the paper's for CIFAR."""
_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Value:
    """The loss at some weights, and its gradient.

    Attributes:
        loss: L, in the units of the loss function (nats for cross-entropy).
        grad: dL/dw, (P,); None if it was not asked for.
        losses: of each group of samples: the mean over the group, (G,). L is their mean weighted by `Objective.shares`.
        grads: of each group, (G, P); None without groups, or if the gradient was not asked for.
    """

    loss: float
    grad: np.ndarray | None
    losses: np.ndarray
    grads: np.ndarray | None = None


class Objective:
    """L(w): the loss over all of some samples at weights w, with gradient, as one deterministic function.

    The loss is what the loss function says of all samples at once (for reduction "mean" with class weights or
    ignored targets: one weighted mean over everything, not a mean of means); single losses are added in float64.
    Regularizers that the optimizer adds (weight decay) are not in it.

    Args:
        model: the network; it is copied.
        loss_fn: called as loss_fn(model(inputs), targets).
        samples: the data, in memory.
        batch_norm: "batch": batch statistics of fixed chunks of `chunk` samples in the order of the data, as in the
            paper; L then depends on the chunks. "running": the running statistics, see `load_buffers`.
        dropout: "off", or "fixed": on, with the same masks in every evaluation.
        chunk: samples that go through the network together; None: measured, or everything under batch statistics.
        seed: of fixed dropout masks.

    Raises:
        Incompatible: if the loss is no mean or sum over samples, or the network is random.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Any,
        samples: Samples,
        *,
        batch_norm: str = "batch",
        dropout: str = "off",
        chunk: int | None = None,
        seed: int = 0,
    ) -> None:
        self.batch_norm, self.dropout, self._seed = batch_norm, dropout, seed
        self._model = copied(model)
        norms = self._set_modes()
        self.has_batch_norm = bool(norms)
        self.coupled = any(norm.training or norm.running_mean is None for norm in norms)
        self._live = live_buffers(self._model)
        self.samples = samples.in_order() if self.coupled else samples
        self._loss_fn, self._evaluate = unhooked(loss_fn), Evaluator(loss_fn)
        self._flat, self._grad = flatten(self._model)
        self.device = self._flat.device
        self.gradients = self.evaluations = 0
        self.seconds = 0.0
        with self._as_alone():
            self._weight, self.shares = self._weights()
        self._check_deterministic()
        if chunk is not None and chunk < 1:
            raise NbdynError(f"chunk={chunk}: samples at a time, at least 1.")
        self._chunk = chunk or (min(len(samples), COUPLED_CHUNK) if self._chunks_matter else None)

    @property
    def chunk(self) -> int:
        """Samples that go through the network together; measured at first use where they do not define the loss."""
        if self._chunk is None:
            self._chunk = self._fastest_chunk()
        return self._chunk

    @property
    def _chunks_matter(self) -> bool:
        """Whether the loss depends on the chunks: by batch statistics, or masks that are drawn for each."""
        return self.coupled or self.dropout == "fixed"

    @property
    def has_live_buffers(self) -> bool:
        """Whether the loss depends on buffers of the network."""
        return bool(self._live)

    @property
    def epsilon(self) -> float:
        """Of the network's arithmetic."""
        return torch.finfo(self._flat.dtype).eps

    @property
    def parameters(self) -> int:
        """How many parameters the network has."""
        return len(self._flat)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of weights and gradients: float32, or float64 where the network is."""
        return np.dtype(np.float64 if self._flat.dtype == torch.float64 else np.float32)

    def load_buffers(self, values: dict[str, torch.Tensor]) -> bool:
        """Put buffers (running statistics) into the network; whether any of them was another before."""
        changed = False
        with torch.no_grad():
            for name, buffer in self._model.named_buffers():
                value = values.get(clean_name(name)) if clean_name(name) in self._live else None
                if value is not None and not torch.equal(buffer, value.to(buffer.device)):
                    buffer.copy_(value)
                    changed = True
        return changed

    def __call__(self, weights: np.ndarray, gradient: bool = True) -> Value:
        """Evaluate at some weights, (P,) of any float type.

        Cost: forward (and backward) of all samples. With groups the same: each chunk holds samples of one group,
        unless batch statistics couple them, when every group takes one backward pass more.
        """
        began = time.perf_counter()
        with torch.no_grad():
            self._flat.copy_(torch.from_numpy(np.ascontiguousarray(weights)))
        groups = max(1, self.samples.groups)
        losses = np.zeros(groups)
        sums = [torch.zeros_like(self._flat, dtype=torch.float64) for _ in range(groups)] if gradient else []
        with self._as_alone(), torch.set_grad_enabled(gradient):
            for group, where in self._chunks():
                per_sample = self._losses(where)
                if group >= 0:
                    losses[group] += self._add(per_sample.sum(), sums, group, last=True)
                    continue
                members = self.samples.group[where]
                present = np.unique(members).tolist()
                for number in present:
                    some = torch.from_numpy(members == number).to(self.device)
                    losses[number] += self._add(per_sample[some].sum(), sums, number, last=number == present[-1])
        self.evaluations += 1
        self.gradients += gradient
        value = self._value(losses, [s.cpu().numpy() for s in sums])
        self.seconds += time.perf_counter() - began
        return value

    def _value(self, losses: np.ndarray, sums: list[np.ndarray]) -> Value:
        """L and its gradient from sums over the samples of each group."""
        total = float(losses.sum())
        grad = None if not sums else (sums[0] if len(sums) == 1 else np.add.reduce(sums)).astype(self.dtype)
        if not self.samples.groups:
            return Value(total, grad, losses)
        of_group = np.divide(1.0, self.shares, out=np.zeros(len(losses)), where=self.shares > 0)
        grads = None if not sums else np.stack([s * f for s, f in zip(sums, of_group, strict=True)]).astype(self.dtype)
        return Value(total, grad, losses * of_group, grads)

    def _add(self, loss: torch.Tensor, sums: list[torch.Tensor], group: int, last: bool) -> float:
        """Add the gradient of a sum of losses to a group's."""
        if sums:
            self._grad.zero_()
            loss.backward(retain_graph=not last)
            sums[group].add_(self._grad)
        return float(loss.detach())

    def _chunks(self) -> Iterator[tuple[int, slice]]:
        """(group or -1 for several, samples) of each chunk, in order."""
        edges = [0, len(self.samples)] if self.coupled or not self.samples.groups else self.samples.edges.tolist()
        several = self.coupled and self.samples.groups > 0
        for group, (start, stop) in enumerate(itertools.pairwise(edges)):
            firsts = list(range(start, stop, self.chunk))
            if self.coupled and len(firsts) > 1 and stop - firsts[-1] == 1:  # one sample has no batch statistics
                firsts.pop()
            for first, last in itertools.pairwise([*firsts, stop]):
                yield (-1 if several else group), slice(first, last)

    def _losses(self, where: slice) -> torch.Tensor:
        """What each of some samples adds to L, (n,) float64; differentiable."""
        outputs = self._model(self.samples.inputs[where].to(self.device))
        targets = self.samples.targets[where].to(self.device)
        size = where.stop - where.start
        if self._evaluate.unreduced is None:
            return self._mean_losses(outputs, targets, where)
        elements = self._evaluate.unreduced(outputs, targets).double()
        if elements.numel() % size:
            raise Incompatible("the loss function gives no loss for each sample; give one of torch.nn's losses.")
        elements = elements.reshape(size, -1)
        return (elements.sum(1) if self._evaluate.adds_up else elements.mean(1)) * self._weight

    def _mean_losses(self, outputs: Any, targets: torch.Tensor, where: slice) -> torch.Tensor:
        """Of a loss that only gives means: each sample counts the mean over its group."""
        size = where.stop - where.start
        if not (self.coupled and self.samples.groups):  # a chunk is of one group
            return (self._loss_fn(outputs, targets).double() * self._weight).expand(size)
        losses = torch.empty(size, dtype=torch.float64, device=self.device)
        for group in np.unique(self.samples.group[where]):
            some = torch.from_numpy(np.flatnonzero(self.samples.group[where] == group)).to(self.device)
            losses[some] = self._loss_fn(outputs[some], targets[some]).double() * self._weight
        return losses

    def _weights(self) -> tuple[float, np.ndarray]:
        """What a sample's loss counts in L, and what the mean loss of each group does, (groups or 1,).

        For sums a sample counts 1; for means 1 over all shares (class weights, say).
        """
        size, targets = len(self.samples), self.samples.targets
        shares = np.ones(size)
        if self._evaluate.unreduced is None:
            self._check_is_mean()
        elif not self._evaluate.is_sum:
            shares = self._evaluate.shares(targets.to(self.device), size).cpu().numpy()
        weight = 1.0 if self._evaluate.is_sum else 1 / shares.sum()
        groups = np.bincount(self.samples.group, shares, self.samples.groups) if self.samples.groups else shares.sum()
        return weight, np.atleast_1d(groups * weight)

    @torch.no_grad()
    def _check_is_mean(self) -> None:
        """Raise Incompatible unless a loss without a form for single samples is a mean over samples."""
        # From all over the data: its first samples may be of one class.
        size = min(len(self.samples), 64)
        spread = torch.linspace(0, len(self.samples) - 1, size).long()
        inputs, targets = self.samples.inputs[spread].to(self.device), self.samples.targets[spread].to(self.device)
        outputs, cut = self._model(inputs), size // 3

        def mean(a: int, b: int) -> float:  # batch statistics and dropout masks are those of the whole
            part = outputs[a:b] if self.coupled or self.dropout == "fixed" else self._model(inputs[a:b])
            return float(self._loss_fn(part, targets[a:b]))

        parts = [mean(0, cut), mean(cut, size)] if cut else []
        whole = float(self._loss_fn(outputs, targets))
        of_parts = sum(x * n for x, n in zip(parts, (cut, size - cut), strict=False)) / size
        if parts and math.isfinite(whole) and not math.isclose(whole, of_parts, rel_tol=1e-4, abs_tol=1e-7):
            raise Incompatible(
                "the loss of a batch is not the mean of its parts' losses, so that the loss of the data set is not "
                "defined by chunks; give a loss with a mean over samples, or a torch.nn loss."
            )

    @torch.no_grad()
    def _check_deterministic(self) -> None:
        where = slice(0, min(len(self.samples), 64))
        with self._as_alone():
            first = self._losses(where).sum()
            second = self._losses(where).sum() if self.dropout == "off" else first
        if not torch.isclose(first, second, rtol=1e-6) and not (first.isnan() and second.isnan()):
            raise Incompatible(
                "the network gives another loss when it is evaluated again: it holds a layer that is random in eval "
                "mode. LCA needs one function of the weights; take the randomness out of forward."
            )

    def _fastest_chunk(self) -> int:
        """The chunk size with the least time a sample, measured on the first samples."""
        best, chunk = math.inf, min(FIRST_CHUNK, len(self.samples))
        while True:
            times = [self._time_of(chunk) for _ in range(2)]
            if min(times) > best * FASTER:
                return chunk // 2
            best = min(times)
            if chunk * 2 > min(len(self.samples), LARGEST_CHUNK):
                return chunk
            chunk *= 2

    def _time_of(self, chunk: int) -> float:
        began = time.perf_counter()
        with self._as_alone(), torch.enable_grad():
            loss = self._losses(slice(0, chunk)).sum()
            self._grad.zero_()
            loss.backward()
            float(self._grad[0])  # waits for a GPU
        return (time.perf_counter() - began) / chunk

    def _set_modes(self) -> list[nn.modules.batchnorm._BatchNorm]:
        """Put layers into the modes asked for; those of batch normalization."""
        for name, value, known in (("batch_norm", self.batch_norm, BATCH_NORM), ("dropout", self.dropout, DROPOUT)):
            if value not in known:
                raise NbdynError(f"{name}={value!r}: it is one of {', '.join(map(repr, known))}.")
        self._model.eval()
        norms = [m for m in self._model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms if self.batch_norm == "batch" else ():
            norm.train()
            norm.momentum = 0.0  # batch statistics are used, the recorded running ones stay
        for module in self._model.modules():
            if isinstance(module, _DROPOUT) and self.dropout == "fixed":
                module.train()
        return norms

    @contextmanager
    def _as_alone(self) -> Iterator[None]:
        """The network's own precision whatever the caller's, and fixed masks: the same random numbers everywhere.

        The caller's generator stays as it was.
        """
        with torch.autocast(self.device.type, enabled=False):
            if self.dropout == "off":
                yield
                return
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(self._seed)
                yield

    @functools.cached_property
    def _digest(self) -> str:
        """Of the data: reading gigabytes takes seconds."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (self.samples.inputs, self.samples.targets):
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What defines L, JSON-able: stored with results and compared before one is taken up again."""
        loss = " ".join(_settings(self._loss_fn))
        found = {"samples": len(self.samples), "data": self._digest, "loss": loss, "dropout": self.dropout}
        if self.dropout == "fixed":
            found |= {"masks": self._seed}
        if self.has_batch_norm:
            found |= {"batch_norm": self.batch_norm}
        if self._chunks_matter:
            found |= {"chunk": self.chunk}
        return found | self.samples.describe()


def _settings(loss_fn: Any) -> Iterator[str]:
    """A loss function's name and its settings (reduction, class weights), as far as they show."""
    inner = getattr(loss_fn, "func", loss_fn)  # of a partial
    yield getattr(inner, "__name__", type(inner).__name__)
    settings = dict(getattr(loss_fn, "keywords", {}))
    if isinstance(loss_fn, nn.Module):
        settings |= {name: value for name, value in vars(loss_fn).items() if name[0] != "_" and name != "training"}
        settings |= loss_fn.state_dict()
    for name, value in sorted(settings.items()):
        if isinstance(value, torch.Tensor):
            yield f"{name}={value.tolist()}"
        elif isinstance(value, (bool, int, float, str, type(None))):
            yield f"{name}={value}"
