"""Tests mirror the packages; numerics.py holds the one accuracy rule."""
