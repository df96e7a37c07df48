"""The tiny run as a fixture."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

# Test folders are no packages (importlib mode), so the shared problem is loaded by its place, once.
if "query_problems" not in sys.modules:
    spec = importlib.util.spec_from_file_location("query_problems", Path(__file__).with_name("problems.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["query_problems"] = module
    spec.loader.exec_module(module)


@pytest.fixture
def store():
    """Six steps, every weight at every step."""
    return sys.modules["query_problems"].MemoryStore()
