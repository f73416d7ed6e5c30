"""What a model needs on its GPUs, from its config and the sweep's settings alone.

Estimated where a sweep is planned, for the longest prompt that the settings allow; checked against
the real card, for the weights, when a worker loads the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from avflow.orchestrator.cost import AUDIO_TOKENS_PER_S, FRAME_TOKENS

if TYPE_CHECKING:
    from avflow.orchestrator.config import ModelConfig, SweepConfig
    from avflow.workers.models.base import ModelInfo

TEXT_TOKENS = 200  # system prompt, question and options, roughly


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes over all of a worker's GPUs; `tokens` of the prompt that `peak` is for."""

    model: str
    gpus: int
    weights: int
    peak: int
    tokens: int

    def __str__(self) -> str:
        where = f"{self.gpus} GPUs" if self.gpus > 1 else "one GPU"
        return (
            f"{self.model} needs {self.peak / 2**30:.1f} GiB on {where}: weights "
            f"{self.weights / 2**30:.1f} GiB, the rest for a prompt of {self.tokens:,} tokens"
        )


def needs(config: SweepConfig, models: Mapping[str, ModelInfo]) -> list[Need]:
    """Of each of the sweep's models, a line."""
    return [
        Need(
            model=model.name,
            gpus=model.gpus_per_model,
            weights=models[model.name].weight_bytes(model.dtype),
            peak=peak(
                models[model.name],
                model.dtype,
                longest_prompt(model),
                config.execution.byte_budget,
            ),
            tokens=longest_prompt(model),
        )
        for model in config.models
    ]


def longest_prompt(model: ModelConfig) -> int:
    """Tokens of a video with as many frames as are allowed, and of its sound."""
    seconds = model.max_frames / model.fps
    pairs = -(-model.max_frames // 2)
    visual = pairs * (model.frame_tokens or FRAME_TOKENS)
    return visual + round(seconds * AUDIO_TOKENS_PER_S) + TEXT_TOKENS


def peak(info: ModelInfo, dtype: str, n_tokens: int, byte_budget: int) -> int:
    """Bytes at a sample's peak, weights included. Imports torch."""
    from avflow.workers.engine.memory import peak_bytes, shapes_of
    from avflow.workers.models.base import DTYPES

    shapes = shapes_of(info, info.head_size, n_tokens, DTYPES[dtype].itemsize)
    return peak_bytes(shapes, info.weight_bytes(dtype), byte_budget)


def too_small_here(found: list[Need]) -> list[str]:
    """Warnings for this machine's own GPUs, if it has any; a cluster's are met at loading."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return []
    each = min(torch.cuda.get_device_properties(i).total_memory for i in range(count))
    return [
        f"{need}; this machine's GPUs have {each / 2**30:.1f} GiB each"
        for need in found
        if need.peak > each * need.gpus
    ]
