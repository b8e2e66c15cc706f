"""Saves and loads the state of a run."""
