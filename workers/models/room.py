"""Whether a model, and its work on the longest prompt, fit the GPUs that it is given.

Weights lie spread over a model's GPUs, and with each layer its keys and values. The states of a
batch and a layer's activations do not: they pass through every GPU, which must have room for them.
"""

import os
from collections.abc import Sequence

import torch

from avflow.workers.engine.memory import baseline_bytes, peak_bytes, shapes_of
from avflow.workers.models.base import (
    DTYPES,
    ModelInfo,
    ModelSpec,
    NotNowError,
    UnsupportedModelError,
)

TEXT_TOKENS = 200  # system prompt, question and options, roughly
AUDIO_TOKENS_PER_S = 25  # Qwen2.5-Omni's; video-SALMONN 2+ has fewer


def longest_prompt(fps: float, max_frames: int, frame_tokens: int) -> int:
    """Tokens of a video with as many frames as a `ModelSpec` allows, and of its sound."""
    pairs, sound = -(-max_frames // 2), round(max_frames / fps * AUDIO_TOKENS_PER_S)
    return pairs * frame_tokens + sound + TEXT_TOKENS


def needed_on_each(
    info: ModelInfo, dtype: str, n_tokens: int, byte_budget: int, gpus: int = 1
) -> int:
    """Bytes on each of a model's GPUs at a sample's peak, its share of the weights included."""
    weights = info.weight_bytes(dtype)
    shapes = shapes_of(info, info.head_size, n_tokens, DTYPES[dtype].itemsize)
    shared = weights + baseline_bytes(shapes)
    return -(-shared // gpus) + peak_bytes(shapes, weights, byte_budget) - shared


def check_room(spec: ModelSpec, info: ModelInfo, n_tokens: int, devices: Sequence[str]) -> None:
    """Compare what a prompt of `n_tokens` takes with the memory of these CUDA devices.

    Raises UnsupportedModelError where it can't fit, NotNowError where others hold the memory or
    the devices are not there: another machine may have them.
    """
    seen = torch.cuda.device_count()
    if seen < len(devices):
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise NotNowError(
            f"model {spec.name}: of the {len(devices)} GPUs given to its worker torch "
            f"{torch.__version__} sees {seen} (CUDA_VISIBLE_DEVICES: {given}); look at nvidia-smi "
            "on that machine, install a torch that is built for its driver, and tell Ray no more "
            "GPUs than there are"
        )
    torch.cuda.empty_cache()  # what a model before this one left in torch's hands is free, too
    refuse_too_small(spec, info, n_tokens, [torch.cuda.mem_get_info(d) for d in devices])


def refuse_too_small(
    spec: ModelSpec, info: ModelInfo, n_tokens: int, memory: Sequence[tuple[int, int]]
) -> None:
    """As `check_room`; `memory`: free and total bytes of each GPU."""
    needed = needed_on_each(info, spec.dtype, n_tokens, spec.byte_budget, len(memory))
    free, total = min(memory), min(whole for _, whole in memory)
    if needed <= free[0]:
        return
    where = f"each of its {len(memory)} GPUs" if len(memory) > 1 else "its GPU"
    needs = (
        f"model {spec.name} needs {_gib(needed)} on {where}: of weights in {spec.dtype} "
        f"{_gib(info.weight_bytes(spec.dtype))} in all, the rest for a prompt of {n_tokens:,} "
        f"tokens with a byte_budget of {_gib(spec.byte_budget)}"
    )
    if needed <= total:
        raise NotNowError(
            f"{needs}; free is {_gib(free[0])} of {_gib(total)}: end what else runs there"
        )
    raise UnsupportedModelError(
        f"{needs}; the smallest has {_gib(total)}; raise gpus_per_model, lower max_frames, "
        "frame_tokens or execution.byte_budget, or use larger GPUs"
    )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
