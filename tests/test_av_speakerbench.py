"""AV-SpeakerBench: three spellings of one table, and what is wrong in it by file, row and field."""

from pathlib import Path

import pytest
from benchmark_snapshots import (
    SPEC,
    Row,
    changed,
    load,
    speakerbench_rows,
    write_speakerbench,
    write_table,
)

from avflow.datasets.media import decode_sample
from avflow.datasets.sample import MediaPart, TextPart
from avflow.orchestrator.errors import ConfigError

TASKS = {"Speech Rate": 2, "Speaker Counting": 2, "Visual Counting": 1}
FILES = ("test.csv", "test.tsv", "data/test-00000-of-00001.parquet")


def left_out(root: Path, rows: list[Row], **settings: object) -> list[str]:
    """What the reader says of the rows that it leaves out; one row, at least, is good."""
    loaded = load("av_speakerbench", write_speakerbench(root, rows), tasks="all", **settings)
    assert len(loaded.samples) + len(loaded.left_out) == len(rows)
    return [str(row) for row in loaded.left_out]


@pytest.mark.parametrize("file", FILES)
def test_each_layout_gives_the_same_samples(tmp_path: Path, file: str) -> None:
    rows = speakerbench_rows(TASKS)
    root = write_speakerbench(tmp_path, rows, file=file)
    loaded = load("av_speakerbench", root, tasks="all")
    assert [s.sample_id for s in loaded.samples] == [f"q-{i:05d}" for i in range(5)]
    first, last = loaded.samples[0], loaded.samples[-1]
    assert (first.task, first.category, first.layout) == (
        "Speech Rate",
        "Speech Attributes",
        "single_video",
    )
    assert first.media == (
        MediaPart(kind="video", path="audiovisual/clip-0_0_4.mp4", with_audio=True),
    )
    assert first.media_group == last.media_group != loaded.samples[1].media_group
    assert [s.answer_letter for s in loaded.samples] == list("ABCDA")
    texts = [p.text for p in first.parts if isinstance(p, TextPart)]
    assert "Who speaks, in question 0,\nafter the door is shut?" in texts
    assert '. the one in red, saying "I can\'t"\n' in texts
    csv = write_speakerbench(tmp_path / "csv", rows)
    assert load("av_speakerbench", csv, tasks="all").fingerprint == loaded.fingerprint


def test_ids_may_be_numbers(tmp_path: Path) -> None:
    rows = [row | {"question_id": 7 + i} for i, row in enumerate(speakerbench_rows(TASKS))]
    root = write_speakerbench(tmp_path, rows, file=FILES[2])
    assert [s.sample_id for s in load("av_speakerbench", root).samples] == ["7", "8"]


def test_tasks_are_chosen_by_use_or_name(tmp_path: Path) -> None:
    root = write_speakerbench(tmp_path, speakerbench_rows(TASKS))
    for tasks, found in (
        ("knockout", ["Speech Rate"] * 2),
        ("cross_task", ["Visual Counting"]),
        (["Visual Counting", "Speaker Counting"], ["Speaker Counting"] * 2 + ["Visual Counting"]),
    ):
        assert [s.task for s in load("av_speakerbench", root, tasks=tasks).samples] == found


