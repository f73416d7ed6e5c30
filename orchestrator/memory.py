"""What a model needs on its GPUs, from its config and the sweep's settings alone.

Estimated where a sweep is planned, for the longest prompt that the settings allow; compared with
the real card when a worker loads the model (`avflow.workers.models.room`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from avflow.orchestrator.config import SweepConfig
    from avflow.workers.models.base import ModelInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Bytes: `weights` in all, `peak` on each of a worker's GPUs, for a prompt of `tokens`."""

    model: str
    gpus: int
    weights: int
    peak: int
    tokens: int

    def __str__(self) -> str:
        where = f"each of {self.gpus} GPUs" if self.gpus > 1 else "one GPU"
        return (
            f"{self.model} needs {self.peak / 2**30:.1f} GiB on {where}: weights "
            f"{self.weights / 2**30:.1f} GiB in all, the rest for a prompt of {self.tokens:,} "
            "tokens"
        )


def needs(config: SweepConfig, models: Mapping[str, ModelInfo]) -> list[Need]:
    """Of each of the sweep's models, a line. Imports torch."""
    from avflow.workers.models import longest_prompt_of
    from avflow.workers.models.room import needed_on_each

    found = []
    for model in config.models:
        info, tokens = models[model.name], longest_prompt_of(model.spec())
        budget, gpus = config.execution.byte_budget, model.gpus_per_model
        found.append(
            Need(
                model=model.name,
                gpus=gpus,
                weights=info.weight_bytes(model.dtype),
                peak=needed_on_each(info, model.dtype, tokens, budget, gpus),
                tokens=tokens,
            )
        )
    return found


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
        if need.peak > each
    ]
