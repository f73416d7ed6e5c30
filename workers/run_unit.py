"""One sample's whole work on a loaded model, as a stream of events.

    prepare -> encode -> prefill -> (batch of rows -> CurveDone ...) ... -> SampleDone

A failure is yielded as data (UnitFailure) and the rest goes on; only what ruins the worker itself
(host memory gone, a broken CUDA context) is raised. The same unit gives the same numbers whatever
was wanted of it: batches follow from all of its curves.

Shapes: R rows, C centre layers, O option letters, S segments, N prompt tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from avflow.datasets.media import DecodedMedia
from avflow.datasets.sample import LETTERS
from avflow.pathways.groups import group_names, group_positions
from avflow.pathways.layout import Layout, LayoutError
from avflow.pathways.pathway import (
    blocked_keys,
    blocked_segments,
    first_target,
)
from avflow.pathways.windows import window_layers
from avflow.workers.decode import media_notes
from avflow.workers.engine.baseline import Baseline, run_baseline
from avflow.workers.engine.cost import (
    Cost,
    Shapes,
    plain_cost,
    prefill_floor,
    replay_cost,
    replay_floor,
    shapes_of,
)
from avflow.workers.engine.masks import SuffixMasks, suffix_masks
from avflow.workers.engine.plan import Batch, Knockout, compose_batches, score_bytes
from avflow.workers.engine.replay import Row, replay
from avflow.workers.failing import failure, is_out_of_memory, ruins_worker
from avflow.workers.meter import Meter
from avflow.workers.models.base import LoadedModel, Prepared
from avflow.workers.protocol import (
    CurveDone,
    CurveSpec,
    Event,
    SampleDone,
    UnitFailure,
    UnitSpec,
)


def run_unit(
    model: LoadedModel, unit: UnitSpec, media: Sequence[DecodedMedia], decode_s: float
) -> Iterator[Event]:
    """Yield a CurveDone for each wanted curve as soon as it is complete, then one SampleDone.

    `media` in the order of `unit.sample.media`, decoded in `decode_s` seconds. A curve that fails
    yields a UnitFailure of its own; a sample that fails before its curves yields one with
    `curve` None and ends. A curve with `correct_only` is left out where the baseline is wrong.
    """
    meter = Meter(model.device)
    try:
        _check_wanted(unit)
        with meter.timed("prepare"):
            prepared = model.prepare(unit.sample, media)
            curves, lost = _resolve(unit, prepared.layout, model.info.n_layers)
        with meter.timed("encode"):
            embedded = model.embed(prepared, model.encode(prepared))
        with meter.timed("prefill"):
            starts = [c.knockout.start for c in curves if c.knockout.start is not None]
            first = min(starts, default=prepared.layout.n_tokens)
            baseline = run_baseline(model.decoder, embedded, first)
    except Exception as error:  # a bad sample is data for the coordinator's policy, whatever it is
        if ruins_worker(error):
            raise
        yield failure(unit.unit_id, None, meter.stage, error)
        return
    work = _Work(model, unit, prepared, baseline)
    yield from (event for event in lost if event.curve in unit.wanted)
    kept = [c for c in curves if work.correct or not c.spec.correct_only]
    yield from work.curves(kept, meter)
    notes = media_notes(unit.sample, media)
    yield replace(work.sample_done(kept, meter, decode_s), media_notes=notes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Curve:
    """A curve whose token groups were found. `lost_keys` [N]: how many keys each query loses."""

    spec: CurveSpec
    knockout: Knockout
    lost_keys: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What is read off R rows' probabilities."""

    p_base_token: NDArray[np.float64]  # [R]
    p_options: NDArray[np.float64]  # [R, O]
    token: NDArray[np.int32]  # [R]

    @staticmethod
    def join(parts: "Sequence[_Outcome]") -> "_Outcome":
        return _Outcome(
            p_base_token=np.concatenate([part.p_base_token for part in parts]),
            p_options=np.concatenate([part.p_options for part in parts]),
            token=np.concatenate([part.token for part in parts]),
        )

    def __getitem__(self, rows: list[int]) -> "_Outcome":
        return _Outcome(
            p_base_token=self.p_base_token[rows],
            p_options=self.p_options[rows],
            token=self.token[rows],
        )


