"""The cockpit in a real JupyterLab: it appears, moves while the cell trains, and shows the frame's values."""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import Page, poll

pytestmark = pytest.mark.browser

FED_FROM_A_THREAD = """
import threading, time
import numpy as np
from nbdyn.widgets import Cockpit

cockpit = Cockpit("runs/fed")
display(cockpit)

def write():
    rng = np.random.default_rng(0)
    for at in range(0, 3000, 20):
        t = np.arange(at, at + 20)
        loss = 2.3 * np.exp(-t / 600) + 0.12 * rng.random(20) + 0.02
        grad = np.exp(-t / 1500) * rng.lognormal(0, 0.35, 20)
        loss[t == 1500] = 1.9
        grad[t == 1500] = 40.0
        loss[(t >= 2200) & (t < 2205)] = np.nan
        ratio = np.where(t % 50 == 0, 1e-3 * np.exp(-t / 2500) * (1 + rng.random(20)), np.nan)
        lr = 0.1 * np.minimum(t / 200, 1) * 0.5 * (1 + np.cos(np.pi * t / 3000))
        cockpit.feed({"step": t, "loss": loss, "lr": lr, "grad_norm": grad, "update_ratio": ratio})
        time.sleep(0.02)

writer = threading.Thread(target=write)
writer.start()
writer.join()
cockpit.finish("complete")
"""


def watch(page: Page, cells: int) -> list[int]:
    """The numbers of steps that the cockpit showed, one after the other, until all cells had ended."""
    shown: list[int] = []

    def ended() -> bool:
        digest = page.digest()
        if digest and digest["n"] and digest["n"] != (shown or [0])[-1]:
            shown.append(digest["n"])
        counts = page.counts()
        if trouble := page.trouble():
            pytest.fail(trouble)
        return len(counts) == cells and None not in counts

    poll(ended, "the cells to end", 180)
    return shown


def agrees(digest: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Check what the browser drew against `cockpit.frame()`."""
    for name in {row["quantity"] for row in rows}:
        own = [row for row in rows if row["quantity"] == name]
        series = digest["series"][name]
        assert series["bins"] == len(own)
        assert series["nan"] == sum(row["nan_count"] for row in own)
        logarithmic = name in ("grad_norm", "update_ratio")
        low = min(row["low"] for row in own if not (math.isnan(row["low"]) or (logarithmic and row["low"] <= 0)))
        high = max(row["high"] for row in own if not math.isnan(row["high"]))
        assert series["extent"] == pytest.approx([low, high], rel=1e-6)


def outputs(page: Page, index: int) -> list[Any]:
    return page.save().cells[index].outputs


def test_it_moves_while_a_thread_feeds_it(page: Page, screenshots: Path) -> None:
    frame = "import json; print(json.dumps(cockpit.frame().to_dict('records')))"
    page.lab.write("fed.ipynb", FED_FROM_A_THREAD, frame)
    page.open("fed.ipynb")
    page.command("notebook:run-all-cells")
    shown = watch(page, 2)
    assert len(shown) >= 5 and shown == sorted(shown)
    digest = poll(lambda: (d := page.digest()) and d["status"] == "complete" and d, "the last frame")
    assert (digest["n"], digest["first"], digest["last"]) == (3000, 0, 2999)
    rows = json.loads(outputs(page, 1)[0].text)
    agrees(digest, rows)

    saved = outputs(page, 0)
    assert [output.output_type for output in saved] == ["display_data"]
    assert "image/png" in saved[0].data and saved[0].data["text/plain"] == "cockpit of runs/fed, steps 0..2999"
    assert saved[0].data["application/vnd.jupyter.widget-view+json"]["model_id"]
    assert page.page.locator(".nbdyn-cockpit").count() == 1

    for theme in ("JupyterLab Dark", "JupyterLab Light"):
        page.theme(theme)
        page.page.mouse.move(5, 5)
        page.picture(screenshots / f"cockpit-{theme.split()[1].lower()}.png")
        page.page.locator(".nbdyn-cockpit canvas").hover(position={"x": 480, "y": 80})
        page.picture(screenshots / f"cockpit-{theme.split()[1].lower()}-hover.png")


def test_it_answers_while_the_kernel_is_busy(page: Page, screenshots: Path) -> None:
    feed = """
    import numpy as np
    from nbdyn.widgets import Cockpit
    cockpit = Cockpit("runs/busy")
    t = np.arange(100)
    ratio = np.where(t % 50 == 0, t + 1, np.nan)
    cockpit.feed({"step": t, "loss": np.where(t == 40, 7.0, 1.0 + t / 100), "update_ratio": ratio})
    display(cockpit)
    """
    page.lab.write("busy.ipynb", textwrap.dedent(feed), "import time\nwhile True: time.sleep(0.1)")
    page.open("busy.ipynb")
    page.command("notebook:run-all-cells")
    poll(lambda: (d := page.digest()) and d["n"] == 100, "the cockpit")
    poll(lambda: page.counts()[0] and page.counts()[1] is None, "the second cell to run")
    canvas = page.page.locator(".nbdyn-cockpit canvas")
    label = canvas.get_attribute("aria-label") or ""
    assert label.startswith("cockpit of runs/busy, live, steps 0 to 99; loss 1.99; update / weight ratio 51.0")
    box = canvas.bounding_box()
    x = 52 + 40 / 99 * (box["width"] - 64)
    canvas.hover(position={"x": x, "y": 60})
    hovered = "step 40; loss 7.00; update / weight ratio 51.0 (at 50)"
    poll(lambda: hovered in (canvas.get_attribute("aria-label") or ""), "the values of the step pointed at")
    page.picture(screenshots / "live-hover.png")
    canvas.focus()
    page.page.keyboard.press("ArrowRight")
    poll(lambda: "step 41; loss 1.41" in (canvas.get_attribute("aria-label") or ""), "the step after it")
    page.page.keyboard.press("Escape")
    poll(lambda: canvas.get_attribute("aria-label") == label, "the last values again")
    with page.page.expect_download() as download:
        page.page.get_by_label("save as PNG").click()
    assert download.value.suggested_filename == "runs-busy-cockpit.png"
    download.value.save_as(screenshots / "downloaded.png")
    assert (screenshots / "downloaded.png").read_bytes().startswith(b"\x89PNG")
    page.page.set_viewport_size({"width": 620, "height": 900})
    page.picture(screenshots / "narrow.png")
    page.command("notebook:interrupt-kernel")
    poll(lambda: page.counts()[1], "the kernel to be free")
