"""Folders in the layouts of the paper's benchmarks, with questions and media of our own.

Columns, spellings and value formats are the authors'; no row of theirs is here. `media=False`
leaves the clips out, so that a snapshot of full size costs nothing but its table.
"""

import csv
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from avflow.datasets.media_spec import MediaSpec
from avflow.datasets.sample import LETTERS
from avflow.datasets.selections import (
    AV_ODYSSEY,
    AV_SPEAKERBENCH,
    CQR,
    IMAGE_TO_AUDIO,
    QRC,
    RCQ,
    RQC,
    WORLDSENSE,
)
from avflow.datasets.testbed.render import render_clip, render_image, render_sound
from avflow.datasets.testbed.world import Scene, sample_scene
from avflow.orchestrator.data import LoadedDataset, load_samples
from avflow.orchestrator.dataset_config import DatasetConfig

Row = dict[str, Any]
PAPER: Mapping[str, dict[str, int]] = {
    name: {task.name: task.count for task in selection.tasks if task.count is not None}
    for name, selection in (
        ("av_speakerbench", AV_SPEAKERBENCH),
        ("worldsense", WORLDSENSE),
        ("av_odyssey", AV_ODYSSEY),
    )
}
N_CLIPS = 2
SPEC = MediaSpec(
    fps=2.0,
    max_frames=8,
    temporal_patch=2,
    frame_min_pixels=0,
    frame_max_pixels=10**6,
    image_min_pixels=0,
    image_max_pixels=10**6,
    patch_multiple=28,
    sample_rate=16000,
    max_audio_s=None,
)

_WORDS = ('the one in red, saying "I can\'t"', "nobody", "the one who left's friend", "both")


def load(reader: str, root: Path, **settings: object) -> LoadedDataset:
    """As a sweep reads it, with these settings."""
    raw = {"name": "data", "reader": reader, "root": str(root), "settings": settings}
    config = TypeAdapter[DatasetConfig](DatasetConfig).validate_json(json.dumps(raw))
    return load_samples(config)


def changed(rows: Sequence[Row], at: int, **fields: object) -> list[Row]:
    """The rows with one of them changed."""
    return [row | fields if index == at else row for index, row in enumerate(rows)]


# -- AV-SpeakerBench -------------------------------------------------------------------------

_DOMAINS = {"Speech": "Audio-centric", "Speaker": "Speaker-centric"}


def speakerbench_rows(counts: Mapping[str, int]) -> list[Row]:
    """In the authors' columns; options are a Python list in a text, with quotes of both kinds."""
    rows: list[Row] = []
    for task, count in counts.items():
        for number in range(count):
            clip = f"clip-{len(rows) % N_CLIPS}_0_4.mp4"
            rows.append(
                {
                    "question_id": f"q-{len(rows):05d}",
                    "video_id": f"video-{len(rows) % N_CLIPS}",
                    "category": _DOMAINS.get(task.split()[0], "Visual-centric"),
                    "sub_category": task.split()[0],
                    "task_id": task,
                    "question": f"Who speaks, in question {number},\nafter the door is shut?",
                    "choices": repr([f"{a}. {w}" for a, w in zip(LETTERS, _WORDS, strict=False)]),
                    "answer": LETTERS[len(rows) % 4],
                    "audio_visual_path": f"audiovisual/{clip}",
                    "visual_path": f"visual_only/{clip}",
                    "audio_path": f"audio_only/{clip}".replace(".mp4", ".wav"),
                }
            )
    return rows


def write_speakerbench(
    root: Path, rows: Sequence[Row], *, file: str = "test.csv", media: bool = False
) -> Path:
    """A snapshot with its table in test.csv, test.tsv or data/test-....parquet."""
    write_table(root / file, rows)
    if media:
        for number in range(N_CLIPS):
            render_clip(_scene(number), root / f"audiovisual/clip-{number}_0_4.mp4")
    return root


# -- WorldSense ------------------------------------------------------------------------------


