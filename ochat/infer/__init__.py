"""Generation under a class condition."""
