"""The training step, its optimizer, its checkpoints and its story."""
