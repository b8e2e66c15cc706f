"""The processes of a run: start, watchdog, signals."""
