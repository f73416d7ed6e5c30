"""AV-SpeakerBench (`plnguyen2908/AV-SpeakerBench`), as it lies on the hub.

    ROOT/test.csv                  or test.tsv, or data/test-*.parquet
    ROOT/audiovisual/*.mp4         with sound; the paths are in the table

`visual_only/` and `audio_only/` are not read: a clip is sent with its own sound.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

from avflow.datasets.choices import answer_of, options_of, text_of
from avflow.datasets.prompts import PromptTemplate, single_video
from avflow.datasets.reading import LeftOut, Row, RowError, find_file, place, table_rows
from avflow.datasets.sample import MediaPart, Sample
from avflow.datasets.selections import AV_SPEAKERBENCH

FILES = ("test.csv", "test.tsv", "data/test-*.parquet")
COLUMNS = ("question_id", "task_id", "question", "choices", "answer", "audio_visual_path")
OTHER_TASK_COLUMN = "sub_category"  # consumers of an older table found the names there

_TASKS = frozenset(AV_SPEAKERBENCH.names())


def read(
    root: Path, *, tasks: Collection[str], template: PromptTemplate
) -> Iterator[Sample | LeftOut]:
    """The questions of these tasks, in the table's order.

    Raises AnnotationError when there is no table, or it lacks a column.
    """
    for path in find_file(root, FILES, "AV-SpeakerBench"):
        for number, row in table_rows(path, COLUMNS, (OTHER_TASK_COLUMN,)):
            task = _task(row)
            try:
                if task not in _TASKS:
                    raise RowError(f"task_id is {task!r}, none of the benchmark's 12")
                if task in tasks:
                    yield _sample(row, task, template)
            except RowError as error:
                yield LeftOut(place=place(path, number), task=task, reason=str(error))


def _task(row: Row) -> str:
    name = str(row["task_id"]).strip()
    other = str(row.get(OTHER_TASK_COLUMN) or "").strip()
    return other if name not in _TASKS and other in _TASKS else name


def _sample(row: Row, task: str, template: PromptTemplate) -> Sample:
    options = options_of(row, "choices")
    path = text_of(row, "audio_visual_path")
    clip = MediaPart(kind="video", path=path, with_audio=True)
    return Sample(
        sample_id=text_of(row, "question_id"),
        dataset="av_speakerbench",
        task=task,
        category=AV_SPEAKERBENCH.category(task),
        layout="single_video",
        parts=single_video(template, clip, text_of(row, "question"), options),
        answer=answer_of(row, "answer", len(options)),
        media_group=path,
    )
