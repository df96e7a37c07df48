"""Recording in a real JupyterLab: the live cockpit of a real run, and the first notebook from top to bottom."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import ROOT, Page, poll
from tests.browser.test_cockpit import agrees, outputs, watch

pytestmark = pytest.mark.browser

RECORD = """
import time

import torch
from torch import nn

import nbdyn

torch.manual_seed(0)
data = torch.utils.data.TensorDataset(torch.randn(640, 20), torch.randint(0, 3, (640,)))
loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)
model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
loss_fn = nn.CrossEntropyLoss()
rec = nbdyn.record("runs/live", model, optimizer, loss_fn)
cockpit = rec.cockpit()
display(cockpit)
for epoch in range(10):
    for x, y in rec.watch(loader):
        loss = loss_fn(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        time.sleep(0.01)
rec.close()
"""

VALUES = """
import json
steps = nbdyn.open(rec.uri).steps
shown = ("loss", "lr", "grad_norm", "update_ratio")
ends = {name: [float(steps[name].min()), float(steps[name].max())] for name in shown}
print(json.dumps({"frame": cockpit.frame().to_dict("records"), "steps": ends, "n": len(steps)}))
"""

OPENED = "nbdyn.open(rec.uri).cockpit()"


def no_errors(page: Page) -> list[Any]:
    """The code cells of the saved notebook, none of which failed."""
    cells = [cell for cell in page.save().cells if cell.cell_type == "code"]
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error", "\n".join(output.traceback)
    return cells


def pictures(cells: list[Any]) -> int:
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


def test_the_cockpit_of_a_run_moves_and_is_right(page: Page, screenshots: Path) -> None:
    page.lab.write("live.ipynb", RECORD, VALUES, OPENED)
    page.open("live.ipynb")
    page.command("notebook:run-all-cells")
    shown = watch(page, 3)
    cells = no_errors(page)
    assert len(shown) >= 4, shown  # it grew while the cell trained
    values = json.loads(cells[1].outputs[0].text)
    assert values["n"] == 200
    poll(lambda: page.page.locator(".nbdyn-cockpit").count() == 2, "the cockpit of the opened run")
    for digest in poll(lambda: (d := page.digests()) and all(d) and d, "both cockpits to be drawn"):
        assert (digest["n"], digest["first"], digest["last"], digest["status"]) == (200, 0, 199, "complete")
        agrees(digest, values["frame"])
        for name, ends in values["steps"].items():
            assert digest["series"][name]["extent"] == pytest.approx(ends, rel=1e-5)
    assert pictures(cells) == 2
    page.picture(screenshots / "recorded.png")


def test_first_light_runs_and_runs_again(page: Page, screenshots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(ROOT / "notebooks" / "01_first_light.ipynb", page.lab.folder)
    page.open("01_first_light.ipynb")
    code = [cell for cell in page.lab.read(page.name).cells if cell.cell_type == "code"]
    page.command("notebook:run-all-cells")
    shown = watch(page, len(code))
    cells = no_errors(page)
    assert len(shown) >= 2, shown
    assert pictures(cells) >= 2
    digest = poll(lambda: (d := page.digest()) and d["status"] == "complete" and d, "the last frame")
    page.page.screenshot(path=screenshots / "first-light.png")

    recording = next(i for i, c in enumerate(page.lab.read(page.name).cells) if "nbdyn.record(" in c.source)
    for again in range(recording, recording + 3):  # record, cockpit, train
        before = max(filter(None, page.counts()))
        page.select(again)
        page.command("notebook:run-cell")
        poll(lambda n=before: (c := page.counts()) and None not in c and max(c) == n + 1, f"cell {again} to run again")
    no_errors(page)
    assert outputs(page, recording)[0].text != ""
    assert page.digest()["n"] == digest["n"]
