"""Packs sequences into bins of tokens: a pure computation without torch and without I/O."""
