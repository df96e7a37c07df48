"""Gradient noise of a run: what is sampled is named, and its tails, scale and nulls are measured."""
