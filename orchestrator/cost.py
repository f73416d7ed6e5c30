"""What a sweep will take, from nominal token counts: for ordering units and for `avflow plan`.

A prompt's true length is known only once its media are decoded; here a clip is `CLIP_S` seconds
long, a picture of the size `PICTURE` if the model's budget allows it, and a token of text
`CHARS_PER_TOKEN` characters. What was really executed is counted by the engine, in the samples
table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from avflow.datasets.sample import MediaPart, Sample, TextPart
from avflow.orchestrator.config import ModelConfig
from avflow.pathways.layout import Layout, LayoutError, OptionSpan, Segment, SegmentKind
from avflow.pathways.pathway import Pathway, blocked_segments, first_target
from avflow.pathways.windows import window_layers
from avflow.workers.protocol import CurveSpec, DiscardSpec, ExtraSpec, MaskSpec, ProbeSpec

if TYPE_CHECKING:
    from avflow.workers.models.base import ModelInfo

CLIP_S = 20
CHARS_PER_TOKEN = 4
AUDIO_TOKENS_PER_S = 25
PICTURE = (1280, 720)  # pixels of a frame or an image, where a model's budget is larger
PICTURE_TOKENS = round(PICTURE[0] / 28) * round(PICTURE[1] / 28)
SYSTEM_TOKENS = 40
_Pieces = tuple[tuple[SegmentKind, int, int | None], ...]  # kind, tokens, index
TEXT_STEP = 16  # texts are rounded up to this many tokens, so that few prompts differ


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Token-layers (one position through one decoder layer). Costs add.

    `plain`: one full forward a cell, and one a baseline; `token_layers`: the same cells with the
    prefix and the layers below the window shared. For the order of units and progress; FLOPs and
    hours are `estimate`'s.
    """

    plain: float = 0.0
    token_layers: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            plain=self.plain + other.plain,
            token_layers=self.token_layers + other.token_layers,
        )


class NominalCost:
    """The cost of a sample with these curves; one computation a shape of prompt."""

    def __init__(self, curves: Sequence[CurveSpec], model: ModelConfig, info: ModelInfo) -> None:
        self._curves = curves
        self._model = model
        self._n_layers = info.n_layers
        self._layers = [_layers_from_window_up(curve, info.n_layers) for curve in curves]
        self._known: dict[tuple[_Pieces, tuple[ExtraSpec, ...]], Cost] = {}

    def __call__(self, sample: Sample, extras: Sequence[ExtraSpec] = ()) -> Cost:
        """As if the sample's baseline were right."""
        pieces = tuple(_pieces(sample, self._model))
        key = (pieces, tuple(extras))
        if key not in self._known:
            layout = _layout(sample, pieces)
            self._known[key] = self._cost(layout) + self._cost_of_extras(layout, extras)
        return self._known[key]

    def _cost_of_extras(self, layout: Layout | None, extras: Sequence[ExtraSpec]) -> Cost:
        if layout is None:
            return Cost()
        prefill = float(layout.n_tokens * self._n_layers)
        cost = Cost()
        for spec in extras:
            match spec:
                case MaskSpec():
                    replayed = max(_replayed(layout, p, spec.option_span) for p in spec.pathways)
                    done = float(replayed * (self._n_layers - spec.layers[0]))
                case DiscardSpec():
                    done = 2 * prefill  # it runs twice; what it saves is small
                case ProbeSpec():  # watches the baseline
                    continue
            cost += Cost(plain=prefill, token_layers=done)
        return cost

    def _cost(self, layout: Layout | None) -> Cost:
        n = layout.n_tokens if layout is not None else 1
        prefill = float(n * self._n_layers)
        cost = Cost(plain=prefill, token_layers=prefill)
        for curve, layers in zip(self._curves, self._layers, strict=True):
            plain = prefill * len(curve.center_layers)
            replayed = 0.0
            if layout is not None:
                replayed = float(_replayed(layout, curve.pathway, curve.option_span) * layers)
            cost += Cost(plain=plain, token_layers=replayed)
        return cost


