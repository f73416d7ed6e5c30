"""Knockout rows replayed off the baseline: only what a knockout can change is computed again.

Causality (docs/engine.md): before its first masked layer a row equals the undisturbed trunk, so it
is born there; before the first blocked query every layer equals the baseline, whose keys and values
stand in; in its first masked layer only its targets change, and all keys are still the baseline's;
in the last layer only the last position's query is asked for. So a batch walks up the layers once,
the trunk beside its rows, and holds one residual state a row, never one a layer.

Shapes: R rows, N prompt tokens, m = N - start replayed positions, D hidden size.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avflow.workers.engine.attention import Group, OwnKeys, Record, Replay, replaying
from avflow.workers.engine.backends import View, plan_view
from avflow.workers.engine.baseline import Baseline
from avflow.workers.engine.plan import Batch
from avflow.workers.engine.reads import Span
from avflow.workers.engine.rows import Step, steps
from avflow.workers.models.base import Decoder
from avflow.workers.models.placement import device_of

_TRUNK = 0  # its place among the states; row i's is i + 1


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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Strand:
    """A row's part in a layer call: which of the states it is, the positions asked for, and the
    mask they read under (by number; None: causal). One that `joins` takes the trunk's input and
    the baseline's keys, any other its own."""

    state: int
    spans: tuple[Span, ...]
    mask: int | None
    joins: bool

    @property
    def n(self) -> int:
        return sum(stop - start for start, stop in self.spans)


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
        self.final: tuple[Span, ...] = ((baseline.n_tokens - 1, baseline.n_tokens),)
        self._views: dict[tuple[int | None, tuple[Span, ...], int], View] = {}

    def take(self, step: Step) -> None:
        """One layer."""
        if self.m == 1:
            step = _all_running(step)
        if step.layer == self.batch.hand_over:
            self.handed_over = self.states[_TRUNK].clone()
        for child, parent in step.forks:
            self.states[child + 1] = self.states[parent + 1]
        at_the_top = step.layer == len(self.decoder.layers) - 1
        if at_the_top and self.m > 1:
            self._finish(step)
            return
        strands = [*self._joining(step), *self._running(step, self.suffix)]
        for piece in _pieces(strands, self.tokens_a_piece):
            out = self._through(step.layer, piece)
            self._flat.index_copy_(0, self._places(piece), out)
        for row in step.joins:  # what no mask touched is the trunk's, which has passed by now
            for start, stop in self._untouched(row):
                self.states[row + 1, start:stop] = self.states[_TRUNK, start:stop]
        if at_the_top:
            self.last = self.states[:, -1]

    def _finish(self, step: Step) -> None:
        """The last layer: every position's keys and values, the last position's query alone."""
        joining = [
            replace(strand, spans=self.final)
            for strand in self._joining(step)
            if strand.spans[-1][1] == self.baseline.n_tokens
        ]
        alone = {row + 1 for row in step.joins} - {strand.state for strand in joining}
        for piece in _pieces(self._running(step, self.suffix), self.tokens_a_piece):
            chosen = self._index([strand.state for strand in piece])
            own = self._keys_and_values(step.layer, self.states[chosen])
            asked = [*joining, *(replace(strand, spans=self.final) for strand in piece)]
            states = self._index([strand.state for strand in asked])
            self.last[states] = self._through(step.layer, asked, own)
            joining = []
        for state in alone:  # no edge of the last position is blocked: the trunk, unchanged
            self.last[state] = self.last[_TRUNK]

    def _joining(self, step: Step) -> list[_Strand]:
        """Rows that leave the trunk in this layer: their targets alone."""
        masks = [(row, self.batch.rows[row].mask) for row in step.joins]
        return [
            _Strand(state=row + 1, spans=self.batch.masks[mask].targets, mask=mask, joins=True)
            for row, mask in sorted(masks, key=lambda pair: pair[1])
        ]

    def _running(self, step: Step, spans: tuple[Span, ...]) -> list[_Strand]:
        """Rows that have left it, and the trunk; alike ones side by side."""
        masks = {row: self.batch.rows[row].mask for row in step.running if row in step.masked}
        states = [row + 1 for row in step.running] + [_TRUNK] * step.trunk
        strands = [
            _Strand(state=state, spans=spans, mask=masks.get(state - 1), joins=False)
            for state in states
        ]
        return sorted(strands, key=lambda s: (-1 if s.mask is None else s.mask, s.state))

    def _through(
        self, number: int, piece: Sequence[_Strand], own: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """A layer's output [T, D] for strands end to end; those that join come first."""
        groups, at, n_running = [], 0, 0
        for _, alike in groupby(piece, key=lambda s: (s.joins, s.mask, s.spans)):
            rows = list(alike)
            strand, length = rows[0], len(rows) * rows[0].n
            own_from = self.baseline.n_tokens if strand.joins else self.batch.start
            own_rows = slice(n_running, n_running + (0 if strand.joins else len(rows)))
            groups.append(
                Group(
                    queries=slice(at, at + length),
                    n_rows=len(rows),
                    own=own_rows,
                    view=self._view(strand.mask, strand.spans, own_from),
                )
            )
            at, n_running = at + length, own_rows.stop
        replayed = Replay(
            groups=tuple(groups),
            key=self.baseline.keys[number],
            value=self.baseline.values[number],
            own=OwnKeys(within=slice(at - n_running * self.m, at), n_rows=n_running, given=own),
        )
        source = [replace(s, state=_TRUNK) if s.joins else s for s in piece]
        positions = np.concatenate([_positions(strand.spans) for strand in piece])
        out: Tensor = self.decoder.layers[number](
            self._flat.index_select(0, self._places(source))[None],
            attention_mask=None,
            position_embeddings=self._rotary(positions),
            replayed=replayed,
        )
        return out[0].to(self.states.device)

    def _keys_and_values(self, number: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows' input [P, m, D], by the layer's own projections; its MLP is not asked."""
        record, layer = Record(), self.decoder.layers[number]
        device = device_of(layer)  # hooks of a model on several devices may sit on the layer alone
        rotary = self._rotary(_positions(self.suffix))
        layer.get_submodule("self_attn")(
            hidden_states=layer.get_submodule("input_layernorm")(hidden.to(device)),
            attention_mask=None,
            position_embeddings=tuple(t.to(device) for t in rotary),
            replayed=record,
        )
        return record.held[0]

    @property
    def _flat(self) -> Tensor:
        """The states' positions in a row, [(1 + R) * m, D]."""
        return self.states.view(-1, self.states.shape[-1])

    def _places(self, strands: Iterable[_Strand]) -> Tensor:
        """Where their positions lie among the states', int64 [T]."""
        return self._index(
            np.concatenate([_positions(s.spans) + s.state * self.m for s in strands])
            - self.batch.start
        )

    def _untouched(self, row: int) -> Iterator[Span]:
        """The positions, counted from the start, that are no targets of a row's mask."""
        at = self.batch.start
        for start, stop in (
            *self.batch.masks[self.batch.rows[row].mask].targets,
            (self.baseline.n_tokens, self.baseline.n_tokens),
        ):
            if at < start:
                yield at - self.batch.start, start - self.batch.start
            at = stop

    def _rotary(self, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        cos, sin = self.baseline.cos, self.baseline.sin
        index = torch.from_numpy(positions).to(cos.device)
        return cos.index_select(-2, index), sin.index_select(-2, index)

    def _index(self, places: Sequence[int] | NDArray[np.int64]) -> Tensor:
        return torch.as_tensor(places, device=self.states.device)

    def _view(self, mask: int | None, queries: tuple[Span, ...], own_from: int) -> View:
        key = (mask, queries, own_from)
        if key not in self._views:
            blocked = None if mask is None else self.batch.masks[mask].blocked
            device = self.baseline.keys[0].device
            self._views[key] = plan_view(self.batch.layout, blocked, queries, own_from, device)
        return self._views[key]


def _pieces(strands: Sequence[_Strand], tokens: int) -> Iterator[list[_Strand]]:
    """In their order, at most so many positions at a time, or one strand."""
    piece: list[_Strand] = []
    length = 0
    for strand in strands:
        if piece and length + strand.n > tokens:
            yield piece
            piece, length = [], 0
        piece.append(strand)
        length += strand.n
    if piece:
        yield piece


def _all_running(step: Step) -> Step:
    """Of a single position, targets and suffix are one: joining rows go along with the others, in
    the same few parts of the attention."""
    leaving = tuple((row, _TRUNK - 1) for row in step.joins)
    return replace(step, forks=step.forks + leaving, joins=(), running=step.running + step.joins)


def _positions(spans: tuple[Span, ...]) -> NDArray[np.int64]:
    return np.concatenate([np.arange(start, stop) for start, stop in spans])
