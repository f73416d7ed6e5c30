"""Questions of one's own: what a line becomes, and what is said of one that can't be used."""

import json
from pathlib import Path
from typing import Any

import pytest
from media_files import SPEC

from avflow.datasets.jsonl import MOST_ERRORS, read
from avflow.datasets.media import MediaError, decode_sample
from avflow.datasets.prompts import TEMPLATES, PromptTemplate
from avflow.datasets.reading import AnnotationError
from avflow.datasets.sample import MediaPart, Sample, TextPart
from avflow.orchestrator.data import load_samples
from avflow.orchestrator.dataset_config import JsonlDataset
from avflow.orchestrator.errors import ConfigError

CLIP: dict[str, Any] = {
    "media": "clips/a.mp4",
    "question": "What colour is the ball?",
    "options": ["red", "blue", "green"],
    "answer": "B",
    "task": "colour",
}
MATCH: dict[str, Any] = {
    "id": "m1",
    "task": "match",
    "parts": [
        "1.",
        {"candidate": "a.png"},
        "2.",
        {"candidate": "b.JPG"},
        {"question": "Which picture is of what you hear?"},
        {"reference": "sound", "kind": "audio"},
    ],
    "options": ["the first image", "the second image"],
    "answer": "A",
    "correct_candidate": 1,
}


def write(root: Path, *lines: dict[str, Any] | str, name: str = "q.jsonl") -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (root / name).write_text("\n".join(texts) + "\n")
    return root


def one(root: Path, *lines: dict[str, Any] | str) -> Sample:
    return read(write(root, *lines), file=None, template=TEMPLATES["plain"])[0]


def said(root: Path, *lines: dict[str, Any] | str) -> list[str]:
    """What is said of the lines, without the head."""
    with pytest.raises(AnnotationError) as caught:
        read(write(root, *lines), file="q.jsonl", template=PromptTemplate())
    head, *rest = str(caught.value).splitlines()
    assert head == f"{root / 'q.jsonl'} can't be used:"
    return [line.strip() for line in rest]


def test_a_question_about_a_clip(tmp_path: Path) -> None:
    sample = one(tmp_path, CLIP)
    assert sample.layout == "single_video"
    assert sample.media == (MediaPart(kind="video", path="clips/a.mp4", with_audio=True),)
    assert "".join(p.text for p in sample.parts if isinstance(p, TextPart)) == (
        "What colour is the ball?\nA. red\nB. blue\nC. green\nThe best answer is:"
    )
    assert [p.text for p in sample.parts if isinstance(p, TextPart) and p.role == "question"] == [
        "What colour is the ball?"
    ]
    assert (sample.sample_id, sample.task, sample.category) == ("1", "colour", "colour")
    assert (sample.answer_letter, sample.n_options) == ("B", 3)
    assert (sample.direction, sample.ordering, sample.correct_candidate) == (None, None, None)


def test_a_task_s_name_fits_a_sweep_file(tmp_path: Path) -> None:
    assert one(tmp_path, CLIP | {"task": "t" * 100}).task == "t" * 100
    (reason,) = said(tmp_path, CLIP | {"task": "t" * 101})
    assert reason == "line 1, task: String should have at most 100 characters"


def test_a_clip_without_its_sound(tmp_path: Path) -> None:
    assert not one(tmp_path, CLIP | {"sound": False, "category": "sight"}).media[0].with_audio


def test_candidates_and_a_reference(tmp_path: Path) -> None:
    sample = one(tmp_path, MATCH)
    assert sample.layout == "interleaved"
    assert sample.media == (
        MediaPart(kind="image", path="a.png", role="candidate", index=0),
        MediaPart(kind="image", path="b.JPG", role="candidate", index=1),
        MediaPart(kind="audio", path="sound", role="reference"),
    )
    assert (sample.direction, sample.ordering, sample.correct_candidate) == (
        "audio_to_image",
        "candidates-question-reference",
        0,
    )
    assert sample.sample_id == "m1"


