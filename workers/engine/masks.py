"""Segments to token masks: which keys a replayed query may read, in and out of a window.

Paper section 3, Eq. 2: at the window's layers an edge (target query, source key) gets minus
infinity, every other edge stays causal. A query always reads itself, so no row of the softmax is
empty; that is checked here, since sdpa and eager attention differ (0, mean, NaN) when one is.

Shapes: S segments, N prompt tokens, m = N - start replayed positions.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avflow.pathways.layout import Layout
from avflow.pathways.pathway import causal_blocked_edges


class MaskNotAppliedError(RuntimeError):
    """The token mask blocks other edges than the segments say, or leaves a query without a key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuffixMasks:
    """bool [m, N], True where a query of the suffix may read a key: `causal` outside a window,
    `knockout[curve]` inside."""

    causal: Tensor
    knockout: dict[int, Tensor]


def suffix_masks(
    layout: Layout, start: int, blocked: dict[int, NDArray[np.bool_]], device: torch.device
) -> SuffixMasks:
    """The masks of the curves (by number) that are replayed from position `start` on."""
    causal = causal_mask(start, layout.n_tokens, device)
    knockout = {curve: knockout_mask(causal, layout, b) for curve, b in blocked.items()}
    return SuffixMasks(causal=causal, knockout=knockout)


def causal_mask(start: int, n_tokens: int, device: torch.device) -> Tensor:
    """bool [m, N], True where the query at `start + row` may read the key of that column."""
    query = torch.arange(start, n_tokens, device=device)
    return torch.arange(n_tokens, device=device) <= query[:, None]


def knockout_mask(causal: Tensor, layout: Layout, blocked: NDArray[np.bool_]) -> Tensor:
    """bool [m, N]: `causal` without the edges that `blocked` [S, S] (query, key) closes.

    Raises MaskNotAppliedError if a query is left without a key, or if the number of closed edges
    is not the one that the segments' lengths give.
    """
    m, n_tokens = causal.shape
    segment = torch.from_numpy(layout.segment_of_position).to(causal.device)
    closed = torch.from_numpy(blocked).to(causal.device)[segment[n_tokens - m :]][:, segment]
    closed.diagonal(offset=n_tokens - m).fill_(False)  # a position always reads itself
    allowed = causal & ~closed
    readable = allowed.any(dim=1)
    if not bool(readable.all()):
        position = n_tokens - m + int((~readable).nonzero()[0, 0])
        raise MaskNotAppliedError(
            f"the query at position {position} has no key left; a position must always read itself"
        )
    expected, applied = causal_blocked_edges(layout, blocked), int((causal & closed).sum())
    if applied != expected:
        raise MaskNotAppliedError(
            f"the mask from position {n_tokens - m} on closes {applied} edges a layer, the "
            f"pathway's segments {expected}: a target lies before the replayed suffix"
        )
    return allowed
