"""A run in memory, six steps long, whose answers can be read off with the eye."""

from __future__ import annotations

from typing import Any

import numpy as np

EPOCH = np.array([0, 0, 0, 1, 1, 1])
LOSS = np.array([2.0, 1.5, 6.0, 1.0, np.nan, 0.5])
ACCURACY = np.array([0.0, 0.5, 0.0, 0.5, 1.0, 1.0])
GRAD = np.array([[3.0, 4.0], [0.0, 2.0], [30.0, 40.0], [1.0, 0.0], [np.nan, 1.0], [0.0, 0.0]])
SAMPLE = np.array([[0, 1], [2, 3], [4, 5], [5, 0], [1, 2], [3, 4]])
VISIT_LOSS = np.array([[1.0, 3.0], [1.0, 2.0], [5.0, 7.0], [0.5, 1.5], [np.nan, 2.0], [0.25, 0.75]], np.float32)
CORRECT = np.array([[0, 0], [1, 0], [0, 0], [1, 0], [1, 1], [1, 1]], np.int8)
WEIGHTS = np.array(
    [
        # fc1.weight[0,0] .. [1,1]        fc1.bias
        [0.5, 1.0, 0.1, 1e-3, 1.0, 0.0],
        [0.2, -1.0, 0.1, 5e-7, 1.0, 1.0],
        [0.0, 1.0, 0.1, 1e-3, 1.0, 2.0],
        [0.0, np.nan, 0.1, 1e-3, 1.0, 3.0],
        [-0.1, -1.0, 0.1, 1e-3, -0.0, 4.0],
        [0.0, -1.0, 0.1, 1e-3, 1.0, 5.0],
        [0.3, 2.0, 0.1, 1e-3, 1.0, 6.0],
    ],
    dtype=np.float32,
)
TENSORS = [
    {"name": "fc1.weight", "layer": "fc1", "shape": [2, 2], "dtype": "float32", "first": 0, "size": 4,
     "trainable": True, "group": 0},
    {"name": "fc1.bias", "layer": "fc1", "shape": [2], "dtype": "float32", "first": 4, "size": 2,
     "trainable": True, "group": 0},
]  # fmt: skip


class MemoryWeights:
    """The stored rows of weights, and a record of what was read."""

    def __init__(self, rows: np.ndarray, steps: np.ndarray) -> None:
        self.rows, self.steps = rows, steps
        self.reads: list[tuple[int, int]] = []

    def read(self, indices: np.ndarray, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        self.reads.append((start, stop))
        steps = self.steps[(self.steps >= start) & (self.steps < stop)]
        return steps, self.rows[steps][:, indices]


class MemoryStore:
    """What the query room needs of a store."""

    def __init__(self, name: str = "tiny", weights: str = "every", writable: bool = True, loss: Any = LOSS) -> None:
        self.name, self.uri, self.neighbours = name, f"mem/{name}", {}
        self.steps_committed = len(loss)
        self.columns = ["lr/0", "lr/1", "grad_norm/0", "grad_norm/1", "weight_norm/0", "weight_norm/1", "update_norm/0",
                        "update_norm/1", "log/val loss", "log/mean"]  # fmt: skip
        self.config: dict[str, Any] = {"tensors": TENSORS, "weights": weights, "every": 3, "row_dtype": "float32"}
        steps = np.arange(7) if weights == "every" else np.array([0, 3, 6])
        self.weights = MemoryWeights(WEIGHTS, steps)
        self.loss = np.asarray(loss)
        self.notes: list[tuple[int, str, str]] = []
        self.writable = writable
        self.steps_read: list[tuple[int, int]] = []

    def read_steps(self, start: int, stop: int) -> dict[str, np.ndarray]:
        columns = {
            "epoch": EPOCH, "source": np.zeros(6, int), "batch_size": np.full(6, 2), "loss": self.loss,
            "accuracy": ACCURACY, "seconds": np.arange(6.0), "skipped": np.array([0, 0, 1, 0, 0, 0]),
        }  # fmt: skip
        return {name: values[start:stop] for name, values in columns.items()}

    def read_scalars(self, start: int, stop: int) -> dict[str, np.ndarray]:
        self.steps_read.append((start, stop))
        sparse = np.where(np.arange(6) % 3 == 0, 2.0, np.nan)
        values = [np.full(6, 0.1), np.full(6, 0.2), GRAD[:, 0], GRAD[:, 1], sparse, sparse, sparse / 4, sparse / 4,
                  np.arange(6.0) * 10, np.arange(6.0)]  # fmt: skip
        return {name: column[start:stop] for name, column in zip(self.columns, values, strict=True)}

    def read_visits(self, start: int, stop: int) -> dict[str, np.ndarray]:
        steps = np.arange(start, stop)
        return {
            "step": np.repeat(steps, 2),
            "position": np.tile([0, 1], len(steps)),
            "sample": SAMPLE[start:stop].reshape(-1),
            "target": np.full(2 * len(steps), -1),
            "loss": VISIT_LOSS[start:stop].reshape(-1),
            "correct": CORRECT[start:stop].reshape(-1),
        }

    def write_note(self, step: int, kind: str, text: str) -> None:
        if not self.writable:
            raise PermissionError("read-only file system")
        self.notes.append((step, kind, text))
