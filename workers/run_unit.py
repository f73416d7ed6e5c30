"""One sample's whole work on a loaded model, as a stream of events.

    prepare -> encode -> prefill, probed -> (batch of rows -> CurveDone ...) ...
            -> InterventionDone ... -> ProbeDone ... -> SampleDone

A failure is yielded as data (UnitFailure) and the rest goes on; only what ruins the worker itself
(host memory gone, a broken CUDA context) is raised. The same unit gives the same numbers whatever
was wanted of it: batches follow from all of its curves.

Shapes: R rows, C centre layers, O option letters, S segments, N prompt tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from avflow.datasets.media import DecodedMedia
from avflow.datasets.sample import LETTERS
from avflow.pathways.groups import group_names, group_positions
from avflow.pathways.layout import Layout, LayoutError
from avflow.workers.batches import BatchRunner, Outcome, Reader
from avflow.workers.curves import Curve, check_wanted, knockouts_of, resolve
from avflow.workers.decode import media_notes
from avflow.workers.encoders import EncoderCache
from avflow.workers.engine.baseline import Baseline, run_baseline
from avflow.workers.engine.cost import knockout_floor, prefill_floor
from avflow.workers.engine.memory import Shapes, shapes_of
from avflow.workers.engine.plan import Batch, checkpoints, compose_batches
from avflow.workers.engine.probes import Probes
from avflow.workers.engine.rows import Knockout
from avflow.workers.extras import Extras, plan_masks, wanted_probes
from avflow.workers.failing import failure, ruins_worker
from avflow.workers.meter import Meter
from avflow.workers.models.answers import other_form
from avflow.workers.models.base import Embedded, LoadedModel, Prepared
from avflow.workers.protocol import CurveDone, Event, SampleDone, UnitFailure, UnitSpec


def run_unit(
    model: LoadedModel,
    unit: UnitSpec,
    media: Sequence[DecodedMedia],
    decode_s: float,
    encoders: EncoderCache | None = None,
) -> Iterator[Event]:
    """Yield a CurveDone for each wanted curve as soon as it is complete, what is wanted of the
    interventions and probes after them, then one SampleDone.

    `media` in the order of `unit.sample.media`, decoded in `decode_s` seconds. A curve that fails
    yields a UnitFailure of its own; a sample that fails before its curves yields one with
    `curve` None and ends. A curve with `correct_only` is left out where the baseline is wrong.
    `encoders`, if given, holds what the encoders made of media that were seen before.
    """
    meter = Meter(model.device)
    try:
        check_wanted(unit)
        with meter.timed("prepare"):
            prepared = model.prepare(unit.sample, media)
            curves, lost = resolve(unit, prepared.layout, model.info.n_layers)
        with meter.timed("encode"):
            features = encoders.encode(model, prepared) if encoders else model.encode(prepared)
            embedded = model.embed(prepared, features)
        with meter.timed("prefill"):
            planned = _plan(model, unit, prepared, embedded, curves)
            masks = plan_masks(unit, prepared.layout, planned.shapes)
            kept = planned.checkpoints | masks.checkpoints
            probes = Probes(
                unit_id=unit.unit_id,
                decoder=model.decoder,
                layout=prepared.layout,
                specs=wanted_probes(unit),
                timed=partial(meter.timed, "probe"),
            )
            baseline = run_baseline(model.decoder, embedded, kept, probes.watch)
    except Exception as error:  # a bad sample is data for the coordinator's policy, whatever it is
        if ruins_worker(error):
            raise
        yield failure(unit.unit_id, None, meter.stage, error)
        return
    work = _Work(model, unit, prepared, baseline, planned)
    yield from (event for event in lost if event.curve in unit.wanted)
    yield from work.curves(meter)
    extras = Extras(
        model=model,
        unit=unit,
        prepared=prepared,
        embedded=embedded,
        masks=masks,
        probes=probes,
        runner=work.runner,
        base=work.base,
    )
    yield from extras.run(meter)
    notes = (*media_notes(unit.sample, media), *prepared.notes, *work.answer_notes(model))
    yield replace(work.sample_done(meter, decode_s, extras.knockouts), notes=notes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """What will be run where the baseline is right, and where it is wrong; both follow from the
    plan and the prompt alone, before anything is known of the answer."""

    shapes: Shapes
    if_correct: tuple[list[Curve], tuple[Batch, ...]]
    if_wrong: tuple[list[Curve], tuple[Batch, ...]]

    @property
    def checkpoints(self) -> set[tuple[int, int]]:
        """(layer, start) where the baseline is kept for them."""
        return checkpoints((*self.if_correct[1], *self.if_wrong[1]))


def _plan(
    model: LoadedModel, unit: UnitSpec, prepared: Prepared, embedded: Embedded, curves: list[Curve]
) -> _Planned:
    item_bytes = embedded.inputs_embeds.element_size()
    n_tokens = prepared.layout.n_tokens
    shapes = shapes_of(model.info, model.info.head_size, n_tokens, item_bytes)

    def composed(kept: list[Curve]) -> tuple[list[Curve], tuple[Batch, ...]]:
        knockouts = knockouts_of(kept)
        return kept, compose_batches(prepared.layout, knockouts, shapes, unit.byte_budget)

    return _Planned(
        shapes=shapes,
        if_correct=composed(curves),
        if_wrong=composed([c for c in curves if not c.spec.correct_only]),
    )


class _Work:
    """A unit past its baseline."""

    def __init__(
        self,
        model: LoadedModel,
        unit: UnitSpec,
        prepared: Prepared,
        baseline: Baseline,
        planned: _Planned,
    ) -> None:
        self.unit, self.shapes = unit, planned.shapes
        self.layout = prepared.layout
        self.option_tokens = prepared.option_tokens
        self.answer_token = prepared.option_tokens[prepared.layout.answer]
        self.base_token = int(baseline.probabilities.argmax())
        self.correct = self.base_token == self.answer_token
        self.kept, self.batches = planned.if_correct if self.correct else planned.if_wrong
        reader = Reader(base_token=self.base_token, option_tokens=self.option_tokens)
        self.base = reader.read(baseline.probabilities[None])
        self.runner = BatchRunner(
            decoder=model.decoder,
            baseline=baseline,
            shapes=self.shapes,
            byte_budget=unit.byte_budget,
            reader=reader,
        )

    def curves(self, meter: Meter) -> Iterator[CurveDone | UnitFailure]:
        """Run the batches that hold a wanted curve; yield each wanted one once, done or failed."""
        wanted = {i for i, c in enumerate(self.kept) if c.spec.key in self.unit.wanted}
        for i in sorted(wanted):
            if self.kept[i].knockout.start is None or not self.kept[i].knockout.layer_sets:
                rows = [0] * len(self.kept[i].spec.center_layers)  # no edge to block: the baseline
                yield self._curve_done(self.kept[i], self.base[rows], self.base)
                wanted.discard(i)
        # A group's batches build on each other: all of them are run, or none.
        asked = {batch.group for batch in self.batches if batch.knockouts & wanted}
        controls: dict[int, Outcome] = {}
        found: dict[int, dict[int, Outcome]] = {i: {} for i in wanted}
        for batch in self.batches:
            if batch.group not in asked:
                continue
            try:
                with meter.timed("replay"):
                    outcome = self.runner.run(batch)
            except Exception as error:  # costs this batch's curves; the others go on
                if ruins_worker(error):
                    raise
                of_group = (b.knockouts for b in self.batches if b.group == batch.group)
                lost = sorted(wanted.intersection(frozenset().union(*of_group)))
                yield from (
                    failure(self.unit.unit_id, self.kept[i].spec.key, "replay", error) for i in lost
                )
                wanted.difference_update(lost)
                asked.discard(batch.group)
                continue
            if batch.control:
                controls[batch.group] = outcome[[0]]
            for number, answers in enumerate(batch.wanted_by):
                for i, at in answers:
                    if i in wanted:
                        found[i][at] = outcome[[number + 1]]
            for i in sorted(batch.knockouts & wanted):
                if len(found[i]) == len(self.kept[i].knockout.layer_sets):
                    rows_of = found.pop(i)
                    whole = Outcome.join([rows_of[at] for at in sorted(rows_of)])
                    yield self._curve_done(self.kept[i], whole, controls[batch.group])
                    wanted.discard(i)

    def _curve_done(self, curve: Curve, outcome: Outcome, control: Outcome) -> CurveDone:
        spec = curve.spec
        return CurveDone(
            unit_id=self.unit.unit_id,
            curve=spec.key,
            center_layer=np.array(spec.center_layers, dtype=np.int16),
            p_knockout=outcome.p_base_token,
            p_options=outcome.p_options,
            knockout_token=outcome.token,
            n_blocked_edges=curve.n_blocked_edges,
            p_base=float(control.p_base_token[0]),
            base_token=self.base_token,
            correct_base=self.correct,
            answer_token=self.answer_token,
            n_tokens=self.layout.n_tokens,
        )

    def answer_notes(self, model: LoadedModel) -> Iterator[str]:
        """Whether the model answers with a letter in a form that is not the counted one."""
        text = model.token_text(self.base_token)
        letters = LETTERS[: len(self.option_tokens)]
        letter = other_form(self.base_token, text, self.option_tokens, letters)
        if letter is not None:
            counted = model.token_text(self.option_tokens[letters.index(letter)])
            yield f"answer: the model says {text!r}; what counts is {counted!r}, another token"

    def sample_done(
        self, meter: Meter, decode_s: float, of_masks: Sequence[Knockout]
    ) -> SampleDone:
        letters = dict(zip(self.option_tokens, LETTERS, strict=False))
        wanted = [curve for curve in self.kept if curve.spec.key in self.unit.wanted]
        floor = prefill_floor(self.shapes)
        knockouts = [*knockouts_of(wanted), *of_masks]
        floor += knockout_floor(self.layout, self.shapes, knockouts)
        cost = prefill_floor(self.shapes) + self.runner.cost
        return SampleDone(
            unit_id=self.unit.unit_id,
            answer=LETTERS[self.layout.answer],
            predicted=letters.get(self.base_token),
            base_token=self.base_token,
            p_base=float(self.base.p_base_token[0]),
            p_options=self.base.p_options[0],
            correct=self.correct,
            n_tokens=self.layout.n_tokens,
            group_spans=group_spans(self.layout),
            decode_s=decode_s,
            encode_s=meter.seconds("prepare") + meter.seconds("encode"),
            prefill_s=meter.seconds("prefill"),
            replay_s=meter.seconds("replay"),
            token_layers=cost.token_layers,
            flops=cost.flops,
            flops_lower_bound=floor.flops,
            split_batches=self.runner.split_batches,
            peak_bytes=meter.peak_bytes,
        )


def group_spans(layout: Layout) -> dict[str, list[list[int]]]:
    """Half-open spans of each group that the prompt has, positions next to each other merged."""
    spans = {}
    for name in group_names(layout.kind):
        try:
            held = group_positions(layout, name)
        except LayoutError:  # the group is empty here, or (candidates) not defined for the sample
            continue
        cuts = np.flatnonzero(np.diff(held) > 1) + 1
        spans[name] = [[int(run[0]), int(run[-1]) + 1] for run in np.split(held, cuts)]
    return spans
