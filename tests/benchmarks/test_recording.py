"""The benchmark runs and its table is complete; and every contestant gives back the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from tests.benchmarks import recording

pytestmark = pytest.mark.benchmark


def test_prints_a_line_for_every_contestant(capsys):
    recording.main(["--steps", "20", "--repeats", "1", "--models", "784-100-50-10"])
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in recording.CONTESTANTS)


def test_contestants_agree_bit_for_bit(tmp_path):
    rng = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(2_000, 784, generator=rng), torch.randint(10, (2_000,), generator=rng))
    answers = []
    for name in recording.CONTESTANTS.keys() - recording.missing_packages().keys() - {"plain loop"}:
        contestant = recording.CONTESTANTS[name][0]()
        loader = recording.make_loader(data, "ordinary")
        recording.train(contestant, tmp_path / name.replace(" ", "-"), (784, 100, 50, 10), loader, 12)
        if "snapshots" not in name:
            answers.append((contestant.trajectory(12_345), contestant.vector(7)))
    for trajectory, vector in answers:
        np.testing.assert_array_equal(trajectory, answers[0][0])
        np.testing.assert_array_equal(vector, answers[0][1])
    assert len(answers) >= 2
