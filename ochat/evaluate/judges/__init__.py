"""Benchmarks that others judge: answers in their formats, AGIEval's questions, and win rates by a model that judges."""