def nominal_layout(sample: Sample, model: ModelConfig) -> Layout | None:
    """The prompt that the sample will roughly have; None where it makes no sense."""
    return _layout(sample, _pieces(sample, model))


def _layers_from_window_up(curve: CurveSpec, n_layers: int) -> int:
    """Summed over the curve's centre layers."""
    return sum(
        n_layers - window_layers(center, curve.window, n_layers).start
        for center in curve.center_layers
    )


@lru_cache(maxsize=100_000)  # a sweep's samples share few shapes of prompt
def _replayed(layout: Layout, pathway: Pathway, span: OptionSpan) -> int:
    """Positions that a knockout changes."""
    try:
        start = first_target(layout, blocked_segments(layout, pathway, span))
    except LayoutError:
        return 0  # the worker will say so, for this sample
    return 0 if start is None else layout.n_tokens - start


def _pieces(sample: Sample, model: ModelConfig) -> list[tuple[SegmentKind, int, int | None]]:
    """(kind, tokens, index) of each segment that the prompt will roughly have."""
    pieces: list[tuple[SegmentKind, int, int | None]] = [("system", SYSTEM_TOKENS, None)]
    for part in sample.parts:
        pieces += _text(part) if isinstance(part, TextPart) else _media(part, model)
    return [*pieces, ("template", 4, None), ("last", 1, None)]


def _text(part: TextPart) -> list[tuple[SegmentKind, int, int | None]]:
    tokens = -(-len(part.text) // (CHARS_PER_TOKEN * TEXT_STEP)) * TEXT_STEP
    match part.role:
        case "question":
            return [("non_option_question", tokens, None)]
        case "option_letter":
            return [("option_letter", 1, part.index)]
        case "option_text":
            return [("option_text", tokens, part.index)]
        case "other":
            return [("template", tokens, None)]


def _media(part: MediaPart, model: ModelConfig) -> list[tuple[SegmentKind, int, int | None]]:
    if part.kind == "image":
        one = [min(model.image_tokens or PICTURE_TOKENS, PICTURE_TOKENS)]
    elif part.kind == "audio":
        one = [CLIP_S * AUDIO_TOKENS_PER_S]
    else:
        frames = max(2, min(model.max_frames, round(CLIP_S * model.fps)))
        one = [min(_frame_tokens(model, frames), PICTURE_TOKENS)] * (frames // 2)
    if part.role != "clip":
        kind: SegmentKind = "candidate" if part.role == "candidate" else "reference"
        return [(kind, sum(one), part.index)]
    numbers = count()
    pieces: list[tuple[SegmentKind, int, int | None]] = []
    for number, tokens in enumerate(one):
        if part.kind == "audio":
            pieces.append(("audio_chunk", tokens, next(numbers)))
            continue
        pieces.append(("frame", tokens, number))
        if part.with_audio:
            pieces.append(("audio_chunk", CLIP_S * AUDIO_TOKENS_PER_S // len(one), next(numbers)))
    return pieces


def _frame_tokens(model: ModelConfig, frames: int) -> int:
    """Of a frame pair at most, in a video of so many frames."""
    if model.frame_tokens is not None:
        return model.frame_tokens
    from avflow.workers.models import frame_tokens_of  # late: torch takes seconds to import

    return frame_tokens_of(model.spec(), frames)


def _layout(sample: Sample, pieces: Sequence[tuple[SegmentKind, int, int | None]]) -> Layout | None:
    """None where the prompt makes no sense: the worker will say why, for this sample."""
    ends = np.cumsum([max(1, tokens) for _, tokens, _ in pieces]).tolist()
    segments = tuple(
        Segment(kind=kind, start=start, stop=stop, index=index)
        for (kind, _, index), start, stop in zip(pieces, [0, *ends], ends, strict=False)
    )
    try:
        return Layout(
            kind=sample.layout,
            n_tokens=ends[-1],
            segments=segments,
            answer=sample.answer,
            correct_candidate=sample.correct_candidate,
        )
    except LayoutError:
        return None
