"""Attention of replayed rows over the baseline's keys and values, without copies of these a row.

The official decoder layers run unchanged (projections, rotary, MLP, norms); only the attention
function is ours, set through transformers' AttentionInterface for the text decoder alone and put
back afterwards, so that the plain model is never disturbed.

A layer call takes positions of several rows, laid end to end as one long sequence: its weights are
read once for all of them, whatever each of them reads.

Shapes: T positions of a call, R rows, H heads, G key/value heads, q queries a row, m replayed
positions, d head size.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import PreTrainedConfig

from avflow.workers.engine.backends import View, attend
from avflow.workers.engine.interface import attending

NAME = "avflow_replay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Neighbouring rows of a call that read alike, as `view` says: their `queries` among the
    call's T, and `own`, their places among the rows that have keys of their own (none: empty)."""

    queries: slice
    n_rows: int
    own: slice
    view: View


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnKeys:
    """Where rows' own keys and values are: `given` ones [R, G, m, d]; or, without these, those that
    the call computes from its positions `within`, `n_rows` rows of m each."""

    within: slice
    n_rows: int
    given: tuple[Tensor, Tensor] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a layer's attention reads. `key` and `value` are the baseline's [1, G, s, d]."""

    groups: tuple[Group, ...]
    key: Tensor
    value: Tensor
    own: OwnKeys


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
    """query [1, H, T, d], key and value [1, G, T, d] -> ([1, T, H, d], None)."""
    if sliding_window is not None:
        raise NotImplementedError(
            f"sliding-window attention ({sliding_window}) can't be replayed: the engine knows "
            "full causal attention"
        )
    rows, heads, n, d = query.shape
    if isinstance(replayed, Record):
        replayed.held.append((key, value))
        return query.new_zeros(()).expand(rows, n, heads, d), None
    own = replayed.own
    keys, values = own.given or (
        _apart(key[:, :, own.within], own.n_rows),
        _apart(value[:, :, own.within], own.n_rows),
    )
    shared = (replayed.key, replayed.value)
    out = query.new_empty(n, heads, d)
    for group in replayed.groups:
        asked = _apart(query[:, :, group.queries], group.n_rows)
        mixed = attend(group.view, asked, (keys[group.own], values[group.own]), shared, scaling)
        mixed = mixed.transpose(1, 2)
        if len(replayed.groups) == 1:
            return mixed.reshape(1, n, heads, d), None
        out[group.queries].view(mixed.shape).copy_(mixed)
    return out[None], None


def _apart(states: Tensor, n_rows: int) -> Tensor:
    """[1, H, R * q, d] -> [R, H, q, d], a view."""
    _, heads, length, d = states.shape
    return states.view(heads, n_rows, length // max(1, n_rows), d).transpose(0, 1)


def replaying(config: PreTrainedConfig) -> AbstractContextManager[None]:
    """Within, layers of this text config attend through `replay_attention`."""
    return attending(config, NAME, replay_attention)
