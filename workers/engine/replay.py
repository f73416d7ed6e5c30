"""Knockout rows replayed off the baseline: only what a knockout can change is computed again.

Causality (docs/engine.md): before its first masked layer a row equals the undisturbed trunk, so it
is born there; before the first blocked query every layer equals the baseline, whose keys and values
stand in; in its first masked layer only its targets change, and all keys are still the baseline's;
in the last layer only the last position's query is asked for. So a batch walks up the layers once,
the trunk beside its rows, and holds one residual state a row, never one a layer.

Shapes: R rows, N prompt tokens, m = N - start replayed positions, D hidden size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor, nn

from avflow.workers.engine.attention import Group, Record, Replay, replaying
from avflow.workers.engine.backends import View, plan_view
from avflow.workers.engine.baseline import Baseline
from avflow.workers.engine.plan import Batch
from avflow.workers.engine.reads import Span
from avflow.workers.engine.rows import Step, steps
from avflow.workers.models.base import Decoder
from avflow.workers.models.placement import device_of

_TRUNK = 0  # its place among the states; row i's is i + 1
_ALL = slice(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """The last layer's output at the last position, [1 + R, D]: the trunk's (of a `control`, else
    nothing that means anything), then the rows' in their order; and the `trunk` [m, D] that the
    next batch of the group begins with, if there is one."""

    last: Tensor
    trunk: Tensor | None


@torch.inference_mode()
def replay(
    decoder: Decoder, baseline: Baseline, trunk: Tensor, batch: Batch, tokens_a_piece: int
) -> Replayed:
    """Walk a batch up the layers. `trunk` [m, D]: the undisturbed input of its first layer from
    its start on, of the baseline's checkpoint or as the batch before handed it over. At most
    `tokens_a_piece` positions (or one row) go through a layer at a time.
    """
    walk = _Walk(decoder, baseline, trunk, batch, tokens_a_piece)
    n_layers = len(decoder.layers)
    with replaying(decoder.config):
        layers = range(batch.first_layer, n_layers)
        for step in steps(batch.rows, layers, batch.trunk_until(n_layers)):
            walk.take(step)
    return Replayed(last=walk.last, trunk=walk.handed_over)


class _Walk:
    """The states of a batch on their way up."""

    def __init__(
        self,
        decoder: Decoder,
        baseline: Baseline,
        trunk: Tensor,
        batch: Batch,
        tokens_a_piece: int,
    ) -> None:
        self.decoder, self.baseline, self.batch = decoder, baseline, batch
        self.tokens_a_piece = tokens_a_piece
        self.m, width = trunk.shape
        self.states = trunk.new_empty(len(batch.rows) + 1, self.m, width)
        self.states[_TRUNK] = trunk
        self.handed_over: Tensor | None = None
        self.last = trunk.new_empty(len(batch.rows) + 1, width)
        self.suffix: tuple[Span, ...] = ((batch.start, baseline.n_tokens),)
        self._views: dict[tuple[int | None, tuple[Span, ...], int], View] = {}

    @cached_property
    def final(self) -> tuple[Span, ...]:
        """The last position alone."""
        return ((self.baseline.n_tokens - 1, self.baseline.n_tokens),)

    def take(self, step: Step) -> None:
        """One layer."""
        if self.m == 1:
            step = _all_running(step)
        layer = self.decoder.layers[step.layer]
        if step.layer == self.batch.hand_over:
            self.handed_over = self.states[_TRUNK].clone()
        for child, parent in step.forks:
            self.states[child + 1] = self.states[parent + 1]
        at_the_top = step.layer == len(self.decoder.layers) - 1
        if at_the_top and self.m > 1:
            self._finish(layer, step)
            return
        targets = {row: self.batch.masks[self.batch.rows[row].mask].targets for row in step.joins}
        joined = dict(self._join(layer, step, targets))
        for piece in self._pieces(step):
            chosen = torch.tensor([row + 1 for row, _ in piece], device=self.states.device)
            self.states[chosen] = self._call(layer, self.states[chosen], self._replay(step, piece))
        for row, out in joined.items():
            self.states[row + 1] = self.states[_TRUNK]
            self.states[row + 1, self._offsets(targets[row])] = out
        if at_the_top:
            self.last = self.states[:, -1]

    def _finish(self, layer: nn.Module, step: Step) -> None:
        """The last layer: every position's keys and values, the last position's query alone."""
        asked = {
            row: self.final
            for row in step.joins
            if self.batch.masks[self.batch.rows[row].mask].targets[-1][1] == self.baseline.n_tokens
        }
        joined = dict(self._join(layer, step, asked))
        for piece in self._pieces(step):
            chosen = torch.tensor([row + 1 for row, _ in piece], device=self.states.device)
            states = self.states[chosen]
            own = self._keys_and_values(layer, states)
            replayed = self._replay(step, piece, self.final, own)
            self.last[chosen] = self._call(layer, states[:, -1:], replayed, self.final)[:, 0]
        for row in step.joins:  # without a blocked edge at the last position: the trunk, unchanged
            self.last[row + 1] = joined[row][0] if row in joined else self.last[_TRUNK]

    def _pieces(self, step: Step) -> Iterator[Sequence[tuple[int, int | None]]]:
        """Running rows with their masks here (None: causal), alike ones side by side. The trunk
        goes as row -1."""
        running: list[tuple[int, int | None]] = [
            (row, self.batch.rows[row].mask if row in step.masked else None) for row in step.running
        ]
        if step.trunk:
            running.append((_TRUNK - 1, None))
        running.sort(key=lambda pair: (-1 if pair[1] is None else pair[1], pair[0]))
        size = max(1, self.tokens_a_piece // self.m)
        for at in range(0, len(running), size):
            yield running[at : at + size]

    def _replay(
        self,
        step: Step,
        piece: Sequence[tuple[int, int | None]],
        queries: tuple[Span, ...] | None = None,
        own: tuple[Tensor, Tensor] | None = None,
    ) -> Replay:
        start, groups, at = self.batch.start, [], 0
        for mask, alike in groupby(piece, key=lambda pair: pair[1]):
            rows = slice(at, at + len(list(alike)))
            at = rows.stop
            view = self._view(mask, queries or self.suffix, start)
            groups.append(Group(rows=rows, queries=_ALL, view=view))
        return Replay(
            groups=tuple(groups),
            key=self.baseline.keys[step.layer][:, :, :start],
            value=self.baseline.values[step.layer][:, :, :start],
            own=own,
        )

    def _join(
        self, layer: nn.Module, step: Step, asked: dict[int, tuple[Span, ...]]
    ) -> Iterator[tuple[int, Tensor]]:
        """Each joining row's layer output [t, D] at the positions asked for. Their inputs are the
        trunk's and their keys the baseline's, so that they go through as one long sequence."""
        for piece in self._joint_pieces(asked):
            groups, at, n = [], 0, self.baseline.n_tokens
            for row in piece:
                length = _length(asked[row])
                view = self._view(self.batch.rows[row].mask, asked[row], n)
                groups.append(Group(rows=_ALL, queries=slice(at, at + length), view=view))
                at += length
            replayed = Replay(
                groups=tuple(groups),
                key=self.baseline.keys[step.layer],
                value=self.baseline.values[step.layer],
            )
            spans = tuple(span for row in piece for span in asked[row])
            trunk = self.states[_TRUNK, self._offsets(spans)][None]
            out = self._call(layer, trunk, replayed, spans)[0]
            lengths = [_length(asked[row]) for row in piece]
            yield from zip(piece, torch.split(out, lengths), strict=True)

    def _joint_pieces(self, asked: dict[int, tuple[Span, ...]]) -> Iterator[list[int]]:
        piece: list[int] = []
        room = max(self.tokens_a_piece, self.m)
        for row, spans in asked.items():
            if piece and sum(_length(asked[other]) for other in piece) + _length(spans) > room:
                yield piece
                piece = []
            piece.append(row)
        if piece:
            yield piece

    def _call(
        self,
        layer: nn.Module,
        hidden: Tensor,
        replayed: Replay,
        spans: tuple[Span, ...] | None = None,
    ) -> Tensor:
        out: Tensor = layer(
            hidden,
            attention_mask=None,
            position_embeddings=self._rotary(spans or self.suffix),
            replayed=replayed,
        )
        return out.to(self.states.device)

    def _keys_and_values(self, layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of a piece's input [P, m, D], by the layer's own projections; its MLP is not asked."""
        record = Record()
        device = device_of(layer)  # hooks of a model on several devices may sit on the layer alone
        layer.self_attn(  # type: ignore[operator]
            hidden_states=layer.input_layernorm(hidden.to(device)),  # type: ignore[operator]
            attention_mask=None,
            position_embeddings=tuple(t.to(device) for t in self._rotary(self.suffix)),
            replayed=record,
        )
        return record.held[0]

    def _rotary(self, spans: tuple[Span, ...]) -> tuple[Tensor, Tensor]:
        cos, sin = self.baseline.cos, self.baseline.sin
        if len(spans) == 1:
            at = slice(*spans[0])
            return cos[..., at, :], sin[..., at, :]
        index = _positions(spans, cos.device)
        return cos.index_select(-2, index), sin.index_select(-2, index)

    def _offsets(self, spans: tuple[Span, ...]) -> Tensor:
        return _positions(spans, self.states.device) - self.batch.start

    def _view(self, mask: int | None, queries: tuple[Span, ...], own_from: int) -> View:
        key = (mask, queries, own_from)
        if key not in self._views:
            blocked = None if mask is None else self.batch.masks[mask].blocked
            device = self.baseline.keys[0].device
            self._views[key] = plan_view(self.batch.layout, blocked, queries, own_from, device)
        return self._views[key]


def _all_running(step: Step) -> Step:
    """Of a single position, targets and suffix are one: joining rows go along with the others, so
    that a layer's weights, which is where the time goes, are read once."""
    leaving = tuple((row, _TRUNK - 1) for row in step.joins)
    return replace(step, forks=step.forks + leaving, joins=(), running=step.running + step.joins)


def _length(spans: tuple[Span, ...]) -> int:
    return sum(stop - start for start, stop in spans)


def _positions(spans: tuple[Span, ...], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in spans])
