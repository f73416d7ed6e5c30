"""WorldSense: the authors' JSON and its two copies, three or four options, durations."""

import json
from pathlib import Path

import pytest
from benchmark_snapshots import Row, changed, load, worldsense_rows, write_worldsense

from avflow.datasets.sample import MediaPart, TextPart
from avflow.orchestrator.errors import ConfigError

TASKS = {"Audio Change": 3, "Event Sorting": 2}
FILES = ("worldsense_qa.json", "data/test-00000-of-00001.parquet", "WorldSense.tsv")


@pytest.mark.parametrize("file", FILES)
def test_each_layout_gives_the_same_samples(tmp_path: Path, file: str) -> None:
    rows = worldsense_rows(TASKS)
    root = write_worldsense(tmp_path, rows, file=file)
    loaded = load("worldsense", root, tasks="all")
    assert [s.sample_id for s in loaded.samples] == [
        "1min-0000-0",
        "1min-0000-1",
        "1min-0001-0",
        "1min-0001-1",
        "1min-0002-0",
    ]
    assert [s.media_group for s in loaded.samples][:3] == ["1min-0000"] * 2 + ["1min-0001"]
    assert [s.n_options for s in loaded.samples] == [4, 4, 3, 4, 4]
    assert [s.answer_letter for s in loaded.samples] == ["A", "B", "C", "D", "A"]
    first = loaded.samples[0]
    assert (first.task, first.category) == ("Audio Change", "Reasoning")
    assert first.media == (MediaPart(kind="video", path="videos/1min-0000.mp4", with_audio=True),)
    before, video = first.parts[:2]
    assert isinstance(before, TextPart)
    assert before.role == "other"  # so that it belongs to `system`
    assert isinstance(video, MediaPart)
    json_root = write_worldsense(tmp_path / "json", rows)
    assert load("worldsense", json_root, tasks="all").fingerprint == loaded.fingerprint


@pytest.mark.parametrize("file", FILES)
def test_the_paper_takes_videos_under_a_minute(tmp_path: Path, file: str) -> None:
    root = write_worldsense(tmp_path, worldsense_rows(TASKS, longer=2), file=file)
    assert len(load("worldsense", root, tasks="all").samples) == 5
    assert len(load("worldsense", root, tasks="all", durations=["1-2min"]).samples) == 10
    assert len(load("worldsense", root, tasks="all", durations="all").samples) == 25
    assert len(load("worldsense", root, tasks="knockout", durations="all").samples) == 10


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("answer", "E", "answer is 'E', which is none of its options, ABCD"),
        ("answer", None, "answer is None, which is none of its options, ABCD"),
        ("candidates", ["A. x", "B. y"], "candidates holds 2 options, not 3 or 4"),
        ("candidates", None, "candidates is None, which is no list of texts"),
        ("question", None, "question is None, and a text is needed"),
        ("task_type", "Smell", "task_type is 'Smell', none of the benchmark's 26"),
        ("task_type", None, "task_type is None, none of the benchmark's 26"),
        ("duration", "1min", "duration is '1min', none of <1min, 1-2min"),
    ],
)
def test_a_broken_question_is_left_out_by_name(
    tmp_path: Path, field: str, value: object, reason: str
) -> None:
    rows = changed(worldsense_rows(TASKS), 4, **{field: value})  # alone about its video
    loaded = load("worldsense", write_worldsense(tmp_path, rows), tasks="all")
    assert len(loaded.samples) == 4
    (said,) = {str(row).rpartition(", task")[0] for row in loaded.left_out} or {""}
    assert said == f"{tmp_path / 'worldsense_qa.json'}, video 1min-0002"
    assert reason in str(loaded.left_out[0])
    task = str(rows[0]["task_type"])
    others = load("worldsense", tmp_path, tasks=[task]).left_out
    assert len(others) == (field == "task_type"), "rows of other tasks are nobody's loss"


@pytest.mark.parametrize("name", ["1min-0001", "task0", "question"])
def test_what_is_there_twice_is_not_lost_in_silence(tmp_path: Path, name: str) -> None:
    path = write_worldsense(tmp_path, worldsense_rows(TASKS)) / "worldsense_qa.json"
    path.write_text(path.read_text().replace(f'"{name}": ', f'"{name}": {{}}, "{name}": ', 1))
    with pytest.raises(ConfigError, match=f"{name} is there twice; fetch it again"):
        load("worldsense", tmp_path, tasks="all")


def test_a_byte_order_mark_is_none_of_the_data(tmp_path: Path) -> None:
    path = write_worldsense(tmp_path, worldsense_rows(TASKS)) / "worldsense_qa.json"
    path.write_text("\ufeff" + path.read_text())
    assert len(load("worldsense", tmp_path, tasks="all").samples) == 5


def test_an_answer_beyond_three_options(tmp_path: Path) -> None:
    rows = changed(worldsense_rows(TASKS), 2, answer="D")
    loaded = load("worldsense", write_worldsense(tmp_path, rows), tasks="all")
    assert str(loaded.left_out[0]).endswith(
        "video 1min-0001, task0: answer is 'D', which is none of its options, ABC"
    )
    # The question after it keeps its name.
    assert [s.sample_id for s in loaded.samples if s.media_group == "1min-0001"] == ["1min-0001-1"]


def test_more_than_nine_questions_stay_in_order(tmp_path: Path) -> None:
    rows = [
        row | {"video": "v", "duration": "<1min"} for row in worldsense_rows({"Audio Change": 4})
    ]
    loaded = load("worldsense", write_worldsense(tmp_path, rows), tasks="all")
    questions = [p.text for s in loaded.samples for p in s.parts if p in _questions(s.parts)]
    assert questions == [f"What is heard first ({i})?" for i in range(12)]


def _questions(parts: tuple[object, ...]) -> list[TextPart]:
    return [p for p in parts if isinstance(p, TextPart) and p.role == "question"]


def test_files_that_can_t_be_used_are_errors(tmp_path: Path) -> None:
    def refusal(text: str) -> str:
        (tmp_path / "worldsense_qa.json").write_text(text)
        with pytest.raises(ConfigError) as caught:
            load("worldsense", tmp_path)
        return str(caught.value)

    with pytest.raises(ConfigError, match=r"no annotations of WorldSense .*worldsense_qa\.json"):
        load("worldsense", tmp_path)
    assert "worldsense_qa.json: not valid JSON" in refusal("{")
    assert "worldsense_qa.json: not valid JSON" in refusal("[" * 200_000)
    assert "surrogates not allowed" in refusal('{"a": {"task0": {"question": "\\ud800"}}}')
    assert "is no object of videos" in refusal("[]")
    assert "is no object of videos" in refusal('{"a": 1}')
    assert "video a has no task0" in refusal(json.dumps({"a": {"duration": "<1min"}}))
    (tmp_path / "worldsense_qa.json").unlink()
    rows: list[Row] = [
        {k: v for k, v in r.items() if k != "duration"} for r in worldsense_rows(TASKS)
    ]
    write_worldsense(tmp_path, rows, file="WorldSense.tsv")
    with pytest.raises(ConfigError, match=r"WorldSense\.tsv: no column duration; it has "):
        load("worldsense", tmp_path)
