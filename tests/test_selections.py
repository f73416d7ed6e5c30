"""The paper's tables as data, and the comparison of data with them."""

from pathlib import Path

import pytest
from benchmark_snapshots import (
    PAPER,
    changed,
    load,
    odyssey_rows,
    speakerbench_rows,
    worldsense_rows,
    write_odyssey,
    write_speakerbench,
    write_worldsense,
)

from avflow.datasets.selections import (
    AV_ODYSSEY,
    AV_SPEAKERBENCH,
    CQR,
    QRC,
    RCQ,
    RQC,
    SELECTIONS,
    WORLDSENSE,
    CountCheck,
    Selection,
    Task,
    check_counts,
)


def total(selection: Selection, use: str) -> int:
    return sum(selection.task(name).count or 0 for name in selection.names(use))


def test_the_sums_of_the_paper_s_rows() -> None:
    assert total(AV_SPEAKERBENCH, "knockout") == 2081  # the paper prints 2,281
    assert total(AV_SPEAKERBENCH, "cross_task") == 493
    assert total(AV_SPEAKERBENCH, "all") == 3212
    assert total(WORLDSENSE, "knockout") == 418
    assert total(WORLDSENSE, "cross_task") == 45 + 27
    assert total(AV_ODYSSEY, "knockout") == 1304
    assert total(AV_ODYSSEY, "cross_task") == 400
    assert [len(s.tasks) for s in SELECTIONS.values()] == [12, 26, 26]
    for selection in SELECTIONS.values():
        assert len(set(selection.names())) == len(selection.tasks)


def test_the_categories_of_av_speakerbench() -> None:
    sums: dict[str, int] = {}
    for name in AV_SPEAKERBENCH.names("knockout"):
        category = AV_SPEAKERBENCH.category(name)
        sums[category] = sums.get(category, 0) + (AV_SPEAKERBENCH.task(name).count or 0)
    assert sums == {
        "Speech Attributes": 621,
        "Speech Recognition": 201,
        "Visual Recognition": 410,
        "Speaker Recognition": 422,
        "Speaker Detection": 427,
    }
    assert AV_SPEAKERBENCH.category("Speech Counting") == "Speech Counting"


def test_the_directions_and_orderings_of_av_odyssey() -> None:
    tasks = [AV_ODYSSEY.task(name) for name in AV_ODYSSEY.names("knockout")]
    orderings = [task.orderings or {} for task in tasks]
    sums = {label: sum(o[label] for o in orderings) for label in (CQR, QRC, RCQ, RQC)}
    assert sums == {CQR: 1001, QRC: 161, RCQ: 124, RQC: 18}
    for task in tasks:
        assert sum((task.orderings or {}).values()) == task.count
        assert sum((task.directions or {}).values()) == task.count
    audio_reference = sum((task.directions or {})["audio_to_image"] for task in tasks)
    assert round(100 * audio_reference / 1304) == 77
    percent = {  # Tables 9 and 12; the paper prints 39% for Bird's images, and means 49%
        "Instrument Recognition": (49, 51),
        "Music Genre Classification": (52, 48),
        "Bird Recognition": (51, 49),
    }
    for name, expected in percent.items():
        directions = AV_ODYSSEY.task(name).directions or {}
        assert tuple(round(n / 2) for n in directions.values()) == expected


def test_names_are_the_authors_and_unknown_ones_are_refused() -> None:
    assert AV_ODYSSEY.names()[0] == "Instrument Recognition"
    assert AV_ODYSSEY.names()[3] == "Bird Recognition"
    assert AV_ODYSSEY.names()[8] == "Hazard Recognition"
    assert AV_ODYSSEY.names()[16] == "Film and Music Matching"
    assert AV_ODYSSEY.names()[25] == "Action Tracing"
    assert WORLDSENSE.names(["Audio Change"]) == ("Audio Change",)
    with pytest.raises(KeyError):
        WORLDSENSE.names(["Smell"])


SMALL = Selection(
    layout="interleaved",
    tasks=(Task(name="a", count=2, directions={"x": 1, "y": 1}), Task(name="b")),
)


def test_rounding_hides_one_question_and_no_more() -> None:
    (total, x, y) = check_counts(SMALL, ("a", "b"), ())
    assert total == CountCheck(task="a", expected=2, found=0)
    assert not total.good
    assert (x.part, x.within, x.good) == ("x", 1, True)
    assert str(total) == "a: 0 questions where the paper has 2"
    assert str(y) == "a, y: 0 questions where the paper has 1"
    assert not CountCheck(task="a", part="x", expected=3, found=1, within=1).good


def test_data_of_the_paper_s_size_pass_row_by_row(tmp_path: Path) -> None:
    roots = {
        "av_speakerbench": write_speakerbench(
            tmp_path / "s", speakerbench_rows(PAPER["av_speakerbench"])
        ),
        "worldsense": write_worldsense(tmp_path / "w", worldsense_rows(PAPER["worldsense"])),
        "av_odyssey": write_odyssey(tmp_path / "o", odyssey_rows(PAPER["av_odyssey"])),
    }
    for reader, root in roots.items():
        for use in ("knockout", "cross_task"):
            loaded = load(reader, root, tasks=use)
            assert len(loaded.samples) == total(SELECTIONS[reader], use)
            assert loaded.checks
            assert loaded.warnings() == []
    assert len(load("av_speakerbench", roots["av_speakerbench"], tasks="all").samples) == 3212
    assert len(load("av_odyssey", roots["av_odyssey"]).checks) == 7 * (1 + 2 + 4)


def test_a_question_too_few_is_named(tmp_path: Path) -> None:
    rows = odyssey_rows(PAPER["av_odyssey"])
    (one,) = [i for i, row in enumerate(rows) if row["question_id"] == "7_200"]  # the last
    loaded = load("av_odyssey", write_odyssey(tmp_path, rows[:one] + rows[one + 1 :]))
    bad = [check for check in loaded.checks if not check.good]
    assert bad == [
        CountCheck(task="Material Recognition", expected=200, found=199),
        CountCheck(task="Material Recognition", part="audio_to_image", expected=200, found=199),
        CountCheck(task="Material Recognition", part=RQC, expected=7, found=6),
    ]
    assert loaded.warnings() == ["Material Recognition: 199 questions where the paper has 200"]


def test_a_question_in_another_order_is_named(tmp_path: Path) -> None:
    rows = odyssey_rows({"Animal Recognition": 200})
    text = "Given [audio1] and also [img1][img2][img3][img4]: which one of these belongs to it?"
    loaded = load("av_odyssey", write_odyssey(tmp_path, changed(rows, 0, question=text)))
    assert [warning for warning in loaded.warnings() if "Animal" in warning] == [
        f"Animal Recognition, {CQR}: 199 questions where the paper has 200",
        f"Animal Recognition, {RCQ}: 1 questions where the paper has 0",
    ]


def test_another_selection_than_the_paper_s_is_not_compared_with_it(tmp_path: Path) -> None:
    rows = worldsense_rows({"Audio Change": 3})
    root = write_worldsense(tmp_path / "w", rows)
    assert load("worldsense", root, tasks=["Audio Change"]).checks[0].found == 3
    assert load("worldsense", root, tasks=["Audio Change"], durations="all").checks == ()
    root = write_odyssey(tmp_path / "o", odyssey_rows({"Bird Recognition": 4}))
    assert load("av_odyssey", root, tasks="cross_task", orderings=[CQR]).checks == ()
