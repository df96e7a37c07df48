"""Other ways to per-sample gradients, for `per_sample.py others`: each is a training loop that has them at every step.

None of them keeps what it computes, sparse cells excepted: storing dense gradients would come on top.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, grad, vmap


def plain(model: nn.Module, batches: Iterable[Any], rate: float) -> tuple[float, int]:
    """The ordinary loop. Returns seconds, and bytes of per-sample gradients a step (0)."""
    loss_fn, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    began = time.perf_counter()
    for x, y in batches:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return time.perf_counter() - began, 0


def functional(
    model: nn.Module,
    batches: Iterable[Any],
    rate: float,
    each: Callable[[int, dict[str, torch.Tensor]], int] | None = None,
) -> tuple[float, int]:
    """torch.func: vmap(grad) gives the samples' gradients, their mean the step; `each` may store them."""
    loss_fn, optimizer = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss_fn(functional_call(model, parameters, (x[None],)), y[None])

    samples = vmap(grad(loss), in_dims=(None, 0, 0))
    began, n_bytes = time.perf_counter(), 0
    for step, (x, y) in enumerate(batches):
        found = samples({name: p.detach() for name, p in model.named_parameters()}, x, y)
        for name, p in model.named_parameters():
            p.grad = found[name].mean(0)
        n_bytes = sum(g.nbytes for g in found.values()) if each is None else n_bytes + each(step, found)
        optimizer.step()
    steps = step + 1
    return time.perf_counter() - began, n_bytes if each is None else n_bytes // steps


def sparse_cells(model: nn.Module, batches: Iterable[Any], rate: float) -> tuple[float, int]:
    """vmap(grad), and every cell other than zero written to a sparse TileDB array in global order."""
    import tiledb

    with tempfile.TemporaryDirectory() as folder:
        uri, ctx = str(Path(folder) / "cells"), tiledb.Ctx()
        packed = tiledb.FilterList([tiledb.ByteShuffleFilter(), tiledb.ZstdFilter(1)])
        dims = [
            tiledb.Dim(name, domain=(0, 2**31), tile=tile, dtype=np.uint32, filters=packed, ctx=ctx)
            for name, tile in (("step", 1), ("parameter", 2**30), ("sample", 2**30))
        ]
        value = tiledb.Attr("g", dtype=np.float32, filters=packed, ctx=ctx)
        tiledb.Array.create(uri, tiledb.ArraySchema(tiledb.Domain(*dims, ctx=ctx), attrs=[value], sparse=True, ctx=ctx))

        def write(step: int, found: dict[str, torch.Tensor]) -> int:
            flat = torch.cat([g.flatten(1) for g in found.values()], dim=1).t()
            parameter, sample = flat.nonzero(as_tuple=True)
            columns = {
                "step": np.full(len(sample), step, np.uint32),
                "parameter": parameter.numpy().astype(np.uint32),
                "sample": sample.numpy().astype(np.uint32),
                "g": flat[parameter, sample].numpy(),
            }
            lt = tiledb.libtiledb
            with tiledb.open(uri, "w", ctx=ctx) as array:
                query = lt.Query(ctx, lt.Array(ctx, array), lt.QueryType.WRITE)
                query.layout = lt.LayoutType.GLOBAL_ORDER
                for name, values in columns.items():
                    query.set_data_buffer(name, values, len(values))
                query._submit()
                query.finalize()
            return 0

        seconds, _ = functional(model, batches, rate, write)
        total = sum(file.stat().st_size for file in Path(uri).rglob("*") if file.is_file())
        return seconds, total // len(list((Path(uri) / "__commits").iterdir()))


def opacus(model: nn.Module, batches: Iterable[Any], rate: float) -> tuple[float, int]:
    """Opacus: hooks that compute p.grad_sample in the backward pass."""
    from opacus import GradSampleModule  # pyright: ignore[reportMissingImports]

    wrapped, loss_fn = GradSampleModule(model, loss_reduction="mean"), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    began, n_bytes = time.perf_counter(), 0
    for x, y in batches:
        optimizer.zero_grad()
        loss_fn(wrapped(x), y).backward()
        n_bytes = sum(p.grad_sample.nbytes for p in model.parameters())
        optimizer.step()
        for p in model.parameters():
            p.grad_sample = None
    return time.perf_counter() - began, n_bytes


def backpack(model: nn.Module, batches: Iterable[Any], rate: float) -> tuple[float, int]:
    """BackPACK: the extension BatchGrad computes p.grad_batch in the backward pass."""
    from backpack import backpack as extension  # pyright: ignore[reportMissingImports]
    from backpack import extend
    from backpack.extensions import BatchGrad  # pyright: ignore[reportMissingImports]

    extended, loss_fn = extend(model), extend(nn.CrossEntropyLoss())
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    began, n_bytes = time.perf_counter(), 0
    for x, y in batches:
        optimizer.zero_grad()
        with extension(BatchGrad()):
            loss_fn(extended(x), y).backward()
        n_bytes = sum(p.grad_batch.nbytes for p in model.parameters())
        optimizer.step()
    return time.perf_counter() - began, n_bytes


OTHERS: dict[str, tuple[Callable[..., tuple[float, int]], str]] = {
    "plain loop": (plain, ""),
    "Opacus": (opacus, "opacus"),
    "BackPACK": (backpack, "backpack"),
    "torch.func.vmap(grad)": (functional, ""),
    "vmap(grad) and sparse TileDB cells": (sparse_cells, ""),
}
"""Name -> the loop, and the package that it needs."""


def missing() -> dict[str, str]:
    """The ways that cannot run here, and the package that each lacks."""
    needs = {name: package for name, (_, package) in OTHERS.items() if package}
    return {name: package for name, package in needs.items() if importlib.util.find_spec(package) is None}
