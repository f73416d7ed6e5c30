"""The 37 pathways on prompts small enough to check by eye, and layouts cut at random."""

from dataclasses import replace
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from avflow.pathways import catalogue
from avflow.pathways.groups import group_names, group_positions, members
from avflow.pathways.layout import Layout, LayoutError, LayoutKind, Segment, SegmentKind
from avflow.pathways.pathway import (
    Pathway,
    PathwayError,
    blocked_segments,
    causal_blocked_edges,
    first_target,
    target_positions,
)


def lay(kind: LayoutKind, words: str, answer: int, correct_candidate: int | None = None) -> Layout:
    """A layout from `kind` or `kind:index` words, a token each; `frame:0*2` holds two."""
    segments, at = [], 0
    for word in words.split():
        name, _, count = word.partition("*")
        segment_kind, _, index = name.partition(":")
        length = int(count or 1)
        segments.append(
            Segment(
                kind=cast(SegmentKind, segment_kind),
                start=at,
                stop=at + length,
                index=int(index) if index else None,
            )
        )
        at += length
    return Layout(
        kind=kind,
        n_tokens=at,
        segments=tuple(segments),
        answer=answer,
        correct_candidate=correct_candidate,
    )


#                       0      1       2             3       4             5
VIDEO_PROMPT = lay(
    "single_video",
    "system frame:0 audio_chunk:0 frame:1 audio_chunk:1 template non_option_question "
    #    6 is the question; 7                8             9               10            11
    "option_letter:0 option_text:0 option_letter:1 option_text:1 last",
    answer=1,
)
#                       0      1           2           3        4
ITEMS_PROMPT = lay(
    "interleaved",
    "system candidate:0 candidate:1 template non_option_question reference "
    #    5 is the reference; 6            7             8               9             10       11
    "option_letter:0 option_text:0 option_letter:1 option_text:1 template last",
    answer=1,
    correct_candidate=1,
)

# Blocked edges that causality allows, as `query<keys`.
VIDEO_EDGES = {
    "cross_frame": "3<1",
    "cross_audio": "4<2",
    "audio_video_mutual": "2<1 3<2 4<1,3",
    "video_to_audio": "2<1 4<1,3",
    "audio_to_video": "3<2",
    "video_to_question": "5<1,3 6<1,3 7<1,3 8<1,3 9<1,3 10<1,3",
    "audio_to_question": "5<2,4 6<2,4 7<2,4 8<2,4 9<2,4 10<2,4",
    "question_to_last": "11<5,6,7,8,9,10",
    "video_to_last": "11<1,3",
    "audio_to_last": "11<2,4",
    "video_audio_to_question": "5<1,2,3,4 6<1,2,3,4 7<1,2,3,4 8<1,2,3,4 9<1,2,3,4 10<1,2,3,4",
    "video_audio_to_last": "11<1,2,3,4",
    "video_to_non_option_question": "6<1,3",
    "audio_to_non_option_question": "6<2,4",
    "video_audio_to_non_option_question": "6<1,2,3,4",
    "video_to_true_option": "9<1,3",
    "audio_to_true_option": "9<2,4",
    "non_option_question_to_true_option": "9<6",
    "video_audio_to_true_option": "9<1,2,3,4",
    "true_option_to_last": "11<9",
    "false_options_to_last": "11<7",
    "non_option_question_to_last": "11<6",
}
ITEMS_EDGES = {
    "cross_candidate": "2<1",
    "candidates_to_reference": "5<1,2",
    "question_to_reference": "5<4",
    "candidates_to_question": "4<1,2",
    "reference_to_last": "11<5",
    "candidates_to_last": "11<1,2",
    "question_to_last": "11<4",
    "correct_candidate_to_correct_option": "8<2",
    "incorrect_candidates_to_correct_option": "8<1",
    "reference_to_correct_option": "8<5",
    "question_to_correct_option": "8<4",
    "correct_candidate_to_last": "11<2",
    "incorrect_candidates_to_last": "11<1",
    "correct_option_to_last": "11<8",
    "incorrect_options_to_last": "11<6",
}


