"""The words of the language: verbs, fields, functions, and what each one means in one line."""

from __future__ import annotations

VERBS = {
    "show": "show loss, |grad| during epoch 3",
    "last": "last 50 samples before fc1.weight[3,5] becomes 0 within 1e-6",
    "compare": "compare runA, runB by progress(loss), dist(w, init), acc at step 500",
    "explain": "explain show w of fc1.* at step 0",
}
"""The verbs that are built, each with an example."""

UNBUILT_VERBS = ("top", "group", "estimate")
"""Verbs of the language that a later version brings."""

STEP_FIELDS = {
    "step": "number of the optimizer step, from 0",
    "epoch": "number of the epoch, from 0",
    "batch_size": "samples in the step",
    "loss": "loss of the batch, at the weights before the step",
    "accuracy": "share of the batch that was right (NaN where there are no classes)",
    "lr": "learning rate of the first param group",
    "grad_norm": "Euclidean norm of the whole gradient, also |grad|",
    "update_ratio": "|dw| / |w|, every few steps (NaN between)",
    "seconds": "time since the first step",
    "skipped": "whether a gradient scaler left the step out",
}
VISIT_FIELDS = {
    "step": "number of the optimizer step",
    "position": "place in the batch, from 0",
    "epoch": "number of the epoch",
    "sample": "index of the sample in the data set",
    "loss": "loss of the sample at that step",
    "correct": "1 right, 0 wrong (NaN unknown)",
}
SAMPLE_FIELDS = {
    "sample": "index of the sample in the data set",
    "times_seen": "number of visits",
    "first_step": "step of its first visit",
    "last_step": "step of its last visit",
    "first_loss": "loss at its first visit",
    "last_loss": "loss at its last visit",
    "mean_loss": "mean of its losses",
    "first_learned": "step at which it was first right (NaN never)",
    "forgotten": "how often it went from right to wrong",
}
NORM_FIELDS = {
    "step": "number of the optimizer step",
    "epoch": "number of the epoch",
    "tensor": "name of the parameter tensor",
    "grad_norm": "Euclidean norm of the tensor's gradient, also |grad|",
    "weight_norm": "Euclidean norm of the tensor, also |w|, every few steps (NaN between)",
    "update_norm": "Euclidean norm of the tensor's update, also |dw|, every few steps (NaN between)",
}
WEIGHT_FIELDS = {
    "step": "t of weights[t]",
    "parameter": "global index of the parameter",
    "value": "the weight, or its change",
}
FIELDS = {
    "steps": STEP_FIELDS,
    "visits": VISIT_FIELDS,
    "samples": SAMPLE_FIELDS,
    "norms": NORM_FIELDS,
    "weights": WEIGHT_FIELDS,
}
"""The fields of each table that a statement can read."""

BOOLEAN_FIELDS = ("skipped",)
"""Fields that are conditions by themselves."""

ALIASES = {"acc": "accuracy"}
"""Short names of fields."""

NORMS = {"grad": "grad_norm", "w": "weight_norm", "dw": "update_norm"}
"""|x| of a whole tensor is a column: |grad| is `grad_norm`."""

TABLES = ("samples", "visits")
"""Tables that `show` gives whole."""

FUNCTIONS = {
    "abs": "absolute value, also |x|",
    "log2": "logarithm to base 2",
    "sqrt": "square root",
    "nan": "whether the value is NaN (a condition)",
    "inf": "whether the value is infinite (a condition)",
}
CONDITIONS = ("nan", "inf")
"""Functions whose value is a condition."""

AGGREGATES = {
    "mean": "mean",
    "min": "smallest",
    "max": "largest",
    "sum": "sum",
    "count": "number of rows; of a field: where it is not NaN",
    "share": "share of the rows where the condition holds",
    "first": "first one",
    "last": "last one",
}

UNITS = ("step", "epoch", "sample", "tensor")
"""What `per` knows."""

UNBUILT_UNITS = ("layer", "batch", "class", "weight", "unit", "run")
"""What `per` will know in a later version."""

MEASURES = {
    "progress(loss)": "(L0 - Lt) / (L0 - Lmin), Lmin over all compared runs",
    "dist(w, init)": "Euclidean distance of weights[t] from weights[0]",
    "loss": "loss of the batch, with its standard error",
    "acc": "accuracy of the batch, with its 95 % Wilson interval",
    "|grad|": "Euclidean norm of the whole gradient",
    "lr": "learning rate of the first param group",
}
"""What `compare ... by` knows."""

CLAUSES = ("per", "during", "at", "over", "where", "by", "of")
RESERVED = frozenset((
    *CLAUSES, "and", "or", "not", "becomes", "crosses", "exactly", "within", "before", "every",
    *TABLES, *FUNCTIONS, *AGGREGATES,
))  # fmt: skip
"""Words that stand for themselves in an expression; a field of such a name is written in backticks."""
