"""Where a model's parts go: one device, or several of which each holds a run of decoder layers."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn


def cuda_devices(gpus: int) -> tuple[str, ...]:
    """The names of the first `gpus` CUDA devices; ("cpu",) on a machine that has none."""
    if not torch.cuda.is_available():
        return ("cpu",)
    return tuple(f"cuda:{i}" for i in range(gpus))


def device_map(parts: Sequence[tuple[str, nn.Module]], devices: Sequence[str]) -> dict[str, str]:
    """Which of the devices each part goes to, for `from_pretrained`: as even as runs can be.

    `parts` are (name in the model, module, on any device) in the order in which a forward meets
    them. The same parts and devices give the same map, whatever memory is free.
    """
    if len(devices) == 1:
        return {"": devices[0]}
    sizes = [sum(p.numel() for p in module.parameters()) for _, module in parts]
    total = sum(sizes)
    middles = [end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True)]
    last = len(devices) - 1
    return {
        name: devices[min(last, int(middle * len(devices) / max(total, 1)))]
        for (name, _), middle in zip(parts, middles, strict=True)
    }


def named(model: nn.Module, parts: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Each part with its name in the model, as `device_map` takes them."""
    names = {module: name for name, module in model.named_modules()}
    return [(names[part], part) for part in parts]


def device_of(module: nn.Module) -> torch.device:
    """Where a part of a model computes: its weights may lie elsewhere (offloaded) meanwhile."""
    hook = getattr(module, "_hf_hook", None)
    execution = getattr(hook, "execution_device", None)
    return next(module.parameters()).device if execution is None else torch.device(execution)