def mask_of(layout: Layout, blocked: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """bool [N, N]: the edges that a layer loses, causality and a token's own key respected."""
    segment = layout.segment_of_position
    return np.tril(blocked[np.ix_(segment, segment)], -1)


def edges_of(layout: Layout, blocked: NDArray[np.bool_]) -> str:
    mask = mask_of(layout, blocked)
    rows = [(q, np.flatnonzero(mask[q])) for q in range(layout.n_tokens) if mask[q].any()]
    return " ".join(f"{q}<{','.join(map(str, keys))}" for q, keys in rows)


def picture(layout: Layout, blocked: NDArray[np.bool_]) -> list[str]:
    """A row a query: `.` read, `x` blocked, blank for the future."""
    mask = mask_of(layout, blocked)
    return ["".join("x" if x else "." for x in row[: i + 1]) for i, row in enumerate(mask)]


def named(name: str, layout: LayoutKind) -> Pathway:
    (found,) = (p for p in catalogue.find(name) if p.layout == layout)
    return found


def test_the_papers_37_pathways_are_declared_once_each() -> None:
    assert len(catalogue.SINGLE_VIDEO) == 22
    assert len(catalogue.INTERLEAVED) == 15
    assert {p.name for p in catalogue.SINGLE_VIDEO} == set(VIDEO_EDGES)
    assert {p.name for p in catalogue.INTERLEAVED} == set(ITEMS_EDGES)
    assert all(p.figures for p in catalogue.ALL)


@pytest.mark.parametrize("pathway", catalogue.SINGLE_VIDEO, ids=lambda p: p.name)
def test_edges_of_a_single_video_prompt(pathway: Pathway) -> None:
    blocked = blocked_segments(VIDEO_PROMPT, pathway)
    assert edges_of(VIDEO_PROMPT, blocked) == VIDEO_EDGES[pathway.name]


@pytest.mark.parametrize("pathway", catalogue.INTERLEAVED, ids=lambda p: p.name)
def test_edges_of_an_interleaved_prompt(pathway: Pathway) -> None:
    blocked = blocked_segments(ITEMS_PROMPT, pathway)
    assert edges_of(ITEMS_PROMPT, blocked) == ITEMS_EDGES[pathway.name]


def test_video_to_question_as_a_picture() -> None:
    blocked = blocked_segments(VIDEO_PROMPT, named("video_to_question", "single_video"))
    assert picture(VIDEO_PROMPT, blocked) == [
        ".",  # system
        "..",  # frame 0
        "...",  # its sound
        "....",  # frame 1
        ".....",  # its sound
        ".x.x..",  # what closes the media: part of the question (Eq. 1)
        ".x.x...",
        ".x.x....",  # A
        ".x.x.....",
        ".x.x......",  # B
        ".x.x.......",
        "............",  # last
    ]


def test_frames_of_several_tokens_read_themselves_but_not_each_other() -> None:
    layout = lay("single_video", "system frame:0*2 frame:1*2 non_option_question last", answer=0)
    blocked = blocked_segments(layout, named("cross_frame", "single_video"))
    assert picture(layout, blocked) == [
        ".",
        "..",
        "...",
        ".xx.",
        ".xx..",
        "......",
        ".......",
    ]
    assert causal_blocked_edges(layout, blocked) == 4
    assert first_target(layout, blocked) == 3
    assert target_positions(layout, blocked).tolist() == [3, 4]


def test_the_whole_option_can_be_the_group() -> None:
    pathway = named("true_option_to_last", "single_video")
    assert edges_of(VIDEO_PROMPT, blocked_segments(VIDEO_PROMPT, pathway, "full")) == "11<9,10"
    pathway = named("false_options_to_last", "single_video")
    assert edges_of(VIDEO_PROMPT, blocked_segments(VIDEO_PROMPT, pathway, "full")) == "11<7,8"


def test_overlapping_ends_close_a_segment_but_never_a_token_to_itself() -> None:
    own = Pathway(
        name="inside", layout="single_video", sources=("question",), targets=("question",)
    )
    layout = lay("single_video", "system frame:0 non_option_question*3 last", answer=0)
    blocked = blocked_segments(layout, own)
    assert picture(layout, blocked) == [".", "..", "...", "..x.", "..xx.", "......"]
    assert causal_blocked_edges(layout, blocked) == 3
    assert first_target(layout, blocked) == 3
    assert target_positions(layout, blocked).tolist() == [3, 4]


def test_a_target_before_its_source_loses_nothing() -> None:
    words = "system reference non_option_question candidate:0 candidate:1 template last"
    layout = lay("interleaved", words, answer=0, correct_candidate=0)
    blocked = blocked_segments(layout, named("candidates_to_reference", "interleaved"))
    assert blocked.any()
    assert causal_blocked_edges(layout, blocked) == 0
    assert first_target(layout, blocked) is None


def test_groups_of_a_single_video_prompt() -> None:
    held = {name: group_positions(VIDEO_PROMPT, name).tolist() for name in
            group_names("single_video") if name != "audio_padding"}  # fmt: skip
    assert held == {
        "system": [0],
        "video": [1, 3],
        "audio": [2, 4],
        "question": [5, 6, 7, 8, 9, 10],
        "non_option_question": [6],
        "true_option": [9],
        "false_options": [7],
        "template": [5],
        "last": [11],
    }
    assert members(VIDEO_PROMPT, "video") == ((1,), (3,))


def test_groups_of_an_interleaved_prompt() -> None:
    held = {name: group_positions(ITEMS_PROMPT, name).tolist() for name in
            group_names("interleaved")}  # fmt: skip
    assert held == {
        "system": [0],
        "candidates": [1, 2],
        "correct_candidate": [2],
        "incorrect_candidates": [1],
        "question": [4],
        "reference": [5],
        "correct_option": [8],
        "incorrect_options": [6],
        "template": [3, 10],
        "last": [11],
    }


def test_a_group_that_the_prompt_lacks_is_an_error() -> None:
    silent = lay("single_video", "system frame:0 non_option_question last", answer=0)
    with pytest.raises(LayoutError, match="group 'audio'"):
        blocked_segments(silent, named("audio_to_last", "single_video"))
    with pytest.raises(LayoutError, match="no group 'reference'; it has system, video"):
        members(silent, "reference")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("system frame:0 last*2", "exactly the final position"),
        ("system last frame:0", "exactly the final position"),
        ("system frame:0 template", "exactly the final position"),
        ("system frame last", "has no index"),
        ("option_letter:0 option_text:1 last", "not by its own option's text"),
        ("option_letter:0 template last", "not by its own option's text"),
        ("option_letter:1 option_text:1 option_letter:0 option_text:0 last", "numbered"),
        ("option_letter:0 option_text:0 option_letter:0 option_text:0 last", "numbered"),
    ],
)
def test_a_layout_that_contradicts_itself(words: str, complaint: str) -> None:
    with pytest.raises(LayoutError, match=complaint):
        lay("single_video", words, answer=0)


