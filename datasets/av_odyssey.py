"""AV-Odyssey, as it lies on the hub.

    ROOT/av_odyssey_part*.parquet  `AV_Odyssey_Bench`: media inside (image_1, audio_1 ...)
    ROOT/av_odyssey.parquet        `AV_Odyssey_Bench_LMMs_Eval`: lists of paths below ROOT

Only the columns of text are read here: media inside a table are read when they are decoded. A
task has no name in the data; it follows from the task's id, 1 to 26.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from avflow.datasets.choices import answer_of, options_of, text_of
from avflow.datasets.matching import FilePath, candidate_of, parse_matching
from avflow.datasets.prompts import PromptTemplate, interleaved
from avflow.datasets.reading import (
    AnnotationError,
    LeftOut,
    Row,
    RowError,
    column_names,
    find_file,
    place,
    table_rows,
)
from avflow.datasets.sample import MediaKind, Sample
from avflow.datasets.selections import AV_ODYSSEY
from avflow.datasets.stored_media import cell_path

FILES = ("av_odyssey_part*.parquet", "av_odyssey.parquet")
COLUMNS = ("question_id", "question", "options", "answer")
TASK_COLUMN = "question_type_id"

_TASKS = AV_ODYSSEY.names()  # in the order of their ids
_QUESTION_ID = re.compile(r"(\d+)_\d+")
_PATH_COLUMNS = ("image_path", "audio_path")
_CELL_COLUMNS = ("image_1", "audio_1")


def read(
    root: Path,
    *,
    tasks: Collection[str],
    directions: str | Collection[str],
    orderings: str | Collection[str],
    template: PromptTemplate,
) -> Iterator[Sample | LeftOut]:
    """The matching questions of these tasks, directions and orderings (`all`, or some).

    Raises AnnotationError when there is no table, or it lacks a column.
    """
    for path in find_file(root, FILES, "AV-Odyssey"):
        in_cells = _media_in_cells(path)
        for number, row in table_rows(path, COLUMNS, (TASK_COLUMN, *_PATH_COLUMNS)):
            task = "?"
            try:
                task = _task(row)
                if task not in tasks:
                    continue
                media = _cells(root, path, number) if in_cells else _paths(row)
                sample = _sample(row, task, media, template)
            except RowError as error:
                yield LeftOut(place=place(path, number), task=task, reason=str(error))
                continue
            if (directions == "all" or sample.direction in directions) and (
                orderings == "all" or sample.ordering in orderings
            ):
                yield sample


def _media_in_cells(path: Path) -> bool:
    names = column_names(path)
    if set(_PATH_COLUMNS) <= set(names):
        return False
    if set(_CELL_COLUMNS) <= set(names):
        return True
    raise AnnotationError(
        f"{path}: no media columns (image_1, audio_1 ... or image_path, audio_path); it has "
        f"{', '.join(names)}"
    )


def _task(row: Row) -> str:
    """From the type's id, or the question's: 7_12 is the 12th question of task 7."""
    text = str(row.get(TASK_COLUMN) or "").strip()
    field = TASK_COLUMN
    if not text:
        field, text = "question_id", str(row["question_id"])
        match = _QUESTION_ID.fullmatch(text)
        text = match[1] if match else text
    if not text.isdecimal() or not 1 <= int(text) <= len(_TASKS):
        raise RowError(f"{field} is {text!r}, which is no task's id, 1 to {len(_TASKS)}")
    return _TASKS[int(text) - 1]


def _sample(row: Row, task: str, path_of: FilePath, template: PromptTemplate) -> Sample:
    question = parse_matching(text_of(row, "question"), path_of)
    if {question.reference, question.candidates} != {"image", "audio"}:
        raise RowError(f"question matches {question.reference} with {question.candidates}")
    options = options_of(row, "options")
    named = [candidate_of(o, question.candidates, question.n_candidates) for o in options]
    if len(set(named)) < len(named):
        raise RowError(f"options name a candidate twice: {', '.join(options)}")
    answer = answer_of(row, "answer", len(options))
    name = text_of(row, "question_id")
    return Sample(
        sample_id=name,
        dataset="av_odyssey",
        task=task,
        category=AV_ODYSSEY.category(task),
        layout="interleaved",
        parts=interleaved(template, question.parts, options),
        answer=answer,
        media_group=name,
        direction=question.direction,
        ordering=question.ordering,
        correct_candidate=named[answer],
    )


def _cells(root: Path, path: Path, row: int) -> FilePath:
    file = path.relative_to(root).as_posix()
    return lambda kind, number: cell_path(file, f"{kind}_{number}", row - 1)


def _paths(row: Row) -> FilePath:
    def path_of(kind: MediaKind, number: int) -> str:
        field = f"{kind}_path"
        paths = row.get(field)
        if not isinstance(paths, list) or len(paths) < number or not paths[number - 1]:
            raise RowError(f"{field} is {paths!r}, which has no path number {number}")
        return str(paths[number - 1])

    return path_of
