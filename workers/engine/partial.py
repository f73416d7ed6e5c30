"""Attention over a part of the keys, with its log-sum-exp, and the merging of parts.

softmax over A and B together = (e^lA * out_A + e^lB * out_B) / (e^lA + e^lB), with l the
log-sum-exp of each part's scores: exact, whatever the parts. The kernels are those that
`scaled_dot_product_attention` itself runs, in the form that hands out the log-sum-exp.

Shapes: B batch, H heads, G key/value heads (H = G * g), q queries, n keys, d head size.
"""

import torch
from torch import Tensor

from avflow.workers.engine import kernel_check

Part = tuple[Tensor, Tensor]  # out [B, H, q, d] and log-sum-exp [B, H, q]

_SCORE_BYTES = 256 << 20  # of the plain way below, a piece


def partial_attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
) -> Part:
    """query [B, H, q, d], key and value [B, G, n, d] -> out in the query's dtype, log-sum-exp in
    float32 (float64 for float64). Softmax inside is float32 or better. `causal` needs q == n.

    By a fused kernel where there is one that was found right, else in plain products.
    """
    if _has_kernel(query) and kernel_check.fits(query.device, query.dtype):
        return fused_attention(query, key, value, causal=causal, scale=scale)
    return plain_attention(query, key, value, causal=causal, scale=scale)


def _has_kernel(query: Tensor) -> bool:
    kind, d = query.device.type, query.shape[-1]
    half = query.dtype in (torch.bfloat16, torch.float16)
    on_cuda = (half and d % 8 == 0 and d <= 256) or (query.dtype == torch.float32 and d % 4 == 0)
    return kind == "cpu" or (kind == "cuda" and on_cuda)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
) -> Part:
    """As `partial_attention`, by this device's kernel."""
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
    elif query.dtype == torch.float32:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, *_per_head(query, key, value), None, True, 0.0, causal, scale=scale
        )
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, scale=scale
        )
    return out, lse[..., : query.shape[2]]  # a kernel may pad its queries


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
) -> Part:
    """The same in plain products, for devices and dtypes without such a kernel."""
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    key, value = (t.to(exact) for t in _per_head(query, key, value))
    batch, heads, q, _ = query.shape
    n = key.shape[2]
    size = max(1, _SCORE_BYTES // (4 * batch * heads * n))
    outs, sums = [], []
    for at in range(0, q, size):
        scores = query[:, :, at : at + size].to(exact) * scale @ key.transpose(2, 3)
        if causal:
            rows = torch.arange(at, at + scores.shape[2], device=query.device)
            later = torch.arange(n, device=query.device) > rows[:, None]
            scores.masked_fill_(later, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        outs.append((torch.exp(scores - lse[..., None]) @ value).to(query.dtype))
        sums.append(lse)
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2)


def self_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Part:
    """Each query reads its own position alone: out is its value, in memory of its own (parts are
    merged in place). q == n."""
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    rows, heads, q, d = query.shape
    key, value = _per_head(query, key, value)
    out = query.new_empty(rows, q, heads, d).transpose(1, 2).copy_(value)
    return out, (query.to(exact) * key).sum(-1) * scale


def shared_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Part:
    """All rows against keys that they share, in one product, without a copy of the keys a row.

    query [R, H, q, d], key and value [1, G, n, d]. Rows and the heads of a group become queries.
    """
    rows, heads, q, d = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    folded = query.view(rows, kv_heads, group, q, d).transpose(0, 1)
    folded = folded.reshape(1, kv_heads, rows * group * q, d)
    out, lse = partial_attention(folded, key, value, causal=False, scale=scale)
    out = out.reshape(kv_heads, rows, group, q, d).transpose(0, 1).reshape(rows, heads, q, d)
    lse = lse.reshape(kv_heads, rows, group, q).transpose(0, 1).reshape(rows, heads, q)
    return out, lse


def merge_into(total: Part, part: Part) -> None:
    """Add a part to `total`, in place; `total` is float32 or better.

    Its weight e^lB / (e^lA + e^lB) is the logistic function of lB - lA.
    """
    out, lse = total
    more, more_lse = part
    out.lerp_(more.to(out.dtype), torch.sigmoid(more_lse - lse)[..., None])
    torch.logaddexp(lse, more_lse, out=lse)


def _per_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]
    if group == 1:
        return key, value
    return key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
