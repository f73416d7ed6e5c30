"""Token groups by name: which segments of a layout belong to each.

A group is a list of *members* (lists of segment numbers): `video` has one member a frame, `audio`
one a chunk, `candidates` one a candidate; every other group has a single member. A pathway across
a group (cross-frame) blocks edges between different members. Silence that pads a clip's sound is
`audio_padding`, and one more member of `audio` unless its layout says otherwise.

The groups of a single video and of interleaved inputs differ where the paper's do: `question` of
a single video is every position after the media up to `last`, closing template tokens included
(Eq. 1), of interleaved inputs the question's own text (D.3.1).
"""

from collections.abc import Callable, Iterable
from typing import cast

import numpy as np

from avflow.pathways.layout import Layout, LayoutError, LayoutKind, OptionSpan, Positions, Segment

_OF_A_CLIP = ("frame", "audio_chunk", "audio_padding")
Member = tuple[int, ...]  # numbers of segments
Members = tuple[Member, ...]
_Rule = Callable[[Layout, OptionSpan], Members]
_Numbered = Iterable[tuple[int, Segment]]


def _numbered(layout: Layout) -> _Numbered:
    return enumerate(layout.segments)


def _one(numbers: Iterable[int]) -> Members:
    member = tuple(numbers)
    return (member,) if member else ()


def _kind(kind: str) -> _Rule:
    return lambda layout, _span: _one(i for i, s in _numbered(layout) if s.kind == kind)


def _each(kind: str) -> _Rule:
    def rule(layout: Layout, _span: OptionSpan) -> Members:
        indices = sorted({cast(int, s.index) for s in layout.segments if s.kind == kind})
        return tuple(
            tuple(i for i, s in _numbered(layout) if s.kind == kind and s.index == index)
            for index in indices
        )

    return rule


def _audio(layout: Layout, span: OptionSpan) -> Members:
    padding = _kind("audio_padding")(layout, span) if layout.audio_with_padding else ()
    return _each("audio_chunk")(layout, span) + padding


def _question_of_single_video(layout: Layout, _span: OptionSpan) -> Members:
    media = [i for i, s in _numbered(layout) if s.kind in _OF_A_CLIP]
    if not media:
        return ()
    return _one(i for i, s in _numbered(layout) if i > media[-1] and s.kind != "last")


def _options(correct: bool) -> _Rule:
    def rule(layout: Layout, span: OptionSpan) -> Members:
        kinds = ("option_letter",) if span == "letter" else ("option_letter", "option_text")
        return _one(
            i
            for i, s in _numbered(layout)
            if s.kind in kinds and (s.index == layout.answer) is correct
        )

    return rule


def _candidates(correct: bool) -> _Rule:
    def rule(layout: Layout, _span: OptionSpan) -> Members:
        if layout.correct_candidate is None:
            raise LayoutError("this sample does not say which candidate is the correct one")
        return _one(
            i
            for i, s in _numbered(layout)
            if s.kind == "candidate" and (s.index == layout.correct_candidate) is correct
        )

    return rule


_SINGLE_VIDEO: dict[str, _Rule] = {
    "system": _kind("system"),
    "video": _each("frame"),
    "audio": _audio,
    "audio_padding": _kind("audio_padding"),
    "question": _question_of_single_video,
    "non_option_question": _kind("non_option_question"),
    "true_option": _options(correct=True),
    "false_options": _options(correct=False),
    "template": _kind("template"),
    "last": _kind("last"),
}
_INTERLEAVED: dict[str, _Rule] = {
    "system": _kind("system"),
    "candidates": _each("candidate"),
    "correct_candidate": _candidates(correct=True),
    "incorrect_candidates": _candidates(correct=False),
    "question": _kind("non_option_question"),
    "reference": _kind("reference"),
    "correct_option": _options(correct=True),
    "incorrect_options": _options(correct=False),
    "template": _kind("template"),
    "last": _kind("last"),
}
_RULES: dict[LayoutKind, dict[str, _Rule]] = {
    "single_video": _SINGLE_VIDEO,
    "interleaved": _INTERLEAVED,
}


def group_names(kind: LayoutKind) -> tuple[str, ...]:
    """The groups that prompts of this kind have."""
    return tuple(_RULES[kind])


def members(layout: Layout, group: str, option_span: OptionSpan = "letter") -> Members:
    """The group's members as numbers of segments. Raises LayoutError if unknown or empty."""
    rules = _RULES[layout.kind]
    if group not in rules:
        raise LayoutError(
            f"a {layout.kind} prompt has no group {group!r}; it has {', '.join(rules)}"
        )
    found = rules[group](layout, option_span)
    if not found:
        raise LayoutError(f"no token of group {group!r} was found in the prompt")
    return found


def positions(layout: Layout, member: Member) -> Positions:
    """int64, ascending: the positions that a member's segments hold."""
    spans = [np.arange(layout.segments[i].start, layout.segments[i].stop) for i in member]
    return np.concatenate(spans) if spans else np.empty(0, dtype=np.int64)


def group_positions(layout: Layout, group: str, option_span: OptionSpan = "letter") -> Positions:
    """int64, ascending: all positions of a group. Raises LayoutError if unknown or empty."""
    found = members(layout, group, option_span)
    return np.sort(np.concatenate([positions(layout, member) for member in found]))