def test_a_layout_must_cover_the_prompt_and_know_its_answer() -> None:
    with pytest.raises(LayoutError, match="the prompt has 13 tokens"):
        replace(VIDEO_PROMPT, n_tokens=13)
    with pytest.raises(LayoutError, match="expected to start at 1"):
        replace(VIDEO_PROMPT, segments=VIDEO_PROMPT.segments[:1] + VIDEO_PROMPT.segments[2:])
    with pytest.raises(LayoutError, match="answer 2 is not one of 2 options"):
        replace(VIDEO_PROMPT, answer=2)
    with pytest.raises(LayoutError, match="correct candidate 5"):
        replace(ITEMS_PROMPT, correct_candidate=5)


def test_a_wrong_pathway_names_what_is_known() -> None:
    with pytest.raises(PathwayError, match="no group 'vidoe'; known: system, video"):
        Pathway(name="own", layout="single_video", sources=("vidoe",), targets=("last",))
    with pytest.raises(PathwayError, match="plain identifier"):
        Pathway(name="A->B", layout="single_video", sources=("video",), targets=("last",))
    with pytest.raises(PathwayError, match="'across' needs the same"):
        Pathway(
            name="own",
            layout="single_video",
            sources=("video",),
            targets=("audio",),
            direction="across",
        )
    with pytest.raises(PathwayError, match=r"unknown pathway 'video_to_lost'.*video_to_last"):
        catalogue.find("video_to_lost")


