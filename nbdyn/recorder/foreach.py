"""torch's horizontally fused list operations: one call for all tensors of a model, as torch's own optimizers use them.

They have an underscore in torch (`torch._foreach_*`) but are documented there; this is the one place that names them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def copy_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target; from a GPU into pinned memory without waiting for the device."""
    torch._foreach_copy_(list(targets), list(sources), non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]


def norm(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The Euclidean norm of each tensor, as tensors without dimensions; of half-precision ones in float32."""
    dtype = torch.float32 if any(t.dtype in (torch.float16, torch.bfloat16) for t in tensors) else None
    return list(torch._foreach_norm(list(tensors), 2, dtype=dtype))  # pyright: ignore[reportPrivateImportUsage]


def sub_(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    """Take right from left, tensor by tensor, in place."""
    torch._foreach_sub_(list(left), list(right))  # pyright: ignore[reportPrivateImportUsage]


def multiply_(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiply each tensor by a number, in place."""
    torch._foreach_mul_(list(tensors), factor)  # pyright: ignore[reportPrivateImportUsage]
