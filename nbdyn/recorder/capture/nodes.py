"""Tensors that were made of parameters alone, and what gradients at them say about the parameters.

A sample's contribution to such a tensor is a gradient of the tensor's shape; a node brings it back to parameters.
Where a tensor holds one row for each sample (an expanded class token), sample s contributes to row s only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from nbdyn.recorder.capture.calls import CannotSplit

MOVING = frozenset({"repeat", "tile", "repeat_interleave", "clone", "contiguous", "reshape", "flatten"})
"""Functions whose results hold elements of their first argument, even where they are no views of it."""


@dataclass(eq=False)
class Watched:
    """A parameter whose uses are watched.

    Attributes:
        name: within its layer, such as `in_proj_weight`.
        layer: the module that owns it.
        parameter: itself.
        first: global index of its first element.
        time_first: whether tensors of three dimensions are (time, sample, feature) where it is used.
        given_up: whether a use of it could not be split into samples.
    """

    name: str
    layer: str
    parameter: nn.Parameter
    first: int
    time_first: bool = False
    given_up: bool = False

    @property
    def site(self) -> str:
        """Names a site of it."""
        return site_name(self.layer, self.name)


def site_name(layer: str, parameter: str) -> str:
    """A site inside a module, named by one of the module's parameters.

    >>> site_name("lstm", "weight_ih_l0"), site_name("", "cls")
    ('lstm:weight_ih_l0', 'cls')
    """
    return f"{layer}:{parameter}" if layer else parameter


class Node:
    """A tensor made of watched parameters.

    Attributes:
        tensor: its value, without history.
        owner: who watches; for whoever finds the node.
        expanded: the dimension along which it was expanded to one row for each sample; None if it was not.
        used: whether a function took it.
    """

    def __init__(self, tensor: Tensor, owner: Any) -> None:
        self.tensor = tensor.detach()
        self.owner = owner
        self.expanded: int | None = None
        self.used = False

    @property
    def parameters(self) -> list[Watched]:
        """Which parameters it was made of."""
        raise NotImplementedError

    @property
    def given_up(self) -> bool:
        """Whether nothing that it was made of is watched any more."""
        return all(w.given_up for w in self.parameters)


class Root(Node):
    """A parameter itself."""

    def __init__(self, watched: Watched, owner: Any) -> None:
        super().__init__(watched.parameter, owner)
        self.watched = watched

    @property
    def parameters(self) -> list[Watched]:
        """Itself."""
        return [self.watched]


class View(Node):
    """Elements of another node, rearranged: a view of its memory, or a copy such as `repeat` makes."""

    def __init__(self, tensor: Tensor, base: Node, index: Callable[[], Tensor] | None = None) -> None:
        """`index`: makes the place in the flattened base of each element; None for a view of its memory."""
        super().__init__(tensor, base.owner)
        self.base, self.index = base, index

    @property
    def offset(self) -> int | None:
        """The first place in the base if the elements are consecutive there, None if they are not."""
        consecutive = self.index is None and self.base.tensor.is_contiguous() and self.tensor.is_contiguous()
        return _offset(self.tensor, self.base.tensor) if consecutive else None

    def places(self) -> Tensor:
        """For each element its place in the flattened base, int64."""
        if self.index is not None:
            return self.index()
        whole = self.base.tensor
        places = torch.empty_strided(whole.shape, whole.stride(), dtype=torch.int64, device=whole.device)
        places.copy_(_numbers(whole))
        return places.as_strided(self.tensor.shape, self.tensor.stride(), _offset(self.tensor, whole))

    @property
    def parameters(self) -> list[Watched]:
        """Those of its base."""
        return self.base.parameters


class Made(Node):
    """The result of a function of nodes and of tensors that do not depend on the batch."""

    def __init__(self, tensor: Tensor, call: Application) -> None:
        super().__init__(tensor, call.nodes[0].owner)
        self.call = call

    @property
    def parameters(self) -> list[Watched]:
        """Those of all nodes that the function took."""
        return list({id(w): w for node in self.call.nodes for w in node.parameters}.values())


class Application:
    """A call of a torch function, with nodes in place of the tensors that they stand for.

    Attributes:
        function: the function.
        name: its name, without the underscore of functions that work in place.
        args: its arguments; tensors without history.
        kwargs: its arguments by keyword.
        place: which of several results.
        nodes: the nodes among the arguments, each once.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        nodes: dict[int, Any],
        place: int | None = None,
    ) -> None:
        """A call as it was made; `nodes`: id(tensor) -> node."""
        name = name_of(function)
        self.function, self.place = function, place
        self.name = name[:-1] if is_in_place(name) else name
        self.nodes: list[Node] = []
        self.args = tuple(self._taken(arg, nodes) for arg in args)
        self.kwargs = {key: self._taken(arg, nodes) for key, arg in kwargs.items()}

    def _taken(self, value: Any, nodes: dict[int, Any]) -> Any:
        if isinstance(value, Tensor):
            node = nodes.get(id(value))
            if not isinstance(node, Node) or node.expanded is not None:
                return value.detach()
            if node not in self.nodes:
                self.nodes.append(node)
            return node
        if type(value) in (list, tuple):
            return type(value)(self._taken(item, nodes) for item in value)
        return value

    @cached_property
    def flat(self) -> tuple[list[Any], TreeSpec]:
        """All arguments as one list, and how to put them back."""
        return tree_flatten((self.args, self.kwargs))

    @property
    def leaves(self) -> list[Any]:
        """All arguments as one list."""
        return self.flat[0]

    def repeated(self, leaves: list[Any]) -> Tensor:
        """The function's result for other leaves."""
        if is_in_place(name_of(self.function)):
            leaves = [leaves[0].clone(), *leaves[1:]]  # what works in place would change what is still needed
        args, kwargs = tree_unflatten(leaves, self.flat[1])
        result = self.function(*args, **kwargs)
        return result if self.place is None else result[self.place]


