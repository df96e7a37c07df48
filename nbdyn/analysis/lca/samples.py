"""The samples that a loss is taken over: in memory, in groups (classes, or blocks of a random subset)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset
from tqdm.auto import tqdm

from nbdyn.errors import Incompatible, NbdynError
from nbdyn.recorder.replay import as_fetch

FETCH, PROGRESS_SAMPLES = 1024, 20_000
"""Data sets are read so many samples at a time; larger ones show a bar."""
BLOCKS = 10
"""A random subset is divided into so many blocks, whose spread gives confidence intervals (9 degrees of freedom)."""


@dataclass(frozen=True)
class Samples:
    """Inputs and targets.

    Attributes:
        inputs, targets: tensors with one row a sample; samples of a group are consecutive (but see `in_order`).
        kind: of the groups: "class", "block", or "" for none.
        group: (n,) number of the group of each sample; empty for none.
        names: of the groups: classes as they are in the targets, or numbers of blocks.
        of: how many samples a random subset was taken from; 0 if it is everything.
        seed: of the subset.
        place: (n,) of each sample in the data, where they were sorted by class; empty if they were not.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    kind: str = ""
    group: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    names: tuple[int, ...] = ()
    of: int = 0
    seed: int = 0
    place: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def groups(self) -> int:
        """How many groups there are; 0 for none."""
        return len(self.names)

    @property
    def edges(self) -> np.ndarray:
        """(groups + 1,) where each group begins."""
        return np.searchsorted(self.group, np.arange(self.groups + 1))

    def in_order(self) -> Samples:
        """The same samples in the order of the data: sorted ones would have batch statistics of single classes."""
        if not len(self.place):
            return self
        order = np.argsort(self.place)
        where = torch.from_numpy(order)
        return replace(
            self, inputs=self.inputs[where], targets=self.targets[where], group=self.group[order], place=np.empty(0)
        )

    def describe(self) -> dict[str, Any]:
        """What the groups and the subset are, JSON-able."""
        return {"groups": self.kind, "names": list(self.names), "of": self.of, "seed": self.seed}


def samples_of(
    data: Any, *, classes: bool = False, subset: int | None = None, seed: int = 0, progress: bool = True
) -> Samples:
    """Take data into memory.

    Args:
        data: a map-style data set of (input, target) pairs, a pair (inputs, targets) of tensors or arrays, or a
            `Samples`.
        classes: sort them by class; targets must be class numbers.
        subset: take so many at random, without replacement, in BLOCKS blocks.
        seed: of that.
        progress: whether a bar is shown for many.

    Raises:
        Incompatible: if data is none of these, or the targets are no classes.
        NbdynError: if the subset is larger than the data, or classes are asked of a subset.
    """
    if isinstance(data, Samples):
        return data
    inputs, targets = _all(data, progress)
    if len(inputs) != len(targets) or not len(targets):
        raise Incompatible(f"{len(inputs):,} inputs and {len(targets):,} targets; LCA needs one target for each input.")
    if subset is None:
        return _by_class(inputs, targets) if classes else Samples(inputs, targets)
    if classes:
        raise NbdynError("classes=True and subset= exclude each other: a subset's blocks take the place of classes.")
    if not 2 * BLOCKS <= subset <= len(targets):
        raise NbdynError(
            f"subset={subset}: at least {2 * BLOCKS} and at most the {len(targets):,} samples that there are."
        )
    chosen = np.random.default_rng(seed).permutation(len(targets))[: subset - subset % BLOCKS]
    where = torch.from_numpy(chosen)
    group = np.repeat(np.arange(BLOCKS), len(chosen) // BLOCKS)
    return Samples(inputs[where], targets[where], "block", group, tuple(range(BLOCKS)), len(targets), seed)


def _by_class(inputs: torch.Tensor, targets: torch.Tensor) -> Samples:
    if targets.ndim != 1 or targets.is_floating_point():
        raise Incompatible(
            f"classes=True needs class numbers as targets; these are {targets.dtype} {tuple(targets.shape)}."
        )
    names, group = np.unique(targets.cpu().numpy(), return_inverse=True)
    order = np.argsort(group, kind="stable")
    where = torch.from_numpy(order)
    return Samples(inputs[where], targets[where], "class", group[order], tuple(names.tolist()), place=order)


def _all(data: Any, progress: bool) -> tuple[torch.Tensor, torch.Tensor]:
    # The very class: others that keep tensors may change them as they are fetched.
    pair: Any = data.tensors if type(data) is TensorDataset and len(data.tensors) == 2 else data
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        inputs, targets = (torch.as_tensor(part) for part in pair)
        return inputs, targets
    if not hasattr(data, "__len__"):
        raise Incompatible(
            f"data is a {type(data).__name__}; LCA needs the data set itself, or a pair (inputs, targets)."
        )
    fetch: Callable[[np.ndarray], tuple[torch.Tensor, torch.Tensor]] = as_fetch(data)
    ids = np.array_split(np.arange(len(data)), -(-len(data) // FETCH))
    parts = [
        fetch(some)
        for some in tqdm(ids, "reading the data", leave=False, disable=not progress or len(data) < PROGRESS_SAMPLES)
    ]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
