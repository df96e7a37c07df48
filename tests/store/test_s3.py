"""A run at an S3 URI. TileDB takes its settings from the environment: TILEDB_VFS_S3_ENDPOINT_OVERRIDE and the like."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import nbdyn
from nbdyn.errors import NbdynError, RunBusy
from nbdyn.store import backend, journal, lock, metadata, packer, verify
from nbdyn.store.compact import compact
from tests import problems
from tests.store.test_compact import Killed, cells_of, record, table

SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """A bucket on a server of this machine, in a process of its own: TileDB holds the GIL while it waits."""
    for module in ("moto", "flask"):
        pytest.importorskip(module, reason='no S3 server to test against; `pip install "moto[server]"` brings one')
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as server,
    ):
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        assert port, "the S3 server did not start"
        settings = {"ENDPOINT_OVERRIDE": f"127.0.0.1:{port}", "SCHEME": "http", "USE_VIRTUAL_ADDRESSING": "false"}
        for key, value in settings.items():
            patch.setenv(f"TILEDB_VFS_S3_{key}", value)
        for key, value in (("ACCESS_KEY_ID", "nobody"), ("SECRET_ACCESS_KEY", "none"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{key}", value)
        backend.tiledb().VFS(ctx=backend.context("s3://bucket")).create_bucket("s3://bucket")
        yield "s3://bucket"
        server.kill()


def train(rec: Any, model: nn.Module, optimizer: Any, loss_fn: Any, steps: range) -> list[np.ndarray]:
    inputs, targets = problems.data().tensors
    rows = []
    for step in steps:
        rows.append(problems.flat(model).numpy())
        ids = (torch.arange(20) + step) % len(inputs)
        rec.batch(ids)
        optimizer.zero_grad()
        loss_fn(model(inputs[ids]), targets[ids]).backward()
        optimizer.step()
    return rows


def test_a_run_at_an_s3_uri(bucket: str) -> None:
    """Recorded, opened, listed, verified, resumed, held by one writer, replaced."""
    uri = f"{bucket}/runs/fc"
    model = problems.mlp(12, 8, 4)
    optimizer, loss_fn = torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss()
    with nbdyn.record(uri, model, optimizer, loss_fn, weights="every") as rec:
        assert lock.is_held(uri) and nbdyn.open(uri).status == "recording"
        rows = train(rec, model, optimizer, loss_fn, range(5))
    run = nbdyn.open(uri)
    assert (run.name, run.uri, run.status, len(run)) == ("fc", uri, "complete", 5)
    np.testing.assert_array_equal(run.weights["all", :-1], np.stack(rows))
    assert len(run.visits) == 100

    with nbdyn.record(uri + "/", model, optimizer, loss_fn, mode="resume") as rec:  # at once: the lease was given back
        rows += train(rec, model, optimizer, loss_fn, range(5, 8))
    assert run.refresh()
    np.testing.assert_array_equal(run.weights["all", :-1], np.stack(rows))
    assert len(verify.verify(uri)) == len(verify.gc(uri)) == 0
    table = nbdyn.runs(f"{bucket}/runs")
    assert table["run"].tolist() == ["fc"] and table["status"].tolist() == ["complete"]

    lease = {"pid": 4711, "host": "elsewhere", "time": time.time()}
    metadata.write_metadata(uri, backend.context(uri), writer=json.dumps(lease), status="recording")
    for mode in ("new", "resume", "replace"):
        with pytest.raises(RunBusy, match="process 4711 on elsewhere"):
            nbdyn.record(uri, model, optimizer, loss_fn, mode=mode)
    lease["time"] -= lock.REMOTE_LEASE_SECONDS + 1
    metadata.write_metadata(uri, backend.context(uri), writer=json.dumps(lease))
    assert nbdyn.open(uri).status == "killed"
    nbdyn.record(uri, model, optimizer, loss_fn, mode="replace").close()
    assert len(nbdyn.open(uri)) == 0


def test_a_bucket_that_is_not_there(bucket: str) -> None:
    model = problems.mlp(12, 8, 4)
    with pytest.raises(NbdynError, match=r"cannot reach s3://missing/fc: .*NoSuchBucket"):
        nbdyn.record("s3://missing/fc", model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(NbdynError, match=r"cannot reach s3://missing/fc: .*NoSuchBucket"):
        nbdyn.open("s3://missing/fc")


def test_captures_are_compacted_at_an_s3_uri(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rec = record(f"{bucket}/runs/captures", segments=2)
    before = table(rec.uri)
    assert len(before) == 2 * 2 * (6 + 3)

    def die(*arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(packer.Packer, "_write_calls", die)
        with pytest.raises(Killed):
            compact(rec.uri)
    assert table(rec.uri) == before
    compact(rec.uri, upto=1, cells=cells_of)
    assert table(rec.uri) == before
    compact(rec.uri, cells=cells_of)
    assert table(rec.uri) == before and not list(journal.numbers(rec.uri))
    assert len(verify.gc(rec.uri)) == len(verify.verify(rec.uri)) == 0
    verify.delete(rec.uri)
    assert backend.object_type(rec.uri) is None
