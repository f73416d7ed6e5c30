"""Questions of one's own: a JSON object a line (docs/adding-a-dataset.md shows both kinds).

    {"media": "a.mp4", "question": ..., "options": [...], "answer": "B", "task": ...}
    {"parts": [{"candidate": "a.png"}, {"question": ...}, {"reference": "b.wav"}], "options": ...}

A file is read whole or not at all: its author is there to mend it, so every line that can't be
used is named at once.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from avflow.datasets.choices import lettered
from avflow.datasets.media_spec import MediaError
from avflow.datasets.prompts import PromptTemplate, interleaved, single_video
from avflow.datasets.reading import AnnotationError, DoubledField, each_once
from avflow.datasets.roots import inside
from avflow.datasets.sample import (
    LETTERS,
    MediaKind,
    MediaPart,
    MediaRole,
    Part,
    Sample,
    TextPart,
)

MOST_ERRORS = 20

_SUFFIXES: dict[MediaKind, str] = {
    "video": ".mp4 .mkv .webm .mov .avi .mpg .mpeg .ts .flv .m4v .3gp .ogv .gif",
    "audio": ".wav .mp3 .flac .ogg .m4a .opus .aac .aiff .mka .wma",
    "image": ".png .jpg .jpeg .webp .bmp .tif .tiff",
}
_KINDS = {suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}

_LONGEST_NAME = 100  # of tasks, as in a sweep file
_Text = Annotated[str, Field(min_length=1, pattern=r"\S")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _PartLine(_Strict):
    """One piece of an interleaved question: exactly one of the first three fields."""

    question: _Text | None = None
    candidate: _Text | None = None
    reference: _Text | None = None
    kind: MediaKind | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(v is not None for v in (self.question, self.candidate, self.reference)) != 1:
            raise ValueError("a part is one of `question`, `candidate` or `reference`")
        return self


_TEXT, _PART = "text", "part"
_Part = Annotated[
    Annotated[str, Tag(_TEXT)] | Annotated[_PartLine, Tag(_PART)],
    Discriminator(lambda value: _TEXT if isinstance(value, str) else _PART),
]


class _Line(_Strict):
    """A line of the file."""

    id: _Text | None = None
    task: Annotated[_Text, Field(max_length=_LONGEST_NAME)]
    category: _Text | None = None
    media: _Text | None = None
    sound: bool = True
    question: _Text | None = None
    parts: tuple[_Part, ...] = ()
    options: tuple[_Text, ...]
    answer: _Text
    correct_candidate: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not 2 <= len(self.options) <= len(LETTERS):
            raise ValueError(f"{len(self.options)} options; a question takes 2 to {len(LETTERS)}")
        if self.answer not in LETTERS[: len(self.options)]:
            known = ", ".join(LETTERS[: len(self.options)])
            raise ValueError(f"answer is {self.answer!r}, which is none of {known}")
        if len(set(self.options)) < len(self.options):
            raise ValueError("two options are the same")
        if lettered(self.options):
            raise ValueError(
                "options begin with their letters; leave these out, the prompt has them"
            )
        if bool(self.parts) == bool(self.media):
            raise ValueError("give either `media` (a clip) and `question`, or `parts`")
        if bool(self.media) != bool(self.question):
            raise ValueError("`question` goes with `media`; among `parts` it is one of them")
        if self.parts:
            self._check_parts()
        elif self.correct_candidate is not None:
            raise ValueError("`correct_candidate` is for `parts` with candidates")
        return self

    def _check_parts(self) -> None:
        parts = [part for part in self.parts if isinstance(part, _PartLine)]
        candidates = sum(part.candidate is not None for part in parts)
        references = sum(part.reference is not None for part in parts)
        if candidates < 2 or references != 1 or not any(part.question for part in parts):
            raise ValueError(
                f"parts hold {candidates} candidates and {references} references; they need two "
                "or more, one, and a question"
            )
        if self.correct_candidate is not None and self.correct_candidate > candidates:
            raise ValueError(
                f"correct_candidate is {self.correct_candidate}, of {candidates} candidates"
            )


class _BadLine(ValueError):
    """A field of a line: where, and what is wrong."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)


def read(root: Path, *, file: str | None, template: PromptTemplate) -> list[Sample]:
    """The questions of `file` (None: the only .jsonl there) below `root`, in its order.

    A question without an `id` is called by its line. Raises AnnotationError: no such file, or
    lines that can't be used, with file, line and field of each (of the first 20).
    """
    path = _find(root, file)
    samples: list[Sample] = []
    seen: dict[str, int] = {}
    errors: list[str] = []
    for number, line in _lines(path):
        try:
            sample = _sample(root, _parse(line), number, template)
            first = seen.setdefault(sample.sample_id, number)
            if first != number:
                raise _BadLine("id", f"{sample.sample_id!r} is also that of line {first}")
            samples.append(sample)
        except ExceptionGroup as group:
            errors += [f"line {number}, {error}" for error in group.exceptions]
        except _BadLine as error:
            errors.append(f"line {number}, {error}")
    if errors:
        more = f"\n  and {len(errors) - MOST_ERRORS} more" if len(errors) > MOST_ERRORS else ""
        raise AnnotationError(
            f"{path} can't be used:\n  " + "\n  ".join(errors[:MOST_ERRORS]) + more
        )
    if not samples:
        raise AnnotationError(f"{path} holds no question")
    return samples


