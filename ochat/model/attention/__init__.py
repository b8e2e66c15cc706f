"""Attention over packed documents: the call (packed.py), who computes it (backends.py), the definition (sdpa.py)."""
