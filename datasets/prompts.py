"""The text of a multiple-choice question, cut by role where it is written."""

from collections.abc import Sequence

from avflow.datasets.sample import LETTERS, TextPart


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
    if not 1 <= len(options) <= len(LETTERS):
        raise ValueError(f"{len(options)} options; a question takes 1 to {len(LETTERS)}")
    parts = []
    for index, (letter, option) in enumerate(zip(LETTERS, options, strict=False)):
        parts.append(TextPart(role="option_letter", text=letter, index=index))
        parts.append(TextPart(role="option_text", text=f". {option}\n", index=index))
    return (*parts, TextPart(role="other", text=closing)) if closing else tuple(parts)
