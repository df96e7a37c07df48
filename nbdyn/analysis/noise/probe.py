"""A probe: the network put back to recorded weights, and the gradient of every sample of some data there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from nbdyn.analysis.lca.network import copied, flatten, unhooked
from nbdyn.analysis.lca.samples import Samples
from nbdyn.analysis.noise.sampled import Sums
from nbdyn.analysis.noise.split import Part, Split, add_along, add_squares, splits
from nbdyn.errors import Incompatible
from nbdyn.recorder.arena import Arena
from nbdyn.recorder.capture.capture import Capture, captured_block
from nbdyn.recorder.capture.options import CaptureOptions, check_capturable
from nbdyn.recorder.describe import clean_name, named_parameters, tensor_entries
from nbdyn.recorder.losses import Evaluator
from nbdyn.recorder.watch import Batch
from nbdyn.store import closed

CHUNK_BYTES, FIRST_CHUNK, LARGEST_CHUNK = 64_000_000, 32, 1024
"""Samples that go through the network together: so many that their factors take about this, after a first few."""
PROGRESS_SAMPLES = 20_000
"""From so many samples on a bar is shown."""


class Probe:
    """Gradients of single samples at any weights, by the machinery that records them in training.

    The network is in eval mode: dropout is off, batch normalization uses running statistics, so that samples do not
    depend on each other. A sample's gradient g_s is that of its own loss, scaled so that the mean over all samples is
    the gradient of the loss over all of them (of a loss that is a sum: its own loss).

    Args:
        model: the network; it is copied.
        loss_fn: called as loss_fn(outputs, targets).
        samples: the data, in memory.
        trained: which tensors were; of others there is no noise.
        progress: whether a bar is shown.

    Raises:
        Incompatible: if the loss gives no loss for single samples, the network cannot be hooked, or its samples depend
            on each other in eval mode, too.
    """

    def __init__(
        self, model: nn.Module, loss_fn: Any, samples: Samples, trained: Sequence[bool], progress: bool = True
    ) -> None:
        self._model = copied(model).eval()
        self._check_is_apart()
        self.samples = samples
        self._progress = progress and len(samples) >= PROGRESS_SAMPLES
        self._flat, self._grad = flatten(self._model)
        named = named_parameters(self._model)
        for (_, p), is_trained in zip(named, trained, strict=True):
            p.requires_grad_(is_trained)
        self.tensors = [entry for entry in tensor_entries(named) if entry["trainable"]]
        check_capturable(self._model, CaptureOptions(), self.tensors)
        self._arena = Arena(self._flat.device)
        parameters = [p for _, p in named if p.requires_grad]
        self._capture = Capture(
            self._model, self.tensors, parameters, CaptureOptions(), self._arena, [], lambda key, text: None
        )
        for p in parameters:
            p.register_post_accumulate_grad_hook(lambda p: self._capture.accumulated(p, fresh=True))
        layers = list(dict.fromkeys(t["layer"] for t in self.tensors))
        self._layers = tuple(layers)
        self._firsts = np.array([t["first"] for t in self.tensors])
        self._layer_of = np.array([layers.index(t["layer"]) for t in self.tensors])
        self._layer_at = np.full(len(self._flat), -1)
        for tensor, layer in zip(self.tensors, self._layer_of, strict=True):
            self._layer_at[tensor["first"] : tensor["first"] + tensor["size"]] = layer
        self._loss_fn, self._evaluate = unhooked(loss_fn), Evaluator(loss_fn)
        self.is_uneven = False  # whether samples count differently in the mean
        self._weight = self._weight_of_all()
        self._chunk = min(FIRST_CHUNK, len(samples))

    def layers(self) -> dict[str, np.ndarray]:
        """Which parameters belong to each layer, and "all" to the network."""
        return {name: np.flatnonzero(self._layer_at == i) for i, name in enumerate(self._layers)} | {
            "all": np.flatnonzero(self._layer_at >= 0)
        }

    def _check_is_apart(self) -> None:
        """Raise Incompatible if batch normalization has no running statistics: it couples samples in eval mode, too."""
        for name, module in self._model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
                raise Incompatible(
                    f"{name} normalizes with the statistics of each batch (track_running_stats=False): samples have no "
                    'gradients of their own; sampled="steps" takes those of batches.'
                )

    @property
    def has_batch_norm(self) -> bool:
        """Whether layers of the network couple the samples of a batch in training."""
        return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self._model.modules())

    @property
    def is_random(self) -> bool:
        """Whether layers of the network are random in training."""
        kinds = nn.modules.dropout._DropoutNd
        shares = [m.p if isinstance(m, kinds) else getattr(m, "dropout", 0.0) for m in self._model.modules()]
        return any(isinstance(share, float) and share > 0 for share in shares)  # a user's .dropout may be a module

    @property
    def left_out(self) -> dict[str, str]:
        """Tensor -> why its gradients were not split into samples; known after a pass."""
        return dict(self._capture.batch_only)

    @property
    def _missing(self) -> np.ndarray:
        return np.isin([t["name"] for t in self.tensors], list(self.left_out))

    def is_split(self, indices: np.ndarray) -> np.ndarray:
        """Which parameters' gradients were split into samples, (k,) bool; known after a pass."""
        return ~self._missing[np.searchsorted(self._firsts, indices, side="right") - 1]

    @torch.no_grad()
    def go_to(self, weights: np.ndarray, buffers: dict[str, torch.Tensor]) -> None:
        """Put the network to some weights, (P,), and buffers."""
        self._flat.copy_(torch.from_numpy(np.ascontiguousarray(weights)))
        for name, buffer in self._model.named_buffers():
            value = buffers.get(clean_name(name))
            if value is not None:
                buffer.copy_(value)

    def gradient(self, where: np.ndarray | slice) -> np.ndarray:
        """The mean gradient of some samples, (P,), in the network's type. Cost: one pass over them."""
        self._capture.begin(None)
        with torch.enable_grad():
            self._backward(where)
        size = len(self.samples.targets[where])
        return (self._grad / size).cpu().numpy()

    def pass_over(self, chosen: np.ndarray, words: str) -> tuple[np.ndarray, Sums]:
        """Every sample's gradient at the network's weights.

        Cost: two forward and backward passes over all samples, and their factors.

        Args:
            chosen: global indices of coordinates, (k,).
            words: what the bar says.

        Returns:
            The gradients' chosen coordinates (n, k) in the network's type, NaN where they could not be split; and sums
            over all coordinates of each layer (step 0), NaN for layers of which something could not.
        """
        n, layers = len(self.samples), len(self._layers)
        values = np.zeros((n, len(chosen)), np.float64 if self._flat.dtype == torch.float64 else np.float32)
        squares, along = np.zeros((n, layers)), np.zeros((n, layers))
        total = torch.zeros_like(self._flat, dtype=torch.float64)
        for where, parts in self._chunks(f"{words}: gradients"):
            total += self._grad
            for site, block in parts:
                runs = [(chosen >= first) & (chosen < first + size) for first, size in site.runs]
                columns = np.flatnonzero(np.any(runs, axis=0))
                if len(columns):
                    values[where, columns] += closed.cells(site, block, chosen[columns])
            for split in self._splits(parts):
                add_squares(split, self._layer_at, squares[where])
        mean = total.cpu().numpy() / n
        for where, parts in self._chunks(f"{words}: along the mean"):
            for split in self._splits(parts):
                add_along(split, self._layer_at, mean, along[where])
        mean_square = np.array([np.square(mean[self._layer_at == layer]).sum() for layer in range(layers)])
        holes = np.unique(self._layer_of[self._missing])
        squares[:, holes], along[:, holes], mean_square[holes] = np.nan, np.nan, np.nan
        values[:, ~self.is_split(chosen)] = np.nan
        return values, Sums(0, self._layers, squares, along, mean_square)

    def _splits(self, parts: list[Part]) -> list[Split]:
        return splits(parts, self._firsts, self._layer_of)

    def _chunks(self, words: str) -> Iterator[tuple[slice, list[Part]]]:
        """All samples, some at a time: their places and the factors that a backward pass left."""
        done, n = 0, len(self.samples)
        with tqdm(total=n, desc=words, leave=False, disable=not self._progress) as bar:
            while done < n:
                where = slice(done, min(n, done + self._chunk))
                parts = self._factors(where)
                yield where, parts
                size = sum(x.nbytes for _, block in parts for x in block.tensors.values()) // (where.stop - done)
                self._chunk = int(np.clip(CHUNK_BYTES // max(1, size), 1, LARGEST_CHUNK))
                self._arena.release(self._arena.hold())
                bar.update(where.stop - done)
                done = where.stop

    def _factors(self, where: slice) -> list[Part]:
        """What each use of a parameter leaves of some samples."""
        batch = Batch(None, where.stop - where.start, 0, 0)
        self._capture.begin(batch, whole=True)
        with torch.enable_grad():
            self._backward(where)
        entries = self._capture.collect(0, [batch], [1.0])
        self._capture.forget_gradients()
        self._capture.begin(None)
        self._arena.wait()
        kept = [entry for entry in entries if not self._capture.is_batch_only(entry.site)]
        return [(self._capture.sites[entry.site], captured_block(entry)) for entry in kept]

    def _backward(self, where: np.ndarray | slice) -> None:
        """The sum of some samples' gradients, into the flat gradient."""
        self._grad.zero_()
        index = where if isinstance(where, slice) else torch.from_numpy(where)
        self._losses(index).sum().backward()

    def _losses(self, where: Any) -> torch.Tensor:
        """Losses of some samples, (n,), whose gradients are the g_s."""
        device = self._flat.device
        outputs = self._model(self.samples.inputs[where].to(device))
        targets = self.samples.targets[where].to(device)
        if self._evaluate.unreduced is None:
            return torch.func.vmap(self._loss_fn)(outputs.unsqueeze(1), targets.unsqueeze(1))
        elements = self._evaluate.unreduced(outputs, targets)
        if elements.ndim == 0 or elements.numel() % len(targets):
            raise Incompatible("the loss function gives no loss for each sample; give one of torch.nn's losses.")
        elements = elements.reshape(len(targets), -1)
        return (elements.sum(1) if self._evaluate.adds_up else elements.mean(1)) * self._weight

    def _weight_of_all(self) -> float:
        """What a sample's own loss is multiplied by: class weights and ignored targets count as in the whole's mean."""
        targets = self.samples.targets
        if self._evaluate.unreduced is None:
            self._check_is_mean()
            return 1.0
        if self._evaluate.is_sum:
            return 1.0
        shares = self._evaluate.shares(targets.to(self._flat.device), len(targets))
        self.is_uneven = bool((shares != shares[0]).any())
        return len(targets) / float(shares.sum())

    @torch.no_grad()
    def _check_is_mean(self) -> None:
        """Raise Incompatible unless a loss without a form for single samples is the mean of theirs."""
        some = torch.linspace(0, len(self.samples) - 1, min(len(self.samples), 64)).long()
        device = self._flat.device
        outputs, targets = self._model(self.samples.inputs[some].to(device)), self.samples.targets[some].to(device)
        whole = self._loss_fn(outputs, targets)
        try:
            alone = torch.func.vmap(self._loss_fn)(outputs.unsqueeze(1), targets.unsqueeze(1))
        except RuntimeError as error:
            raise Incompatible(f"the loss of single samples cannot be computed ({error}); give a torch.nn loss.") from (
                error
            )
        if whole.ndim or not torch.isclose(whole, alone.mean(), rtol=1e-4, atol=1e-7):
            raise Incompatible(
                "the loss of a batch is not the mean of its samples' losses, so that it has no gradients of single "
                "samples; give a torch.nn loss."
            )
