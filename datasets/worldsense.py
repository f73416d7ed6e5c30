"""WorldSense, as its authors publish it, or as its evaluation kits keep it.

    ROOT/worldsense_qa.json        `honglyhly/WorldSense`: by video, then task0, task1 ...
    ROOT/data/test-*.parquet       `lmms-lab/WorldSense`: a row a question
    ROOT/WorldSense.tsv            VLMEvalKit: likewise
    ROOT/videos/VIDEO.mp4          with sound; or where the row's `video_path` says

Questions are told apart as VIDEO-K, K counting the questions of one video from 0, in each layout.
Filter by `duration` and `task_type` alone: the figures of task domains contradict each other.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import get_args

from avflow.datasets.choices import answer_of, options_of, text_of
from avflow.datasets.prompts import PromptTemplate, single_video
from avflow.datasets.reading import (
    AnnotationError,
    DoubledField,
    LeftOut,
    Row,
    RowError,
    each_once,
    find_file,
    place,
    table_rows,
)
from avflow.datasets.sample import MediaPart, Sample
from avflow.datasets.selections import WORLDSENSE, Duration

FILES = ("worldsense_qa.json", "data/test-*.parquet", "WorldSense.tsv")
COLUMNS = ("video", "duration", "task_type", "question", "candidates", "answer")
DURATIONS = get_args(Duration)

_TASKS = frozenset(WORLDSENSE.names())
_TASK_KEY = re.compile(r"task(\d+)")


def read(
    root: Path,
    *,
    tasks: Collection[str],
    durations: str | Collection[str],
    template: PromptTemplate,
) -> Iterator[Sample | LeftOut]:
    """The questions of these tasks about videos of these durations (`all`, or some of DURATIONS).

    Raises AnnotationError when there is no file, or it can't be read or lacks a column.
    """
    asked: Counter[str] = Counter()
    for where, row in _rows(root):
        video, task = str(row["video"]), str(row["task_type"])
        number = asked[video]
        asked[video] += 1
        try:
            if task not in _TASKS:
                raise RowError(f"task_type is {row['task_type']!r}, none of the benchmark's 26")
            if task not in tasks:
                continue
            if row["duration"] not in DURATIONS:
                known = ", ".join(DURATIONS)
                raise RowError(f"duration is {row['duration']!r}, none of {known}")
            if durations == "all" or row["duration"] in durations:
                yield _sample(row, f"{video}-{number}", template)
        except RowError as error:
            yield LeftOut(place=where, task=task, reason=str(error))


def _rows(root: Path) -> Iterator[tuple[str, Row]]:
    for path in find_file(root, FILES, "WorldSense"):
        if path.suffix == ".json":
            yield from _json_rows(path)
        else:
            for number, row in table_rows(path, COLUMNS, ("video_path",)):
                yield place(path, number), row


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        videos = json.loads(text, object_pairs_hook=each_once)
        json.dumps(videos, ensure_ascii=False).encode()  # half a character can't be stored
    except DoubledField as error:
        raise AnnotationError(f"{path}: {error} is there twice; fetch it again") from error
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{path}: not valid JSON ({error}); fetch it again") from error
    if not isinstance(videos, dict) or not all(isinstance(v, dict) for v in videos.values()):
        raise AnnotationError(f"{path}: is no object of videos; is this the benchmark's own file?")
    for video, about in videos.items():
        keys = sorted(filter(_TASK_KEY.fullmatch, about), key=lambda key: int(key[4:]))
        if not keys:
            raise AnnotationError(f"{path}: video {video} has no task0; is this the right file?")
        for key in keys:
            question = about[key] if isinstance(about[key], dict) else {}
            row = {name: question.get(name) for name in COLUMNS}
            row |= {"video": video, "duration": about.get("duration")}
            yield f"{path}, video {video}, {key}", row


def _sample(row: Row, sample_id: str, template: PromptTemplate) -> Sample:
    options = options_of(row, "candidates", counts=(3, 4))
    task, video = str(row["task_type"]), text_of(row, "video")
    path = str(PurePosixPath(str(row.get("video_path") or f"videos/{video}.mp4")))
    return Sample(
        sample_id=sample_id,
        dataset="worldsense",
        task=task,
        category=WORLDSENSE.category(task),
        layout="single_video",
        parts=single_video(
            template,
            MediaPart(kind="video", path=path, with_audio=True),
            text_of(row, "question"),
            options,
        ),
        answer=answer_of(row, "answer", len(options)),
        media_group=video,
    )