def _find(root: Path, file: str | None) -> Path:
    if file is not None:
        try:
            path = inside(root, file)
        except MediaError as error:
            raise AnnotationError(str(error)) from error
        if not path.is_file():
            raise AnnotationError(f"{path}: no such file")
        return path
    found = sorted(root.glob("*.jsonl"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise AnnotationError(
            f"{root} must hold one .jsonl file, or `file` name it; found: {names}"
        )
    return found[0]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1. Bad bytes fail the line's JSON."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.rstrip("\r\n")


def _parse(line: str) -> _Line:
    """Raises an ExceptionGroup of _BadLine, one a field, or the _BadLine of a doubled one."""
    try:
        json.loads(line, object_pairs_hook=each_once)
    except DoubledField as error:
        raise _BadLine(str(error), "is there twice; leave one of them") from None
    except (ValueError, RecursionError):
        pass  # no JSON: pydantic says where
    try:
        return _Line.model_validate_json(line.encode("utf-8", "surrogateescape"))
    except ValidationError as error:
        raise ExceptionGroup("", [_told(each) for each in error.errors()]) from None


def _told(error: object) -> _BadLine:
    assert isinstance(error, dict)
    if error["type"] == "json_invalid":
        return _BadLine("", f"no JSON object ({error['ctx']['error'].replace('line 1 ', '')})")
    field = ".".join(
        str(step + 1) if isinstance(step, int) else step
        for step in error["loc"]
        if step not in (_TEXT, _PART)
    )
    return _BadLine(field, _message(error).removeprefix("Value error, "))


def _message(error: Mapping[str, Any]) -> str:
    match error["type"]:
        case "string_pattern_mismatch" | "string_too_short":
            return "is blank"
        case "extra_forbidden":
            known = _PartLine if _PART in error["loc"] else _Line
            return f"unknown field; known: {', '.join(known.model_fields)}"
    return str(error["msg"])


def _sample(root: Path, line: _Line, number: int, template: PromptTemplate) -> Sample:
    parts: tuple[Part, ...]
    if line.media is not None and line.question is not None:
        clip = MediaPart(kind="video", path=line.media, with_audio=line.sound)
        if (kind := _kind(root, "media", line.media, None)) != "video":
            raise _BadLine("media", f"{line.media} is of kind {kind}; a clip is a video")
        parts = single_video(template, clip, line.question, line.options)
        media: Sequence[MediaPart] = (clip,)
    else:
        question = tuple(_question_parts(root, line.parts))
        parts = interleaved(template, question, line.options)
        media = [part for part in question if isinstance(part, MediaPart)]
    correct = line.correct_candidate
    return Sample(
        sample_id=line.id or str(number),
        dataset="jsonl",
        task=line.task,
        category=line.category or line.task,
        layout="single_video" if line.media else "interleaved",
        parts=parts,
        answer=LETTERS.index(line.answer),
        media_group="\n".join(part.path for part in media),
        direction=None if line.media else _direction(media),
        ordering=None if line.media else _ordering(parts),
        correct_candidate=None if correct is None else correct - 1,
    )


def _question_parts(root: Path, parts: Iterable[_PartLine | str]) -> Iterator[Part]:
    """Bare strings belong to nothing; candidates are numbered as they come."""
    index = 0
    for number, part in enumerate(parts, start=1):
        if isinstance(part, str):
            if part:
                yield TextPart(role="other", text=part)
        elif part.question is not None:
            yield TextPart(role="question", text=part.question)
        else:
            role: MediaRole = "reference" if part.candidate is None else "candidate"
            path = part.candidate or part.reference or ""
            kind = _kind(root, f"parts.{number}.{role}", path, part.kind)
            yield MediaPart(
                kind=kind, path=path, role=role, index=index if role == "candidate" else None
            )
            index += role == "candidate"


def _kind(root: Path, field: str, path: str, stated: MediaKind | None) -> MediaKind:
    try:
        inside(root, path)
    except MediaError as error:
        raise _BadLine(field, str(error)) from error
    suffix = PurePosixPath(path).suffix.lower()
    kind = stated or _KINDS.get(suffix)
    if kind is None:
        raise _BadLine(
            field, f"{path}: {suffix or 'no ending'} tells no kind; known: {list(_KINDS)}"
        )
    return kind


def _direction(media: Sequence[MediaPart]) -> str | None:
    """`audio_to_image`: from the reference's kind to the candidates', where they are of one."""
    reference = next(part.kind for part in media if part.role == "reference")
    candidates = {part.kind for part in media if part.role == "candidate"}
    return f"{reference}_to_{candidates.pop()}" if len(candidates) == 1 else None


def _ordering(parts: Iterable[Part]) -> str | None:
    """As the paper has it ("candidates-question-reference"); None if one is in several places."""
    names: dict[str, Literal["candidates", "question", "reference"]] = {
        "candidate": "candidates",
        "question": "question",
        "reference": "reference",
    }
    order: list[str] = []
    for part in parts:
        name = names.get(part.role)
        if name is not None and order[-1:] != [name]:
            order.append(name)
    return "-".join(order) if len(order) == len(names) else None
