"""Attention of replayed suffixes over one shared prefix, without copying the prefix per row.

The official decoder layers run unchanged (projections, rotary, MLP, norms); only the attention
function is ours, set through transformers' AttentionInterface for the text decoder alone and put
back afterwards, so that the plain model is never disturbed.

Shapes: R rows, H heads, G key/value heads, g = H // G, m suffix queries, s prefix keys,
N = s + m, d head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

# No "flash", "sdpa" or "/" in it: transformers treats names that hold these differently.
NAME = "avflow_shared_prefix"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefix:
    """The baseline's keys and values [1, G, s, d] before the suffix, and the bytes that a piece's
    attention scores may take."""

    key: Tensor
    value: Tensor
    score_bytes: int


def query_chunks(rows: int, heads: int, m: int, n_tokens: int, score_bytes: int) -> list[range]:
    """Suffix queries cut so that a piece's float32 scores fit `score_bytes` (at least 1 query)."""
    size = max(1, min(m, score_bytes // (4 * rows * heads * n_tokens)))
    return [range(i, min(i + size, m)) for i in range(0, m, size)]


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    shared_prefix: SharedPrefix,
    sliding_window: int | None = None,
    **_interface: object,  # dropout, position_ids, …: what transformers passes to every function
) -> tuple[Tensor, None]:
    """Softmax attention over prefix and own suffix. query [R, H, m, d], key and value [R, G, m, d],
    attention_mask bool [R or 1, 1, m, N] -> ([R, m, H, d], None). Softmax in float32 or better."""
    if sliding_window is not None:
        raise NotImplementedError(
            f"sliding-window attention ({sliding_window}) can't be replayed: masks are made for "
            "full causal attention"
        )
    rows, heads, m, d = query.shape
    kv_heads, s = key.shape[1], shared_prefix.key.shape[2]
    # Scores and sums of a bfloat16 model stay in float32, as in the fused kernels.
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    # Key/value heads first: then all rows' queries meet the prefix in a single product.
    queries = (query.to(exact) * scaling).view(rows, kv_heads, -1, m, d).transpose(0, 1)
    own = (key.to(exact).transpose(0, 1), value.to(exact).transpose(0, 1))
    before = (shared_prefix.key[0].to(exact), shared_prefix.value[0].to(exact))
    out = query.new_empty(rows, m, kv_heads, heads // kv_heads, d)
    for chunk in query_chunks(rows, heads, m, s + m, shared_prefix.score_bytes):
        part, end = slice(chunk.start, chunk.stop), chunk.stop
        allowed = attention_mask[:, 0, part, : s + end]  # no query of the piece reads further
        reached = (own[0][:, :, :end], own[1][:, :, :end])
        mixed = _attend(queries[:, :, :, part], before, reached, allowed)
        out[:, part] = mixed.permute(1, 3, 0, 2, 4)
    return out.view(rows, m, heads, d), None


def _attend(
    query: Tensor, before: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], allowed: Tensor
) -> Tensor:
    """query [G, R, g, c, d]; keys and values `before` [G, s, d], shared, and `own` [G, R, n, d];
    allowed [R or 1, c, s + n]. Returns [G, R, g, c, d]."""
    kv_heads, rows, group, c, d = query.shape
    s = before[0].shape[1]
    together = query.reshape(kv_heads, rows * group * c, d)
    apart = together.view(kv_heads, rows, group * c, d)
    on_prefix = (together @ before[0].transpose(1, 2)).view(kv_heads, rows, group * c, s)
    scores = torch.cat([on_prefix, apart @ own[0].transpose(2, 3)], dim=-1)
    scores = scores.view(kv_heads, rows, group, c, -1)
    scores.masked_fill_(~allowed[None, :, None], float("-inf"))
    weights = torch.softmax(scores, dim=-1).view(kv_heads, rows, group * c, -1)
    mixed = weights[..., s:] @ own[1]
    mixed += (weights[..., :s].reshape(kv_heads, -1, s) @ before[1]).view_as(mixed)
    return mixed.view(kv_heads, rows, group, c, d)


@contextmanager
def shared_prefix_layers(config: object) -> Iterator[None]:
    """Within, layers of this text config attend through `shared_prefix_attention`."""
    AttentionInterface.register(NAME, shared_prefix_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = config._attn_implementation  # type: ignore[attr-defined]
    config._attn_implementation = NAME  # type: ignore[attr-defined]
    try:
        yield
    finally:
        config._attn_implementation = before  # type: ignore[attr-defined]
