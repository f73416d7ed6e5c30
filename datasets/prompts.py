"""The text of a multiple-choice question, cut by role where it is written.

A template is the user's turn with the question and its options left open. Only the question's own
words have the role `question` (the seed's NonOptQ; map-the-flow cuts it likewise): what a template
puts around them is `other`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from avflow.datasets.sample import LETTERS, MediaPart, Part, TextPart


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTemplate:
    """`before` MEDIA `question` `heading` `option`... `closing`; all kept verbatim.

    Raises ValueError unless `question` holds {question}, and `option` {letter} before {option},
    each once. In interleaved questions the media stand inside {question}, and `before` comes first.
    """

    before: str = ""
    question: str = "{question}\n"
    heading: str = ""
    option: str = "{letter}. {option}\n"
    closing: str = ""

    def __post_init__(self) -> None:
        for field, names in (("question", ("question",)), ("option", ("letter", "option"))):
            text = getattr(self, field)
            if re.findall(r"\{(\w+)\}", text) != list(names):
                wanted = " and then ".join(f"{{{name}}}" for name in names)
                raise ValueError(f"{field} is {text!r}; it must hold {wanted}, once")


TEMPLATES: Mapping[str, PromptTemplate] = {
    # The benchmark's own pipeline, and its paper's Fig. 7.
    "av_speakerbench": PromptTemplate(
        question="Select the best answer to the following multiple-choice question based on the "
        "video. Respond with only the letter (A, B, C, or D) of the correct option.\n{question}\n",
        closing="The best answer is:",
    ),
    # VLMEvalKit, which the benchmark names as its evaluation. It sends the sound a second time,
    # as a file of its own, after the video: left out, since the video is read with its sound.
    "worldsense": PromptTemplate(
        before="Carefully watch this video and pay attention to every detail. Based on your "
        "observations, select the best option that accurately addresses the question.",
        question="\nThese are the frames of a video and the corresponding audio. Select the best "
        "answer to the following multiple-choice question based on the video. Respond with only "
        "the letter (A, B, C, or D) of the correct option.\nQuestion: {question}\n",
        closing="Answer: ",
    ),
    # The benchmark's own pipeline: a colon and no space after the letter.
    "av_odyssey": PromptTemplate(
        option="{letter}:{option}\n",
        closing="Answer with the option's letter from the given choices directly.",
    ),
    "plain": PromptTemplate(closing="The best answer is:"),
}


def single_video(
    template: PromptTemplate, clip: MediaPart, question: str, options: Sequence[str]
) -> tuple[Part, ...]:
    """The user's turn about one clip. Raises ValueError as `option_lines`."""
    return (
        *_other(template.before),
        clip,
        *_put(template, (TextPart(role="question", text=question),)),
        *option_lines(template, options),
    )


def interleaved(
    template: PromptTemplate, question: Sequence[Part], options: Sequence[str]
) -> tuple[Part, ...]:
    """The user's turn of a question that holds its media. Raises ValueError as `option_lines`."""
    return (
        *_other(template.before),
        *_put(template, question),
        *option_lines(template, options),
    )


def multiple_choice(
    question: str, options: Sequence[str], *, heading: str = "", closing: str = ""
) -> tuple[TextPart, ...]:
    """`question`, `heading`, one line an option ("A. red"), `closing`, as text parts.

    Question, heading and closing are kept as they are: end them with the newline they need. Raises
    ValueError without options or with more than there are letters.
    """
    parts = (
        TextPart(role="question", text=question),
        TextPart(role="other", text=heading),
        *option_list(options, closing=closing),
    )
    return tuple(part for part in parts if part.text)


def option_list(options: Sequence[str], *, closing: str = "") -> tuple[TextPart, ...]:
    """The end of a prompt alone, where media stand between the question and its options.

    Raises ValueError without options or with more than there are letters.
    """
    return option_lines(PromptTemplate(closing=closing), options)


def option_lines(template: PromptTemplate, options: Sequence[str]) -> tuple[TextPart, ...]:
    """Heading, options and closing.

    Raises ValueError without options or with more than there are letters.
    """
    if not 1 <= len(options) <= len(LETTERS):
        raise ValueError(f"{len(options)} options; a question takes 1 to {len(LETTERS)}")
    before_letter, rest = template.option.split("{letter}")
    before, after = rest.split("{option}")
    parts = [*_other(template.heading)]
    for index, (letter, option) in enumerate(zip(LETTERS, options, strict=False)):
        parts += _other(before_letter)
        parts.append(TextPart(role="option_letter", text=letter, index=index))
        parts.append(TextPart(role="option_text", text=before + option + after, index=index))
    return (*parts, *_other(template.closing))


def _put(template: PromptTemplate, question: Sequence[Part]) -> tuple[Part, ...]:
    """The question between the texts that the template has around it."""
    head, tail = template.question.split("{question}")
    return (*_other(head), *question, *_other(tail))


def _other(text: str) -> tuple[TextPart, ...]:
    return (TextPart(role="other", text=text),) if text else ()
