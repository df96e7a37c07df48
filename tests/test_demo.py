"""The demo answers all five questions, in a short text and one picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdyn.demo import demo
from nbdyn.plots import png_size
from nbdyn.settings import options


def test_the_demo_answers_five_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = demo(tmp_path / "demo", epochs=4)
    told = capsys.readouterr().out
    asked = [line.split("%dyn ")[1] for line in told.splitlines() if "%dyn " in line]
    assert [statement.split()[0] for statement in asked] == ["top", "group", "compare", "last", "last"]
    assert "crosses 0" in asked[4] and "share(|grad| > explode) > 10%" in asked[3]
    assert "whose learning rate was left alone: no step in" in told
    assert len(told.splitlines()) < 60
    size = png_size(picture.read_bytes())
    assert 600 < size["width"] < 1600 and 600 < size["height"] < 2000
    assert not options.quiet
