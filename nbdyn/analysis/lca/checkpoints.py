"""Weights from a folder of checkpoints, as the allocation of loss changes reads them: one flat row at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from nbdyn.analysis.lca import checkpoint_files
from nbdyn.errors import Incompatible, NbdynError, nearest
from nbdyn.recorder.describe import clean_name, named_parameters, row_dtype, tensor_entries

if TYPE_CHECKING:
    from nbdyn.analysis.lca.precision import Precision
    from nbdyn.analysis.lca.result import Allocation

STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")
"""Under which a checkpoint may keep the model's state, if not at its top."""
PREFIXES = ("module.", "model.")
"""What DistributedDataParallel and a model inside a LightningModule put before every name."""


def from_checkpoints(
    folder: str | Path,
    model: nn.Module,
    *,
    pattern: str | None = None,
    steps: Sequence[int] | Callable[[str], int] | None = None,
) -> Checkpoints:
    """The checkpoints in a folder, in the order of their steps.

    Found are `*.pt`, `.pth`, `.ckpt`, `.bin`, `.safetensors` in the folder and, one folder deeper,
    `checkpoint-500/model.safetensors` or `pytorch_model.bin`. The step is the number after "step" in the name
    (`epoch=3-step=880.ckpt`), else its last number. The state of the model is at the top of a file or under
    `state_dict`, `model_state_dict`, `model` or `module`; `module.`, `model.` before every name and torch.compile's
    `_orig_mod.` are left out where the model's names are without. No code in a file is run.
    Cost: the first checkpoint is read and checked against the model, the others when they are asked for.

    Args:
        folder: where the checkpoints are.
        model: the network whose weights they are; its own weights are neither read nor changed.
        pattern: a glob relative to `folder` in place of the files above, such as "run1/*.pt".
        steps: the step of each file, in the order of their names (numbers in numeric order); or a function from a
            file's name, relative to `folder`, to its step.

    Raises:
        NbdynError: if there are fewer than two checkpoints, a step is unclear or twice there, or a file holds objects
            that only pickle could make.
        CorruptRun: if the first file is damaged.
        Incompatible: if the names or shapes in it are not those of the model.
    """
    folder = Path(folder).expanduser()
    names = checkpoint_files.find(folder, pattern)
    if len(names) < 2:
        raise NbdynError(f"{folder} holds one checkpoint, {names[0]}; a change of the loss is between two or more.")
    numbers = checkpoint_files.steps_of(names, steps)
    order = sorted(range(len(names)), key=numbers.__getitem__)
    found = np.array([numbers[i] for i in order], np.int64)
    return Checkpoints(folder, [names[i] for i in order], found, model)