class _Work:
    """A unit past its baseline: runs its batches and counts what they cost."""

    def __init__(
        self, model: LoadedModel, unit: UnitSpec, prepared: Prepared, baseline: Baseline
    ) -> None:
        self.model, self.unit, self.baseline = model, unit, baseline
        self.layout = prepared.layout
        self.option_tokens = prepared.option_tokens
        self.answer_token = prepared.option_tokens[prepared.layout.answer]
        self.base_token = int(baseline.probabilities.argmax())
        self.correct = self.base_token == self.answer_token
        self.base = self._read(baseline.probabilities[None])
        residual = baseline.residual[0]
        self.shapes = shapes_of(
            model.info, baseline.keys[0].shape[3], baseline.n_tokens, residual.element_size()
        )
        self.cost = plain_cost(self.shapes)
        self.split_batches = 0

    def curves(self, curves: Sequence[_Curve], meter: Meter) -> Iterator[CurveDone | UnitFailure]:
        """Run the batches that hold a wanted curve; yield each wanted one once, done or failed."""
        wanted = {i for i, c in enumerate(curves) if c.spec.key in self.unit.wanted}
        for i in sorted(wanted):
            centers = curves[i].spec.center_layers
            if curves[i].knockout.start is None or not centers:
                rows = [0] * len(centers)  # no edge to block: the baseline, exactly
                yield self._curve_done(curves[i], self.base[rows])
                wanted.discard(i)
        parts: dict[int, list[_Outcome]] = {i: [] for i in wanted}
        rows_left = {i: len(curves[i].spec.center_layers) for i in wanted}
        knockouts = [curve.knockout for curve in curves]
        for batch in compose_batches(knockouts, self.shapes, self.unit.byte_budget):
            here = [i for i in dict.fromkeys(row.curve for row in batch.rows) if i in wanted]
            if not here:
                continue
            try:
                with meter.timed("replay"):
                    outcome = self._run_batch(batch, knockouts)
            except Exception as error:  # costs this batch's curves; the others go on
                if ruins_worker(error):
                    raise
                yield from (
                    failure(self.unit.unit_id, curves[i].spec.key, "replay", error) for i in here
                )
                wanted.difference_update(here)
                continue
            for i in here:
                own = [n for n, row in enumerate(batch.rows) if row.curve == i]
                parts[i].append(outcome[own])
                rows_left[i] -= len(own)
                if not rows_left[i]:
                    yield self._curve_done(curves[i], _Outcome.join(parts.pop(i)))

    def _run_batch(self, batch: Batch, knockouts: Sequence[Knockout]) -> _Outcome:
        blocked = {i: knockouts[i].blocked for i in {row.curve for row in batch.rows}}
        device = self.baseline.keys[0].device
        masks = suffix_masks(self.layout, batch.start, blocked, device)
        return self._run_rows(batch, batch.rows, masks)

    def _run_rows(self, batch: Batch, rows: Sequence[Row], masks: SuffixMasks) -> _Outcome:
        scores = score_bytes(self.unit.byte_budget)
        try:
            outcome = self._read(replay(self.model.decoder, self.baseline, rows, masks, scores))
            self.cost += replay_cost(self.shapes, batch.start, rows, scores)
            return outcome
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(rows) == 1:
                raise
        # Outside the handler, so that the failed attempt's tensors are free by now.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.split_batches += 1
        half = len(rows) // 2
        return _Outcome.join(
            [self._run_rows(batch, part, masks) for part in (rows[:half], rows[half:])]
        )

    def _read(self, probabilities: Tensor) -> _Outcome:
        options = probabilities[:, list(self.option_tokens)]
        return _Outcome(
            p_base_token=probabilities[:, self.base_token].double().cpu().numpy(),
            p_options=options.double().cpu().numpy(),
            token=probabilities.argmax(dim=1).int().cpu().numpy(),
        )

    def _curve_done(self, curve: _Curve, outcome: _Outcome) -> CurveDone:
        spec = curve.spec
        n_layers = self.shapes.n_layers
        windows = [window_layers(c, spec.window, n_layers) for c in spec.center_layers]
        n_edges = int(curve.lost_keys.sum())
        return CurveDone(
            unit_id=self.unit.unit_id,
            curve=spec.key,
            center_layer=np.array(spec.center_layers, dtype=np.int16),
            p_knockout=outcome.p_base_token,
            p_options=outcome.p_options,
            knockout_token=outcome.token,
            n_blocked_edges=np.array([n_edges * len(w) for w in windows], dtype=np.int64),
            p_base=float(self.base.p_base_token[0]),
            base_token=self.base_token,
            correct_base=self.correct,
            answer_token=self.answer_token,
            n_tokens=self.layout.n_tokens,
        )

    def sample_done(self, curves: Sequence[_Curve], meter: Meter, decode_s: float) -> SampleDone:
        letters = dict(zip(self.option_tokens, LETTERS, strict=False))
        floor = prefill_floor(self.shapes)
        for curve in curves:
            if curve.spec.key in self.unit.wanted:
                floor += _replay_floor(curve, self.shapes)
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
            token_layers=self.cost.token_layers,
            flops=self.cost.flops,
            flops_lower_bound=floor.flops,
            split_batches=self.split_batches,
            peak_bytes=meter.peak_bytes,
        )


def _check_wanted(unit: UnitSpec) -> None:
    keys = [curve.key for curve in unit.curves]
    unknown = unit.wanted.difference(keys)
    if unknown or len(set(keys)) < len(keys):
        raise ValueError(
            f"unit {unit.unit_id}: wanted curves must be among its own, each key once; "
            f"not among them: {sorted(unknown)}; its curves: {keys}"
        )


def _resolve(
    unit: UnitSpec, layout: Layout, n_layers: int
) -> tuple[list[_Curve], list[UnitFailure]]:
    """The unit's curves on this prompt, and the failures of those whose groups it lacks."""
    curves, lost = [], []
    for spec in unit.curves:
        try:
            for center in spec.center_layers:
                window_layers(center, spec.window, n_layers)
            blocked = blocked_segments(layout, spec.pathway, spec.option_span)
        except ValueError as error:  # LayoutError, or a window that does not fit the model
            lost.append(failure(unit.unit_id, spec.key, "prepare", error))
            continue
        knockout = Knockout(
            blocked=blocked,
            start=first_target(layout, blocked),
            window=spec.window,
            center_layers=spec.center_layers,
        )
        curve = _Curve(spec=spec, knockout=knockout, lost_keys=blocked_keys(layout, blocked))
        curves.append(curve)
    return curves, lost


def _replay_floor(curve: _Curve, shapes: Shapes) -> Cost:
    if curve.knockout.start is None:
        return Cost()
    spec = curve.spec
    windows = [window_layers(c, spec.window, shapes.n_layers) for c in spec.center_layers]
    return replay_floor(shapes, curve.lost_keys, windows)


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
