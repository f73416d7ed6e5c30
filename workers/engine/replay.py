"""Knockout rows replayed off the baseline: only what a knockout can change is computed again.

Causality (design: "The engine"): below its window's first layer a row equals the baseline, so it
joins the batch there, from the baseline's residual stream; before the first blocked query `start`
every layer equals the baseline, so the baseline's keys and values stand in for those positions.

Shapes: R rows, N prompt tokens, m = N - start replayed positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from avflow.workers.engine.attention import SharedPrefix, shared_prefix_layers
from avflow.workers.engine.baseline import Baseline
from avflow.workers.engine.head import last_probabilities
from avflow.workers.engine.masks import SuffixMasks
from avflow.workers.models.base import Decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One forward's worth: a curve (by number) with the knockout at `layers`, a window that is
    centred on `center_layer`."""

    curve: int
    center_layer: int
    layers: range


@torch.inference_mode()
def replay(
    decoder: Decoder,
    baseline: Baseline,
    rows: Sequence[Row],
    masks: SuffixMasks,
    score_bytes: int,
) -> Tensor:
    """Probabilities [R, V] at the last position, one row a `Row`, in their order.

    `masks` cover the positions from `start` = N - m on, which must not lie before the baseline's
    own `start`; a piece's attention scores take at most `score_bytes`.
    """
    start = baseline.n_tokens - masks.causal.shape[0]
    if start < baseline.start:
        raise ValueError(f"replay from {start}, but the baseline kept {baseline.start} on")
    order = sorted(range(len(rows)), key=lambda i: rows[i].layers.start)
    joining = [rows[i] for i in order]  # by first layer: the rows under way are always a prefix
    curves = sorted({row.curve for row in rows})
    stack = torch.stack([masks.causal, *(masks.knockout[curve] for curve in curves)])
    place = {curve: i + 1 for i, curve in enumerate(curves)}
    rotary = (baseline.cos[..., start:, :], baseline.sin[..., start:, :])
    hidden: Tensor | None = None
    with shared_prefix_layers(decoder.config):
        for i in range(joining[0].layers.start, len(decoder.layers)):
            alive = [row for row in joining if row.layers.start <= i]
            hidden = _join(hidden, baseline.residual[i][:, start - baseline.start :], len(alive))
            choice = [place[row.curve] if i in row.layers else 0 for row in alive]
            prefix = SharedPrefix(
                key=baseline.keys[i][:, :, :start],
                value=baseline.values[i][:, :, :start],
                score_bytes=score_bytes,
            )
            hidden = decoder.layers[i](
                hidden,
                attention_mask=_choose(stack, choice),
                position_embeddings=rotary,
                shared_prefix=prefix,
            )
    assert hidden is not None  # there is at least one row
    probabilities = last_probabilities(decoder, hidden[:, -1])
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order)] = torch.arange(len(order))
    return probabilities[back.to(probabilities.device)]


def _join(hidden: Tensor | None, residual: Tensor, n_alive: int) -> Tensor:
    """hidden [r, m, D] with rows from the baseline's residual [1, m, D] appended, up to n_alive."""
    new = n_alive - (0 if hidden is None else hidden.shape[0])
    fresh = residual.expand(new, -1, -1)
    if hidden is None:
        return fresh
    return torch.cat([hidden, fresh]) if new else hidden


def _choose(stack: Tensor, choice: list[int]) -> Tensor:
    """bool [R or 1, 1, m, N]: each row's mask; one for all where they are the same."""
    if len(set(choice)) == 1:
        return stack[choice[0]][None, None]
    return stack[torch.tensor(choice, device=stack.device)][:, None]