def test_a_name_of_both_kinds_and_an_own_definition() -> None:
    both = catalogue.find("question_to_last")
    assert [p.layout for p in both] == ["single_video", "interleaved"]
    own = Pathway(
        name="question_to_last", layout="interleaved", sources=("template",), targets=("last",)
    )
    assert catalogue.find("question_to_last", (own,)) == (both[0], own)


def test_labels_print_the_papers_arrows() -> None:
    labels = {p.name: p.label for p in catalogue.SINGLE_VIDEO}
    assert labels["video_to_question"] == "video -/-> question"
    assert labels["audio_video_mutual"] == "audio <-/-> video"
    assert labels["video_audio_to_last"] == "video+audio -/-> last"
    assert labels["cross_frame"] == "cross-frame"


@st.composite
def segmentations(draw: st.DrawFn) -> Layout:
    """Any order of media, text and options between `system` and `last`."""
    pool: list[tuple[SegmentKind, int | None]] = [("non_option_question", None), ("template", None)]
    pool += [("frame", i) for i in range(draw(st.integers(1, 4)))]
    pool += [("audio_chunk", i) for i in range(draw(st.integers(1, 4)))]
    middle = draw(st.permutations(pool))
    options: list[tuple[SegmentKind, int | None]] = []
    n_options = draw(st.integers(2, 4))
    for i in range(n_options):
        options += [("option_letter", i), ("option_text", i)]
    words = [("system", None), *middle, *options]
    lengths = draw(st.lists(st.integers(1, 4), min_size=len(words), max_size=len(words)))
    parts = [
        f"{kind}{'' if index is None else f':{index}'}*{length}"
        for (kind, index), length in zip(words, lengths, strict=True)
    ]
    return lay("single_video", " ".join([*parts, "last"]), draw(st.integers(0, n_options - 1)))


@given(layout=segmentations(), pathway=st.sampled_from(catalogue.SINGLE_VIDEO))
def test_segments_say_the_same_as_positions(layout: Layout, pathway: Pathway) -> None:
    """Eq. 2 over positions, written out edge by edge."""
    try:
        blocked = blocked_segments(layout, pathway)
    except LayoutError:  # e.g. no position after the media but `last`
        assert not all(_found(layout, name) for name in pathway.sources + pathway.targets)
        return
    expected = np.zeros((layout.n_tokens, layout.n_tokens), dtype=np.bool_)
    frame_of = {}
    for segment in layout.segments:
        for position in range(segment.start, segment.stop):
            frame_of[position] = (segment.kind, segment.index)
    sources = [p for name in pathway.sources for p in group_positions(layout, name).tolist()]
    targets = [p for name in pathway.targets for p in group_positions(layout, name).tolist()]
    for query in range(layout.n_tokens):
        for key in range(query):
            forth = query in targets and key in sources
            back = query in sources and key in targets
            match pathway.direction:
                case "one_way":
                    expected[query, key] = forth
                case "both_ways":
                    expected[query, key] = forth or back
                case "across":
                    expected[query, key] = forth and frame_of[query] != frame_of[key]
    np.testing.assert_array_equal(mask_of(layout, blocked), expected)
    assert causal_blocked_edges(layout, blocked) == expected.sum()
    rows = np.flatnonzero(expected.any(axis=1))
    np.testing.assert_array_equal(target_positions(layout, blocked), rows)
    assert first_target(layout, blocked) == (rows[0] if rows.size else None)


def _found(layout: Layout, name: str) -> bool:
    try:
        return bool(members(layout, name))
    except LayoutError:
        return False


@given(layout=segmentations())
def test_groups_of_a_prompt_are_disjoint_where_they_are_meant_to_be(layout: Layout) -> None:
    apart = ("system", "video", "audio", "non_option_question", "true_option", "false_options",
             "template", "last")  # fmt: skip
    held = [p for name in apart if _found(layout, name) for p in group_positions(layout, name)]
    assert len(held) == len(set(held))
    texts = {p for s in layout.of("option_text") for p in range(s.start, s.stop)}
    assert set(held) | texts == set(range(layout.n_tokens))
