"""Model families. A family is one module that knows how to describe and load its checkpoints.

To add one: write `workers/models/<family>.py` with a FAMILY, and name it in FAMILIES
(docs/adding-a-model.md).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from avflow.workers.models import qwen2_5_omni, video_salmonn2
from avflow.workers.models.base import (
    ATTENTIONS,
    DTYPES,
    Family,
    LoadedModel,
    ModelInfo,
    ModelSpec,
    UnsupportedModelError,
)
from avflow.workers.models.checkpoint import resolve_path
from avflow.workers.models.room import check_room, longest_prompt

__all__ = [
    "FAMILIES",
    "Family",
    "describe",
    "frame_tokens_of",
    "load",
    "longest_prompt_of",
    "resolve_path",
]

FAMILIES: dict[str, Family] = {
    "qwen2_5_omni": qwen2_5_omni.FAMILY,
    "video_salmonn2": video_salmonn2.FAMILY,
}

_SHOWN_CHARACTERS = 400  # of another library's message


def describe(spec: ModelSpec) -> ModelInfo:
    """What planning needs, from all of a checkpoint's files but its weights, whose presence is
    checked. Raises UnsupportedModelError."""
    with _naming(spec):
        return _family(spec).describe(spec)


def load(spec: ModelSpec, *devices: torch.device | str) -> LoadedModel:
    """Load a checkpoint's weights and processor; over several devices, a run of layers on each.

    Raises UnsupportedModelError, also where the model and its work don't fit the GPUs.
    """
    family, places = _family(spec), tuple(str(device) for device in devices) or ("cpu",)
    if spec.dtype not in DTYPES or spec.attention not in ATTENTIONS:
        raise UnsupportedModelError(
            f"model {spec.name}: dtype {spec.dtype!r} (known: {', '.join(DTYPES)}), attention "
            f"{spec.attention!r} (known: {', '.join(ATTENTIONS)})"
        )
    if all(place.startswith("cuda") for place in places):
        check_room(spec, describe(spec), longest_prompt_of(spec), places)
    with _naming(spec):
        return family.load(spec, places)


@contextmanager
def _naming(spec: ModelSpec) -> Iterator[None]:
    """What libraries raise over a checkpoint's files, in our words. Errors of the machine (memory,
    a device, a disk) are let through: another machine, or another try, may do."""
    try:
        yield
    except (UnsupportedModelError, MemoryError, RuntimeError):
        raise
    except Exception as error:  # tokenizers raises Exception itself
        if isinstance(error, OSError) and error.errno is not None:
            raise
        said = " ".join(str(error).split())[:_SHOWN_CHARACTERS]
        raise UnsupportedModelError(
            f"model {spec.name}: {spec.path}: its files can't be read as those of {spec.family}: "
            f"{type(error).__name__}: {said}"
        ) from error


def longest_prompt_of(spec: ModelSpec) -> int:
    """Tokens of the longest prompt with one video that the spec allows, roughly."""
    tokens = frame_tokens_of(spec, spec.max_frames)
    return longest_prompt(spec.fps, spec.max_frames, tokens)


def frame_tokens_of(spec: ModelSpec, frames: int) -> int:
    """Tokens at most of a frame pair in a video of so many frames; 0: it takes no video."""
    if spec.frame_tokens is not None:
        return spec.frame_tokens
    own = _family(spec).own_frame_tokens
    return 0 if own is None else own(frames, spec.max_frames)


def _family(spec: ModelSpec) -> Family:
    if spec.family not in FAMILIES:
        raise UnsupportedModelError(
            f"model {spec.name}: no family {spec.family!r}; known: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[spec.family]