def worldsense_rows(counts: Mapping[str, int], *, longer: int = 1) -> list[Row]:
    """A row a question, two or so a video; every third has three options. `longer`: as many
    questions a task again about longer videos."""
    rows: list[Row] = []
    for duration, factor in (("<1min", 1), ("1-2min", longer), (">8min", longer)):
        for task, count in counts.items():
            for _ in range(count * factor):
                n = 3 if len(rows) % 3 == 2 else 4
                rows.append(
                    {
                        "index": len(rows),
                        "video": f"{duration.strip('<>')}-{len(rows) // 2:04d}",
                        "duration": duration,
                        "domain": "Daily Life",
                        "candidates": [
                            f"{a}. {w}" for a, w in zip(LETTERS, _WORDS[:n], strict=False)
                        ],
                        "sub_category": "Cooking",
                        "audio_class": ["Speech", "Event"],
                        "task_domain": "Recognition",
                        "task_type": task,
                        "question": f"What is heard first ({len(rows)})?",
                        "answer": LETTERS[len(rows) % n],
                    }
                )
    return rows


def write_worldsense(
    root: Path, rows: Sequence[Row], *, file: str = "worldsense_qa.json", media: bool = False
) -> Path:
    """The authors' JSON, the Parquet copy, or the TSV of an evaluation kit."""
    if file.endswith(".json"):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(json.dumps(_by_video(rows)), encoding="utf-8")
    else:
        paths = [{"video_path": f"./videos/{row['video']}.mp4"} | row for row in rows]
        as_text = file.endswith(".tsv")
        write_table(root / file, [_spelled(row) for row in paths] if as_text else paths)
    if media:
        for number, video in enumerate(dict.fromkeys(str(row["video"]) for row in rows)):
            render_clip(_scene(number), root / f"videos/{video}.mp4")
    return root


def _by_video(rows: Sequence[Row]) -> dict[str, Row]:
    videos: dict[str, Row] = {}
    for row in rows:
        video = str(row["video"])
        about = videos.setdefault(
            video,
            {
                "video_id": video,
                "video_duration": "60s",
                "duration": row["duration"],
                "domain": row["domain"],
                "sub_category": row["sub_category"],
                "audio_class": row["audio_class"],
                "video_caption": "A kitchen.",
            },
        )
        number = sum(key.startswith("task") for key in about)
        asked = ("task_domain", "task_type", "question", "answer", "candidates")
        about[f"task{number}"] = {key: row[key] for key in asked if key in row}
    return videos


def _spelled(row: Row) -> Row:
    return {key: repr(value) if isinstance(value, list) else value for key, value in row.items()}


# -- AV-Odyssey ------------------------------------------------------------------------------

# R is the reference, C the four candidates. Text between candidates comes in several ways.
_ODYSSEY = {
    CQR: "Among the things in {C}, which one do you think belongs to {R}?",
    QRC: "Of all that is there to choose from, which one fits best with what is in {R}? {C}.",
    RCQ: "Given {R} and also {C}: which one of these would you say belongs to it?",
    RQC: "Thinking of {R}, which one of the things shown or heard here belongs to it: {C}?",
}
_JOINS = ((", ", " or "), ("", ""), (" ", " "), (", ", ", and "))
_ORDINALS = ("first", "second", "third", "fourth")


def odyssey_rows(counts: Mapping[str, int], *, orderings: Sequence[str] | None = None) -> list[Row]:
    """So many questions a task, in the paper's directions and orderings, or in these by turns."""
    rows: list[Row] = []
    for task, count in counts.items():
        step = 1 if orderings is None else len(orderings)
        directions = _spread(AV_ODYSSEY.task(task).directions or {}, count, step)
        labels = (
            _spread(AV_ODYSSEY.task(task).orderings or {CQR: count}, count)
            if orderings is None
            else cycle(orderings)
        )
        for number, (direction, ordering) in enumerate(zip(directions, labels, strict=False)):
            rows.append(_odyssey_row(task, number + 1, direction, ordering))
    return rows


