"""What the report says in words: the numbers are the store's, and no claim is larger than they."""

import numpy as np
import polars as pl
import pytest

from avflow.orchestrator.accuracy import accuracies, change_words
from avflow.orchestrator.extras_figures import attention_shares
from avflow.orchestrator.findings import verdicts
from avflow.orchestrator.sentences import (
    attention_sentences,
    curve_sentences,
    spoken,
    sweep_sentences,
)
from avflow.orchestrator.statistics import bootstrap_band
from avflow.pathways.catalogue import ALL
from avflow.pathways.pathway import Pathway


def point(layer: int, mean: float, **changes: object) -> dict[str, object]:
    row: dict[str, object] = {
        "model": "m", "dataset": "d", "task": "sight", "variant": "letter", "window": 7,
        "pathway": "video_to_question", "center_layer": layer, "n": 40, "videos": 30, "mean": mean,
        "low": mean - 0.01, "high": mean + 0.01, "q_value": 0.0001 if mean else 1.0,
    }  # fmt: skip
    return row | changes


def test_an_effect_is_told_with_its_size_n_band_corrected_p_and_layers() -> None:
    curve = pl.DataFrame([point(0, 0.0), point(1, -0.4), point(2, -0.8), point(3, 0.0)])
    (sentence,) = curve_sentences(curve)
    assert sentence == (
        "video -/-> question: if the question can't read the video, the predicted answer's "
        "probability falls for sight by 80% at layer 2 (95% band -81% to -79%, corrected p < "
        "0.001, n = 40 of 30 videos; effect at layers 1-2)."
    )


def test_both_signs_of_a_curve_are_told() -> None:
    curve = pl.DataFrame([point(0, -0.4), point(1, 0.2), point(2, 0.3)])
    (sentence,) = curve_sentences(curve)
    assert "falls for sight by 40% at layer 0" in sentence
    assert "it rises for sight by 30% at layer 2" in sentence
    assert verdicts(curve).select("verdict", "layers").rows() == [("falls", "0"), ("rises", "1-2")]


def test_a_large_change_that_is_not_sure_is_unclear() -> None:
    wide = point(0, -0.3, low=-0.7, high=0.1, q_value=0.21)
    (sentence,) = curve_sentences(pl.DataFrame([wide]))
    assert (
        "whether the predicted answer's probability changes is unclear for sight, whose" in sentence
    )
    assert "-30% at layer 0 (95% band -70% to +10%, corrected p = 0.21, n = 40" in sentence
    assert "falls" not in sentence


def test_a_small_change_is_no_proof_of_none() -> None:
    tight = pl.DataFrame([point(0, 0.01, low=0.0, high=0.02, q_value=0.3)])
    assert (
        "changes by no more than 5% at any layer for sight (no band goes beyond 2.0%;"
        in (curve_sentences(tight)[0])
    )
    loose = pl.DataFrame([point(0, 0.01, low=-0.2, high=0.1, q_value=0.9)])
    (sentence,) = curve_sentences(loose)
    assert (
        "no mean change over 5% is seen for sight, but bands reach 20.0%, so that one" in sentence
    )
    assert "is not excluded" in sentence


def test_one_sample_says_nothing_and_few_say_little() -> None:
    unknown = {"low": None, "high": None, "q_value": None}
    alone = pl.DataFrame(
        [point(0, -0.9, n=1, videos=1, **unknown)],
        schema_overrides=dict.fromkeys(unknown, pl.Float64),
    )
    first, caution = curve_sentences(alone)
    assert first.endswith("nothing can be said of sight: one sample or video.")
    assert "stand on 1 video:" in caution
    few = pl.DataFrame([point(0, -0.9, n=8, videos=8)])
    assert "bands of fewer than 20 are too narrow" in curve_sentences(few)[-1]


