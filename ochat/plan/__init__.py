"""Predicts memory and speed of a run without a GPU."""
