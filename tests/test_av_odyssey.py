"""AV-Odyssey: media inside the table or beside it, both directions, the four orderings."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from benchmark_snapshots import (
    SPEC,
    Row,
    changed,
    load,
    odyssey_rows,
    write_odyssey,
    write_table,
)

from avflow.datasets.media import MediaError, decode_media, decode_sample
from avflow.datasets.sample import LETTERS, MediaPart, Sample, TextPart
from avflow.datasets.selections import CQR, QRC, RCQ, RQC
from avflow.datasets.stored_media import cell_path, opened
from avflow.orchestrator.errors import ConfigError

ALL_FOUR = (CQR, QRC, RCQ, RQC)


def without_paths(sample: Sample) -> tuple[object, ...]:
    parts = tuple(
        (p.kind, p.role, p.index) if isinstance(p, MediaPart) else p for p in sample.parts
    )
    return sample.sample_id, sample.task, parts, sample.answer, sample.correct_candidate


def test_both_layouts_ask_the_same(tmp_path: Path) -> None:
    rows = odyssey_rows({"Animal Recognition": 8, "Bird Recognition": 8}, orderings=ALL_FOUR)
    cells = load("av_odyssey", write_odyssey(tmp_path / "c", rows), tasks="all")
    paths = load("av_odyssey", write_odyssey(tmp_path / "p", rows, in_cells=False), tasks="all")
    assert list(map(without_paths, cells.samples)) == list(map(without_paths, paths.samples))
    assert Counter(s.ordering for s in cells.samples) == dict.fromkeys(ALL_FOUR, 4)
    assert Counter(s.direction for s in cells.samples) == {
        "audio_to_image": 8,
        "image_to_audio": 8,
    }
    assert {m.path for s in paths.samples for m in s.media} == {
        *(f"media/picture-{i}.png" for i in range(4)),
        *(f"media/sound-{i}.wav" for i in range(4)),
    }


def test_the_answer_s_ordinal_is_the_candidate(tmp_path: Path) -> None:
    rows = odyssey_rows({"Animal Recognition": 12})
    loaded = load("av_odyssey", write_odyssey(tmp_path, rows))
    ordinals = ("first", "second", "third", "fourth")
    moved = 0
    for row, sample in zip(rows, loaded.samples, strict=True):
        option = row["options"][LETTERS.index(row["answer"])]
        assert sample.correct_candidate is not None
        assert ordinals[sample.correct_candidate] in option
        assert sample.answer_letter == row["answer"]
        moved += sample.correct_candidate != sample.answer
    assert moved > 3  # letters and candidates are not in one order


def test_directions_and_orderings_can_be_chosen(tmp_path: Path) -> None:
    rows = odyssey_rows({"Animal Recognition": 16}, orderings=ALL_FOUR)
    root = write_odyssey(tmp_path, rows)
    only = load("av_odyssey", root, orderings=[QRC, RQC])
    assert {s.ordering for s in only.samples} == {QRC, RQC}
    only = load("av_odyssey", root, directions=["image_to_audio"], orderings=[CQR])
    assert {(s.direction, s.ordering) for s in only.samples} == {("image_to_audio", CQR)}
    reference = only.samples[0].media[-1]
    assert (reference.kind, reference.role) == ("image", "reference")
    assert [m.index for m in only.samples[0].media] == [0, 1, 2, 3, None]


def test_media_are_read_out_of_their_cells(tmp_path: Path) -> None:
    rows = odyssey_rows({"Animal Recognition": 7}, orderings=ALL_FOUR)
    cells = write_odyssey(tmp_path / "c", rows, media=True)
    paths = write_odyssey(tmp_path / "p", rows, in_cells=False, media=True)
    inside, beside = load("av_odyssey", cells).samples, load("av_odyssey", paths).samples
    assert {m.path.split("#")[0] for s in inside for m in s.media} == {
        "av_odyssey_part1.parquet",
        "av_odyssey_part2.parquet",
    }
    for one, other in zip(inside, beside, strict=True):
        for a, b in zip(
            decode_sample(cells, one, SPEC), decode_sample(paths, other, SPEC), strict=True
        ):
            assert a.kind == b.kind
            for mine, theirs in ((a.frames, b.frames), (a.waveform, b.waveform)):
                assert (mine is None) == (theirs is None)
                assert mine is None or np.array_equal(mine, theirs)


def test_cells_may_hold_bytes_beside_a_path(tmp_path: Path) -> None:
    write_table(
        tmp_path / "t.parquet",
        [{"image_1": {"bytes": bytes([i]), "path": "x"}} for i in range(7)],
        row_group_size=3,
    )
    for row in (0, 2, 3, 6):
        with opened(tmp_path, cell_path("t.parquet", "image_1", row)) as file:
            assert file.read_bytes() == bytes([row])
    assert not file.exists()


def test_tables_in_large_pieces_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_odyssey(tmp_path, odyssey_rows({"Animal Recognition": 4}), media=True)
    assert load("av_odyssey", root).notes == ()
    monkeypatch.setattr("avflow.datasets.stored_media._COARSE_BYTES", 1000)
    loaded = load("av_odyssey", root)
    assert [note.partition(": ")[0] for note in loaded.notes] == [
        str(root / f"av_odyssey_part{i}.parquet") for i in (1, 2)
    ]
    assert "row groups of up to" in loaded.warnings()[0]


def test_a_snapshot_in_the_hub_s_cache_is_read_in_place(tmp_path: Path) -> None:
    rows = odyssey_rows({"Animal Recognition": 2})
    file = write_odyssey(tmp_path / "elsewhere", rows, media=True, parts=1)
    blobs, snapshot = tmp_path / "cache/blobs", tmp_path / "cache/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (file / "av_odyssey_part1.parquet").rename(blobs / "0123")
    (snapshot / "av_odyssey_part1.parquet").symlink_to("../../blobs/0123")
    first = load("av_odyssey", snapshot).samples[0]
    assert [media.kind for media in decode_sample(snapshot, first, SPEC)] == ["image"] * 4 + [
        "audio"
    ]


def test_a_cell_is_a_file_without_linux_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.memfd_create")
    write_table(tmp_path / "t.parquet", [{"image_1": b"x"}])
    with opened(tmp_path, cell_path("t.parquet", "image_1", 0)) as file:
        assert file.read_bytes() == b"x"
    assert not file.exists()


def test_a_cell_that_can_t_be_used_is_named(tmp_path: Path) -> None:
    rows = odyssey_rows({"Animal Recognition": 2})
    root = write_odyssey(tmp_path, rows, media=True, parts=1)
    file = root / "av_odyssey_part1.parquet"
    table = pq.read_table(file).to_pylist()
    write_table(file, [table[0] | {"image_1": b"no image", "image_2": None}, *table[1:]])

    def refusal(path: str) -> str:
        with pytest.raises(MediaError) as caught:
            decode_media(root, MediaPart(kind="image", path=path), SPEC)
        return str(caught.value)

    name = file.name
    assert f"{file}#image_1/0: " in refusal(cell_path(name, "image_1", 0))
    assert "column image_2, row 1: holds no media bytes" in refusal(cell_path(name, "image_2", 0))
    assert "column image_9, row 1: can't be read" in refusal(cell_path(name, "image_9", 0))
    assert "row 3: can't be read (the file has fewer rows)" in refusal(
        cell_path(name, "image_1", 2)
    )
    assert "no such file" in refusal(cell_path("none.parquet", "image_1", 0))
    assert "leaves the data set's root" in refusal(cell_path("../x.parquet", "image_1", 0))


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("answer", "E", "answer is 'E', which is none of its options, ABCD"),
        ("options", ["first image"] * 4, "options name a candidate twice"),
        ("options", ["first", "second", "third", "last"], "options hold 'last', which does not"),
        ("options", ["first", "second", "third", "fifth"], "and there are 4 candidates"),
        ("options", ["first audio", "second", "third", "fourth"], "the candidates are of kind"),
        ("options", ["first", "second", "third"], "options holds 3 options, not 4"),
        ("options", None, "options is None, which is no list of texts"),
        ("question", "Look at [img1] and hear [audio1]", "is not about one reference"),
        ("question", "[video1] like [img1][img2][img3][img4]", "question matches video with image"),
        ("question", "", "question is '', and a text is needed"),
        ("question_id", None, "question_id is None, and a text is needed"),
        ("question_type_id", 27, "question_type_id is '27', which is no task's id, 1 to 26"),
        ("question_type_id", -1, "question_type_id is '-1', which is no task's id"),
    ],
)
def test_a_broken_row_is_left_out_by_name(
    tmp_path: Path, field: str, value: object, reason: str
) -> None:
    rows = odyssey_rows({"Material Recognition": 4})
    root = write_odyssey(tmp_path, changed(rows, 2, **{field: value}))
    loaded = load("av_odyssey", root, tasks=["Material Recognition"])
    assert len(loaded.samples) == 3
    (said,) = map(str, loaded.left_out)
    assert said.startswith(f"{root / 'av_odyssey_part2.parquet'}, row 1: ")
    assert reason in said


def test_the_task_follows_from_either_id(tmp_path: Path) -> None:
    rows = odyssey_rows({"Hazard Recognition": 2})
    for spelled in (9, "9", " 9 "):
        typed: list[Row] = [row | {"question_type_id": spelled} for row in rows]
        root = write_odyssey(tmp_path / f"{spelled!r}", typed)
        loaded = load("av_odyssey", root)
        assert {s.task for s in loaded.samples} == {"Hazard Recognition"}
    root = write_odyssey(tmp_path / "p", changed(rows, 0, question_id="what"), in_cells=False)
    loaded = load("av_odyssey", root)
    assert [s.task for s in loaded.samples] == ["Hazard Recognition"]
    assert "question_id is 'what', which is no task's id" in str(loaded.left_out[0])


def test_a_path_that_is_not_there_leaves_the_question_out(tmp_path: Path) -> None:
    rows = odyssey_rows({"Hazard Recognition": 2})
    root = write_odyssey(tmp_path, rows, in_cells=False)
    table = pq.read_table(root / "av_odyssey.parquet").to_pylist()
    table[1]["image_path"] = ["media/picture-0.png"]
    write_table(root / "av_odyssey.parquet", table)
    (said,) = load("av_odyssey", root).left_out
    assert "image_path is ['media/picture-0.png'], which has no path number 2" in str(said)


def test_all_tasks_leave_out_what_is_no_matching_question(tmp_path: Path) -> None:
    rows = odyssey_rows({"Hazard Recognition": 3})
    question = "How far away is [audio1], seen in [img1]?"
    rows = changed(rows, 0, question=question, question_type_id=20, question_id="20_1")
    root = write_odyssey(tmp_path, rows)
    assert not load("av_odyssey", root).left_out
    loaded = load("av_odyssey", root, tasks="all")
    assert [left_out.task for left_out in loaded.left_out] == ["Audio Distance Estimation"]
    assert len(loaded.samples) == 2


def test_tables_that_can_t_be_used_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no annotations of AV-Odyssey .*av_odyssey_part"):
        load("av_odyssey", tmp_path)
    rows = odyssey_rows({"Hazard Recognition": 1})
    write_table(tmp_path / "av_odyssey.parquet", rows)
    with pytest.raises(ConfigError, match=r"av_odyssey\.parquet: no media columns \(image_1"):
        load("av_odyssey", tmp_path)
    del rows[0]["options"]
    write_odyssey(tmp_path, rows)
    with pytest.raises(ConfigError, match=r"part1\.parquet: no column options; it has "):
        load("av_odyssey", tmp_path)


def test_the_prompt_is_the_benchmark_s(tmp_path: Path) -> None:
    rows = odyssey_rows({"Animal Recognition": 1})
    (sample,) = load("av_odyssey", write_odyssey(tmp_path, rows, parts=1)).samples
    text = "".join(
        p.text
        if isinstance(p, TextPart)
        else f"[{'img' if p.kind == 'image' else 'audio'}{(p.index or 0) + 1}]"
        for p in sample.parts
    )
    options = "".join(f"{a}:{o}\n" for a, o in zip("ABCD", rows[0]["options"], strict=True))
    closing = "Answer with the option's letter from the given choices directly."
    assert text == f"{rows[0]['question']}\n{options}{closing}"