def test_an_older_table_has_the_names_in_another_column(tmp_path: Path) -> None:
    rows = [
        row | {"task_id": str(i), "sub_category": row["task_id"]}
        for i, row in enumerate(speakerbench_rows(TASKS))
    ]
    loaded = load("av_speakerbench", write_speakerbench(tmp_path, rows), tasks="all")
    assert [s.task for s in loaded.samples][:3] == ["Speech Rate"] * 2 + ["Speaker Counting"]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("answer", "E", "answer is 'E', which is none of its options, ABCD"),
        ("answer", "", "answer is '', which is none of its options, ABCD"),
        ("answer", "BC", "answer is 'BC'"),
        ("choices", "['A. x', 'B. y'", "choices is \"['A. x', 'B. y'\", which is no Python list"),
        ("choices", "__import__('os').getcwd()", "which is no Python list"),
        ("choices", "{'A': 'x'}", "which is no list of texts"),
        ("choices", "[1, 2, 3, 4]", "which is no list of texts"),
        ("choices", "['A. \\ud800', 'B. y', 'C. z', 'D. w']", "which is no list of texts"),
        ("choices", "['A. x'] * 10**9", "which is no Python list"),
        ("choices", "['A. x', 'B. y', 'C. z']", "choices holds 3 options, not 4"),
        ("choices", "['A. x', 'C. y', 'B. z', 'D. w']", "not lettered A, B, ..."),
        ("choices", "['A. x', 'y', 'z', 'w']", "not lettered A, B, ..."),
        ("choices", "['A. x', 'B. ', 'C. z', 'D. w']", "choices holds an empty option"),
        ("question", " ", "question is ' ', and a text is needed"),
        ("question_id", "", "question_id is '', and a text is needed"),
        ("audio_visual_path", "", "audio_visual_path is '', and a text is needed"),
        ("task_id", "Speech Smell", "task_id is 'Speech Smell', none of the benchmark's 12"),
    ],
)
def test_a_broken_row_is_left_out_by_name(
    tmp_path: Path, field: str, value: str, reason: str
) -> None:
    (said,) = left_out(tmp_path, changed(speakerbench_rows(TASKS), 3, **{field: value}))
    assert said.startswith(f"{tmp_path / 'test.csv'}, row 4: ")
    assert reason in said


def test_options_without_letters_get_them(tmp_path: Path) -> None:
    rows = changed(speakerbench_rows(TASKS), 0, choices="['x', 'y', 'A', 'w']")
    loaded = load("av_speakerbench", write_speakerbench(tmp_path, rows))
    texts = [p.text for p in loaded.samples[0].parts if isinstance(p, TextPart)]
    assert texts[3:7] == ["A", ". x\n", "B", ". y\n"]


def test_a_table_that_can_t_be_used_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no annotations of AV-SpeakerBench .*test\.csv, test"):
        load("av_speakerbench", tmp_path)
    rows = speakerbench_rows(TASKS)
    write_table(tmp_path / "test.csv", [{k: r[k] for k in r if k != "choices"} for r in rows])
    with pytest.raises(ConfigError, match=r"test\.csv: no column choices; it has question_id, "):
        load("av_speakerbench", tmp_path)
    (tmp_path / "test.csv").write_text("question_id,task_id\n1,2,3\n")
    with pytest.raises(ConfigError, match=r"data set data: .*test\.csv: "):
        load("av_speakerbench", tmp_path)
    (tmp_path / "test.csv").unlink()
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test-0.parquet").write_text("no Parquet")
    with pytest.raises(ConfigError, match=r"test-0\.parquet: can't be read"):
        load("av_speakerbench", tmp_path)


def test_an_id_twice_and_an_empty_selection_are_errors(tmp_path: Path) -> None:
    rows = speakerbench_rows(TASKS)
    root = write_speakerbench(tmp_path, changed(rows, 1, question_id="q-00000"))
    with pytest.raises(ConfigError, match="1 sample ids are there twice"):
        load("av_speakerbench", root)
    with pytest.raises(ConfigError, match="holds no question of those selected"):
        load("av_speakerbench", root, tasks=["Speech Duration"])


def test_its_clips_decode_with_their_sound(tmp_path: Path) -> None:
    root = write_speakerbench(tmp_path, speakerbench_rows({"Speech Rate": 1}), media=True)
    (media,) = decode_sample(root, load("av_speakerbench", root).samples[0], SPEC)
    assert media.frames is not None
    assert media.waveform is not None
    assert media.duration == pytest.approx(len(media.waveform) / 16000, abs=0.05)
