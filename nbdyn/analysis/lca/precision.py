"""How exact an allocation has to be."""

from __future__ import annotations

from dataclasses import dataclass

from nbdyn.analysis.lca.rules import ADAPTIVE, fixed
from nbdyn.errors import NbdynError


@dataclass(frozen=True)
class Precision:
    """How exact an allocation has to be.

    Attributes:
        integrator: "adaptive", or one of `nbdyn.analysis.lca.rules.RULES`.
        splits: equal parts of each step, for the fixed rules.
        tolerance: "adaptive": the most that a step may miss, |L(t+1) - L(t) - sum of A[t]|, in units of the loss.
        total: "adaptive": the most that all steps may miss together, as a share of the largest |L(t) - L(0)|.
        most: "adaptive": nodes of one step at most. A step that would need more than these, or misses the tolerance by
            the rounding of the network, is marked as not met.
    """

    integrator: str = ADAPTIVE
    splits: int = 1
    tolerance: float = 1e-3
    total: float = 1e-4
    most: int = 33

    def __post_init__(self) -> None:
        if self.integrator != ADAPTIVE:
            fixed(self.integrator, self.splits)
        elif self.splits != 1:
            raise NbdynError("splits= is for the fixed rules; the adaptive one splits where it has to.")
        if not (self.tolerance > 0 and self.total > 0 and self.most >= 3):
            raise NbdynError("tolerance and total have to be positive, most at least 3.")
