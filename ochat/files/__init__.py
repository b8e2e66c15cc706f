"""Reads and writes files safely: atomic writes, checksums, bounded JSON, JSON lines."""
