"""Runs on disk: one run is one TileDB group, at any TileDB URI."""

from nbdyn.store.store import Store
from nbdyn.store.weights import Weights

__all__ = ["Store", "Weights"]
