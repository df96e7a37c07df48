"""The words of the language: verbs, fields, functions, and what each one means in one line."""

from __future__ import annotations

VERBS = {
    "show": "show loss, |grad| during epoch 3",
    "top": "top 20 samples per weight of fc1.* by sum |g| during epoch 3",
    "group": "group weights by sum |grad| into 8 over all",
    "last": "last 50 samples before fc1.weight[3,5] becomes 0 within 1e-6",
    "compare": "compare runA, runB by progress(loss), dist(w, init), acc at step 500",
    "from": "from hot",
    "explain": "explain show w of fc1.* at step 0",
    "estimate": "estimate top 20 samples per weight of fc1.* by sum |g|",
}
"""The verbs, each with an example."""

PREFIXES = ("explain", "estimate")
"""Verbs that stand before a whole statement."""

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
    "class": "class of the sample's target (-1 none)",
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
GRAD_FIELDS = {
    "step": "number of the optimizer step",
    "epoch": "number of the epoch",
    "parameter": "global index of the parameter",
    "value": "the gradient of the batch",
}
G_FIELDS = VISIT_FIELDS | {
    "parameter": "global index of the parameter",
    "value": "the sample's own gradient",
}
UNIT_FIELDS = VISIT_FIELDS | {
    "place": "index in the sequence or map, from 0",
    "unit": "input unit of act, output unit of err: channels of convolutions",
    "value": "what the unit got, or the loss's gradient at it",
}
FIELDS = {
    "steps": STEP_FIELDS,
    "visits": VISIT_FIELDS,
    "samples": SAMPLE_FIELDS,
    "norms": NORM_FIELDS,
    "weights": WEIGHT_FIELDS,
    "grad": GRAD_FIELDS,
    "g": G_FIELDS,
    "act": UNIT_FIELDS,
    "err": UNIT_FIELDS,
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
    "sign": "-1, 0 or 1",
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
    "var": "variance of the values, divided by their number (population)",
    "count": "number of rows; of a field: where it is not NaN",
    "share": "share of the rows where the condition holds",
    "first": "first one",
    "last": "last one",
}

QUANTITIES = {
    "g": "the sample's own gradient",
    "grad": "the gradient of the batch, as in p.grad",
    "w": "the weights before the step",
    "dw": "what the step changed of the weights",
    "act": "the layer's input",
    "err": "the loss's gradient at the layer's output, also delta",
}
"""What has cells: a value for each visit and parameter, or for each step and parameter (grad, w, dw)."""

ONLY_CELLS = ("g", "act", "err")
"""Quantities of which nothing but cells is recorded: no usual field is called so."""

OF_UNITS = ("act", "err")
"""Quantities whose cells are those of a layer's units, not of its parameters."""

SAME_QUANTITY = {"delta": "err"}
"""Other words for quantities."""

MEASURE_AGGREGATES = {
    "sum": "sum of the cells",
    "mean": "mean of the cells",
    "max": "largest cell, by signed value; max |g| by magnitude",
    "var": "variance of the cells",
    "count": "number of cells other than 0",
    "norm": "Euclidean norm of the cells",
    "share": "share of the cells beyond a threshold: share(|grad| > 1e-3), share(|grad| > explode)",
    "net": "net dw: how far the weight moved from the first step to the last",
    "path": "path dw: how far it moved in all, sum |dw|",
}
"""What a measure makes of cells."""

DISPLACEMENTS = ("net", "path")
"""Aggregates that are taken of dw alone."""

EXPLODE = "explode"
"""The threshold 10 x the layer's RMS gradient, as the median over the last 100 steps."""

MEMBERS = {
    "sample": "a sample of the data set",
    "class": "the samples of one class",
    "batch": "the visits of one step; also: step",
    "epoch": "the visits of one epoch",
    "token": "the positions of one token id",
    "position": "one position of the sequence",
    "weight": "one parameter",
    "unit": "the parameters of one output unit: a row of a weight matrix, a filter",
    "layer": "the parameters of one layer",
    "tensor": "the parameters of one tensor",
}
"""What `top` ranks and `group` divides."""

SAME_MEMBER = {"step": "batch"}
"""Other words for members."""

PLURALS = {name: f"{name}es" if name in ("class", "batch") else f"{name}s" for name in (*MEMBERS, *SAME_MEMBER)}

WITHOUT_FIELDS = ("weight", "unit")
"""Members of which nothing is recorded but their cells: only a measure ranks them."""

UNITS = ("step", "epoch", "sample", "tensor", "class")
"""What `show ... per` knows for recorded fields."""

CELL_UNITS = (*UNITS, "layer", "weight", "unit", "token", "position")
"""What `show ... per` knows for a measure of cells."""

SAME_UNIT = {"batch": "step"}
"""Other words for units."""

IN_FIELDS = ("sample", "class", "step", "epoch")
"""Fields that may be among a list of numbers, or among those of a named result."""

MEASURES = {
    "progress(loss)": "(L0 - Lt) / (L0 - Lmin), Lmin over all compared runs",
    "dist(w, init)": "Euclidean distance of weights[t] from weights[0]",
    "loss": "loss of the batch, with its standard error",
    "acc": "accuracy of the batch, with its 95 % Wilson interval",
    "|grad|": "Euclidean norm of the whole gradient",
    "lr": "learning rate of the first param group",
}
"""What `compare ... by` knows."""

CLAUSES = ("per", "during", "at", "over", "where", "by", "of", "into", "in", "approximately", "as")
RESERVED = frozenset((
    *CLAUSES, "and", "or", "not", "becomes", "crosses", "exactly", "within", "before", "every",
    *TABLES, *FUNCTIONS, *AGGREGATES,
))  # fmt: skip
"""Words that stand for themselves in an expression; a field of such a name is written in backticks."""
