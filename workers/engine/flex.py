"""The attention backend for CUDA where a mask has many parts: FlexAttention, compiled.

A block mask says for each pair of blocks (128 queries, 128 keys) whether it is empty, full or
mixed; it is counted from the segments' overlaps with the blocks, so that nothing of size N x N is
built. Inside mixed blocks the kernel looks up the segments of query and key.

Shapes: R rows, H heads, G key/value heads, q queries, n keys, S segments, d head size.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from avflow.pathways.layout import Layout
from avflow.workers.engine.partial import Part, merge_into
from avflow.workers.engine.reads import Span

BLOCK = 128
Kernel = Callable[..., Any]  # as flex_attention
COMPILER_ERRORS = (TorchDynamoException, InductorError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Block masks [q, n] of a view's queries over its own and its shared keys; None: no edge."""

    own: BlockMask | None
    shared: BlockMask | None


def plan_blocks(
    layout: Layout,
    blocked: NDArray[np.bool_] | None,
    queries: tuple[Span, ...],
    own_from: int,
    device: torch.device,
) -> Blocks:
    """As `reads.plan_reads`, for the same queries and keys."""
    if blocked is None:
        blocked = np.zeros((len(layout.segments),) * 2, dtype=np.bool_)
    asked = np.concatenate([np.arange(start, stop) for start, stop in queries])
    last = int(asked[-1]) + 1
    return Blocks(
        own=_block_mask(layout, blocked, asked, range(own_from, last), device),
        shared=_block_mask(layout, blocked, asked, range(min(own_from, last)), device),
    )


def _block_mask(
    layout: Layout,
    blocked: NDArray[np.bool_],
    asked: NDArray[np.int64],
    keys: range,
    device: torch.device,
) -> BlockMask | None:
    """Queries at positions `asked` over `keys`."""
    if not keys:
        return None
    empty, full = _occupancy(layout, blocked, asked, np.arange(keys.start, keys.stop))
    if empty.all():
        return None
    partial_n, partial_at = _listed(~empty & ~full, device)
    full_n, full_at = _listed(full, device)
    segment = torch.from_numpy(layout.segment_of_position).to(device)
    closed = torch.from_numpy(blocked).to(device)
    # Tensors alone in the closure: a number would be compiled in, and again for each prompt.
    position = torch.from_numpy(asked).to(device)
    key_position = torch.arange(keys.start, keys.stop, device=device)

    def open_edge(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at, other = position[query], key_position[key]
        apart = ~closed[segment[at], segment[other]] & (other <= at)
        return apart | (at == other)

    return BlockMask.from_kv_blocks(
        partial_n, partial_at, full_n, full_at,
        BLOCK_SIZE=BLOCK, mask_mod=open_edge, seq_lengths=(len(asked), len(keys)),
    )  # fmt: skip


def _occupancy(
    layout: Layout,
    blocked: NDArray[np.bool_],
    asked: NDArray[np.int64],
    keys: NDArray[np.int64],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """bool [query blocks, key blocks]: which hold no open edge, and which hold nothing else."""
    segment, n_segments = layout.segment_of_position, len(layout.segments)
    in_queries, in_keys = (_overlaps(segment[positions], n_segments) for positions in (asked, keys))
    open_pairs = in_queries @ (~blocked).astype(np.int64) @ in_keys.T
    sizes = in_queries.sum(axis=1)[:, None] * in_keys.sum(axis=1)[None]
    first_query, last_query = asked[::BLOCK], _lasts(asked)
    first_key, last_key = keys[::BLOCK], _lasts(keys)
    future = first_key[None] > last_query[:, None]
    past = last_key[None] < first_query[:, None]
    full = past & (open_pairs == sizes) & (sizes == BLOCK * BLOCK)
    return future | (past & (open_pairs == 0)), full


def _overlaps(segments: NDArray[np.int64], n_segments: int) -> NDArray[np.int64]:
    """int64 [blocks, S]: positions of each segment in each block."""
    blocks = np.arange(len(segments)) // BLOCK
    counts = np.bincount(blocks * n_segments + segments, minlength=(blocks[-1] + 1) * n_segments)
    return counts.reshape(-1, n_segments).astype(np.int64)


def _lasts(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """The last position of each block."""
    ends = np.minimum(np.arange(BLOCK, len(positions) + BLOCK, BLOCK), len(positions)) - 1
    lasts: NDArray[np.int64] = positions[ends]
    return lasts


def _listed(chosen: NDArray[np.bool_], device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks each query block has, and which, chosen ones first: int32, [1, 1, ...]."""
    order = np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)
    counts = chosen.sum(axis=1).astype(np.int32)
    return torch.from_numpy(counts)[None, None].to(device), torch.from_numpy(order)[None, None].to(
        device
    )


def attend(
    blocks: Blocks,
    query: Tensor,
    own: tuple[Tensor, Tensor],
    shared: tuple[Tensor, Tensor],
    *,
    scale: float,
    kernel: Kernel | None = None,
) -> Tensor:
    """query [R, H, q, d], own [R, G, m, d], shared [1, G, s, d] -> [R, H, q, d]."""
    run = kernel or _compiled()
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    total: Part | None = None
    for mask, (key, value), rows in ((blocks.own, own, 1), (blocks.shared, shared, len(query))):
        if mask is None:
            continue
        n = mask.seq_lengths[1]
        out, aux = run(
            _fold(query, rows, key.shape[1]), key[:, :, :n], value[:, :, :n],
            block_mask=mask, scale=scale, enable_gqa=True, return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        part = (_unfold(out, rows, key.shape[1]), _unfold(aux.lse, rows, key.shape[1]))
        if total is None:
            total = (part[0].to(exact), part[1].to(exact))
        else:
            merge_into(total, part)
    assert total is not None  # each query reads itself
    return total[0].to(query.dtype)


def _fold(query: Tensor, rows: int, kv_heads: int) -> Tensor:
    """[R, H, q, d] -> [1, G * R * g, q, d] for rows that share their keys: rows become heads of
    the keys' own groups, so that the mask over (query, key) stays what it is. One row: as it is."""
    if rows == 1:
        return query
    apart = query.reshape(rows, kv_heads, -1, *query.shape[2:])
    return apart.transpose(0, 1).reshape(1, -1, *query.shape[2:])


def _unfold(result: Tensor, rows: int, kv_heads: int) -> Tensor:
    """The other way, for [1, G * R * g, q, ...]."""
    if rows == 1:
        return result
    apart = result.reshape(kv_heads, rows, -1, *result.shape[2:])
    return apart.transpose(0, 1).reshape(rows, -1, *result.shape[2:])


@functools.cache
def _compiled() -> Kernel:
    # fullgraph: what can't be compiled is an error here, never a slow pass over N x N scores.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


@functools.cache
def works_on(device: torch.device) -> bool:
    """Whether the compiled kernel runs here and is right, found out once with a small example.

    Where it is not (no compiler, an old card), a warning says so and the parts are used instead.
    """
    if device.type != "cuda":
        return False
    from avflow.workers.engine.flex_check import difference

    try:
        error = difference(device)
    except Exception as problem:  # whatever a compiler may raise
        warnings.warn(f"FlexAttention does not run on {device}: {problem}", stacklevel=2)
        return False
    if error > 0.05:  # two bfloat16 roundings of numbers up to 4
        warnings.warn(f"FlexAttention is wrong by {error:.2g} on {device}; not used", stacklevel=2)
        return False
    return True
