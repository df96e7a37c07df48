"""Embeddings: the ids that were looked up and the gradient of each row that they brought."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nbdyn.recorder.capture.affine import Affine, wide
from nbdyn.recorder.capture.calls import CannotSplit, ModuleCall, Stored, by_sample


class _Lookup(Affine):
    """Base of the handlers of embeddings: form "embedding", or "dense" where that is smaller."""

    def _stored(self, weight: nn.Parameter, ids: Tensor, d: Tensor) -> list[Stored]:
        """What is stored of ids (B, T), -1 for none, and the gradients of their rows (B, T, E)."""
        if ids.shape[1] * (1 + d.shape[2]) <= weight.numel():
            return [(self._site("embedding", weight, None), {"ids": ids.contiguous(), "d": d.contiguous()})]
        return self._dense((weight, rows_added(ids, d, len(weight))))


class Embedding(_Lookup):
    """Handler of nn.Embedding; ids may have any shape that begins with the batch, or (T, B).

    Ids in a row that count from 0 are positions, which belong to all samples: their gradient is that of the batch.
    """

    def __init__(self, name: str, module: nn.Module, firsts: dict[int, int]) -> None:
        super().__init__(name, module, firsts)
        self._looks_up_samples = False

    def _split(
        self, call: ModuleCall, x: Tensor, d: Tensor, weight: nn.Parameter | None, bias: nn.Parameter | None
    ) -> list[Stored]:
        assert weight is not None  # an embedding has no other parameter
        module: Any = call.module
        self._refuse_positions(x, call.size)
        ids = x if module.padding_idx is None else x.masked_fill(x == module.padding_idx, -1)
        if module.scale_grad_by_freq:
            d = d / _frequencies(x, len(weight)).to(d.dtype).unsqueeze(-1)
        ids = by_sample(ids.unsqueeze(-1), call.size, call.sequence_first).squeeze(2)
        return self._stored(weight, ids, by_sample(d, call.size, call.sequence_first))

    def _refuse_positions(self, ids: Tensor, size: int) -> None:
        """Raise CannotSplit if the ids are positions; where they once were not, a GPU is not made to wait again."""
        if size == 1 or self._looks_up_samples or ids.numel() != max(ids.shape, default=0):
            return
        if torch.equal(ids.flatten(), torch.arange(ids.numel(), dtype=ids.dtype, device=ids.device)):
            raise CannotSplit("it looked up the positions 0, 1, 2, ... once for all samples of the batch")
        self._looks_up_samples = True


class EmbeddingBag(_Lookup):
    """Handler of nn.EmbeddingBag, in the modes "sum", "mean" and "max"; a bag belongs to a sample."""

    def _split(
        self, call: ModuleCall, x: Tensor, d: Tensor, weight: nn.Parameter | None, bias: nn.Parameter | None
    ) -> list[Stored]:
        assert weight is not None  # an embedding has no other parameter
        if not x.numel():
            return []
        module: Any = call.module
        if module.scale_grad_by_freq:  # torch's processor kernel divides by counts of other ids than its GPU kernel
            raise CannotSplit("how nn.EmbeddingBag scales gradients by frequency depends on the device")
        places, inside = _places(module, x, _argument(call, 1, "offsets"))
        ids = x.flatten()[places]
        if module.padding_idx is not None:
            inside = inside & (ids != module.padding_idx)
        scale = _argument(call, 2, "per_sample_weights")
        scale = torch.ones((), dtype=d.dtype, device=d.device) if scale is None else scale.flatten()[places]
        if module.mode == "mean":
            scale = scale / inside.sum(1, keepdim=True).clamp(min=1)
        rows = d.unsqueeze(1) * scale.to(d.dtype).expand(ids.shape).unsqueeze(-1)
        if module.mode == "max":
            rows = rows * _is_largest(weight, ids, inside)
        ids = ids.masked_fill(~inside, -1)
        ids = by_sample(ids, call.size, call.sequence_first).flatten(1)
        rows = by_sample(rows.flatten(1), call.size, call.sequence_first).reshape(*ids.shape, -1)
        return self._stored(weight, ids, rows)


def _argument(call: ModuleCall, place: int, name: str) -> Any:
    return call.args[place] if len(call.args) > place else call.kwargs.get(name)


def _places(module: Any, ids: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the ids of each bag are among all ids, (bags, T), and which of these places are inside the bag."""
    if offsets is None:
        places = torch.arange(ids.numel(), device=ids.device).reshape(ids.shape)
        return places, torch.ones_like(places, dtype=torch.bool)
    last = ids.numel()
    ends = offsets[1:] if module.include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([last])])
    starts = offsets[: len(ends)].unsqueeze(1)
    longest = int((ends.unsqueeze(1) - starts).max())
    places = starts + torch.arange(longest, device=ids.device)
    return places.clamp(max=last - 1), places < ends.unsqueeze(1)


def _is_largest(weight: Tensor, ids: Tensor, inside: Tensor) -> Tensor:
    """Which row of a bag has the largest element, the first where several do, (bags, T, E) bool."""
    rows = weight.detach()[ids].masked_fill(~inside.unsqueeze(-1), -torch.inf)
    return torch.arange(ids.shape[1], device=ids.device).reshape(-1, 1) == rows.argmax(1, keepdim=True)


def _frequencies(ids: Tensor, count: int) -> Tensor:
    """How often each id occurs among all."""
    ones = torch.ones(ids.numel(), dtype=torch.long, device=ids.device)
    return torch.zeros(count, dtype=torch.long, device=ids.device).index_add_(0, ids.flatten(), ones)[ids]


def rows_added(ids: Tensor, d: Tensor, count: int) -> Tensor:
    """Gradients of rows added up by id: ids (B, T), -1 for none, d (B, T, E) -> (B, count, E), in float32 at least.

    >>> rows_added(torch.tensor([[1, -1, 1]]), torch.tensor([[[1.0], [2.0], [3.0]]]), 3)
    tensor([[[0.],
             [4.],
             [0.]]])
    """
    d = d.to(wide(d.dtype)).masked_fill((ids < 0).unsqueeze(-1), 0)
    table = torch.zeros((len(ids) * count, d.shape[2]), dtype=d.dtype, device=d.device)
    rows = ids.clamp(min=0) + count * torch.arange(len(ids), device=ids.device).unsqueeze(1)
    return table.index_add_(0, rows.flatten(), d.flatten(0, 1)).reshape(len(ids), count, -1)


HANDLERS: dict[type[nn.Module], type[Affine]] = {nn.Embedding: Embedding, nn.EmbeddingBag: EmbeddingBag}
"""Handler classes by the class whose forward pass must be unchanged."""