def test_the_ordering_is_that_of_the_parts(tmp_path: Path) -> None:
    candidates, question, reference = MATCH["parts"][:4], MATCH["parts"][4], MATCH["parts"][5]
    parts = [reference, question, *candidates]
    assert one(tmp_path, MATCH | {"parts": parts}).ordering == "reference-question-candidates"
    parts = [candidates[1], question, candidates[3], reference]
    assert one(tmp_path, MATCH | {"parts": parts}).ordering is None, "candidates are torn apart"


def test_blank_lines_and_a_byte_order_mark_are_no_lines_of_data(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text("\ufeff" + json.dumps(CLIP) + "\n\n" + json.dumps(CLIP))
    samples = read(tmp_path, file=None, template=PromptTemplate())
    assert [sample.sample_id for sample in samples] == ["1", "3"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answer": "D"}, "answer is 'D', which is none of A, B, C"),
        ({"answer": "b"}, "answer is 'b', which is none of A, B, C"),
        ({"answer": 1}, "answer: Input should be a valid string"),
        ({"options": ["red"]}, "1 options; a question takes 2 to 10"),
        ({"options": ["red", " "]}, "options.2: is blank"),
        ({"options": ["red", "red"]}, "two options are the same"),
        ({"options": ["A. red", "B. blue"]}, "options begin with their letters"),
        ({"media": "../a.mp4"}, "media: '../a.mp4' leaves the data set's root"),
        ({"media": "/data/a.mp4"}, "media: '/data/a.mp4' leaves the data set's root"),
        ({"media": "a.png"}, "media: a.png is of kind image; a clip is a video"),
        ({"media": "a.xyz"}, "media: a.xyz: .xyz tells no kind"),
        ({"media": None}, "give either `media` (a clip) and `question`, or `parts`"),
        ({"question": None}, "`question` goes with `media`"),
        ({"task": ""}, "task: is blank"),
        ({"colour": "red"}, "colour: unknown field; known: id, task,"),
        ({"correct_candidate": 1}, "`correct_candidate` is for `parts`"),
    ],
)
def test_a_field_of_a_clip_that_is_wrong(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    (message,) = said(tmp_path, CLIP, CLIP | change)
    assert message.startswith(f"line 2, {says}")


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ([{"candidat": "a.png"}], "parts.1.candidat: unknown field; known: question,"),
        ([{"candidate": "a.png", "question": "?"}], "parts.1: a part is one of"),
        (MATCH["parts"][2:], "parts hold 1 candidates and 1 references"),
        (MATCH["parts"][:5], "parts hold 2 candidates and 0 references"),
        (
            [*MATCH["parts"][:5], {"reference": "../b.wav"}],
            "parts.6.reference: '../b.wav' leaves the data set's root",
        ),
        ([*MATCH["parts"][:5], {"reference": "b"}], "parts.6.reference: b: no ending tells no"),
    ],
)
def test_a_part_that_is_wrong(tmp_path: Path, parts: list[object], says: str) -> None:
    messages = said(tmp_path, MATCH | {"parts": parts})
    assert messages[0].startswith(f"line 1, {says}")


def test_a_candidate_that_is_not_there(tmp_path: Path) -> None:
    (message,) = said(tmp_path, MATCH | {"correct_candidate": 3})
    assert message == "line 1, correct_candidate is 3, of 2 candidates"


def test_all_bad_lines_are_listed_up_to_a_limit(tmp_path: Path) -> None:
    messages = said(
        tmp_path, '{"media":', CLIP | {"answer": "Z"}, "[1]", *["nonsense"] * MOST_ERRORS
    )
    assert [m.partition(",")[0] for m in messages[:3]] == ["line 1", "line 2", "line 3"]
    assert messages[0] == ("line 1, no JSON object (EOF while parsing a value at column 9)")
    assert len(messages) == MOST_ERRORS + 1
    assert messages[-1] == "and 3 more"


