"""Model families. A family is one module that knows how to describe and load its checkpoints.

To add one: write `workers/models/<family>.py` with a FAMILY, and name it in FAMILIES
(docs/adding-a-model.md).
"""

import torch

from avflow.workers.models import qwen2_5_omni, video_salmonn2
from avflow.workers.models.base import (
    Family,
    LoadedModel,
    ModelInfo,
    ModelSpec,
    UnsupportedModelError,
)
from avflow.workers.models.checkpoint import resolve_path

__all__ = ["FAMILIES", "Family", "describe", "load", "resolve_path"]

FAMILIES: dict[str, Family] = {
    "qwen2_5_omni": qwen2_5_omni.FAMILY,
    "video_salmonn2": video_salmonn2.FAMILY,
}


def describe(spec: ModelSpec) -> ModelInfo:
    """What planning needs, from the config alone. Raises UnsupportedModelError."""
    return _family(spec).describe(spec)


def load(spec: ModelSpec, *devices: torch.device | str) -> LoadedModel:
    """Load a checkpoint's weights and processor; over several devices, a run of layers on each.

    Raises UnsupportedModelError.
    """
    return _family(spec).load(spec, tuple(str(device) for device in devices) or ("cpu",))


def _family(spec: ModelSpec) -> Family:
    if spec.family not in FAMILIES:
        raise UnsupportedModelError(
            f"model {spec.name}: no family {spec.family!r}; known: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[spec.family]
