"""A unit's interventions and probes, after its curves: masks, discards, then all probes at once.

Each is handed back whole, or as a failure of its own; the others go on. Letters are compared at
the last prompt position, generation-free, as for the curves.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from avflow.datasets.sample import LETTERS
from avflow.pathways.groups import group_positions
from avflow.pathways.layout import Layout, Positions
from avflow.pathways.pathway import blocked_segments
from avflow.workers.engine.discard import Prefill, timed_prefill
from avflow.workers.engine.probes import ProbeRow, run_probes
from avflow.workers.failing import failure, ruins_worker
from avflow.workers.meter import Meter
from avflow.workers.models.base import Embedded, LoadedModel, Prepared
from avflow.workers.protocol import (
    DiscardSpec,
    InterventionDone,
    MaskSpec,
    ProbeDone,
    ProbeSpec,
    UnitFailure,
    UnitSpec,
)

Masked = Callable[[NDArray[np.bool_], Sequence[int]], Tensor]
"""(blocked [S, S] as of `blocked_segments`, ascending layers) -> probabilities [V] at the last
position with these edges closed at these layers."""


def run_extras(
    *,
    model: LoadedModel,
    unit: UnitSpec,
    prepared: Prepared,
    embedded: Embedded,
    baseline_token: int,
    masked: Masked,
    meter: Meter,
) -> Iterator[InterventionDone | ProbeDone | UnitFailure]:
    """Yield each wanted extra once, done or failed. `masked` is the engine's.

    One with `correct_only` is left out where the baseline's token is not the answer's letter.
    """
    reader = _Reader(unit=unit, prepared=prepared, base_token=baseline_token)
    probes: list[ProbeSpec] = []
    for spec in unit.extras:
        if spec.key not in unit.wanted or (spec.correct_only and not reader.correct_base):
            continue
        if isinstance(spec, ProbeSpec):
            probes.append(spec)
            continue
        try:
            with meter.timed("replay" if isinstance(spec, MaskSpec) else "discard"):
                if isinstance(spec, MaskSpec):
                    done = _mask(spec, prepared.layout, masked, reader)
                else:
                    done = _discard(spec, model, prepared.layout, embedded, reader)
        except Exception as error:  # costs this intervention; the others go on
            if ruins_worker(error):
                raise
            yield failure(unit.unit_id, spec.key, meter.stage, error)
        else:
            yield done
    if probes:
        with meter.timed("probe"):
            found = _look(probes, model, prepared.layout, embedded)
        for key, rows in found.items():
            if isinstance(rows, Exception):
                yield failure(unit.unit_id, key, "probe", rows)
            else:
                yield _probe_done(unit.unit_id, key, rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """Turns probabilities into answers."""

    unit: UnitSpec
    prepared: Prepared
    base_token: int

    @property
    def answer_token(self) -> int:
        return self.prepared.option_tokens[self.prepared.layout.answer]

    @property
    def correct_base(self) -> bool:
        return self.base_token == self.answer_token

    def read(
        self, spec: MaskSpec | DiscardSpec, probabilities: Tensor, prefill: Prefill | None = None
    ) -> InterventionDone:
        options = self.prepared.option_tokens
        letters = dict(zip(options, LETTERS, strict=False))
        token = int(probabilities.argmax())
        return InterventionDone(
            unit_id=self.unit.unit_id,
            curve=spec.key,
            layers=spec.layers,
            p=float(probabilities[self.base_token].double()),
            p_options=probabilities[list(options)].double().cpu().numpy(),
            token=token,
            predicted=letters.get(token),
            correct=token == self.answer_token,
            correct_base=self.correct_base,
            token_layers=None if prefill is None else prefill.token_layers,
            prefill_s=None if prefill is None else prefill.seconds,
        )


def _mask(spec: MaskSpec, layout: Layout, masked: Masked, reader: _Reader) -> InterventionDone:
    closed = [blocked_segments(layout, pathway, spec.option_span) for pathway in spec.pathways]
    return reader.read(spec, masked(np.logical_or.reduce(closed), spec.layers))


def _discard(
    spec: DiscardSpec, model: LoadedModel, layout: Layout, embedded: Embedded, reader: _Reader
) -> InterventionDone:
    drops: dict[int, Positions] = {
        step.after_layer: np.concatenate(
            [group_positions(layout, group, spec.option_span) for group in step.groups]
        )
        for step in spec.steps
    }
    prefill = timed_prefill(model.decoder, embedded, drops)
    return reader.read(spec, prefill.probabilities, prefill)


def _look(
    specs: Sequence[ProbeSpec], model: LoadedModel, layout: Layout, embedded: Embedded
) -> Mapping[str, list[ProbeRow] | Exception]:
    try:
        return run_probes(model.decoder, embedded, layout, specs)
    except Exception as error:  # the walk that they share
        if ruins_worker(error):
            raise
        return {spec.key: error for spec in specs}


def _probe_done(unit_id: str, key: str, rows: Sequence[ProbeRow]) -> ProbeDone:
    return ProbeDone(
        unit_id=unit_id,
        curve=key,
        layer=np.array([row.layer for row in rows], dtype=np.int16),
        group=tuple(row.group for row in rows),
        position=np.array([row.position for row in rows], dtype=np.int32),
        key=np.array([row.key for row in rows], dtype=np.int32),
        width=np.array([row.width for row in rows], dtype=np.int32),
        dimension=np.array([row.dimension for row in rows], dtype=np.int32),
        value=np.array([row.value for row in rows], dtype=np.float64),
    )
