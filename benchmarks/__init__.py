"""Programs that measure; only their tests import them. See README.md in this folder."""
