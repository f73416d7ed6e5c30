"""Token groups, segments, pathways and windows. Knows tokens and masks, nothing of models."""
