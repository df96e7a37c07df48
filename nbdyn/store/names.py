"""Names of parameters: from a selector such as `fc1.weight[3,:]` to global parameter indices."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbdyn.errors import Incompatible, UnknownName, did_you_mean

_INDEX = re.compile(r"\s*(?:(?P<slice>-?\d*\s*:\s*-?\d*)|(?P<int>-?\d+))\s*")


@dataclass(frozen=True)
class Selection:
    """Parameters that a selector names.

    Attributes:
        text: the selector, as normalized.
        names: the tensors it touches, in the order of the model.
        indices: their global parameter indices, (n,) int64.
        shape: the shape of the selected block of one tensor; (n,) where several tensors match.
    """

    text: str
    names: tuple[str, ...]
    indices: np.ndarray
    shape: tuple[int, ...]


def select(text: str, tensors: Sequence[Mapping[str, Any]]) -> Selection:
    """The parameters named by a selector: `fc1.weight`, `fc1.*`, `fc1.weight[3,5]`, `fc1.weight[3,:]`, `all`.

    A layer's name stands for all its tensors; backticks quote a name with brackets or spaces in it.

    Args:
        text: the selector.
        tensors: the `tensors` table of a run's configuration (name, shape, first, size).

    Raises:
        UnknownName: if no tensor has that name; the message has the nearest one.
        Incompatible: if the index does not fit the tensor's shape.

    >>> table = [{"name": "fc.weight", "layer": "fc", "shape": [2, 3], "first": 10, "size": 6}]
    >>> select("fc.weight[1,:]", table).indices
    array([13, 14, 15])
    """
    name, index = _split(text.strip(), {t["name"] for t in tensors})
    matches = [t for t in tensors if name and name in (t["name"], t["layer"])]
    if not matches:
        matches = list(tensors) if name == "all" else [t for t in tensors if fnmatch.fnmatchcase(t["name"], name)]
    if not matches:
        raise UnknownName(f'no parameter tensor "{name}"; {did_you_mean(name, [t["name"] for t in tensors])}')
    names = tuple(t["name"] for t in matches)
    if index is not None and len(matches) > 1:
        raise Incompatible(f'"{name}" matches {len(matches)} tensors; an index needs one: {", ".join(names[:5])}.')
    blocks = [_block(t, index) for t in matches]
    indices = np.concatenate([block.reshape(-1) for block in blocks])
    shape = blocks[0].shape if len(blocks) == 1 else indices.shape
    return Selection(text.strip(), names, indices, shape)


def locate(indices: np.ndarray, tensors: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, list[str]]:
    """The tensor (row of the table) of each global index, and its label such as `fc1.weight[3,5]`.

    Raises:
        Incompatible: if an index lies outside the model.
    """
    check_indices(indices, tensors)
    firsts = np.array([t["first"] for t in tensors], dtype=np.int64)
    owner = np.searchsorted(firsts, indices, side="right") - 1
    labels = np.empty(len(indices), dtype=object)
    for number in np.unique(owner):
        tensor, mask = tensors[number], owner == number
        labels[mask] = _labels(tensor["name"], tuple(tensor["shape"]), indices[mask] - tensor["first"])
    return owner, labels.tolist()


def _labels(name: str, shape: tuple[int, ...], places: np.ndarray) -> list[str]:
    """Labels of elements of a tensor; the parts before and after the last comma are written once each."""
    if not shape:
        return [name] * len(places)
    width = shape[-1:][0]
    head, last = np.divmod(places, width)
    rows, back = np.unique(head, return_inverse=True)
    outer = zip(*(axis.tolist() for axis in np.unravel_index(rows, shape[:-1] or (1,))), strict=True)
    heads = [f"{name}[" + "".join(f"{n}," for n in (index if len(shape) > 1 else ())) for index in outer]
    tails = [f"{n}]" for n in range(width)]
    return [heads[i] + tails[j] for i, j in zip(back.tolist(), last.tolist(), strict=True)]


def ascending(indices: np.ndarray) -> np.ndarray:
    """The different ones of some indices, sorted; those that are so already are not sorted again."""
    return indices if (np.diff(indices) > 0).all() else np.unique(indices)


def check_indices(indices: np.ndarray, tensors: Sequence[Mapping[str, Any]]) -> None:
    """Raise Incompatible if a global parameter index lies outside the model."""
    total = sum(int(t["size"]) for t in tensors)
    if len(indices) and (indices.min() < 0 or indices.max() >= total):
        raise Incompatible(
            f"global parameter indices go from 0 to {total - 1}; found {indices.min()}..{indices.max()}."
        )


def _split(text: str, known: set[str]) -> tuple[str, str | None]:
    """A selector's name and the text between its brackets, if any; a whole known name has no index."""
    if text.startswith("`"):
        quoted, _, rest = text[1:].partition("`")
        rest = rest.strip()
        if rest:
            return quoted, rest[1:-1] if rest.startswith("[") and rest.endswith("]") else rest
        text = quoted
    if text not in known and text.endswith("]") and "[" in text:
        name, _, index = text[:-1].rpartition("[")
        return name.strip(), index
    return text, None


def _block(tensor: Mapping[str, Any], index: str | None) -> np.ndarray:
    """Global indices of a tensor, or of the part of it that the index names."""
    shape = tuple(int(n) for n in tensor["shape"])
    numbers = np.arange(tensor["first"], tensor["first"] + math.prod(shape), dtype=np.int64).reshape(shape)
    if index is None:
        return numbers
    parts: list[int | slice] = []
    for part in index.split(","):
        match = _INDEX.fullmatch(part)
        if match is None:
            raise Incompatible(f'"[{index}]" is no index of {tensor["name"]}; write numbers or slices, such as [3,:].')
        if match["int"] is not None:
            parts.append(int(match["int"]))
        else:
            ends = [int(end) if end.strip() else None for end in match["slice"].split(":")]
            parts.append(slice(*ends))
    try:
        return numbers[tuple(parts)]
    except IndexError:
        raise Incompatible(f'"[{index}]" lies outside {tensor["name"]}, whose shape is {list(shape)}.') from None
