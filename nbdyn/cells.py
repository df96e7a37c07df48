"""Which per-sample cells are also written out, one by one, beside the factors that hold all of them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from nbdyn.errors import NbdynError


@dataclass(frozen=True)
class WriteOut:
    """What `nbdyn.record(..., cells=...)` writes into the sparse array `gradients`.

    The factors hold every cell anyhow; written-out ones can be read with plain tiledb, and fast. `of`, `above` and
    `around` narrow each other down; where none is given, only the top ones are written.

    Args:
        top: so many cells of largest |c| of each tensor at each step; 0 for none.
        of: selectors of layers or weights, such as "fc3.*" or "fc1.weight[3,:]", whose cells are written.
        above: only those with |c| above this number.
        around: a condition on the columns of `run.steps`, such as "loss > 2"; only steps around its rising edges.
        before, after: how many steps before and after such an edge (the edge itself is always in).

    Raises:
        NbdynError: if a number is out of range.

    >>> WriteOut(of="fc3.*", above=1e-3).of
    ('fc3.*',)
    """

    top: int = 64
    of: str | tuple[str, ...] = ()
    above: float | None = None
    around: str | None = None
    before: int = 5
    after: int = 5

    def __post_init__(self) -> None:
        """Check the numbers; one selector stands for a tuple of it."""
        object.__setattr__(self, "of", (self.of,) if isinstance(self.of, str) else tuple(self.of))
        for name in ("top", "before", "after"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise NbdynError(f"cells: {name}={value!r}; give a whole number from 0.")
        if self.above is not None and not (math.isfinite(self.above) and self.above >= 0):
            raise NbdynError(f"cells: above={self.above!r}; give a number from 0.")

    @property
    def selects(self) -> bool:
        """Whether more than the top cells is asked for."""
        return bool(self.of) or self.above is not None or self.around is not None

    def to_json(self) -> dict[str, Any]:
        """What a run's metadata says of it."""
        return asdict(self)

    @staticmethod
    def from_json(entry: Any) -> WriteOut:
        """What `to_json` gave.

        Raises:
            NbdynError: if it is something else.
        """
        try:
            return WriteOut(**entry)
        except TypeError as error:
            raise NbdynError(f"the run's metadata on cells is damaged: {error}") from error


def write_out(cells: Any) -> WriteOut:
    """What the argument `cells=` means: a number (the top ones), a selector (all of its cells), None, or a WriteOut.

    Raises:
        NbdynError: if it is none of these.

    >>> write_out(None).top, write_out(10).top, write_out("fc3.*").of
    (0, 10, ('fc3.*',))
    """
    if cells is None:
        return WriteOut(top=0)
    if isinstance(cells, WriteOut):
        return cells
    if isinstance(cells, str):
        return WriteOut(of=cells)
    if isinstance(cells, int) and not isinstance(cells, bool):
        return WriteOut(top=cells)
    raise NbdynError(
        f'cells={cells!r}: give a number (so many of largest |c|), a selector such as "fc3.*", nbdyn.WriteOut(...) '
        "or None."
    )
