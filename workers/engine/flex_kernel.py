"""The compiled FlexAttention for a device and a model's heads, used once it was found right."""

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor.exc import InductorError
from torch.fx.experimental import _config
from torch.nn.attention.flex_attention import FlexKernelOptions, flex_attention

from avflow.pathways.layout import Layout, Segment
from avflow.workers.engine import flex, sdpa
from avflow.workers.engine.reads import plan_reads

COMPILER_ERRORS = (TorchDynamoException, InductorError, FailOnRecompileLimitHit)
SETTINGS: tuple[FlexKernelOptions, ...] = ({}, {"num_stages": 2})
"""As torch sets the kernel up; and for cards with 100 KB of shared memory (RTX 4090, L40S)."""
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}

_FRAME, _FRAMES, _START = 70, 6, 33


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """What a kernel is compiled for."""

    n: int
    kv: int
    size: int
    dtype: torch.dtype


def possible_on(device: torch.device) -> bool:
    """Whether there may be such a kernel at all. (On a CPU it has no log-sum-exp.)"""
    return device.type == "cuda"


def compiled(compiler: str, settings: FlexKernelOptions) -> flex.Kernel:
    """FlexAttention through a compiler of torch's, with these kernel options. One compilation for
    all lengths: torch gives up after eight."""
    # fullgraph: what can't be compiled is an error here, never a slow pass over N x N scores.
    kernel = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=compiler)
    if settings:
        kernel = functools.partial(kernel, kernel_options=settings)
    # Lengths that happen to be equal once would else be compiled in as equal.
    config: Any = _config
    distinct: flex.Kernel = config.patch(use_duck_shape=False)(kernel)
    return distinct


@functools.cache
def kernel_for(device: torch.device, heads: Heads) -> flex.Kernel | None:
    """The kernel, tried with a small example once a process.

    None, and a warning, where it does not run (no compiler, an old card) or is not right: then
    attention goes by parts.
    """
    problems = []
    for settings in SETTINGS:
        kernel = compiled("inductor", settings)
        try:
            error = difference(device, kernel, heads)
        except Exception as problem:  # whatever a compiler may raise
            problems.append(str(problem))
            continue
        if error <= ROUNDING.get(heads.dtype, 1e-6):
            return kernel
        problems.append(f"it is wrong by {error:.2g}")
    warnings.warn(
        f"FlexAttention is not used on {device} in {heads.dtype}, and pathways inside the media "
        f"will be slower: {problems[-1]}",
        stacklevel=2,
    )
    return None


def difference(device: torch.device, kernel: flex.Kernel, heads: Heads) -> float:
    """Largest difference between the two backends where frames don't read each other."""
    layout = _layout()
    blocked = np.zeros((len(layout.segments),) * 2, dtype=np.bool_)
    frames = np.arange(1, _FRAMES + 1)
    blocked[np.ix_(frames, frames)] = ~np.eye(_FRAMES, dtype=np.bool_)
    queries = ((_START, layout.n_tokens),)
    reads = plan_reads(layout, blocked, queries, _START, device)
    blocks = flex.plan_blocks(layout, blocked, queries, _START, device)
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, n_heads: int, n: int) -> torch.Tensor:
        numbers = torch.randn(rows, n_heads, n, heads.size, generator=generator)
        return numbers.to(device=device, dtype=heads.dtype)

    m = layout.n_tokens - _START
    scale = heads.size**-0.5
    query = random(2, heads.n, m)
    own = (random(2, heads.kv, m), random(2, heads.kv, m))
    shared = (random(1, heads.kv, _START), random(1, heads.kv, _START))
    mine = flex.attend(blocks, query, own, shared, scale=scale, kernel=kernel)
    theirs = sdpa.attend(reads, query, own, shared, scale)
    return float((mine.float() - theirs.float()).abs().max())


def _layout() -> Layout:
    segments, at = [Segment(kind="system", start=0, stop=_START)], _START
    for index in range(_FRAMES):
        segments.append(Segment(kind="frame", start=at, stop=at + _FRAME, index=index))
        at += _FRAME
    segments.append(Segment(kind="option_letter", start=at, stop=at + 1, index=0))
    segments.append(Segment(kind="option_text", start=at + 1, stop=at + 3, index=0))
    segments.append(Segment(kind="last", start=at + 3, stop=at + 4))
    return Layout(kind="single_video", n_tokens=at + 4, segments=tuple(segments), answer=0)
