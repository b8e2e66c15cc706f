"""One module a command: parses its options, runs it, prints its results."""
