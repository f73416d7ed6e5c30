"""A small example that tells whether the compiled FlexAttention is right on a device."""

import numpy as np
import torch

from avflow.pathways.layout import Layout, Segment
from avflow.workers.engine import flex, sdpa
from avflow.workers.engine.reads import plan_reads

_FRAME, _FRAMES, _START = 70, 6, 33


def difference(device: torch.device, kernel: flex.Kernel | None = None) -> float:
    """Largest difference between the two backends: bfloat16, frames that don't read each other."""
    layout = _layout()
    blocked = np.zeros((len(layout.segments),) * 2, dtype=np.bool_)
    frames = np.arange(1, _FRAMES + 1)
    blocked[np.ix_(frames, frames)] = ~np.eye(_FRAMES, dtype=np.bool_)
    queries = ((_START, layout.n_tokens),)
    reads = plan_reads(layout, blocked, queries, _START, device)
    blocks = flex.plan_blocks(layout, blocked, queries, _START, device)
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, heads: int, n: int) -> torch.Tensor:
        numbers = torch.randn(rows, heads, n, 64, generator=generator)
        return numbers.to(device=device, dtype=torch.bfloat16)

    m = layout.n_tokens - _START
    query = random(2, 4, m)
    own = (random(2, 2, m), random(2, 2, m))
    shared = (random(1, 2, _START), random(1, 2, _START))
    mine = flex.attend(blocks, query, own, shared, scale=0.125, kernel=kernel)
    theirs = sdpa.attend(reads, query, own, shared, 0.125)
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
