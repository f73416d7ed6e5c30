"""One loaded model, one sample, all its pathways. No mlflow, no polars; Ray in `actor.py` alone."""