def name_of(function: Any) -> str:
    """A torch function's name."""
    return getattr(function, "__name__", "")


def reason_of(function: Any, error: Exception) -> str:
    """Why a function cannot be split, for the user."""
    text = str(error) if isinstance(error, CannotSplit) else f"{type(error).__name__}: {error}"
    return f"{name_of(function)}: {text}"


def is_in_place(name: str) -> bool:
    """Whether a function of this name changes its first argument.

    >>> is_in_place("add_"), is_in_place("__radd__")
    (True, False)
    """
    return name.endswith("_") and not name.endswith("__")


def node_of(call: Application, tensor: Tensor, base: Node | None) -> Node:
    """The node of a result that no tensor of the batch took part in; `base`: the node of what it is a view of."""
    source = call.args[0] if call.args else None
    if base is not None and tensor.dtype == base.tensor.dtype and tensor.is_conj() == base.tensor.is_conj():
        return View(tensor, base)
    if call.name in MOVING and isinstance(source, Node):
        return View(tensor, source, lambda: _moved(call, source))
    return Made(tensor, call)


def _offset(view: Tensor, whole: Tensor) -> int:
    return int(view.storage_offset()) - int(whole.storage_offset())


def _moved(call: Application, source: Node) -> Tensor:
    return call.repeated([_numbers(source.tensor), *call.leaves[1:]])


def _numbers(t: Tensor) -> Tensor:
    return torch.arange(t.numel(), device=t.device).reshape(t.shape)


@dataclass(frozen=True)
class Place:
    """Consecutive elements of a parameter, or their transpose."""

    watched: Watched
    offset: int
    transposed: bool = False

    @property
    def first(self) -> int:
        """Global index of the first element."""
        return self.watched.first + self.offset


def place_of(node: Node) -> Place | None:
    """Where a node's elements are if they are consecutive elements of one parameter, perhaps transposed."""
    if isinstance(node, Root):
        return Place(node.watched, 0)
    if not (isinstance(node, View) and isinstance(node.base, Root)):
        return None
    if node.offset is not None:
        return Place(node.base.watched, node.offset)
    turned, whole = node.tensor.t() if node.tensor.ndim == 2 else node.tensor, node.base.tensor
    same = turned.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    if same and turned.is_contiguous() and whole.is_contiguous():
        return Place(node.base.watched, _offset(turned, whole), transposed=True)
    return None
