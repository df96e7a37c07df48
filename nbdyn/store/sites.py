"""Sites: where a network uses its parameters, and in which form the contributions of single samples are stored."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from nbdyn.errors import CorruptRun

FORMS = ("linear", "conv", "embedding", "dense")


@dataclass(frozen=True)
class Site:
    """One place where parameters are used, and the form of what is stored for each of its calls.

    Forms (B visits of a batch; c is a visit's contribution, the sum over visits is p.grad):
        linear: a (B, T, I), d (B, T, O); weight cell [o, i] = sum_t d[t, o] a[t, i]; bias cell [o] = sum_t d[t, o].
        conv: a (B, C, *S), d (B, O, *S'); the weight gradient of one sample; bias: d summed over positions.
        embedding: ids (B, T), -1 for none, d (B, T, E); row ids[t] receives d[t].
        dense: g (B, n), the contributions themselves, to the parameters of `ranges` in order.

    Attributes:
        name: the module's name, and what is inside it, such as `lstm:weight_ih_l0`.
        layer: the module that owns the parameters.
        form: one of FORMS.
        first: global index of the weight block's first element; None where the weight is not part of it.
        shape: shape of the weight block, which is contiguous.
        bias: global index of the bias's first element, None for none.
        options: linear: transposed (the block is (I, O)); conv: stride, padding, dilation, groups, transposed.
        ranges: dense: (first, size) of each run of parameters.
        note: what a reader should know, such as "batch-coupled".
    """

    name: str
    layer: str
    form: str
    first: int | None = None
    shape: tuple[int, ...] = ()
    bias: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    ranges: tuple[tuple[int, int], ...] = ()
    note: str = ""

    @property
    def bias_size(self) -> int:
        """How many elements the bias has."""
        if self.bias is None:
            return 0
        if self.form == "conv" and self.options["transposed"]:
            return self.shape[1] * self.options["groups"]
        return self.shape[1] if self.options.get("transposed") else self.shape[0]

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(first, size) of each run of parameters: weight block, then bias; or the ranges."""
        if self.form == "dense":
            return list(self.ranges)
        weight = [] if self.first is None else [(self.first, math.prod(self.shape))]
        return weight + ([] if self.bias is None else [(self.bias, self.bias_size)])

    @property
    def size(self) -> int:
        """How many parameters the site has."""
        return sum(size for _, size in self.runs)

    def indices(self) -> np.ndarray:
        """Global indices of its parameters, (size,) int64, in the order of `runs`."""
        return np.concatenate([np.arange(first, first + size, dtype=np.int64) for first, size in self.runs] or [[]])

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form; `from_json` reads it."""
        return asdict(self)

    @staticmethod
    def from_json(entry: Any, parameters: int) -> Site:
        """A site as it was written, checked: every parameter lies inside the model.

        Raises:
            CorruptRun: if it is not what a recorder writes.
        """
        try:
            site = Site(
                name=str(entry["name"]),
                layer=str(entry["layer"]),
                form=entry["form"],
                first=_index(entry["first"]),
                shape=tuple(int(n) for n in entry["shape"]),
                bias=_index(entry["bias"]),
                options=dict(entry["options"]),
                ranges=tuple((int(first), int(size)) for first, size in entry["ranges"]),
                note=str(entry["note"]),
            )
            inside = all(first >= 0 and size > 0 and first + size <= parameters for first, size in site.runs)
            project = site.options.get("project", 1)
            if (
                not isinstance(project, int)
                or project < 1
                or site.form not in FORMS
                or not inside
                or min(site.shape, default=1) < 1
            ):
                raise ValueError(f"site {site.name!r}")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CorruptRun(
                f"the table of per-sample sites is damaged ({error}); restore the run from a copy."
            ) from error
        return site


def _index(value: Any) -> int | None:
    return None if value is None else int(value)
