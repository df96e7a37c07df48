"""The function mode that sees what a forward pass does with parameters, and with tensors made of them alone."""

from __future__ import annotations

import threading
import types
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import multi_head_attention_forward
from torch.overrides import TorchFunctionMode

from nbdyn.recorder.capture.calls import CannotSplit
from nbdyn.recorder.capture.local import find_cut
from nbdyn.recorder.capture.nodes import Application, Node, Root, is_in_place, name_of, node_of, reason_of
from nbdyn.recorder.capture.rules import BROADCASTING, Share
from nbdyn.recorder.capture.split import plan

if TYPE_CHECKING:
    from nbdyn.recorder.capture.uses import Uses

CONSTANT = object()
"""Stands for tensors that do not depend on the batch."""
EXPANDING = frozenset({"expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave"})
"""Functions that give a tensor to every sample."""
SHAPE_ONLY = frozenset({"expand_as", "view_as", "reshape_as", "type_as"})
"""Functions of which the second argument gives no values."""


class Watch(TorchFunctionMode):
    """Sees the torch functions of one thread from the first `begin` to the last `end`.

    Attributes:
        known: id(tensor) -> its node; CONSTANT for other tensors that do not depend on the batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, Any] = {}
        self._alive: list[Any] = []  # so that an id stays what it was
        self._active: list[Uses] = []

    def begin(self, uses: Uses) -> None:
        """One more module is watched."""
        if not self._active:
            self.__enter__()
        self._active.append(uses)
        for tensor, node in uses.roots(inner=False):
            self._note_node(tensor, node)
        for tensor in uses.constants():
            if self.known.setdefault(id(tensor), CONSTANT) is CONSTANT:
                self._alive.append(tensor)

    def end(self, uses: Uses) -> None:
        """One module less; after the last nothing is watched."""
        if uses not in self._active:
            return
        self._active.remove(uses)
        if not self._active:
            self._leave()
            self._look_for_escaped()
            self.known, self._alive = {}, []

    def abandon(self) -> None:
        """End whatever an interrupt left begun."""
        while self._active:
            self.end(self._active[-1])

    def _leave(self) -> None:
        """Off the stack of modes, wherever it is there."""
        above = []
        while torch._C._len_torch_function_stack():
            mode: Any = torch._C._pop_torch_function_stack()
            if mode is self:
                break
            above.append(mode)
        for mode in reversed(above):
            torch._C._push_on_torch_function_stack(mode)

    def _look_for_escaped(self) -> None:
        """A gradient at what was made of parameters alone and then left the forward pass cannot be split."""
        reason = "what was made of it alone was used outside the watched forward pass"
        for tensor in self._alive:
            node = self.known.get(id(tensor)) if isinstance(tensor, Tensor) else None
            if not isinstance(node, Node) or isinstance(node, Root) or node.used or node.expanded is not None:
                continue
            if tensor.requires_grad and not node.given_up:
                tensor.register_hook(lambda g, node=node: node.owner.give_up([node], reason) if _is_any(g) else None)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function; look at it if it takes a node. On the path of every torch call, so kept short."""
        known = self.known
        hits: list[Node] = []
        of_batch = False
        for arg in args if not kwargs else (*args, *kwargs.values()):
            found = known.get(id(arg))
            if found is None:
                if isinstance(arg, Tensor):
                    of_batch = True
                elif type(arg) in (list, tuple):
                    for item in arg:
                        found = known.get(id(item))
                        if found is None:
                            of_batch = of_batch or isinstance(item, Tensor)
                        elif found is not CONSTANT:
                            hits.append(found)
            elif found is not CONSTANT:
                hits.append(found)
        if hits or func is multi_head_attention_forward:
            return self._look(func, args, kwargs or {}, hits, of_batch)
        result = func(*args, **kwargs) if kwargs else func(*args)
        if not of_batch:
            self._note_constant(result)
        elif args and (result is None or result is args[0]) and known.get(id(args[0])) is CONSTANT:
            del known[id(args[0])]  # the batch was written into it
        return result

    def _note_constant(self, result: Any) -> None:
        """A result that no tensor of the batch took part in."""
        if isinstance(result, Tensor):
            key, known = id(result), self.known
            if key not in known:
                known[key] = CONSTANT
                self._alive.append(weakref.ref(result, lambda _: known.pop(key, None)))
        elif isinstance(result, (list, tuple)):
            for item in result:
                self._note_constant(item)

    def _note_node(self, tensor: Tensor, node: Node) -> None:
        if not isinstance(self.known.get(id(tensor)), Node):
            self.known[id(tensor)] = node
            self._alive.append(tensor)

    def _look(self, func: Any, args: Any, kwargs: dict[str, Any], hits: list[Node], of_batch: bool) -> Any:
        """Call a function that takes a node, and note it."""
        if func is multi_head_attention_forward:
            return self._look_inside(func, args, kwargs)
        name = name_of(func)
        if not torch.is_grad_enabled():
            result = func(*args, **kwargs)
            if not of_batch:
                self._note_constant(result)
            return result
        target, before = None, args
        if args and (is_in_place(name) or name == "__setitem__"):
            target = args[0]
            if name not in ("add_", "sub_", "__setitem__"):  # the factor of a product is what it was before
                with torch._C.DisableTorchFunction():
                    before = (target.detach().clone(), *args[1:])
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            of_batch = of_batch and name not in SHAPE_ONLY
            self._note_written(func, target, hits, of_batch)
            self._note(func, before, kwargs, target if name == "__setitem__" else result, hits, of_batch)
        return result

    def _note_written(self, func: Any, target: Any, hits: list[Node], of_batch: bool) -> None:
        """A function has written into its first argument; None for functions that do not."""
        node = self.known.get(id(target))
        nodes = [hit for hit in hits if hit.expanded is None]
        if isinstance(node, Node) or (node is CONSTANT and nodes and func is Tensor.__setitem__):
            reason = "a tensor made of it is written to, or it into one that is not the batch's"
            hits[0].owner.give_up(nodes, reason_of(func, CannotSplit(reason)))
        if (of_batch or len(nodes) < len(hits)) and node is not None and not isinstance(node, Root):
            del self.known[id(target)]  # it depends on the batch now

    def _look_inside(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the body of an attention's function, with the functions in it seen."""
        roots = [pair for uses in self._active for pair in uses.roots(inner=True)]
        hidden = {id(tensor): self.known.get(id(tensor)) for tensor, _ in roots}
        self.known.update((id(tensor), node) for tensor, node in roots if not isinstance(hidden[id(tensor)], Node))
        try:
            with self:
                return _opened(func)(*args, **kwargs)
        finally:
            for key, before in hidden.items():
                if before is None:
                    del self.known[key]
                else:
                    self.known[key] = before

    def _note(
        self, func: Any, args: Any, kwargs: dict[str, Any], result: Any, hits: list[Node], of_batch: bool
    ) -> None:
        """A function has taken nodes; `args` as they were before it."""
        of_batch = of_batch or any(node.expanded is not None for node in hits)
        several = isinstance(result, (list, tuple))
        results = [(place, t) for place, t in enumerate(result if several else (result,)) if isinstance(t, Tensor)]
        tensors = [(place, t) for place, t in results if t.requires_grad]
        if not of_batch:
            self._note_constant([t for _, t in results if not t.requires_grad])
        inside_func = any(torch._C._functorch.is_functorch_wrapped_tensor(t) for _, t in results)  # type: ignore
        if all(node.given_up for node in hits) or not (tensors or inside_func):
            return
        for node in hits:
            node.used = True
        try:
            if inside_func:
                raise CannotSplit("it works inside a transformation of torch.func")
            if of_batch:
                self._note_use(func, args, kwargs, [t for _, t in tensors], hits)
            else:
                for place, t in tensors:
                    if not isinstance(self.known.get(id(t)), Node):
                        self._note_made(Application(func, args, kwargs, self.known, place if several else None), t)
        except Exception as error:  # training goes on; what is missing is said
            hits[0].owner.give_up([node for node in hits if node.expanded is None], reason_of(func, error))

    def _note_use(self, func: Any, args: Any, kwargs: dict[str, Any], outputs: list[Tensor], hits: list[Node]) -> None:
        """A function of the batch and of nodes: the gradient at its output is to be split once it is there."""
        owner, name, output = hits[0].owner, name_of(func), outputs[0]
        size, cut = owner.size, find_cut(output.shape, owner.size, owner.time_first)
        for node in hits:
            lead = output.ndim - node.tensor.ndim
            misfit = node.expanded is not None and cut is not None and node.expanded + lead != cut.dim
            if misfit and size > 1 and name.rstrip("_") in BROADCASTING:
                owner.give_up([node], f"{name}: it was expanded to as many rows as there are samples, for others")
        nodes = [node for node in hits if node.expanded is None]
        if not nodes:
            return
        if len(outputs) != 1 or cut is None:
            shapes = ", ".join(str(list(t.shape)) for t in outputs)
            raise CannotSplit(f"its result of shape {shapes} is not one by sample, of {size}")
        split = plan(Application(func, args, kwargs, self.known), output, cut)
        output.register_hook(lambda gradient: owner.arrived(nodes, func, size, split, gradient))

    def _note_made(self, call: Application, tensor: Tensor) -> None:
        """A tensor was made of nodes and constants alone; perhaps expanded to one row for each sample."""
        base = None if tensor._base is None else self.known.get(id(tensor._base))
        node = node_of(call, tensor, base if isinstance(base, Node) else None)
        self._note_node(tensor, node)
        owner, size = node.owner, node.owner.size
        dim = _expanded_dim(call, tensor, size, owner.time_first)
        if dim is not None:
            node.expanded = dim
            tensor.register_hook(
                lambda gradient: owner.arrived(
                    [node], call.function, size, lambda g: [Share(node, g.movedim(dim, 0), dim)], gradient
                )
            )


def _expanded_dim(call: Application, tensor: Tensor, size: int, time_first: bool) -> int | None:
    """The dimension along which a function expanded its argument to one row for each sample, None if it did not."""
    source = call.args[0] if call.args else None
    if call.name not in EXPANDING or not isinstance(source, Node):
        return None
    before = (1,) * (tensor.ndim - source.tensor.ndim) + tuple(source.tensor.shape)
    dims = [dim for dim, n in enumerate(tensor.shape) if n == size and before[dim] == 1]
    usual = 1 if time_first else 0
    return usual if usual in dims else dims[0] if dims else None


def _is_any(gradient: Tensor | None) -> bool:
    """Whether a gradient is one: chunks that nobody uses get zeros."""
    return gradient is not None and bool(gradient.any())


def _opened(function: Any) -> Any:
    """A copy of a torch function written in Python that runs its body although a function mode is active."""
    names = {**function.__globals__, "has_torch_function": lambda tensors: False}
    opened = types.FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened


_LOCAL = threading.local()


def watch() -> Watch:
    """The calling thread's: function modes are of a thread."""
    if not hasattr(_LOCAL, "watch"):
        _LOCAL.watch = Watch()
    return _LOCAL.watch


def abandon() -> None:
    """End every watch of this thread that an interrupt left begun; to be called outside of forward passes."""
    watch().abandon()
