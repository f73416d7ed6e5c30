"""Whether this device's fused attention gives what the engine takes it to give.

A log-sum-exp in another base or layout would be wrong without a word. So before a process's first
use the kernels are held to plain products, once a device and dtype: a few milliseconds.
"""

import functools
import warnings

import torch

_HEADS, _KV_HEADS, _SIZE = 4, 2, 64
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}


@functools.cache
def fits(device: torch.device, dtype: torch.dtype) -> bool:
    """If not, a warning says why, and attention goes in plain products: slower, and right."""
    try:
        fault = difference(device, dtype)
    except (RuntimeError, AttributeError, TypeError) as error:  # no such kernel in this torch
        fault = str(error)
    if fault:
        warnings.warn(
            f"fused attention of torch {torch.__version__} on {device} in {dtype} is not used: "
            f"{fault}; this run will be slow",
            stacklevel=2,
        )
    return not fault


def difference(device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with the kernels, if anything: one query over many keys, some over more, and a
    causal square, each with two rows and grouped heads."""
    from avflow.workers.engine.partial import fused_attention, plain_attention  # it knows us

    generator = torch.Generator().manual_seed(0)

    def random(heads: int, n: int) -> torch.Tensor:
        numbers = torch.randn(2, heads, n, _SIZE, generator=generator, dtype=torch.float64)
        return numbers.to(device=device, dtype=dtype)

    for q, n, causal in ((1, 130, False), (70, 130, False), (130, 130, True)):
        query, key, value = random(_HEADS, q), random(_KV_HEADS, n), random(_KV_HEADS, n)
        fast = fused_attention(query, key, value, causal=causal, scale=0.125)
        plain = plain_attention(query, key, value, causal=causal, scale=0.125)
        for mine, theirs, what in zip(fast, plain, ("output", "log-sum-exp"), strict=True):
            if mine.shape != theirs.shape:
                return f"{what} has shape {tuple(mine.shape)}, expected {tuple(theirs.shape)}"
            error = float((mine.double() - theirs.double()).abs().max())
            if not error <= _ROUNDING[dtype]:
                return f"{what} of {q} queries over {n} keys is off by {error:.2g}"
    return None
