"""The attention backend for CUDA where a mask has many parts: FlexAttention, compiled.

A block mask says for each pair of blocks (128 queries, 128 keys) whether it is empty, full or
mixed; it is counted from the segments' overlaps with the blocks, so that nothing of size N x N is
built. Inside mixed blocks the kernel looks up the segments of query and key.

Shapes: R rows, H heads, G key/value heads, q queries, n keys, S segments, d head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask

from avflow.pathways.layout import Layout
from avflow.workers.engine.partial import Part, merge_into
from avflow.workers.engine.reads import Span

BLOCK = 128
Kernel = Callable[..., Any]  # as flex_attention


@dataclass(frozen=True, slots=True, kw_only=True)
class _Side:
    """One row's blocks over one kind of keys, a row's `n_keys`. `mixed` and `full` ones: how many
    each query block has, and which, int32 [1, 1, B] and [1, 1, B, C]. `queries` and `keys`:
    position and segment of each, int32 [B * BLOCK] and [C * BLOCK]; padding reads nothing and is
    read by none."""

    mixed: tuple[Tensor, Tensor]
    full: tuple[Tensor, Tensor]
    queries: tuple[Tensor, Tensor]
    keys: tuple[Tensor, Tensor]
    closed: Tensor
    n_keys: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """What a view's queries read of its own and of its shared keys; None: no edge."""

    own: _Side | None
    shared: _Side | None


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
        own=_side(layout, blocked, asked, range(own_from, layout.n_tokens), device),
        shared=_side(layout, blocked, asked, range(min(own_from, last)), device),
    )


def _side(
    layout: Layout,
    blocked: NDArray[np.bool_],
    asked: NDArray[np.int64],
    keys: range,
    device: torch.device,
) -> _Side | None:
    """Queries at positions `asked` over `keys`."""
    if not keys:
        return None
    positions = np.arange(keys.start, keys.stop)
    empty, full = _occupancy(layout, blocked, asked, positions)
    if empty.all():
        return None
    segment = layout.segment_of_position

    def looked_up(at: NDArray[np.int64], padding: int) -> tuple[Tensor, Tensor]:
        rest = BLOCK * _blocks(len(at)) - len(at)
        where = np.pad(at, (0, rest), constant_values=padding).astype(np.int32)
        which = np.pad(segment[at], (0, rest)).astype(np.int32)
        return torch.from_numpy(where).to(device), torch.from_numpy(which).to(device)

    return _Side(
        mixed=_listed(~empty & ~full, device),
        full=_listed(full, device),
        queries=looked_up(asked, -1),
        keys=looked_up(positions, np.iinfo(np.int32).max),
        closed=torch.from_numpy(blocked).to(device),
        n_keys=len(positions),
    )


def _on(side: _Side, device: torch.device) -> _Side:
    """Of a model on several devices each layer has its own; all share one plan."""
    if side.closed.device == device:
        return side

    def both(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0].to(device), pair[1].to(device)

    return replace(
        side,
        mixed=both(side.mixed),
        full=both(side.full),
        queries=both(side.queries),
        keys=both(side.keys),
        closed=side.closed.to(device),
    )


def _block_mask(side: _Side, rows: int, keys_apart: bool) -> BlockMask:
    """Of rows end to end, each of whole blocks, over keys of their own (`keys_apart`, whole blocks
    too) or over the same ones. No block holds two rows."""
    own_blocks = side.mixed[1].shape[3] * keys_apart

    def of_all(blocks: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        counts, which = (t.repeat(1, 1, rows, *[1] * (t.dim() - 3)) for t in blocks)
        row = _counted(counts[0, 0]) // blocks[0].shape[2]
        return counts, which + own_blocks * row[:, None]

    # Tensors alone in the closure: a number would be compiled in, and again for each prompt.
    position, segment = (t.repeat(rows) for t in side.queries)
    key_position, key_segment = (t.repeat(rows if keys_apart else 1) for t in side.keys)
    row = _counted(position) // len(side.queries[0]) * keys_apart
    key_row = _counted(key_position) // len(side.keys[0])
    closed = side.closed

    def open_edge(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at, other = position[query], key_position[key]
        apart = ~closed[segment[query], key_segment[key]] & (other <= at)
        return (apart | (at == other)) & (row[query] == key_row[key])

    return BlockMask.from_kv_blocks(
        *of_all(side.mixed), *of_all(side.full), BLOCK_SIZE=BLOCK, mask_mod=open_edge,
        seq_lengths=(len(position), len(key_position)), compute_q_blocks=False,
    )  # fmt: skip


def _counted(like: Tensor) -> Tensor:
    """0, 1, 2, ... of its length, dtype and device."""
    return torch.arange(len(like), dtype=like.dtype, device=like.device)


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
    """How many blocks each query block has, and which, chosen ones first."""
    least = [(0, max(0, 2 - n)) for n in chosen.shape]
    chosen = np.pad(chosen, least)
    order = np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)
    counts = chosen.sum(axis=1).astype(np.int32)
    listed = [torch.from_numpy(t)[None, None].to(device) for t in (counts, order)]
    return listed[0], listed[1]


def attend(
    blocks: Blocks,
    query: Tensor,
    own: tuple[Tensor, Tensor],
    shared: tuple[Tensor, Tensor],
    *,
    scale: float,
    kernel: Kernel,
) -> Tensor:
    """query [R, H, q, d], own [R, G, m, d], shared [1, G, s, d] -> [R, H, q, d].

    All rows are one sequence for the kernel, dense in memory: what differs from call to call is
    then lengths alone, and one compilation serves a whole sweep.
    """
    rows, heads, q, d = query.shape
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    asked = _end_to_end(query, q)
    total: Part | None = None
    for side, (key, value), apart in ((blocks.own, own, True), (blocks.shared, shared, False)):
        if side is None:
            continue
        out, aux = kernel(
            asked, _end_to_end(key, side.n_keys), _end_to_end(value, side.n_keys),
            block_mask=_block_mask(_on(side, query.device), rows, apart),
            scale=scale, enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        part = (out.view(heads, rows, -1, d), aux.lse.view(heads, rows, -1))
        if total is None:
            total = (part[0].to(exact), part[1].to(exact))
        else:
            merge_into(total, part)
    assert total is not None  # each query reads itself
    return total[0][:, :, :q].transpose(0, 1).to(query.dtype)


def _end_to_end(states: Tensor, n: int) -> Tensor:
    """[R, H, >= n, d] -> [1, H, R * p, d]: the first n of each row, padded to whole blocks."""
    rows, heads, _, d = states.shape
    dense = states.new_zeros(1, heads, rows * BLOCK * _blocks(n), d)
    dense.view(heads, rows, -1, d)[:, :, :n] = states[:, :, :n].transpose(0, 1)
    return dense


def _blocks(n: int) -> int:
    """That hold n positions. At least two: a compiler takes a length of one for a constant."""
    return max(2, -(-n // BLOCK))
