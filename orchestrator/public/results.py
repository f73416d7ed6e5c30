"""What a sweep found, as polars frames: `read`, `query` and `status` of a run folder, and tables of
its interventions and probes."""

from avflow.orchestrator.extras_results import (
    attention_map,
    intervention_table,
    last_attention_table,
    sink_table,
)
from avflow.orchestrator.results import query, read, status

__all__ = [
    "attention_map",
    "intervention_table",
    "last_attention_table",
    "query",
    "read",
    "sink_table",
    "status",
]
