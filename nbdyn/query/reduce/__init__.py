"""Cells (visit, parameter) to one number a group: sums, extremes, counts, and the largest of each."""
