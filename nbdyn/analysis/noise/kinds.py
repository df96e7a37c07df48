"""What a noise may be a sample of: six objects that are told apart by name, and are never pooled."""

from __future__ import annotations

from dataclasses import dataclass

from nbdyn.errors import UnknownName, did_you_mean


@dataclass(frozen=True)
class Kind:
    """What is sampled.

    Attributes:
        name: as `run.noise(sampled=...)` takes it.
        words: what one value is, in words; `{batch}` is the number of samples of a mini-batch.
        row: what a row of the values is.
        at_fixed_weights: whether all rows of one sample belong to the same weights.
        of_samples: whether rows are single samples, which can be averaged to batches.
        in_order: whether rows follow each other in time and depend on each other.
        warning: what a reader must know; "" for nothing.
    """

    name: str
    words: str
    row: str
    at_fixed_weights: bool = False
    of_samples: bool = False
    in_order: bool = False
    warning: str = ""

    def words_of(self, batch: int | None) -> str:
        """What one value is, with the size of its mini-batch."""
        return self.words.format(batch=batch)


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "samples", "gradients of single samples of the data at fixed weights", "sample",
            at_fixed_weights=True, of_samples=True,
        ),
        Kind(
            "batch", "gradients of the single samples of one recorded batch at its weights", "sample",
            at_fixed_weights=True, of_samples=True,
        ),
        Kind(
            "mini-batches", "gradients of mini-batches of {batch} samples, drawn without replacement, at fixed weights",
            "mini-batch", at_fixed_weights=True,
        ),
        Kind(
            "steps", "recorded batch gradients of successive steps along the path", "step", in_order=True,
            warning="the weights move between the rows: their scales mix, and a mixture of scales looks like a heavy "
            "tail even where every one of them is Gaussian",
        ),
        Kind(
            "iterates", "weights at successive steps of the path", "step", in_order=True,
            warning="these are the weights themselves, not the noise of a gradient; successive ones depend on each "
            "other, and a drift over the window widens their distribution",
        ),
        Kind(
            "coordinates", "coordinates of one recorded batch gradient", "coordinate",
            warning="coordinates of one gradient have different scales and depend on each other: their tail says "
            "nothing about the tail of any one coordinate's noise",
        ),
    )
}  # fmt: skip


def kind_of(name: str) -> Kind:
    """The kind of this name.

    Raises:
        UnknownName: if there is none.

    >>> kind_of("samples").row
    'sample'
    """
    if name not in KINDS:
        raise UnknownName(f"sampled={name!r}: {did_you_mean(str(name), KINDS)}")
    return KINDS[name]
