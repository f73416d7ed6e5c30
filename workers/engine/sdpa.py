"""The attention backend for any device: a kernel call a part, put together by log-sum-exp.

Shapes: R rows, H heads, G key/value heads, q queries, d head size.
"""

import torch
from torch import Tensor

from avflow.workers.engine.partial import (
    merge_into,
    partial_attention,
    self_attention,
    shared_attention,
)
from avflow.workers.engine.reads import Keys, Reads

KeyValue = tuple[Tensor, Tensor]  # each [R or 1, G, n, d]


def attend(
    reads: Reads, query: Tensor, own: KeyValue | None, shared: KeyValue, scale: float
) -> Tensor:
    """query [R, H, q, d]; `own` [R, G, m, d], `shared` [1, G, s, d] -> [R, H, q, d].

    Parts are added up in float32 or better, and cast to the query's dtype once.
    """
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty(query.shape, dtype=exact)
    lse = query.new_empty(query.shape[:3], dtype=exact)
    for square in reads.squares:
        here = query[:, :, square.queries]
        key, value = _pick(square.keys, own, shared)
        if square.alone:
            part = self_attention(here, key, value, scale=scale)
        else:
            rows = len(here)
            key, value = key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1)
            part = partial_attention(here, key, value, causal=True, scale=scale)
        out[:, :, square.queries], lse[:, :, square.queries] = part
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


def _pick(keys: Keys, own: KeyValue | None, shared: KeyValue) -> KeyValue:
    source = shared if keys.shared else own
    assert source is not None  # plan_reads names own keys only where there are some
    if isinstance(keys.at, slice):
        return source[0][:, :, keys.at], source[1][:, :, keys.at]
    at = keys.at.to(source[0].device)  # a model on several devices has its keys on each
    return source[0].index_select(2, at), source[1].index_select(2, at)
