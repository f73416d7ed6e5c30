"""What a sweep found, as polars frames: `read`, `query` and `status` of a run folder."""

from avflow.orchestrator.results import query, read, status

__all__ = ["query", "read", "status"]
