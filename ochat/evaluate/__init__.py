"""Measures of a trained model: how much the class prefix decides which answers it holds likely."""