class Checkpoints:
    """The weights of a model at some steps, each in a file. Made by `from_checkpoints`.

    Only one checkpoint is in memory at a time, and only while it is read.

    Args:
        folder: where the files are.
        files: names relative to `folder`, in the order of `steps`.
        steps: (n,) int64, ascending.
        model: the network.

    Attributes:
        folder, files, steps, model: as above.
        tensors: the tensors in a row, in order, as in a run's `config["tensors"]`: "name", "layer", "shape", "dtype"
            (the model's), "first" (place of the first weight), "size", "trainable". Tied tensors stand there once.
        dtype: of a row: float32, or float64 if a parameter of the model is float64.

    Raises:
        NbdynError, CorruptRun, Incompatible: as `row`, of the first file.
    """

    def __init__(self, folder: Path, files: list[str], steps: np.ndarray, model: nn.Module) -> None:
        parameters = named_parameters(model)
        self.folder, self.files, self.steps, self.model = folder, files, steps, model
        self.tensors = tensor_entries(parameters)
        self.dtype = np.dtype(row_dtype(parameters))
        saved = {clean_name(name) for name in model.state_dict()}
        self._parameters = _all_names(parameters, model.named_parameters(remove_duplicate=False))
        in_model = [(clean_name(name), b) for name, b in model.named_buffers()]
        self._buffers = _all_names(
            [(name, b) for name, b in in_model if name in saved], model.named_buffers(remove_duplicate=False)
        )
        self._values = dict(parameters) | dict(in_model)  # for their shapes and dtypes
        self._allowed = saved | self._values.keys()
        self._last_buffers: tuple[int, dict[str, torch.Tensor]] = (-1, {})
        self._read(0)

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        size = sum(tensor["size"] for tensor in self.tensors)
        return (
            f"<Checkpoints of {type(self.model).__name__}: {len(self)} at steps {self.steps[0]}..{self.steps[-1]}, "
            f"{size:,} parameters, {self.folder}>"
        )

    def row(self, k: int) -> np.ndarray:
        """The weights of a checkpoint as one flat row. Cost: reads the file once.

        Args:
            k: place of the checkpoint in `steps`, 0..n-1.

        Returns:
            (P,) of `dtype`, in the order of `tensors`; half precision widened exactly, float64 rounded to float32
            for a float32 model.

        Raises:
            NbdynError: if there is no such checkpoint, its file cannot be opened or holds objects that only pickle
                could make.
            CorruptRun: if the file is damaged.
            Incompatible: if names or shapes in it are not those of the model.
        """
        state = self._read(k)
        found = np.empty(sum(tensor["size"] for tensor in self.tensors), self.dtype)
        for tensor in self.tensors:
            flat = state[tensor["name"]].reshape(-1).to(getattr(torch, self.dtype.name))
            found[tensor["first"] : tensor["first"] + tensor["size"]] = flat.numpy()
        return found

    @property
    def extent(self) -> list[int]:
        """The steps that there are."""
        return self.steps.tolist()

    @property
    def buffers_from(self) -> str:
        """Where buffers (running statistics) are taken from."""
        return "checkpoints"

    @property
    def labels(self) -> list[int]:
        """The steps, as results store them."""
        return self.steps.tolist()

    def rows(self, first: int) -> Iterator[np.ndarray]:
        """The weights of the checkpoints from place `first` on, one after the other; see `row`."""
        for k in range(first, len(self)):
            yield self.row(k)

    def lca(
        self,
        data: Any,
        loss_fn: Any,
        *,
        classes: bool = False,
        subset: int | None = None,
        precision: Precision | None = None,
        batch_norm: str = "batch",
        dropout: str = "off",
        chunk: int | None = None,
        cells: bool | str | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> Allocation:
        """Loss Change Allocation along the straight lines between the checkpoints; arguments as of `nbdyn.Run.lca`.

        Training went another way between two checkpoints: the sum is still the change of the loss between them, exact
        within the tolerance, but what goes to which parameter is that of the straight line. Far-apart checkpoints
        take more gradients (refinement halves where the loss bends most). The result is in memory.

        Raises:
            NbdynError, CorruptRun, Incompatible: as `row`; as `nbdyn.Run.lca`.
        """
        from nbdyn.analysis.lca.asked import Asked
        from nbdyn.analysis.lca.of_run import of_path

        asked = Asked(classes, subset, precision, batch_norm, dropout, chunk, cells, seed)
        return of_path(self, self.model, data, loss_fn, self.tensors, self.folder.name, asked, progress)

    def buffers(self, k: int) -> dict[str, torch.Tensor]:
        """The buffers of a checkpoint (running statistics) by name, in the model's dtypes, on the CPU.

        Buffers that the model does not save are not among them. Cost: nothing after `row(k)`, else reads the file.

        Raises:
            NbdynError, CorruptRun, Incompatible: as `row`.
        """
        if self._last_buffers[0] != index(k):
            self._read(k)
        return {name: value.clone() for name, value in self._last_buffers[1].items()}

    def _read(self, k: int) -> dict[str, torch.Tensor]:
        """The checked tensors of a checkpoint by the model's names."""
        if not 0 <= index(k) < len(self):
            raise NbdynError(f"there is no checkpoint {k}; there are 0..{len(self) - 1}, at the steps in .steps.")
        path = self.folder / self.files[k]
        found = checkpoint_files.mappings_of_tensors(checkpoint_files.load(path), STATE_KEYS)
        if not found:
            keys = ", ".join(f'"{key}"' for key in STATE_KEYS)
            raise Incompatible(f"{path} holds no weights by name, neither at its top nor under {keys}.")
        state = self._state_that_fits(found)
        self._check_names(path, state)
        wanted = self._parameters | self._buffers
        chosen = {name: self._one_of(path, state, names) for name, names in wanted.items()}
        buffers = {name: chosen[name].to(self._values[name].dtype, copy=True) for name in self._buffers}
        self._last_buffers = (index(k), buffers)
        return chosen

    def _state_that_fits(self, found: list[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Of several mappings, with and without prefixes, the one with most of the model's names and fewest others."""
        candidates = [names for state in found for names in _without_prefixes(state)]
        return max(candidates, key=lambda names: (len(names.keys() & self._allowed), -len(names)))

    def _check_names(self, path: Path, state: dict[str, torch.Tensor]) -> None:
        wanted = self._parameters | self._buffers
        missing = [name for name, names in wanted.items() if not any(n in state for n in names)]
        extra = [name for name in state if name not in self._allowed]
        model = type(self.model).__name__
        if missing:
            like = nearest(missing[0], extra) or nearest(missing[0], state)
            raise Incompatible(
                f"{path} lacks {len(missing)} of the {len(wanted)} tensors of {model}, such as {missing[0]}"
                + (f"; the nearest name in the file is {like}." if like else f"; the file has {_few(list(state))}.")
            )
        if extra:
            like = nearest(extra[0], self._allowed)
            raise Incompatible(
                f"{path} has {len(extra)} tensors that {model} lacks, such as {extra[0]}"
                + (f"; the nearest name in the model is {like}." if like else f"; the model has {_few(list(wanted))}.")
                + " Give the model that the weights are of."
            )

    def _one_of(self, path: Path, state: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
        """The tensor under one of the names of a tied tensor, whose other names must agree with it."""
        present = [name for name in names if name in state]
        value, like = state[present[0]], self._values[names[0]]
        for name in present:
            if state[name].shape != like.shape:
                raise Incompatible(
                    f"{path}: {name} has shape {tuple(state[name].shape)}, the model's {tuple(like.shape)}; give the "
                    "model that the weights are of."
                )
            if state[name].is_floating_point() != like.is_floating_point():
                raise Incompatible(f"{path}: {name} is {state[name].dtype}, the model's {like.dtype}.")
            if not torch.allclose(state[name], value, rtol=0, atol=0, equal_nan=True):
                raise Incompatible(f"{path}: {present[0]} and {name} differ; they are one tensor in the model (tied).")
        return value.detach()


def _all_names(
    once: Sequence[tuple[str, torch.Tensor]], every: Iterator[tuple[str, torch.Tensor]]
) -> dict[str, list[str]]:
    """The name of each tensor -> all names that it has, the first of them itself."""
    names: dict[int, str] = {id(tensor): name for name, tensor in once}
    found: dict[str, list[str]] = {name: [] for name, _ in once}
    for name, tensor in every:
        if id(tensor) in names:
            found[names[id(tensor)]].append(clean_name(name))
    return found


def _without_prefixes(state: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A state dict by the names that it may be meant to have, those with most prefixes first."""
    names = {clean_name(name): value for name, value in state.items()}
    yield names
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in names)), None):
        names = {name.removeprefix(prefix): value for name, value in names.items()}
        yield names


def _few(names: list[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
