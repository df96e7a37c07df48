"""The arrays of a run and the columns of its frames: one place that names everything stored."""

from __future__ import annotations

SCHEMA_VERSION = 1
"""Written into every run; a run with a larger number was written by a newer nbdyn."""

ARRAYS = ("weights", "state", "scalars", "visits", "notes", "steps")
"""The arrays of a run, in the order a segment is committed: `steps` last, it makes the segment visible."""

CAPTURE = ("calls", "gradients", "factors", "rows")
"""Members of a run that captured single samples, once its journal is compacted: arrays, groups of numbered arrays."""

SUMMARY = "summary"
"""The member of a run that holds its indexes: a group of arrays, and the entry of the metadata that makes them
count."""

LCA = "lca"
"""The member of a run that holds its loss change allocations: a group of groups, one for each name."""

# Parts of the `state` array: what a replay needs, keyed by (step, part).
PART_RNG = 0  # torch's CPU generator before the forward pass, where it changed
PART_SNAPSHOT = 1  # safetensors: optimizer state, Python/NumPy/CUDA generators; JSON: param groups, train/eval modes
PART_GRADIENT = 2  # the flat gradient that the optimizer saw, where it is not the raw one times a number
PART_GROUPS = 3  # JSON: param-group options, where they changed (the learning rate is a scalar of every step)
PART_BUFFER = 16  # 16 + i: the i-th buffer of the model, where it changed

LR = "lr/{}"  # learning rate of param group {}
GRAD_NORM = "grad_norm/{}"  # Euclidean norm of p.grad as the optimizer saw it, parameter tensor {}
WEIGHT_NORM = "weight_norm/{}"  # Euclidean norm of weights[t], every `every` steps
UPDATE_NORM = "update_norm/{}"  # Euclidean norm of dw[t] = weights[t+1] - weights[t], every `every` steps
RESIDUAL = "residual/{}"  # max|sum of contributions - p.grad| / max|p.grad| of tensor {}, at steps where it was checked
GRAD_FACTOR = "grad_factor"  # the number c for which seen gradient = c * raw gradient, where c != 1
LOSS_SCALE = "loss_scale"  # a GradScaler's at the steps that have a c, which takes it back; 1 without one
LOG = "log/{}"  # a value that the user logged under the name {}

STEP_COLUMNS = (
    "step", "epoch", "batch_size", "loss", "accuracy", "lr", "grad_norm", "update_ratio", "seconds", "skipped",
)  # fmt: skip
"""Columns that `run.steps` always has; logged values follow under their own names."""

VISIT_COLUMNS = ("step", "position", "epoch", "sample", "class", "loss", "correct")

SAMPLE_COLUMNS = (
    "sample", "times_seen", "first_step", "last_step", "first_loss", "last_loss", "mean_loss",
    "first_learned", "forgotten",
)  # fmt: skip

PROVENANCE = "nbdyn"
"""The key of `DataFrame.attrs` under which a small dict of strings says where a frame came from."""
