"""Model families. A family is one module that knows how to describe and load its checkpoints.

To add one: write `workers/models/<family>.py` with `describe` and `load`, and name it in FAMILIES.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from avflow.workers.models import qwen2_5_omni
from avflow.workers.models.base import LoadedModel, ModelInfo, ModelSpec, UnsupportedModelError
from avflow.workers.models.checkpoint import resolve_path

__all__ = ["FAMILIES", "Family", "describe", "load", "resolve_path"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """`about` is a line for people; `describe` reads a config without weights; `load` puts a
    checkpoint on a device."""

    about: str
    describe: Callable[[ModelSpec], ModelInfo]
    load: Callable[[ModelSpec, torch.device], LoadedModel]


FAMILIES: dict[str, Family] = {
    "qwen2_5_omni": Family(
        about="Qwen2.5-Omni's Thinker (3B, 7B, a folder like theirs; `testbed`: the shipped one)",
        describe=qwen2_5_omni.describe,
        load=qwen2_5_omni.load,
    ),
}


def describe(spec: ModelSpec) -> ModelInfo:
    """What planning needs, from the config alone. Raises UnsupportedModelError."""
    return _family(spec).describe(spec)


def load(spec: ModelSpec, device: torch.device | str) -> LoadedModel:
    """Load a checkpoint's weights and processor. Raises UnsupportedModelError."""
    return _family(spec).load(spec, torch.device(device))


def _family(spec: ModelSpec) -> Family:
    if spec.family not in FAMILIES:
        raise UnsupportedModelError(
            f"model {spec.name}: no family {spec.family!r}; known: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[spec.family]
