"""Two ways to compute the same attention, with one interface; which one is chosen by what is read.

`sdpa` calls a fused kernel a part, on any device. `flex` compiles one kernel for a whole mask, on
CUDA: worth it where a mask has many parts (each frame of a video one), as inside the media.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avflow.pathways.layout import Layout
from avflow.workers.engine import flex, flex_kernel, sdpa
from avflow.workers.engine.reads import Reads, Span, plan_reads

MANY_PARTS = 16
"""From here on, one compiled kernel beats a launch a part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What queries read, ready for the backend that was chosen: as parts, or as blocks too."""

    reads: Reads
    blocks: flex.Blocks | None


def plan_view(
    layout: Layout,
    blocked: NDArray[np.bool_] | None,
    queries: tuple[Span, ...],
    own_from: int,
    device: torch.device,
) -> View:
    """See `reads.plan_reads`. The backend follows from the device and the number of parts."""
    reads = plan_reads(layout, blocked, queries, own_from, device)
    parts = len(reads.squares) + len(reads.rects)
    blocks = None
    if parts > MANY_PARTS and flex_kernel.possible_on(device):
        blocks = flex.plan_blocks(layout, blocked, queries, own_from, device)
    return View(reads=reads, blocks=blocks)


def attend(
    view: View,
    query: Tensor,
    own: tuple[Tensor, Tensor],
    shared: tuple[Tensor, Tensor],
    scale: float,
) -> Tensor:
    """query [R, H, q, d], own [R, G, m, d], shared [1, G, s, d] -> [R, H, q, d].

    Where FlexAttention can't be compiled it goes by parts, with a warning.
    """
    if view.blocks is not None:
        _, n, _, size = query.shape
        heads = flex_kernel.Heads(n=n, kv=shared[0].shape[1], size=size, dtype=query.dtype)
        kernel = flex_kernel.kernel_for(query.device, heads)
        if kernel is not None:
            try:
                return flex.attend(view.blocks, query, own, shared, scale=scale, kernel=kernel)
            except flex_kernel.COMPILER_ERRORS as error:
                warnings.warn(f"FlexAttention: {error}; going by parts", stacklevel=2)
    return sdpa.attend(view.reads, query, own, shared, scale)
