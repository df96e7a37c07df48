"""Indexes of a run: sums, histograms and zones that answer without reading factors; no answer depends on them."""
