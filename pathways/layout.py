"""Where each token group lies in one prompt: a partition of the sequence into labelled segments.

Paper ("From Senses to Decisions"), section 3 and Eq. 1: system, media, question; F.1.2 and D.3.1
for the finer groups. Positions count from 0; spans are half-open.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

LayoutKind = Literal["single_video", "interleaved"]
SegmentKind = Literal[
    "system",  # before the media
    "frame",  # one temporal patch of the clip's video
    "audio_chunk",  # one chunk of the clip's sound between two frames
    "audio_padding",  # silence that fills the clip's sound up to the encoder's length
    "candidate",
    "reference",
    "non_option_question",
    "option_letter",
    "option_text",
    "template",  # anything that is in no other group
    "last",  # the last prompt position
]
OptionSpan = Literal["letter", "full"]
NUMBERED: tuple[SegmentKind, ...] = (
    "frame",
    "audio_chunk",
    "candidate",
    "option_letter",
    "option_text",
)
Positions = NDArray[np.int64]


class LayoutError(ValueError):
    """A token group could not be located or a layout contradicts itself. The sample fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Positions [start, stop) of one kind; `index` numbers members of a kind from 0."""

    kind: SegmentKind
    start: int
    stop: int
    index: int | None = None

    @property
    def name(self) -> str:
        """`frame:3`, `option_letter:B`, `last`."""
        if self.index is None:
            return self.kind
        if self.kind in ("option_letter", "option_text"):
            return f"{self.kind}:{'ABCDEFGHIJ'[self.index]}"
        return f"{self.kind}:{self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A prompt of `n_tokens` positions, cut into contiguous segments that cover it exactly.

    `answer` and `correct_candidate` are indices from 0. `audio_with_padding`: the group `audio`
    holds the `audio_padding` too, where there is any. Raises LayoutError when the segments do
    not partition [0, n_tokens), when `last` is not the single final position, when a frame, chunk,
    candidate or option has no number, when the options are not numbered 0..n-1 with one letter
    each, or when a letter is not followed by the text of its own option.
    """

    kind: LayoutKind
    n_tokens: int
    segments: tuple[Segment, ...]
    answer: int
    correct_candidate: int | None = None
    audio_with_padding: bool = True

    def __post_init__(self) -> None:
        _check_partition(self)
        _check_options(self)
        if self.kind == "interleaved" and self.correct_candidate is not None:
            known = sorted({str(s.index) for s in self.segments if s.kind == "candidate"})
            if str(self.correct_candidate) not in known:
                raise LayoutError(
                    f"correct candidate {self.correct_candidate} is not among {', '.join(known)}"
                )

    def of(self, *kinds: SegmentKind) -> Iterator[Segment]:
        """Segments of these kinds, in order."""
        return (s for s in self.segments if s.kind in kinds)

    @property
    def segment_of_position(self) -> NDArray[np.int64]:
        """int64 [n_tokens]: the segment that holds each position."""
        lengths = [s.stop - s.start for s in self.segments]
        return np.repeat(np.arange(len(self.segments)), lengths)


def _check_partition(layout: Layout) -> None:
    at = 0
    for segment in layout.segments:
        if segment.start != at or segment.stop <= segment.start:
            raise LayoutError(
                f"segment {segment.name} covers [{segment.start}, {segment.stop}), expected to "
                f"start at {at} and hold a token: segments must partition the prompt"
            )
        at = segment.stop
    if at != layout.n_tokens:
        raise LayoutError(f"segments end at {at}, the prompt has {layout.n_tokens} tokens")
    final = layout.segments[-1]
    lasts = [s for s in layout.segments if s.kind == "last"]
    if lasts != [final] or final.stop - final.start != 1:
        raise LayoutError("`last` must be exactly the final position of the prompt")


def _check_options(layout: Layout) -> None:
    for segment in layout.of(*NUMBERED):
        if segment.index is None:
            raise LayoutError(
                f"the {segment.kind} at [{segment.start}, {segment.stop}) has no index"
            )
    letters = list(layout.of("option_letter"))
    indices = [s.index for s in letters]
    if indices != list(range(len(letters))):
        raise LayoutError(f"option letters are numbered {indices}, expected 0..{len(letters) - 1}")
    if not 0 <= layout.answer < max(len(letters), 1):
        raise LayoutError(f"answer {layout.answer} is not one of {len(letters)} options")
    for segment, following in zip(layout.segments, layout.segments[1:], strict=False):
        if segment.kind == "option_letter" and (
            following.kind != "option_text" or following.index != segment.index
        ):
            raise LayoutError(
                f"{segment.name} is followed by {following.name}, not by its own option's text"
            )
