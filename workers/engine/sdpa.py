"""The attention backend for any device: a kernel call a part, put together by log-sum-exp.

Shapes: R rows, H heads, G key/value heads, q queries, d head size.
"""

import torch
from torch import Tensor

from avflow.workers.engine.partial import (
    Part,
    merge_into,
    partial_attention,
    self_attention,
    shared_attention,
)
from avflow.workers.engine.reads import Keys, Reads, Square

KeyValue = tuple[Tensor, Tensor]  # each [R or 1, G, n, d]


def attend(
    reads: Reads, query: Tensor, own: KeyValue | None, shared: KeyValue, scale: float
) -> Tensor:
    """query [R, H, q, d]; `own` [R, G, m, d], `shared` [1, G, s, d] -> [R, H, q, d].

    Parts are added up in float32 or better, and cast to the query's dtype once.
    """
    out, lse = _squares(reads, query, own, shared, scale)
    lists = [_pick(keys, own, shared) for keys in reads.keys]
    for rect in reads.rects:
        key, value = (t[:, :, : rect.n] for t in lists[rect.keys])
        here = query[:, :, rect.queries]
        if reads.keys[rect.keys].shared:
            part = shared_attention(here, key, value, scale=scale)
        else:
            part = partial_attention(here, key, value, causal=False, scale=scale)
        merge_into((out[:, :, rect.queries], lse[:, :, rect.queries]), part)
    return out.to(query.dtype)


def _squares(
    reads: Reads, query: Tensor, own: KeyValue | None, shared: KeyValue, scale: float
) -> Part:
    """Each run's queries over themselves, in float32 or better."""
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    if len(reads.squares) == 1:
        out, lse = _square(reads.squares[0], query, own, shared, scale)
        return out.to(exact), lse
    rows, heads, q, d = query.shape
    out = query.new_empty(rows, q, heads, d, dtype=exact).transpose(1, 2)  # as callers lay it out
    lse = query.new_empty(rows, heads, q, dtype=exact)
    for square in reads.squares:
        part = _square(square, query, own, shared, scale)
        out[:, :, square.queries], lse[:, :, square.queries] = part
    return out, lse


def _square(
    square: Square, query: Tensor, own: KeyValue | None, shared: KeyValue, scale: float
) -> Part:
    here = query[:, :, square.queries]
    key, value = _pick(square.keys, own, shared)
    if square.alone:
        return self_attention(here, key, value, scale=scale)
    rows = len(here)
    key, value = key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1)
    return partial_attention(here, key, value, causal=True, scale=scale)


def _pick(keys: Keys, own: KeyValue | None, shared: KeyValue) -> KeyValue:
    source = shared if keys.shared else own
    assert source is not None  # plan_reads names own keys only where there are some
    if isinstance(keys.at, slice):
        return source[0][:, :, keys.at], source[1][:, :, keys.at]
    at = keys.at.to(source[0].device)  # a model on several devices has its keys on each
    return source[0].index_select(2, at), source[1].index_select(2, at)
