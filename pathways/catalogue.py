"""The paper's 37 pathways: 22 for a single video, 15 for interleaved inputs. One line each.

Names are unique among the pathways of one kind of prompt; `question_to_last` exists for both.
"""

from avflow.pathways.layout import LayoutKind
from avflow.pathways.pathway import Direction, Pathway, PathwayError


def _video(
    name: str, sources: str, targets: str, figure: str, direction: Direction = "one_way"
) -> Pathway:
    return _pathway("single_video", name, (sources, targets), figure, direction)


def _items(
    name: str, sources: str, targets: str, figure: str, direction: Direction = "one_way"
) -> Pathway:
    return _pathway("interleaved", name, (sources, targets), figure, direction)


def _pathway(
    layout: LayoutKind, name: str, ends: tuple[str, str], figure: str, direction: Direction
) -> Pathway:
    sources, targets = ends
    return Pathway(
        name=name,
        layout=layout,
        sources=tuple(sources.split("+")),
        targets=tuple(targets.split("+")),
        direction=direction,
        figures=(figure,),
    )


SINGLE_VIDEO: tuple[Pathway, ...] = (
    _video("cross_frame", "video", "video", "fig3", "across"),
    _video("cross_audio", "audio", "audio", "fig3", "across"),
    _video("audio_video_mutual", "audio", "video", "fig3", "both_ways"),
    _video("video_to_audio", "video", "audio", "fig9"),
    _video("audio_to_video", "audio", "video", "fig9"),
    _video("video_to_question", "video", "question", "fig4"),
    _video("audio_to_question", "audio", "question", "fig4"),
    _video("question_to_last", "question", "last", "fig4"),
    _video("video_to_last", "video", "last", "fig4"),
    _video("audio_to_last", "audio", "last", "fig4"),
    _video("video_audio_to_question", "video+audio", "question", "fig9"),
    _video("video_audio_to_last", "video+audio", "last", "fig9"),
    _video("video_to_non_option_question", "video", "non_option_question", "fig10"),
    _video("audio_to_non_option_question", "audio", "non_option_question", "fig10"),
    _video("video_audio_to_non_option_question", "video+audio", "non_option_question", "fig10"),
    _video("video_to_true_option", "video", "true_option", "fig10"),
    _video("audio_to_true_option", "audio", "true_option", "fig10"),
    _video("non_option_question_to_true_option", "non_option_question", "true_option", "fig10"),
    _video("video_audio_to_true_option", "video+audio", "true_option", "fig10"),
    _video("true_option_to_last", "true_option", "last", "fig10"),
    _video("false_options_to_last", "false_options", "last", "fig10"),
    _video("non_option_question_to_last", "non_option_question", "last", "fig10"),
)

INTERLEAVED: tuple[Pathway, ...] = (
    _items("cross_candidate", "candidates", "candidates", "fig5", "across"),
    _items("candidates_to_reference", "candidates", "reference", "fig5"),
    _items("question_to_reference", "question", "reference", "fig5"),
    _items("candidates_to_question", "candidates", "question", "fig5"),
    _items("reference_to_last", "reference", "last", "fig5"),
    _items("candidates_to_last", "candidates", "last", "fig5"),
    _items("question_to_last", "question", "last", "fig5"),
    _items("correct_candidate_to_correct_option", "correct_candidate", "correct_option", "fig6"),
    _items(
        "incorrect_candidates_to_correct_option", "incorrect_candidates", "correct_option", "fig6"
    ),
    _items("reference_to_correct_option", "reference", "correct_option", "fig6"),
    _items("question_to_correct_option", "question", "correct_option", "fig6"),
    _items("correct_candidate_to_last", "correct_candidate", "last", "fig6"),
    _items("incorrect_candidates_to_last", "incorrect_candidates", "last", "fig6"),
    _items("correct_option_to_last", "correct_option", "last", "fig6"),
    _items("incorrect_options_to_last", "incorrect_options", "last", "fig6"),
)

ALL: tuple[Pathway, ...] = SINGLE_VIDEO + INTERLEAVED


def find(name: str, own: tuple[Pathway, ...] = ()) -> tuple[Pathway, ...]:
    """The pathways of this name, one a kind of prompt (`question_to_last` exists for both).

    A person's own definition takes the place of the paper's for its kind of prompt. Raises
    PathwayError for an unknown name, listing the known ones.
    """
    by_layout: dict[LayoutKind, Pathway] = {}
    for pathway in (*ALL, *own):
        if pathway.name == name:
            by_layout[pathway.layout] = pathway
    if not by_layout:
        known = ", ".join(dict.fromkeys(p.name for p in (*own, *ALL)))
        raise PathwayError(f"unknown pathway {name!r}; known: {known}")
    return tuple(by_layout.values())
