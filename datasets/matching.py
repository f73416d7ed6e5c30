"""A question whose media stand inside its text: one reference against candidates.

How its parts are ordered is found in the four steps of the seed's D.3.1:

1. find the placeholders ([img1], [audio2]); the kind that is there once is the reference, the
   other kind the candidates;
2. split the text at them; what stands between two candidates belongs to their span;
3. the question is the text before the reference if that comes last, else the longest text by
   words; all other text is padding;
4. the order of candidates, question and reference is the label.

A word is a run of letters: a lone comma is none. That decides ties that counting by spaces would
leave ("Based on [audio1], which of the materials shown in [img1]... is most likely the source?").
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from avflow.datasets.reading import RowError
from avflow.datasets.sample import MediaKind, MediaPart, Part, TextPart, TextRole

_PLACEHOLDER = re.compile(r"\[\s*(img|image|audio|video)\s*(\d+)\s*\]", re.IGNORECASE)
_BRACKETS = re.compile(r"\[[^\]]*\]?")
_KINDS: dict[str, MediaKind] = {
    "img": "image",
    "image": "image",
    "audio": "audio",
    "video": "video",
}
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
_NAMED_KINDS: dict[str, MediaKind] = {
    "image": "image",
    "picture": "image",
    "photo": "image",
    "audio": "audio",
    "sound": "audio",
    "video": "video",
}

FilePath = Callable[[MediaKind, int], str]
"""From a kind and a number (from 1) to the medium's path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """The question as parts, in order, and what step 4 calls that order."""

    parts: tuple[Part, ...]
    ordering: str
    reference: MediaKind
    candidates: MediaKind
    n_candidates: int

    @property
    def direction(self) -> str:
        """`audio_to_image`: the reference is a sound, the candidates are images."""
        return f"{self.reference}_to_{self.candidates}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Placeholder:
    kind: MediaKind
    number: int
    start: int
    stop: int


def parse_matching(text: str, path_of: FilePath) -> Matching:
    """Cut a question at its media. Raises RowError when it is no matching question."""
    media = _placeholders(text)
    reference, candidates = _roles(media)
    spans = {
        "candidates": (candidates[0].start, candidates[-1].stop),
        "reference": (reference.start, reference.stop),
    }
    question = _question(text, spans)
    spans["question"] = question
    parts: list[Part] = []
    at = 0
    for medium in media:
        parts += _text(text, at, medium.start, question)
        parts.append(
            MediaPart(
                kind=medium.kind,
                path=path_of(medium.kind, medium.number),
                role="reference" if medium is reference else "candidate",
                index=None if medium is reference else medium.number - 1,
            )
        )
        at = medium.stop
    parts += _text(text, at, len(text), question)
    return Matching(
        parts=tuple(parts),
        ordering="-".join(sorted(spans, key=lambda name: spans[name])),
        reference=reference.kind,
        candidates=candidates[0].kind,
        n_candidates=len(candidates),
    )


def _placeholders(text: str) -> list[_Placeholder]:
    found = [
        _Placeholder(
            kind=_KINDS[match[1].lower()],
            number=int(match[2]),
            start=match.start(),
            stop=match.end(),
        )
        for match in _PLACEHOLDER.finditer(text)
    ]
    known = {text[medium.start : medium.stop] for medium in found}
    for bracket in _BRACKETS.findall(text):
        if bracket not in known:
            raise RowError(f"question holds {bracket!r}, which is no placeholder of a medium")
    return found


def _roles(media: Sequence[_Placeholder]) -> tuple[_Placeholder, list[_Placeholder]]:
    """The reference and the candidates, which must be numbered as they come."""
    by_kind: dict[MediaKind, list[_Placeholder]] = {}
    for medium in media:
        by_kind.setdefault(medium.kind, []).append(medium)
    one = [found[0] for found in by_kind.values() if len(found) == 1]
    many = [found for found in by_kind.values() if len(found) > 1]
    if len(one) != 1 or len(many) != 1:
        counts = ", ".join(f"{len(found)} {kind}" for kind, found in by_kind.items()) or "none"
        raise RowError(
            f"question is not about one reference and candidates: its media are {counts}"
        )
    reference, candidates = one[0], many[0]
    numbers = [candidate.number for candidate in candidates]
    if numbers != list(range(1, len(numbers) + 1)):
        raise RowError(f"question numbers its candidates {numbers}, not 1, 2, ... as they come")
    if reference.number != 1:
        raise RowError(f"question numbers its one reference {reference.number}, not 1")
    if candidates[0].start < reference.start < candidates[-1].start:
        raise RowError("question has its reference between two candidates")
    return reference, candidates


def _question(text: str, spans: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """Step 3."""
    first, second = sorted(spans.values())
    texts = [(0, first[0]), (first[1], second[0]), (second[1], len(text))]
    words = [len(_WORD.findall(text[start:stop])) for start, stop in texts]
    if not any(words):
        raise RowError("question has no words beside its media")
    if spans["reference"] == second and words[1]:
        return texts[1]
    return texts[words.index(max(words))]


def _text(text: str, start: int, stop: int, question: tuple[int, int]) -> list[Part]:
    if start == stop:
        return []
    role: TextRole = "question" if (start, stop) == question else "other"
    return [TextPart(role=role, text=text[start:stop])]


def candidate_of(option: str, candidates: MediaKind, n_candidates: int) -> int:
    """The number, from 0, of the candidate that an option names ("the second image").

    Raises RowError when it names none, several, one that is not there or one of another kind.
    """
    words = [word.lower() for word in _WORD.findall(option)]
    ordinals = [_ORDINALS.index(word) for word in words if word in _ORDINALS]
    if len(ordinals) != 1:
        raise RowError(f"options hold {option!r}, which does not name one candidate by its ordinal")
    kinds = {_NAMED_KINDS[word.rstrip("s")] for word in words if word.rstrip("s") in _NAMED_KINDS}
    if kinds and kinds != {candidates}:
        raise RowError(f"options hold {option!r}, and the candidates are of kind {candidates}")
    if ordinals[0] >= n_candidates:
        raise RowError(f"options hold {option!r}, and there are {n_candidates} candidates")
    return ordinals[0]
