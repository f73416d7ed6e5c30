"""A unit's interventions and probes, after its curves: masks, discards, and what probes saw of the
baseline.

Each is handed back whole, or as a failure of its own; the others go on. Letters are compared at
the last prompt position, generation-free, as for the curves.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from avflow.datasets.sample import LETTERS
from avflow.pathways.groups import group_positions
from avflow.pathways.layout import Layout, LayoutError, Positions
from avflow.pathways.pathway import blocked_segments, first_target
from avflow.workers.batches import BatchRunner, Outcome
from avflow.workers.engine.discard import Prefill, timed_prefill
from avflow.workers.engine.memory import Shapes
from avflow.workers.engine.plan import Batch, checkpoints, compose_batches
from avflow.workers.engine.probes import ProbeRow, Probes
from avflow.workers.engine.rows import Knockout
from avflow.workers.failing import failure, ruins_worker
from avflow.workers.meter import Meter
from avflow.workers.models.base import Embedded, LoadedModel, Prepared
from avflow.workers.protocol import (
    DiscardSpec,
    ExtraSpec,
    InterventionDone,
    MaskSpec,
    ProbeDone,
    ProbeSpec,
    UnitFailure,
    UnitSpec,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Masks:
    """What each wanted mask will run, by its key: its batch, of one row; None where it closes no
    edge; or why it can't be run: above all, where the prompt lacks a group."""

    batches: Mapping[str, Batch | ValueError | None]
    knockouts: Mapping[str, Knockout]

    @property
    def checkpoints(self) -> set[tuple[int, int]]:
        """(layer, start) where the baseline is kept for them."""
        return checkpoints([b for b in self.batches.values() if isinstance(b, Batch)])


def plan_masks(unit: UnitSpec, layout: Layout, shapes: Shapes) -> Masks:
    """Before the baseline, which keeps their checkpoints. A mask's row runs alone: its numbers
    follow from nothing else in the unit."""
    wanted = [spec for spec in unit.extras if spec.key in unit.wanted]
    batches: dict[str, Batch | ValueError | None] = {}
    knockouts: dict[str, Knockout] = {}
    for spec in wanted:
        if isinstance(spec, MaskSpec):
            try:
                knockouts[spec.key] = _knockout(spec, layout, shapes)
            except ValueError as error:  # LayoutError, or layers that the model lacks
                batches[spec.key] = error
                continue
            found = compose_batches(layout, [knockouts[spec.key]], shapes, unit.byte_budget)
            batches[spec.key] = found[0] if found else None
    return Masks(batches=batches, knockouts=knockouts)


def _knockout(spec: MaskSpec, layout: Layout, shapes: Shapes) -> Knockout:
    if spec.layers[-1] >= shapes.n_layers:
        raise ValueError(f"layers {spec.layers} don't fit a model of {shapes.n_layers}")
    closed = [blocked_segments(layout, pathway, spec.option_span) for pathway in spec.pathways]
    blocked = np.logical_or.reduce(closed)
    start = first_target(layout, blocked)
    return Knockout(blocked=blocked, start=start, layer_sets=(spec.layers,))


def wanted_probes(unit: UnitSpec) -> list[ProbeSpec]:
    """Before the baseline, which they watch: those with `correct_only` too, for the answer is not
    known yet."""
    wanted = (spec for spec in unit.extras if spec.key in unit.wanted)
    return [spec for spec in wanted if isinstance(spec, ProbeSpec)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Extras:
    """A unit past its baseline, `base` that pass's own outcome, `probes` what watched it."""

    model: LoadedModel
    unit: UnitSpec
    prepared: Prepared
    embedded: Embedded
    masks: Masks
    probes: Probes
    runner: BatchRunner
    base: Outcome

    def run(self, meter: Meter) -> Iterator[InterventionDone | ProbeDone | UnitFailure]:
        """Yield each wanted extra once, done or failed.

        One with `correct_only` is left out where the baseline's token is not the answer's letter.
        """
        probes: list[ProbeSpec] = []
        for spec in self._called_for:
            match spec:
                case ProbeSpec():
                    probes.append(spec)
                case MaskSpec() | DiscardSpec():
                    yield self._intervene(spec, meter)
        for spec in probes:
            yield self._seen(spec)

    @property
    def knockouts(self) -> list[Knockout]:
        """Of the masks that are run."""
        keys = [spec.key for spec in self._called_for]
        return [self.masks.knockouts[key] for key in keys if key in self.masks.knockouts]

    @property
    def _called_for(self) -> list[ExtraSpec]:
        wanted = [spec for spec in self.unit.extras if spec.key in self.unit.wanted]
        return [spec for spec in wanted if self._correct_base or not spec.correct_only]

    @property
    def _answer_token(self) -> int:
        return self.prepared.option_tokens[self.prepared.layout.answer]

    @property
    def _correct_base(self) -> bool:
        return int(self.base.token[0]) == self._answer_token

    def _intervene(
        self, spec: MaskSpec | DiscardSpec, meter: Meter
    ) -> InterventionDone | UnitFailure:
        try:
            if isinstance(spec, MaskSpec):
                with meter.timed("replay"):
                    return self._mask(spec)
            with meter.timed("discard"):
                return self._discard(spec)
        except Exception as error:  # costs this intervention; the others go on
            if ruins_worker(error):
                raise
            stage = "prepare" if isinstance(error, LayoutError) else meter.stage
            return failure(self.unit.unit_id, spec.key, stage, error)

    def _mask(self, spec: MaskSpec) -> InterventionDone:
        batch = self.masks.batches[spec.key]
        if isinstance(batch, ValueError):
            raise batch
        if batch is None:
            return self._done(spec, self.base, self.base)
        # Beside the unmasked trunk: a few answers of thousands hang on the last bits of bfloat16.
        both = self.runner.run(batch)
        return self._done(spec, both[[1]], both[[0]])

    def _discard(self, spec: DiscardSpec) -> InterventionDone:
        layout = self.prepared.layout
        drops: dict[int, Positions] = {
            step.after_layer: np.concatenate(
                [group_positions(layout, group, spec.option_span) for group in step.groups]
            )
            for step in spec.steps
        }
        prefill = timed_prefill(self.model.decoder, self.embedded, drops)
        outcome = self.runner.reader.read(prefill.probabilities[None])
        return self._done(spec, outcome, self.base, prefill)

    def _done(
        self,
        spec: MaskSpec | DiscardSpec,
        outcome: Outcome,
        base: Outcome,
        prefill: Prefill | None = None,
    ) -> InterventionDone:
        letters = dict(zip(self.prepared.option_tokens, LETTERS, strict=False))
        token = int(outcome.token[0])
        return InterventionDone(
            unit_id=self.unit.unit_id,
            curve=spec.key,
            layers=spec.layers,
            p=float(outcome.p_base_token[0]),
            p_options=outcome.p_options[0],
            token=token,
            predicted=letters.get(token),
            correct=token == self._answer_token,
            p_base=float(base.p_base_token[0]),
            correct_base=int(base.token[0]) == self._answer_token,
            token_layers=None if prefill is None else prefill.token_layers,
            prefill_s=None if prefill is None else prefill.seconds,
        )

    def _seen(self, spec: ProbeSpec) -> ProbeDone | UnitFailure:
        found = self.probes.found[spec.key]
        if isinstance(found, UnitFailure):
            return found
        return _probe_done(self.unit.unit_id, spec.key, found)


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
