"""Layers whose inputs and output gradients are recorded: what `act of fc1` and `err of fc1` are read from."""

# pyright: standard
# pandas ships no complete types, so that the strict rules cannot hold here.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nbdyn.errors import NotRecorded
from nbdyn.query.evaluate import Array
from nbdyn.query.reads import Read
from nbdyn.query.source import Source
from nbdyn.query.tree import Selector
from nbdyn.store import Store
from nbdyn.store.calls import CALL, LENGTH, SIZE
from nbdyn.store.factors import Block
from nbdyn.store.projection import is_projected
from nbdyn.store.sites import Site
from nbdyn.store.streams import SLOTS

SLOT = {"act": "a", "err": "d"}
"""Which of a site's factors a quantity is."""


@dataclass(frozen=True)
class Layer:
    """A layer, or a part of one that has factors of its own.

    Attributes:
        name: the layer's; of a layer with several parts the part's, such as `attention:in_proj_weight[0:64]`.
        sites: numbers of its sites.
        first: number of its first unit among those of all layers asked for.
        units: how many it has: inputs for act, outputs for err; channels of convolutions.
    """

    name: str
    sites: tuple[int, ...]
    first: int
    units: int


def layers_of(quantity: str, selector: Selector, source: Source) -> tuple[tuple[Layer, ...], str]:
    """The layers that a selector names, in the order of the model, and a note about those without such factors.

    Raises:
        QueryError: if the selector names a part of a tensor.
        NotRecorded: if none of the layers has the factor; the message says why.
        UnknownName: if there is no such layer.
    """
    names = _named(quantity, selector, source)
    sites, slot = source.store.factors.sites, SLOT[quantity]
    parts: dict[tuple[str, str, str], list[int]] = {}
    missing: dict[str, str] = {}
    for number, site in enumerate(sites):
        if site.layer in names:
            why = _without(site, slot)
            if why:
                missing[site.layer] = why
            else:
                parts.setdefault((site.layer, site.name, site.form), []).append(number)
    for name in names:
        if not any(site.layer == name for site in sites):
            missing[name] = _nothing(name, source)
    if not parts:
        reasons = "; ".join(f"{name or 'the model itself'}: {why}" for name, why in list(missing.items())[:3])
        raise NotRecorded(f"{source.name} holds no {quantity} of {selector.text}: {reasons}.")
    found, first = [], 0
    for key in sorted(parts, key=lambda key: (names.index(key[0]), parts[key][0])):
        units = max(_units(sites[number], slot) for number in parts[key])
        found.append(Layer(_label(key, list(parts)), tuple(parts[key]), first, units))
        first += units
    note = "; ".join(f"without {name or 'the model itself'}: {why}" for name, why in missing.items())
    return tuple(found), note


def _named(quantity: str, selector: Selector, source: Source) -> list[str]:
    """Names of the layers, in the order of the model."""
    selection = source.select(selector)
    tensors = [tensor for tensor in source.tensors if tensor["name"] in selection.names]
    if len(selection.indices) < sum(int(tensor["size"]) for tensor in tensors):
        layer = tensors[0]["layer"]
        message = f"{quantity} is of the units of whole layers, not of single weights: {quantity} of {layer}."
        raise source.error(message, selector.position)
    return list(dict.fromkeys(str(tensor["layer"]) for tensor in tensors))


def _without(site: Site, slot: str) -> str:
    """Why a site does not have a factor; nothing where it has."""
    if site.form == "dense":
        return "samples' gradients are stored instead of factors, as they are smaller"
    if slot not in SLOTS[site.form]:
        return "its input is token ids, which are no activations"
    return "random projections of its factors are stored (project=)" if is_projected(site) else ""


def _nothing(layer: str, source: Source) -> str:
    factors = source.store.factors
    reasons = [factors.batch_only[t["name"]] for t in source.tensors
               if t["layer"] == layer and t["name"] in factors.batch_only]  # fmt: skip
    return f"by batch only ({reasons[0]})" if reasons else "nothing was captured by sample"


def _units(site: Site, slot: str) -> int:
    """How many units a factor of a site has."""
    groups = site.options.get("groups", 1)
    rows, columns = site.shape[0], site.shape[1]
    if site.form == "embedding":
        return columns
    if site.form == "conv" and site.options["transposed"]:
        return rows if slot == "a" else columns * groups
    if site.form == "conv":
        return columns * groups if slot == "a" else rows
    return rows if (slot == "a") == bool(site.options.get("transposed")) else columns


def _label(key: tuple[str, str, str], keys: Sequence[tuple[str, str, str]]) -> str:
    """A part's name: the layer's, where it has one part."""
    layer, name, form = key
    same = [other for other in keys if other[0] == layer]
    if len(same) == 1:
        return layer or name
    return name if [other[1] for other in same].count(name) == 1 else f"{name}:{form}"


def table_of(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """Layers as a table of tensors of one axis, whose elements are the units: for `reduce.targets`."""
    return [{"name": layer.name, "layer": layer.name, "first": layer.first, "size": layer.units,
             "shape": [layer.units]} for layer in layers]  # fmt: skip


def by_unit(site: Site, tensor: Array) -> Array:
    """A factor as (visits, places, units): the positions of a map become one axis."""
    if site.form != "conv":
        return tensor
    return tensor.reshape(*tensor.shape[:2], -1).transpose(0, 2, 1)


def scale_of(block: Block, scale: Array | None) -> Array:
    """What the err of each visit of a block is multiplied by, (V,): to be the gradient of the sample's own loss."""
    return block.factor if scale is None else block.factor * scale


def has_calls(layers: Sequence[Layer], store: Store, start: int, stop: int) -> bool:
    """Whether one of the layers was called more than once with a batch."""
    calls = (store.factors.calls_of(number, start, stop) for layer in layers for number in layer.sites)
    return any(bool(found[:, CALL].any()) for found in calls)


def has_places(layers: Sequence[Layer], store: Store, start: int, stop: int) -> bool:
    """Whether one of the layers works on sequences or maps."""
    factors = store.factors
    return any(
        factors.sites[number].form == "conv" or bool((factors.calls_of(number, start, stop)[:, LENGTH] > 1).any())
        for layer in layers
        for number in layer.sites
    )


def cells_at_least(layers: Sequence[Layer], store: Store, start: int, stop: int) -> int:
    """How many cells some steps have; a map counts as one place, as its size is not told without reading."""
    total = 0
    for layer in layers:
        for number in layer.sites:
            calls = store.factors.calls_of(number, start, stop)
            total += int((calls[:, SIZE] * calls[:, LENGTH]).sum()) * layer.units
    return total


def read_sites(numbers: Sequence[int], source: Source, start: int, stop: int) -> tuple[Read, ...]:
    """The reading of some sites' captures at some steps, a row each."""
    factors = source.store.factors
    visits = int(source.index["batch_size"].to_numpy()[start:stop].sum())
    reads = []
    for number in numbers:
        site, nbytes = factors.sites[number], factors.nbytes(number, start, stop)
        warm = factors.warm.holds(number, start, stop)
        reads.append(Read(source.name, f"factors of {site.name}", SLOTS[site.form], start, stop, visits, nbytes,
                          "in memory" if warm else "factors", 0.001 if warm else float("nan")))  # fmt: skip
    return tuple(reads)
