"""The run folder: its layout, lock and history."""
