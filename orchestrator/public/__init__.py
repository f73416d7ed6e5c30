"""avflow: how sound and sight travel through an audio-visual LLM, by attention knockout.

In a notebook: `avflow.results.read("runs/demo")` gives the cells of a run as a polars frame.
"""

from importlib import import_module
from importlib.metadata import version
from types import ModuleType

__version__ = version("avflow")
__all__ = ["__version__", "results"]


def __getattr__(name: str) -> ModuleType:
    # Loaded on first use, so that a worker can import avflow.workers without polars.
    if name == "results":
        return import_module("avflow.results")
    raise AttributeError(f"module 'avflow' has no attribute {name!r}")
