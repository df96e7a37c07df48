"""Tests and nulls on plain arrays: NumPy, SciPy and pandas only, nothing of a run."""
