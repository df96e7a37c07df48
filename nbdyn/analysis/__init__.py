"""Analyses that need the model and the data: what a training run did, computed from its weights."""