def test_two_fields_of_a_line_are_two_errors(tmp_path: Path) -> None:
    messages = said(tmp_path, {"media": "a.mp4", "question": "?", "options": ["a", "b"]})
    assert messages == ["line 1, task: Field required", "line 1, answer: Field required"]


def test_ids_must_differ(tmp_path: Path) -> None:
    assert said(tmp_path, CLIP | {"id": "x"}, CLIP, CLIP | {"id": "x"}) == [
        "line 3, id: 'x' is also that of line 1"
    ]


def test_a_field_that_is_there_twice_is_no_guess(tmp_path: Path) -> None:
    clip, match = json.dumps(CLIP), json.dumps(MATCH)
    twice = clip.replace('"answer": "B"', '"answer": "B", "answer": "A"')
    deep = match.replace('{"candidate": "a.png"}', '{"candidate": "a.png", "candidate": "b.png"}')
    deep = deep.replace("m1", "m2")
    assert twice != clip
    assert said(tmp_path, clip, twice, match, deep) == [
        "line 2, answer: is there twice; leave one of them",
        "line 4, candidate: is there twice; leave one of them",
    ]
    assert "Exceeds" not in said(tmp_path, '{"id": ' + "9" * 5000 + "}")[0]
    assert said(tmp_path, '{"id": ' + "[" * 100_000)[0].startswith("line 1, no JSON object")


def test_bytes_that_are_no_utf_8_are_an_error_of_their_line(tmp_path: Path) -> None:
    good = json.dumps(CLIP).encode()
    (tmp_path / "q.jsonl").write_bytes(good + b"\n" + good.replace(b"red", b"r\xe9d") + b"\n")
    with pytest.raises(AnnotationError, match="line 2, no JSON object"):
        read(tmp_path, file=None, template=PromptTemplate())


@pytest.mark.parametrize(
    ("files", "wanted", "says"),
    [
        ((), None, "must hold one .jsonl file, or `file` name it; found: none"),
        (("a", "b"), None, "found: a.jsonl, b.jsonl"),
        (("a",), "b.jsonl", "b.jsonl: no such file"),
        (("a",), "../a.jsonl", "leaves the data set's root"),
    ],
)
def test_which_file(tmp_path: Path, files: tuple[str, ...], wanted: str | None, says: str) -> None:
    for name in files:
        write(tmp_path, CLIP, name=f"{name}.jsonl")
    with pytest.raises(AnnotationError) as caught:
        read(tmp_path, file=wanted, template=PromptTemplate())
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["none.parquet#a/1", "q.jsonl.parquet#a/1", "../x.parquet#a/1"])
def test_a_cell_that_is_not_there_fails_its_sample_and_nothing_else(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "q.jsonl.parquet").write_text("no table")
    parts = [{"candidate": name, "kind": "image"}, *MATCH["parts"][2:]]
    root = write(tmp_path, MATCH | {"parts": parts})
    config = JsonlDataset(name="mine", reader="jsonl", root=str(root))
    if name.startswith(".."):
        with pytest.raises(ConfigError, match="leaves the data set's root"):
            load_samples(config)
        return
    (sample,) = load_samples(config).samples
    with pytest.raises(MediaError, match=r"can't be read|no such file"):
        decode_sample(root, sample, SPEC)


def test_an_empty_file_holds_no_question(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").touch()
    with pytest.raises(AnnotationError, match="holds no question"):
        read(tmp_path, file=None, template=PromptTemplate())


def test_a_sweep_reads_it_by_its_name(tmp_path: Path) -> None:
    config = JsonlDataset(name="mine", reader="jsonl", root=str(write(tmp_path, CLIP, MATCH)))
    loaded = load_samples(config)
    assert [(s.dataset, s.task) for s in loaded.samples] == [("mine", "colour"), ("mine", "match")]
    write(tmp_path, "nonsense")
    with pytest.raises(ConfigError, match=r"data set mine: .*q\.jsonl can't be used:\n  line 1"):
        load_samples(config)