def test_each_pathway_has_plain_words() -> None:
    told = [spoken(pathway) for pathway in ALL]
    assert all("_" not in text and "-/->" not in text for text in told)
    assert "frames can't read each other" in told
    assert "the audio and the video can't read each other" in told
    assert "the letter of the right option can't read the reference" in told
    own = Pathway(
        name="mine", layout="single_video", sources=("system",), targets=("true_option", "last")
    )
    curve = pl.DataFrame([point(0, -0.5, pathway="mine")])
    assert curve_sentences(curve, [own])[0].startswith(
        "system -/-> true_option+last: if the letter of the right option and the last token can't "
        "read the system, "
    )


def test_several_models_have_headings() -> None:
    both = pl.DataFrame([point(0, -0.5), point(0, -0.5, model="other")])
    lines = sweep_sentences(both)
    assert [line for line in lines if line.endswith(":")] == [
        "m, d, window 7 (letter):", "other, d, window 7 (letter):",
    ]  # fmt: skip


def answers(before: list[bool], after: list[bool], per_video: int = 1) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "model": "m", "dataset": "d", "kind": "mask", "intervention": "late",
            "sample_id": [f"s{i:02d}" for i in range(len(before))],
            "media_group": [f"v{i // per_video:02d}" for i in range(len(before))],
            "correct_base": before, "correct": after, "prefill_s": None, "token_layers": None,
        },
        schema_overrides={"prefill_s": pl.Float64, "token_layers": pl.Int64},
    )  # fmt: skip


def test_accuracies_are_paired_and_their_bands_draw_videos() -> None:
    before = [True] * 9 + [False] * 3
    after = [True] * 6 + [False] * 5 + [True]
    (row,) = accuracies(answers(before, after, per_video=2), ["intervention"]).iter_rows(named=True)
    assert (row["n"], row["videos"], row["right"], row["right_base"]) == (12, 6, 7, 9)
    assert (row["lost"], row["gained"]) == (3, 1)
    assert row["change"] == pytest.approx(-2 / 12)
    moved = np.array(after, dtype=float) - np.array(before, dtype=float)
    low, high = bootstrap_band(moved[:, None], np.arange(12) // 2)
    assert (row["low"], row["high"]) == pytest.approx((low[0], high[0]))
    assert change_words(row).startswith("-16.7 points, 95% band ")
    assert change_words(row).endswith("; 3 lost, 1 gained")


def test_no_answer_changed_says_how_often_one_could() -> None:
    (row,) = accuracies(answers([True] * 59, [True] * 59), ["kind"]).iter_rows(named=True)
    assert change_words(row) == "no answer is lost or gained; a rate of up to 5.0% could go unseen"


def test_a_discard_without_its_baseline_is_compared_with_nothing() -> None:
    rows = answers([True, True], [True, False])
    (row,) = accuracies(rows, ["kind"], against="not_run").iter_rows(named=True)
    assert row["accuracy"] == 0.5
    assert change_words(row) == "nothing to compare with is stored"


def test_shares_of_attention_add_up_to_one() -> None:
    groups = {"system": 0.1, "video": 0.2, "audio": 0.1, "question": 0.4, "last": 0.1,
              "true_option": 0.1, "template": 0.3}  # fmt: skip
    table = pl.DataFrame(
        [
            {"model": "m", "dataset": "d", "task": task, "layer": 0, "group": group,
             "attention": value, "n": n}
            for task, n in (("sight", 3), ("sound", 1))
            for group, value in groups.items()
        ]
    )  # fmt: skip
    shares = attention_shares(table)
    assert dict(shares.select("group", "share").iter_rows()) == pytest.approx(
        {"system": 0.1, "video": 0.2, "audio": 0.1, "user text": 0.5, "other": 0.1}
    )
    assert set(shares["n"]) == {4}
    (sentence,) = attention_sentences(shares)
    assert sentence.startswith("Mean over 4 samples, right or wrong: ")
    assert "50% to user text" in sentence
