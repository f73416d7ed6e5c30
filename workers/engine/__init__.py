"""Baseline prefill, knockout replay, and the plain reference pass."""
