"""What is shipped to the browser: its size, no addresses, and its pure functions, run by node."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from nbdyn.widgets import Cockpit, _assets

ROOT = Path(__file__).parents[2]
NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed; it runs the tests of the JavaScript")


def run_node(*arguments: str, text: str | None = None) -> str:
    result = subprocess.run([str(NODE), *arguments], input=text, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_each_widget_is_one_small_module():
    widgets = [path.name for path in _assets.STATIC.glob("*.js") if path.name != "core.js"]
    assert widgets == ["cockpit.js"]
    for name in widgets:
        module = _assets.join(name)
        assert len(module.encode()) < 40_000
        assert "./core.js" not in re.sub(r"/\*\*.*?\*/", "", module, flags=re.DOTALL)
        assert len(re.findall(r"^export ", module, re.MULTILINE)) == 1
        assert not re.search(r"^import ", module, re.MULTILINE)


def test_nothing_shipped_names_an_address():
    for path in _assets.STATIC.iterdir():
        addresses = re.findall(r"https?://[^\s\"')]+", path.read_text(encoding="utf-8"))
        assert [a for a in addresses if not a.startswith("http://www.w3.org/")] == [], path.name


def test_every_style_rule_is_confined():
    css = re.sub(r"/\*.*?\*/", "", _assets.style(), flags=re.DOTALL)
    selectors = re.findall(r"([^{};]+)\{", css)
    plain = [s.strip() for s in selectors if not s.strip().startswith("@") and s.strip() != "50%"]
    assert plain
    for selector in plain:
        assert all(".nbdyn" in one for one in selector.split(",")), selector


@needs_node
def test_the_pure_functions():
    run_node("--test", str(ROOT / "tests" / "js"))


@needs_node
def test_the_joined_module_gives_a_render_function(tmp_path: Path):
    (tmp_path / "widget.mjs").write_text(_assets.join("cockpit.js"), encoding="utf-8")
    program = "import widget from './widget.mjs'; console.log(Object.keys(widget), typeof widget.render)"
    (tmp_path / "main.mjs").write_text(program, encoding="utf-8")
    assert run_node(str(tmp_path / "main.mjs")).strip() == "[ 'render' ] function"


@needs_node
def test_the_browser_reads_what_python_packs(tmp_path: Path):
    steps = np.arange(5000) + 7
    values = np.random.default_rng(0).lognormal(size=5000)
    values[1234], values[77] = 5e4, np.nan
    ratio = np.where(steps % 50 == 0, values * 1e-3, np.nan)
    cockpit = Cockpit("runs/a")
    huge = np.where(steps == 9, 1e300, values)
    cockpit.feed({"step": steps, "loss": values, "grad_norm": huge, "update_ratio": ratio})
    cockpit.finish("complete")
    (tmp_path / "core.mjs").write_text((_assets.STATIC / "core.js").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "main.mjs").write_text(
        "import { readFileSync } from 'node:fs'; import { decode } from './core.mjs';"
        "const { meta, data } = JSON.parse(readFileSync(0, 'utf8')); const bytes = Buffer.from(data, 'base64');"
        "const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);"
        "const rows = decode({ meta, data: view }).series.flatMap((s) => [...s.low].map((low, i) =>"
        "  [s.name, s.first[i], s.final[i], low, s.high[i], s.mean[i], s.nans[i]]));"
        "console.log(JSON.stringify(rows));",
        encoding="utf-8",
    )
    wire = cockpit.wire | {"data": base64.b64encode(cockpit.wire["data"]).decode()}
    rows = json.loads(run_node(str(tmp_path / "main.mjs"), text=json.dumps(wire, allow_nan=False)))
    frame = cockpit.frame()
    assert len(rows) == len(frame)
    for column, values in zip(frame.columns, zip(*rows, strict=True), strict=True):
        if column == "quantity":
            assert list(values) == frame.quantity.tolist()
        else:
            # JSON writes NaN as null; float32 ends at 3.4e38
            expected = np.clip(frame[column].to_numpy(dtype=float), -3.4028235e38, 3.4028235e38)
            np.testing.assert_allclose(np.array(values, dtype=float), expected, rtol=1e-6)
