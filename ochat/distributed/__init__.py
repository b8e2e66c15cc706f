"""The processes of a run: start, rendezvous, watchdog, signals."""
