"""Samples, prompts and media. Knows nothing of models."""
