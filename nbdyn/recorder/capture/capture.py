"""Per-sample capture: hooks on every module that owns parameters, and what a step's calls left behind."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nbdyn.recorder.arena import Arena
from nbdyn.recorder.capture.calls import CannotSplit, Handler, ModuleCall, Stored
from nbdyn.recorder.capture.handlers import handler_of, holds_parameters, sequence_first
from nbdyn.recorder.capture.mode import abandon
from nbdyn.recorder.capture.options import CaptureOptions, chosen_samples
from nbdyn.recorder.capture.uses import Uses
from nbdyn.recorder.watch import Batch
from nbdyn.store import projection
from nbdyn.store.factors import Block
from nbdyn.store.journal import Entry
from nbdyn.store.sites import Site
from nbdyn.store.streams import values_of


@dataclass(slots=True, eq=False)
class Captured:
    """One call's tensors in the arena.

    Attributes:
        site: number of its site.
        parameter: id of a parameter of the site: only backward passes that accumulate into it count.
        task: which backward pass it was; None once it is known to count.
        tensors: slot -> array in the arena, sample first.
        data: whether slot "a" holds rows of the data set.
        holds: how often the arena's memory had been handed on before.
    """

    site: int
    parameter: int
    task: int | None
    tensors: dict[str, np.ndarray]
    data: bool
    holds: int


class Capture:
    """Copies what every use of a parameter leaves behind; a step collects what its backward passes completed.

    Nothing is stored before the gradient at a call's output has arrived: forward passes without a backward one,
    and those repeated by activation checkpointing, leave nothing.

    Args:
        model: what is trained.
        tensors: the run's table of parameter tensors, those to capture only.
        parameters: the parameters of these tensors.
        options: what is captured.
        arena: where tensors are copied to.
        sites: the sites of a run that is resumed, in their order.
        say_once: called as say_once(key, text) for what the user should know.
    """

    def __init__(
        self,
        model: nn.Module,
        tensors: list[dict[str, Any]],
        parameters: list[nn.Parameter],
        options: CaptureOptions,
        arena: Arena,
        sites: list[Site],
        say_once: Callable[[str, str], None],
    ) -> None:
        self.options, self._arena, self._say_once = options, arena, say_once
        self._names = {id(p): t["name"] for t, p in zip(tensors, parameters, strict=True)}
        self._firsts = {id(p): int(t["first"]) for t, p in zip(tensors, parameters, strict=True)}
        self._starts = np.array([t["first"] for t in tensors], dtype=np.int64)
        self._owners = [id(p) for p in parameters]
        self.sites = list(sites)
        self.batch_only: dict[str, str] = {}
        self._numbers: dict[int, tuple[Site, int, int]] = {}  # id(site) -> (site, number, id of a parameter)
        self._by_content = {_content(site): number for number, site in enumerate(self.sites)}
        self._projections: dict[int, tuple[Site, Site]] = {}  # id(site) -> (site, the same with projected factors)
        self._accumulated: dict[int, list[int]] = {}
        self._waiting: list[tuple[Handler, ModuleCall, Batch, int]] = []
        self._batch: Batch | None = None
        self._sequence_first = sequence_first(model)
        self.seconds = 0.0
        self._whole = True
        self.half = False  # whether half precision has been seen
        self._handles: list[Any] = []
        self._install(model)

    def _install(self, model: nn.Module) -> None:
        bare = {}
        for name, module in model.named_modules():
            if not holds_parameters(module, self._firsts):
                continue
            handler = handler_of(name, module, self._firsts)
            if handler is None:
                bare[name] = module
            else:
                self._hook(module, handler)
        self._has_bare = bool(bare)
        if any(not isinstance(module, nn.MultiheadAttention) for module in bare.values()):
            bare.setdefault("", model)  # watches what becomes of tensors that its children made of their parameters
        for name, module in bare.items():
            self._watch_functions(name, module)

    def _hook(self, module: nn.Module, handler: Handler) -> None:
        if getattr(module, "dropout", 0.0) and isinstance(module, nn.RNNBase):
            self._handles.append(module.register_forward_pre_hook(self._remember_generator))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._after_forward(handler, module, args, kwargs, output)

        self._handles.append(module.register_forward_hook(after, with_kwargs=True))

    def _watch_functions(self, name: str, module: nn.Module) -> None:
        uses = Uses(name, module, self._firsts, self._emit_use, self._cannot, self._sequence_first)

        def enter(module: nn.Module, args: Any) -> None:
            if self._batch is not None and torch.is_grad_enabled():
                uses.begin(self._batch.size)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            uses.end()

        self._handles.append(module.register_forward_pre_hook(enter))
        self._handles.append(module.register_forward_hook(leave, always_call=True))

    def remove(self) -> None:
        """Unhook everything."""
        for handle in self._handles:
            handle.remove()
        self._batch = None

    # During forward and backward ------------------------------------------------------------------------------

    def begin(self, batch: Batch | None, whole: bool = False) -> None:
        """The batch that forward passes are about from now on; None: they are not captured. `whole`: all samples."""
        self._batch = batch
        self._arena.forget_shared()
        if self._has_bare:
            abandon()  # an interrupt in a forward pass leaves its watch on: torch then runs no hooks
        if batch is None:
            return
        batch.captured, self._whole = [], whole
        if self.options.fraction < 1.0 and not whole:
            ids = np.arange(batch.size) if batch.ids is None else np.asarray(batch.ids, dtype=np.int64)
            batch.rows = torch.from_numpy(np.nonzero(chosen_samples(ids, self.options.fraction))[0])

    def _remember_generator(self, module: nn.Module, args: Any) -> None:
        if module.training and self._batch is not None:
            module.__dict__["_nbdyn_generator"] = torch.get_rng_state()

    def _after_forward(self, handler: Handler, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        batch = self._batch
        if batch is None or not torch.is_grad_enabled():
            return
        outputs = list(_tensors(output))
        if not any(t.requires_grad for t in outputs):
            return
        rng = module.__dict__.pop("_nbdyn_generator", None)
        call = ModuleCall(module, args, kwargs, None, [None] * len(outputs), batch.size, self._sequence_first, rng)
        if len(outputs) == 1:
            outputs[0].register_hook(lambda grad: self._arrived(handler, call, batch, grad))
            return
        for place, t in enumerate(outputs):
            if t.requires_grad:
                t.register_hook(lambda grad, place=place: self._arrived_one(handler, call, batch, place, grad))

    def _arrived(self, handler: Handler, call: ModuleCall, batch: Batch, grad: Tensor) -> None:
        call.grads[0] = grad
        self._complete(handler, call, batch, _task())

    def _arrived_one(self, handler: Handler, call: ModuleCall, batch: Batch, place: int, grad: Tensor) -> None:
        """One of several outputs has its gradient; the call is looked at once the backward pass is over."""
        task = _task()
        if not any(waiting is call for _, waiting, _, _ in self._waiting):
            self._waiting.append((handler, call, batch, task))
        before = call.grads[place]
        call.grads[place] = grad if before is None else before + grad

    def _emit_use(self, stored: Stored) -> None:
        """A use of a bare parameter has its gradient."""
        if self._batch is not None:
            self._keep([stored], self._batch, _task(), data=False)

    def _complete(self, handler: Handler, call: ModuleCall, batch: Batch, task: int) -> None:
        if batch.captured is None:  # its step was taken already
            return
        began = time.perf_counter()
        try:
            with torch.no_grad():
                inputs = [t for t in call.args if isinstance(t, Tensor)]
                self._keep(handler(call), batch, task, data=not any(t.requires_grad for t in inputs))
        except CannotSplit as error:
            self._cannot(list(call.module._parameters.values()), str(error))
        except Exception as error:  # training goes on; what is missing is said, and stays said in the metadata
            self._cannot(list(call.module._parameters.values()), f"{type(error).__name__}: {error}")
        self.seconds += time.perf_counter() - began

    def _keep(self, stored: list[Stored], batch: Batch, task: int, data: bool) -> None:
        if batch.captured is None:
            return
        for site, tensors in stored:
            # The first step is captured exactly: its contributions are added up and compared with p.grad.
            if self.options.project is not None and site.form == "linear" and not self._whole:
                site, tensors = self._projected(site, tensors)
            number, parameter = self._number(site)
            if self.is_batch_only(number):
                continue
            if batch.rows is not None:
                tensors = {slot: t.index_select(0, batch.rows.to(t.device)) for slot, t in tensors.items()}
            kept = {slot: self._arena.keep(_narrow(t), shared=slot != "d") for slot, t in tensors.items()}
            if batch.rows is not None:
                kept["p"] = batch.rows.numpy()
            is_data = data and site.form in ("linear", "conv")
            self.half |= any(t.itemsize == 2 for t in kept.values())
            batch.captured.append(Captured(number, parameter, task, kept, is_data, self._arena.holds))

    def _projected(self, site: Site, tensors: dict[str, Tensor]) -> tuple[Site, dict[str, Tensor]]:
        """A linear site and its factors, projected where that makes them smaller."""
        assert self.options.project is not None
        found = self._projections.get(id(site))
        if found is None:
            smaller = replace(site, options=site.options | {"project": self.options.project})
            found = self._projections[id(site)] = (site, smaller)
        smaller, kept = found[1], {}
        for slot, t in tensors.items():
            if t.shape[-1] > self.options.project:
                p = torch.from_numpy(projection.matrix(site.name, slot, t.shape[-1], self.options.project))
                t = t @ p.to(device=t.device, dtype=t.dtype)
            kept[slot] = t
        return smaller, kept

    def _number(self, site: Site) -> tuple[int, int]:
        """The site's number, and the id of one of its parameters."""
        known = self._numbers.get(id(site))
        if known is None:
            content = _content(site)
            number = self._by_content.setdefault(content, len(self.sites))
            if number == len(self.sites):
                self.sites.append(site)
            owner = self._owners[int(np.searchsorted(self._starts, site.runs[0][0], side="right")) - 1]
            known = self._numbers[id(site)] = (site, number, owner)  # the site is kept, so that its id stays its own
        return known[1], known[2]

    def _cannot(self, parameters: list[nn.Parameter | None], reason: str) -> None:
        """Record some parameters by batch only, from now on; say so once."""
        for p in parameters:
            if p is not None and p.requires_grad and id(p) in self._names:
                self.give_up(self._names[id(p)], reason)

    def give_up(self, name: str, reason: str) -> None:
        """Record a tensor by batch only: its gradients cannot be split into samples."""
        if name not in self.batch_only:
            self.batch_only[name] = reason
            self._say_once(f"batch-only {name}", f"{name} is recorded by batch only, not by sample: {reason}.")

    def is_batch_only(self, site: int) -> bool:
        """Whether no tensor of a site is recorded by sample any more."""
        return bool(self.batch_only) and all(
            self._name_at(first) in self.batch_only for first, _ in self.sites[site].runs
        )

    def _name_at(self, first: int) -> str:
        return self._names[self._owners[int(np.searchsorted(self._starts, first, side="right")) - 1]]

    # At the step ----------------------------------------------------------------------------------------------

    def accumulated(self, p: Tensor, fresh: bool) -> None:
        """A backward pass has added to p.grad; `fresh`: p.grad had been cleared before."""
        task = _task()
        if fresh:
            self._accumulated[id(p)] = [task]
        else:
            self._accumulated.setdefault(id(p), []).append(task)

    def forget_gradients(self) -> None:
        """The step is taken: what was added to p.grad so far is used up."""
        self._accumulated = {}

    def settle(self, batches: list[Batch]) -> None:
        """Keep of some batches the calls that p.grad holds right now; the next backward pass begins a new gradient."""
        for waiting in [w for w in self._waiting if any(w[2] is batch for batch in batches)]:
            self._waiting.remove(waiting)
            self._complete(*waiting)
        for batch in batches:
            if batch.captured is not None:
                held = [c for c in batch.captured if self._is_held(c)]
                for c in held:
                    c.task = None
                batch.captured = held

    def _is_held(self, c: Captured) -> bool:
        return c.task is None or c.task in self._accumulated.get(c.parameter, ())

    def collect(self, step: int, batches: list[Batch], scales: list[Tensor | float]) -> list[Entry]:
        """The calls of a step's batches that p.grad holds; their tensors are perhaps on their way from a GPU.

        Args:
            step: number of the step.
            batches: its batches, in order.
            scales: the number that a GradScaler multiplied the loss of each with.
        """
        self.settle(batches)
        entries, position = [], 0
        for number, (batch, scale) in enumerate(zip(batches, scales, strict=True)):
            calls: dict[int, int] = {}
            for c in batch.captured or ():
                call = calls[c.site] = calls.get(c.site, -1) + 1
                size = len(next(iter(c.tensors.values())))
                if c.holds != self._arena.holds:  # in memory that an earlier record gives back once that is written
                    self._arena.wait()
                    c.tensors = {slot: t.copy() for slot, t in c.tensors.items()}
                if "p" in c.tensors:
                    c.tensors["p"] = (c.tensors["p"] + position).astype(np.int32)
                # The scale may be a tensor on a GPU; the writer makes a number of it.
                fields = (step, number, position, size, c.site, call, scale, c.data, c.tensors)
                entries.append(Entry(*fields))  # type: ignore[arg-type]
            batch.captured = None
            position += batch.size
        return entries


def _narrow(t: Tensor) -> Tensor:
    """Ids as int32: no embedding has 2**31 rows."""
    return t.to(torch.int32) if t.dtype == torch.int64 else t


def captured_block(entry: Entry) -> Block:
    """An entry that is still the recorder's, as what a reader would get; its scale is left out."""
    bits = {slot: t.view(f"u{t.itemsize}") for slot, t in entry.tensors.items() if slot != "p"}
    dtypes = entry.dtypes
    tensors = {slot: values_of(values, dtypes[slot]) for slot, values in bits.items()}
    places = np.arange(entry.size) + entry.position
    steps, ones = np.full(entry.size, entry.step), np.ones(entry.size)
    return Block(entry.site, entry.call, steps, places, np.full(entry.size, -1), ones, tensors)


def _content(site: Site) -> str:
    return json.dumps(site.to_json(), sort_keys=True)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a module's output, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, dict):
        for item in output.values():
            yield from _tensors(item)


def _task() -> int:
    """The number of the backward pass that is going on; -1 outside."""
    return torch._C._current_graph_task_id()