def _spread(parts: Mapping[str, int], count: int, step: int = 1) -> Iterator[str]:
    if sum(parts.values()) == count:
        yield from (part for part, n in parts.items() for _ in range(n))
    else:
        present = [part for part, n in parts.items() if n]
        yield from (present[number // step % len(present)] for number in range(count))


def _odyssey_row(task: str, number: int, direction: str, ordering: str) -> Row:
    rng = random.Random(f"{task}:{number}")
    task_id = AV_ODYSSEY.names().index(task) + 1
    reference, candidates = ("img", "audio") if direction == IMAGE_TO_AUDIO else ("audio", "img")
    join, last = _JOINS[number % len(_JOINS)]
    shown = [f"[{candidates}{i}]" for i in (1, 2, 3, 4)]
    text = _ODYSSEY[ordering].format(
        R=f"[{reference}1]", C=join.join(shown[:-1]) + last + shown[-1]
    )
    noun = "image" if candidates == "img" else "audio"
    order = rng.sample(_ORDINALS, 4)
    article = "the " if number % 2 else ""
    return {
        "question_id": f"{task_id}_{number}",
        "question_type_id": task_id,
        "data_type": "image",
        "subfield": "Timbre",
        "question": text,
        "options": [f"{article}{ordinal} {noun}" for ordinal in order],
        "answer": LETTERS[rng.randrange(4)],
    }


def write_odyssey(
    root: Path, rows: Sequence[Row], *, in_cells: bool = True, media: bool = False, parts: int = 2
) -> Path:
    """`av_odyssey_part*.parquet` with the media inside, or `av_odyssey.parquet` with paths."""
    root.mkdir(parents=True, exist_ok=True)
    if in_cells:
        size = -(-len(rows) // parts)
        for part in range(parts):
            some = [row | _media_cells(root, row, media) for row in rows[part * size :][:size]]
            write_table(root / f"av_odyssey_part{part + 1}.parquet", some, row_group_size=3)
    else:
        write_table(root / "av_odyssey.parquet", [_with_paths(root, row, media) for row in rows])
    return root


def _numbers(row: Row) -> tuple[int, int]:
    """How many images and sounds a question has."""
    text = str(row["question"])
    return text.count("[img"), text.count("[audio")


def _media_cells(root: Path, row: Row, media: bool) -> Row:
    images, sounds = _numbers(row)
    cells: Row = {f"{kind}_{i}": None for kind in ("image", "audio") for i in (1, 2, 3, 4)}
    cells["video_1"] = None
    for kind, n in (("image", images), ("audio", sounds)):
        for i in range(n if media else 0):
            cells[f"{kind}_{i + 1}"] = _medium(root / ".rendered", kind, i).read_bytes()
    return cells


def _with_paths(root: Path, row: Row, media: bool) -> Row:
    """As the copy for lmms-eval: lettered options, no id of the task, lists of paths."""
    lists: dict[str, list[str]] = {"image_path": [], "audio_path": [], "video_path": []}
    for kind, n in zip(("image", "audio"), _numbers(row), strict=True):
        for i in range(n):
            path = _medium_path(root / "media", kind, i)
            if media:
                _medium(root / "media", kind, i)
            lists[f"{kind}_path"].append(path.relative_to(root).as_posix())
    lettered = [f"{a}. {option}" for a, option in zip(LETTERS, row["options"], strict=False)]
    rest = {key: value for key, value in row.items() if key not in ("question_type_id", "subfield")}
    return rest | lists | {"options": lettered}


def _medium_path(folder: Path, kind: str, number: int) -> Path:
    return folder / (f"picture-{number}.png" if kind == "image" else f"sound-{number}.wav")


def _medium(folder: Path, kind: str, number: int) -> Path:
    path = _medium_path(folder, kind, number)
    if not path.exists():
        (render_image if kind == "image" else render_sound)(number, 7, path)
    return path


# -- shared ----------------------------------------------------------------------------------


def write_table(path: Path, rows: Sequence[Row], **options: int) -> None:
    """By the ending of the name; text files as pandas writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path, **options)
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _scene(number: int) -> Scene:
    return sample_scene(random.Random(f"snapshot:{number}"))
