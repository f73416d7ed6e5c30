"""From a sample's parts to labelled tokens: where each token group lies is known by construction.

1. The chat template is rendered once with a mark in place of every text part; splitting on the
   marks gives what the template itself writes, and so each part's characters.
2. Placeholders of media are replaced by the tokens the processor gave them (`expand`).
3. Each token belongs to the part that holds its first character that is no space (`layout_of`).

Nothing is searched for by its words, so a question that quotes its options changes nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from avflow.datasets.sample import MediaKind, MediaPart, Part, Sample, TextPart
from avflow.pathways.layout import Layout, LayoutError, Segment, SegmentKind
from avflow.workers.models.answers import continuation

Span = tuple[int, int]
Label = tuple[SegmentKind, int | None]
Render = Callable[[Sequence[str]], str]

# Private-use characters, which no prompt has reason to hold.
_OPEN, _CLOSE = "\ue0a0", "\ue0a1"
TEMPLATE: Label = ("template", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A prompt's text and the characters [start, stop) of each part of its sample, in order.

    A text part has its own characters, a media part its placeholder (or, after `expand`, what
    stands for it).
    """

    sample: Sample
    text: str
    spans: tuple[Span, ...]


def render_prompt(
    sample: Sample,
    render: Render,
    placeholders: Mapping[MediaKind, str],
    reserved: Sequence[str],
) -> Prompt:
    """Render a sample's prompt; `render` puts the given texts in place of its text parts.

    Raises LayoutError if a text holds one of the `reserved` strings (it would become a control
    token), if the template doesn't keep the texts verbatim and in order, or if the placeholders
    are not the sample's media in order.
    """
    texts = [part.text for part in sample.parts if isinstance(part, TextPart)]
    for text in texts:
        for word in (_OPEN, _CLOSE, *reserved):
            if word in text:
                raise LayoutError(
                    f"sample {sample.sample_id}: the text {text!r} holds {word!r}, which the "
                    "tokenizer reads as a control token; remove it from the data"
                )
    marks = [f"{_OPEN}{i}{_CLOSE}" for i in range(len(texts))]
    pieces = _split(sample, render(marks), marks)
    text = render(texts)
    woven = pieces[0] + "".join(t + piece for t, piece in zip(texts, pieces[1:], strict=True))
    if text != woven:
        raise LayoutError(
            f"sample {sample.sample_id}: the chat template changes the texts it is given (does it "
            "strip or escape them?), so their tokens can't be told apart"
        )
    return Prompt(sample=sample, text=text, spans=_spans(sample, pieces, placeholders))


def _split(sample: Sample, marked: str, marks: Sequence[str]) -> list[str]:
    """What the template writes before, between and after the marks."""
    pieces, rest = [], marked
    for mark in marks:
        piece, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise LayoutError(
                f"sample {sample.sample_id}: the chat template drops, repeats or reorders the "
                "parts of the user turn"
            )
        pieces.append(piece)
    return [*pieces, rest]


def _spans(
    sample: Sample, pieces: Sequence[str], placeholders: Mapping[MediaKind, str]
) -> tuple[Span, ...]:
    """Walk the template's pieces and the sample's parts side by side."""
    spans: list[Span] = []
    remaining = iter(pieces)
    at, piece = 0, next(remaining)
    for part in sample.parts:
        if isinstance(part, TextPart):
            _no_more_media(sample, piece, placeholders)
            start = at + len(piece)
            at, piece = start + len(part.text), next(remaining)
            spans.append((start, at))
        else:
            kind, offset = _first_placeholder(piece, placeholders)
            if kind != part.kind:
                raise LayoutError(
                    f"sample {sample.sample_id}: the chat template has no {part.kind} placeholder "
                    f"where {part.path} belongs"
                )
            start = at + offset
            at = start + len(placeholders[part.kind])
            piece = piece[at - start + offset :]
            spans.append((start, at))
    _no_more_media(sample, piece, placeholders)
    return tuple(spans)


def _first_placeholder(
    piece: str, placeholders: Mapping[MediaKind, str]
) -> tuple[MediaKind | None, int]:
    found = [(piece.find(word), kind) for kind, word in placeholders.items() if word in piece]
    at, kind = min(found, default=(-1, None))
    return kind, at


def _no_more_media(sample: Sample, piece: str, placeholders: Mapping[MediaKind, str]) -> None:
    kind, _ = _first_placeholder(piece, placeholders)
    if kind is not None:
        raise LayoutError(
            f"sample {sample.sample_id}: the prompt has a {kind} placeholder of no medium"
        )


def expand(prompt: Prompt, replacements: Sequence[str]) -> Prompt:
    """The prompt with its media parts, in order, replaced by these strings."""
    pieces: list[str] = []
    spans: list[Span] = []
    done = at = 0
    remaining = iter(replacements)
    for part, (start, stop) in zip(prompt.sample.parts, prompt.spans, strict=True):
        words = next(remaining) if isinstance(part, MediaPart) else prompt.text[start:stop]
        pieces += [prompt.text[done:start], words]
        at += start - done
        spans.append((at, at + len(words)))
        at, done = at + len(words), stop
    text = "".join([*pieces, prompt.text[done:]])
    return replace(prompt, text=text, spans=tuple(spans))


