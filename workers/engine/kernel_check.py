"""Whether this device's attention kernels give what the engine takes them to give.

A log-sum-exp in another base or layout would be wrong without a word, so before a process's first
replay the kernels are held to plain products, once a device and dtype: a few milliseconds.
"""

import functools

import torch

from avflow.workers.engine.partial import partial_attention, plain_attention

_HEADS, _KV_HEADS, _SIZE = 4, 2, 64
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}


class KernelError(RuntimeError):
    """An attention kernel disagrees with plain products: torch or its driver is not fit for use."""


@functools.cache
def check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Raises KernelError. One query over many keys, a causal square, and both with two rows."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int, n: int) -> torch.Tensor:
        numbers = torch.randn(2, heads, n, _SIZE, generator=generator, dtype=torch.float64)
        return numbers.to(device=device, dtype=dtype)

    for q, n, causal in ((1, 130, False), (70, 130, False), (130, 130, True)):
        query, key, value = random(_HEADS, q), random(_KV_HEADS, n), random(_KV_HEADS, n)
        fast = partial_attention(query, key, value, causal=causal, scale=0.125)
        plain = plain_attention(query, key, value, causal=causal, scale=0.125)
        for mine, theirs, what in zip(fast, plain, ("output", "log-sum-exp"), strict=True):
            shape = (tuple(mine.shape), tuple(theirs.shape))
            if shape[0] != shape[1]:
                raise KernelError(f"{what} of {q} queries on {device} in {dtype}: shapes {shape}")
            error = float((mine.double() - theirs.double()).abs().max())
            if not error <= _ROUNDING[dtype]:
                raise KernelError(
                    f"{what} of {q} queries over {n} keys on {device} in {dtype} is off by "
                    f"{error:.2g}; this build of torch ({torch.__version__}) can't be used here"
                )
