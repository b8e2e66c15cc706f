"""What a run measures beside its steps: held-out sets and exact-match tasks."""