def owners(prompt: Prompt, offsets: Sequence[Span]) -> list[int | None]:
    """The number of the part that each token belongs to; None: the template's own."""
    found: list[int | None] = []
    part = 0
    for start, stop in offsets:
        inside = prompt.text[start:stop]
        blank = len(inside) - len(inside.lstrip())
        at = start + (blank if blank < len(inside) else 0)
        while part < len(prompt.spans) and prompt.spans[part][1] <= at:
            part += 1
        found.append(part if part < len(prompt.spans) and prompt.spans[part][0] <= at else None)
    return found


def layout_of(
    prompt: Prompt,
    offsets: Sequence[Span],
    media_labels: Mapping[int, Sequence[Label]],
    markers: Sequence[bool],
    *,
    audio_with_padding: bool = True,
) -> Layout:
    """The layout of N tokens with these character `offsets`.

    `media_labels`: by number of a media part, the label of each of its tokens. `markers` [N]: the
    tokens that open and close media, which belong to the template. `audio_with_padding` as in
    `Layout`. Raises LayoutError when a part lost its tokens or an option's letter is not a token
    by itself.
    """
    sample = prompt.sample
    owner = owners(prompt, offsets)
    _check_letters(prompt, offsets, owner)
    opened = _end_of_system(sample, owner)
    taken = {number: iter(labels) for number, labels in media_labels.items()}
    labels: list[Label] = []
    for token, number in enumerate(owner):
        if number in taken:
            labels.append(next(taken[number]))
            continue
        label = _text_label(None if number is None else sample.parts[number])
        if label == TEMPLATE and token < opened and not markers[token]:
            label = ("system", None)
        labels.append(label)
    labels[-1] = ("last", None)
    return Layout(
        kind=sample.layout,
        n_tokens=len(labels),
        segments=_segments(labels),
        answer=sample.answer,
        correct_candidate=sample.correct_candidate,
        audio_with_padding=audio_with_padding,
    )


def _text_label(part: Part | None) -> Label:
    if not isinstance(part, TextPart) or part.role == "other":
        return TEMPLATE
    if part.role == "question":
        return ("non_option_question", None)
    return (part.role, part.index)


def _end_of_system(sample: Sample, owner: Sequence[int | None]) -> int:
    """The first position that can't be `system`: the clip, or an interleaved user turn's start."""
    for token, number in enumerate(owner):
        if number is not None and (
            sample.layout == "interleaved" or isinstance(sample.parts[number], MediaPart)
        ):
            return token
    raise LayoutError(f"sample {sample.sample_id}: a {sample.layout} prompt needs a media file")


def _check_letters(prompt: Prompt, offsets: Sequence[Span], owner: Sequence[int | None]) -> None:
    """Every part with words has a token, and a letter's one token is that letter alone."""
    words: dict[int, list[str]] = {}
    for (start, stop), number in zip(offsets, owner, strict=True):
        if number is not None:
            words.setdefault(number, []).append(prompt.text[start:stop].strip())
    for number, part in enumerate(prompt.sample.parts):
        if not isinstance(part, TextPart) or part.role == "other":
            continue
        found = words.get(number, [])
        what = f"sample {prompt.sample.sample_id}: {part.role} {part.index} {part.text!r}"
        if part.role != "question" and part.index is None:
            raise LayoutError(f"{what} has no index")
        if part.role == "option_letter" and found != [part.text.strip()]:
            raise LayoutError(
                f"{what} is tokenised as {found}, not as one token of its own; change how the "
                "prompt's template spells its options"
            )
        if not found:
            raise LayoutError(f"{what} has no token of its own; its neighbours swallowed it")


def _segments(labels: Sequence[Label]) -> tuple[Segment, ...]:
    """Runs of equal labels."""
    cuts = [0, *(i for i, (a, b) in enumerate(pairwise(labels), 1) if a != b), len(labels)]
    return tuple(
        Segment(kind=labels[start][0], start=start, stop=stop, index=labels[start][1])
        for start, stop in pairwise(cuts)
    )


def option_tokens(tokenizer: Any, prompt: Prompt, lead: str = "") -> tuple[int, ...]:
    """The id of each option's letter as the first token after the prompt, `lead` (see
    `answers.answer_lead`) before it.

    Raises LayoutError for a letter that is not one token of its own there, or that comes twice.
    """
    found = []
    for part in prompt.sample.parts:
        if not isinstance(part, TextPart) or part.role != "option_letter":
            continue
        tokens = continuation(tokenizer, prompt.text, lead + part.text.strip())
        if tokens is None or len(tokens) != 1:
            raise LayoutError(
                f"sample {prompt.sample.sample_id}: the letter {part.text!r} after the prompt is "
                "not one token of its own, so its probability can't be read; use single letters"
            )
        found += tokens
    if len(set(found)) != len(found):
        raise LayoutError(f"sample {prompt.sample.sample_id}: two options share a letter")
    return tuple(found)
