"""Silence that pads a clip's sound: a group of its own, and part of `audio` or not."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avflow.pathways import catalogue
from avflow.pathways.groups import group_names, group_positions, members
from avflow.pathways.layout import Layout, LayoutError, Segment, SegmentKind
from avflow.pathways.pathway import Pathway, blocked_segments, target_positions

MEDIA: tuple[SegmentKind, ...] = ("frame", "audio_chunk", "audio_padding")
TAIL: tuple[tuple[SegmentKind, int | None], ...] = (
    ("template", None),
    ("non_option_question", None),
    ("option_letter", 0),
    ("option_text", 0),
    ("option_letter", 1),
    ("option_text", 1),
    ("last", None),
)


def lay(pieces: list[tuple[SegmentKind, int]], *, audio_with_padding: bool = True) -> Layout:
    """`system`, these kinds of media with their lengths, then a question of two options."""
    numbers = dict.fromkeys(MEDIA, 0)
    parts: list[tuple[SegmentKind, int, int | None]] = [("system", 2, None)]
    for kind, length in pieces:
        index = None if kind == "audio_padding" else numbers[kind]
        numbers[kind] += 1
        parts.append((kind, length, index))
    parts += [(kind, 1, index) for kind, index in TAIL]
    segments, at = [], 0
    for kind, length, index in parts:
        segments.append(Segment(kind=kind, start=at, stop=at + length, index=index))
        at += length
    return Layout(
        kind="single_video",
        n_tokens=at,
        segments=tuple(segments),
        answer=1,
        audio_with_padding=audio_with_padding,
    )


pieces = st.lists(st.tuples(st.sampled_from(MEDIA), st.integers(1, 3)), max_size=8).map(
    lambda some: [("frame", 1), ("audio_chunk", 2), *some]
)


def of_kind(layout: Layout, *kinds: SegmentKind) -> list[int]:
    return [n for s in layout.of(*kinds) for n in range(s.start, s.stop)]


def test_padding_by_eye() -> None:
    clip: list[tuple[SegmentKind, int]] = [("frame", 1), ("audio_chunk", 1), ("frame", 1),
                                           ("audio_chunk", 1), ("audio_padding", 3)]  # fmt: skip
    held = lay(clip)  # system 0-1, then 2 3 4 5 and the padding 6-8; template 9
    assert group_positions(held, "audio").tolist() == [3, 5, 6, 7, 8]
    assert group_positions(held, "audio_padding").tolist() == [6, 7, 8]
    assert group_positions(held, "question").tolist() == list(range(9, 15))
    assert members(held, "audio") == ((2,), (4,), (5,))
    apart = lay(clip, audio_with_padding=False)
    assert group_positions(apart, "audio").tolist() == [3, 5]
    assert group_positions(apart, "audio_padding").tolist() == [6, 7, 8]
    assert group_positions(apart, "question").tolist() == list(range(9, 15))


@given(pieces)
def test_audio_is_the_clips_sound_with_or_without_its_padding(
    some: list[tuple[SegmentKind, int]],
) -> None:
    held, apart = lay(some), lay(some, audio_with_padding=False)
    padding = of_kind(held, "audio_padding")
    assert group_positions(held, "audio").tolist() == of_kind(held, "audio_chunk", "audio_padding")
    assert group_positions(apart, "audio").tolist() == of_kind(held, "audio_chunk")
    if padding:
        assert group_positions(apart, "audio_padding").tolist() == padding
    else:
        assert members(held, "audio") == members(apart, "audio")
        with pytest.raises(LayoutError, match="no token of group 'audio_padding'"):
            members(held, "audio_padding")


@given(pieces)
def test_padding_changes_no_group_but_audio(some: list[tuple[SegmentKind, int]]) -> None:
    held, apart = lay(some), lay(some, audio_with_padding=False)
    for name in group_names("single_video"):
        if name not in ("audio", "audio_padding"):
            assert members(held, name) == members(apart, name)
    assert not set(group_positions(held, "question")) & set(of_kind(held, *MEDIA))


@given(pieces)
def test_real_sound_does_not_read_its_padding_across(some: list[tuple[SegmentKind, int]]) -> None:
    (across,) = catalogue.find("cross_audio")
    own = Pathway(
        name="padding_to_question",
        layout="single_video",
        sources=("audio_padding",),
        targets=("question",),
    )
    layout = lay([*some, ("audio_padding", 2)])
    blocked = blocked_segments(layout, across)
    chunks = [i for i, s in enumerate(layout.segments) if s.kind == "audio_chunk"]
    silent = [i for i, s in enumerate(layout.segments) if s.kind == "audio_padding"]
    for chunk in chunks:
        assert blocked[chunk, silent].all()
        assert blocked[silent, chunk].all()
    assert not blocked_segments(replace(layout, audio_with_padding=False), across)[silent].any()
    question = group_positions(layout, "question").tolist()
    assert target_positions(layout, blocked_segments(layout, own)).tolist() == question
