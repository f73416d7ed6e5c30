"""Prompts as the benchmarks' pipelines write them, and one's own."""

from dataclasses import asdict
from typing import Any

import pytest

from avflow.datasets.prompts import (
    TEMPLATES,
    PromptTemplate,
    interleaved,
    multiple_choice,
    option_lines,
    single_video,
)
from avflow.datasets.sample import MediaPart, Part, TextPart
from avflow.orchestrator.dataset_config import PromptConfig, prompt_template, spelled_out
from avflow.orchestrator.identity import identity_fields

CLIP = MediaPart(kind="video", path="a.mp4", with_audio=True)
OPTIONS = ("red", "a {question}", "{letter}", "blue")


def written(parts: tuple[Part, ...]) -> str:
    return "".join(part.text if isinstance(part, TextPart) else "<media>" for part in parts)


def of_role(parts: tuple[Part, ...], role: str) -> list[str]:
    return [part.text for part in parts if isinstance(part, TextPart) and part.role == role]


def test_av_speakerbench_as_its_pipeline_writes_it() -> None:
    parts = single_video(TEMPLATES["av_speakerbench"], CLIP, "Who speaks?", OPTIONS)
    assert written(parts) == (
        "<media>Select the best answer to the following multiple-choice question based on the "
        "video. Respond with only the letter (A, B, C, or D) of the correct option.\n"
        "Who speaks?\nA. red\nB. a {question}\nC. {letter}\nD. blue\nThe best answer is:"
    )
    assert of_role(parts, "question") == ["Who speaks?"]
    assert of_role(parts, "option_letter") == ["A", "B", "C", "D"]


def test_worldsense_puts_text_before_the_video_and_the_sound_once() -> None:
    parts = single_video(TEMPLATES["worldsense"], CLIP, "Why?", ("x", "y", "z"))
    assert written(parts) == (
        "Carefully watch this video and pay attention to every detail. Based on your "
        "observations, select the best option that accurately addresses the question.<media>\n"
        "These are the frames of a video and the corresponding audio. Select the best answer to "
        "the following multiple-choice question based on the video. Respond with only the letter "
        "(A, B, C, or D) of the correct option.\nQuestion: Why?\nA. x\nB. y\nC. z\nAnswer: "
    )
    assert sum(isinstance(part, MediaPart) for part in parts) == 1
    assert of_role(parts, "question") == ["Why?"]


def test_av_odyssey_has_no_space_after_the_colon() -> None:
    question = (TextPart(role="other", text="See "), CLIP, TextPart(role="question", text=": who?"))
    parts = interleaved(TEMPLATES["av_odyssey"], question, ("first image", "second image"))
    assert written(parts) == (
        "See <media>: who?\nA:first image\nB:second image\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_one_s_own_words_go_around_the_same_parts() -> None:
    template = PromptTemplate(
        before="Look.",
        question="Q: {question} ",
        heading="Options:\n",
        option="({letter}) {option};\n",
        closing="So:",
    )
    parts = single_video(template, CLIP, "Who {letter}?", ("red", "blue"))
    assert written(parts) == "Look.<media>Q: Who {letter}? Options:\n(A) red;\n(B) blue;\nSo:"
    assert of_role(parts, "option_text") == [") red;\n", ") blue;\n"]
    assert of_role(parts, "other") == ["Look.", "Q: ", " ", "Options:\n", "(", "(", "So:"]


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("question", "no place"),
        ("question", "{question} {question}"),
        ("question", "{question} {other}"),
        ("option", "{letter}."),
        ("option", "{option} {letter}"),
    ],
)
def test_a_template_without_its_places_is_refused(field: str, text: str) -> None:
    with pytest.raises(ValueError, match=rf"{field} is '.*'; it must hold \{{"):
        PromptTemplate(**{field: text})
    with pytest.raises(ValueError, match=f"{field} is"):
        PromptConfig(**{field: text})


def test_options_have_letters_for_all_of_them() -> None:
    for options in ((), ("x",) * 11):
        with pytest.raises(ValueError, match="a question takes 1 to 10"):
            option_lines(PromptTemplate(), options)
    assert written(multiple_choice("Q?\n", ["x"], heading="H\n", closing="So:")) == (
        "Q?\nH\nA. x\nSo:"
    )


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_a_name_stands_for_texts_that_are_recorded(name: Any) -> None:
    recorded = spelled_out(name)
    assert recorded.template() == TEMPLATES[name] == prompt_template(recorded)
    assert spelled_out(recorded) is recorded
    assert identity_fields(recorded) == asdict(TEMPLATES[name])
