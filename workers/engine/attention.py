"""Attention of replayed rows over the baseline's keys and values, without copies of these a row.

The official decoder layers run unchanged (projections, rotary, MLP, norms); only the attention
function is ours, set through transformers' AttentionInterface for the text decoder alone and put
back afterwards, so that the plain model is never disturbed.

Shapes: R rows, H heads, G key/value heads, q queries, m replayed positions, d head size.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import Tensor, nn

from avflow.workers.engine.backends import View, attend
from avflow.workers.engine.interface import attending

NAME = "avflow_replay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Rows and queries of a call that read alike, as `view` says."""

    rows: slice
    queries: slice
    view: View


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a layer's attention reads. `key` and `value` are the baseline's [1, G, s, d]; `own`,
    where given, stands for the keys and values that the layer computes from its input."""

    groups: tuple[Group, ...]
    key: Tensor
    value: Tensor
    own: tuple[Tensor, Tensor] | None = None


@dataclass(slots=True, kw_only=True)
class Record:
    """Asks a layer's attention for its keys and values [R, G, m, d] and nothing else."""

    held: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def replay_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    replayed: Replay | Record,
    sliding_window: int | None = None,
    **_interface: object,  # dropout, position_ids, …: what transformers passes to every function
) -> tuple[Tensor, None]:
    """query [R, H, q, d], key and value [R, G, q, d] -> ([R, q, H, d], None)."""
    if sliding_window is not None:
        raise NotImplementedError(
            f"sliding-window attention ({sliding_window}) can't be replayed: the engine knows "
            "full causal attention"
        )
    rows, heads, q, d = query.shape
    if isinstance(replayed, Record):
        replayed.held.append((key, value))
        return query.new_zeros(()).expand(rows, q, heads, d), None
    own = (key, value) if replayed.own is None else replayed.own
    shared = (replayed.key, replayed.value)
    out = query.new_empty(rows, q, heads, d)
    for group in replayed.groups:
        mine = (own[0][group.rows], own[1][group.rows])
        asked = query[group.rows, :, group.queries]
        mixed = attend(group.view, asked, mine, shared, scaling)
        out[group.rows, group.queries] = mixed.transpose(1, 2)
    return out, None


def replaying(config: object) -> AbstractContextManager[None]:
    """Within, layers of this text config attend through `replay_attention`."""
    return attending(config, NAME, replay_attention)
