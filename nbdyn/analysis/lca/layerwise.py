"""Layers that learn differently: frozen, with another learning rate, or with a momentum of less delay.

For the experiments on hurting layers of Lan et al. 2019 (arXiv 1909.01440, figures 4 and 5): the last layer frozen, at
a tenth of the learning rate, or with delays from 0 to 9 steps. Each function returns param groups for torch.optim:

    optimizer = torch.optim.SGD(layerwise.delayed(model, "fc", 3, lr=0.1, momentum=0.9))
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nbdyn.errors import Incompatible, NbdynError, UnknownName, did_you_mean
from nbdyn.store.names import select

if TYPE_CHECKING:
    from torch import nn


def param_groups(
    model: nn.Module, layers: Mapping[str, Mapping[str, Any]], *, lr: float, **options: Any
) -> list[dict[str, Any]]:
    """Param groups for torch.optim: some layers with options of their own, all others with the common ones.

    A tied parameter is in one group only, and is found by each of its names. `record` writes the groups down with the
    run, so that everything that reads it later knows the options of every tensor at every step.

    Args:
        model: the model.
        layers: selector (a layer, a tensor, or a pattern such as "conv*") -> the options in which it differs.
        lr: learning rate of all others.
        options: further options of all others, such as momentum, weight_decay or betas.

    Returns:
        First the group of all others (unless there are none), then one group for each of `layers`, in their order; each
        with all of its options.

    Raises:
        UnknownName: if a selector matches no parameter, or sets an option that has no common value (torch would take
            a misspelled one in silence); the message has the nearest name.
        Incompatible: if a selector names a part of a tensor, or two of them name the same tensor.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    >>> groups = param_groups(model, {"1": {"lr": 0.01}}, lr=0.1, momentum=0.9)
    >>> [(len(group["params"]), group["lr"], group["momentum"]) for group in groups]
    [(2, 0.1, 0.9), (2, 0.01, 0.9)]
    >>> optimizer = torch.optim.SGD(groups)
    """
    common = {"lr": lr, **options}
    parameters, table = _parameters(model)
    chosen: dict[int, str] = {}
    groups = []
    for text, own in layers.items():
        _check_options(text, own, common)
        numbers = _numbers(text, table)
        for number in numbers:
            if number in chosen:
                names = " = ".join(row["name"] for row in table if row["number"] == number)
                raise Incompatible(
                    f'"{chosen[number]}" and "{text}" both name {names}, and a parameter is in one group only; give '
                    "selectors that share none."
                )
            chosen[number] = text
        groups.append({"params": [parameters[number] for number in numbers], **common, **own})
    others = [p for number, p in enumerate(parameters) if number not in chosen]
    return ([{"params": others, **common}] if others else []) + groups


def frozen(model: nn.Module, *layers: str, lr: float, **options: Any) -> list[dict[str, Any]]:
    """Param groups in which some layers do not move at all: learning rate 0, without momentum and weight decay.

    Not by requires_grad=False: without a gradient a layer's part in the loss could not be told from that of a layer
    that has none, the gradient would be missing from what is recorded, and clipping by norm would scale all others
    differently. So the layer stays trainable with motion 0, hence an allocation of exactly 0. Schedulers that
    multiply keep its 0; OneCycleLR and CyclicLR need max_lr=0 for its group. Running statistics of a BatchNorm are no
    parameters, and go on.

    Args:
        model: the model.
        layers: selectors of what is frozen, see `param_groups`.
        lr: learning rate of all others.
        options: further options of all others, such as momentum.

    Raises:
        UnknownName, Incompatible: as `param_groups`.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    >>> [(group["lr"], group["momentum"]) for group in frozen(model, "1", lr=0.1, momentum=0.9)]
    [(0.1, 0.9), (0.0, 0.0)]
    """
    still: dict[str, float] = {"lr": 0.0} | {key: 0.0 for key in ("momentum", "weight_decay") if key in options}
    return param_groups(model, {text: still for text in layers}, lr=lr, **options)


def delayed(
    model: nn.Module, layer: str, delay: float, lr: float, momentum: float, matched: bool = False
) -> list[dict[str, Any]]:
    """Param groups for SGD in which one layer's momentum has a given delay (Lan et al. 2019, figure 5).

    Less momentum at the same learning rate makes smaller steps, too: a constant gradient moves a weight by
    lr / (1 - momentum) a step, up to 10 times less without momentum than with 0.9. `matched` takes this confound away.
    The paper does not say which of the two it did. For further options use `param_groups` with
    {"momentum": momentum_of_delay(delay)}; the delay holds for dampening=0 and nesterov=False.

    Args:
        model: the model.
        layer: selector of the layer, see `param_groups`.
        delay: mean age of the gradients in its updates, in steps, from 0.
        lr: learning rate of all others.
        momentum: of all others, 0 <= momentum < 1.
        matched: whether the layer's learning rate becomes lr (1 - momentum_of_delay(delay)) / (1 - momentum), which
            gives it the effective step of the others; else it is `lr`.

    Raises:
        NbdynError: if the delay or the momentum is out of range.
        UnknownName, Incompatible: as `param_groups`.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    >>> last = delayed(model, "1", 1, lr=0.01, momentum=0.9, matched=True)[-1]
    >>> last["momentum"], round(last["lr"], 12)
    (0.5, 0.05)
    """
    own = momentum_of_delay(delay)
    # 1 / (1 + d) is 1 - m of a delay d
    rate = lr * (1 + delay_of_momentum(momentum)) / (1 + delay) if matched else lr
    return param_groups(model, {layer: {"lr": rate, "momentum": own}}, lr=lr, momentum=momentum)


def momentum_of_delay(delay: float) -> float:
    """The momentum whose updates are made of gradients of this mean age: d / (d + 1).

    Args:
        delay: in steps, from 0.

    Raises:
        NbdynError: if it is negative or not finite.

    >>> [round(momentum_of_delay(d), 4) for d in (0, 1, 2, 9)]
    [0.0, 0.5, 0.6667, 0.9]
    """
    if not 0 <= delay < math.inf:
        raise NbdynError(f"delay={delay!r}: the mean age of the gradients in an update, in steps; a number from 0.")
    return delay / (delay + 1)


def delay_of_momentum(momentum: float) -> float:
    """The mean age, in steps, of the gradients in an update of SGD with momentum: m / (1 - m).

    An update is lr sum_k m^k g[t-k]; the mean of k with weights (1 - m) m^k is m / (1 - m). It holds long after the
    start, for dampening=0 and nesterov=False.

    Args:
        momentum: 0 <= m < 1.

    Raises:
        NbdynError: if it is outside of that.

    >>> round(delay_of_momentum(0.9), 12)
    9.0
    """
    if not 0 <= momentum < 1:
        raise NbdynError(f"momentum={momentum!r}: give a number from 0, less than 1.")
    return momentum / (1 - momentum)


def _parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[dict[str, Any]]]:
    """The different parameters of a model, and the table that `select` reads: every name, of tied ones all.

    `number` says which of the parameters a name means.
    """
    from nbdyn.recorder.describe import clean_name, named_parameters

    parameters = [p for _, p in named_parameters(model)]
    numbers = {id(p): number for number, p in enumerate(parameters)}
    table = []
    for whole, p in model.named_parameters(remove_duplicate=False):
        name = clean_name(whole)
        place = {"name": name, "layer": name.rpartition(".")[0], "shape": list(p.shape), "first": 0, "size": p.numel()}
        table.append(place | {"number": numbers[id(p)]})
    return parameters, table


def _numbers(text: str, table: list[dict[str, Any]]) -> list[int]:
    """Which parameters a selector names, each once."""
    found = select(text, table)
    matches = [row for row in table if row["name"] in found.names]
    if len(found.indices) != sum(row["size"] for row in matches):
        raise Incompatible(f'"{text}" names a part of a tensor; an optimizer takes whole ones.')
    return sorted({row["number"] for row in matches})


def _check_options(text: str, own: Mapping[str, Any], common: Mapping[str, Any]) -> None:
    """Refuse options without a common value: torch takes any key, and a misspelled one would do nothing."""
    for key in own:
        if key == "params" or key not in common:
            raise UnknownName(
                f'"{text}" sets {key}, which has no value for the other layers; {did_you_mean(key, common)} '
                f"Else give theirs, too: param_groups(model, layers, ..., {key}=...)."
            )
