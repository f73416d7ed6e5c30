"""Each benchmark's snapshot through decoding and a tiny Qwen2.5-Omni's knockouts, and a sweep."""

import json
from pathlib import Path
from typing import Any

import in_process
import numpy as np
import polars as pl
import pytest
import torch
import yaml
from benchmark_snapshots import (
    changed,
    load,
    odyssey_rows,
    speakerbench_rows,
    worldsense_rows,
    write_odyssey,
    write_speakerbench,
    write_worldsense,
)

from avflow.datasets.media import decode_sample
from avflow.datasets.sample import Sample
from avflow.datasets.selections import CQR, QRC, RCQ, RQC
from avflow.orchestrator.data import LoadedDataset
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.results import read
from avflow.orchestrator.run_folder import sessions
from avflow.pathways import catalogue
from avflow.pathways.groups import group_positions
from avflow.workers.models import load as load_model
from avflow.workers.models.base import ModelSpec
from avflow.workers.models.tiny import build_tiny_checkpoint
from avflow.workers.protocol import CurveDone, CurveSpec, SampleDone, UnitSpec
from avflow.workers.run_unit import run_unit

N_LAYERS = 2
PATHWAYS = {
    "single_video": ("video_audio_to_question", "question_to_last"),
    "interleaved": ("candidates_to_reference", "incorrect_options_to_last"),
}
SHARED = "Attribute Recognition"  # a task of two of the three


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "omni", n_layers=N_LAYERS)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    torch.set_num_threads(1)
    spec = ModelSpec(name="t", family="qwen2_5_omni", path=str(checkpoint), dtype="float32")
    return load_model(spec, "cpu")


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few questions of each benchmark, with media; AV-SpeakerBench's third can't be asked."""
    root = tmp_path_factory.mktemp("snapshots")
    spoken = speakerbench_rows({SHARED: 2, "Speech Rate": 1})
    seen = worldsense_rows({SHARED: 2, "Audio Change": 1}, longer=0)
    matched = odyssey_rows({"Animal Recognition": 8}, orderings=(CQR, QRC, RCQ, RQC))
    return {
        "av_speakerbench": write_speakerbench(
            root / "s", changed(spoken, 2, answer="E"), media=True
        ),
        "worldsense": write_worldsense(root / "w", seen, media=True),
        "av_odyssey": write_odyssey(root / "o", matched, media=True),
    }


def knock_out(model: Any, loaded: LoadedDataset, sample: Sample) -> tuple[Any, list[CurveDone]]:
    """A sample through decoding and the model: its layout and its curves."""
    curves = tuple(
        CurveSpec(
            pathway=catalogue.find(name)[0],
            window=1,
            center_layers=tuple(range(N_LAYERS)),
            correct_only=False,
        )
        for name in PATHWAYS[sample.layout]
    )
    unit = UnitSpec(
        unit_id="u",
        model="t",
        data_root=str(loaded.root),
        sample=sample,
        curves=curves,
        wanted=frozenset(curve.key for curve in curves),
        byte_budget=2**28,
        cost=1,
    )
    media = decode_sample(loaded.root, sample, model.media_spec)
    *done, end = run_unit(model, unit, media, decode_s=0.0)
    assert isinstance(end, SampleDone), end
    assert all(isinstance(event, CurveDone) for event in done)
    return model.prepare(sample, media), done


@pytest.mark.parametrize("reader", ["av_speakerbench", "worldsense", "av_odyssey"])
def test_each_benchmark_is_decoded_laid_out_and_knocked_out(
    reader: str, model: Any, snapshots: dict[str, Path]
) -> None:
    loaded = load(reader, snapshots[reader], tasks="all")
    kinds = {(s.ordering, s.direction, s.n_options): s for s in loaded.samples}
    assert len(kinds) == {"av_speakerbench": 1, "worldsense": 2, "av_odyssey": 8}[reader]
    for sample in kinds.values():
        prepared, curves = knock_out(model, loaded, sample)
        assert len(curves) == 2
        for curve in curves:
            assert curve.p_knockout.shape == (N_LAYERS,)
            assert curve.p_options.shape == (N_LAYERS, sample.n_options)
            # What comes first can't read what comes later, so there is nothing to block.
            backwards = sample.ordering in (QRC, RCQ, RQC) and "_to_reference" in curve.curve
            assert np.all((curve.n_blocked_edges == 0) == backwards)
            assert np.all(np.isfinite(curve.p_knockout))
            if backwards:
                assert curve.p_knockout == pytest.approx(curve.p_base, rel=1e-5)
        layout = prepared.layout
        start = layout.segments[0]
        assert start.kind == "system"
        asked = [s for s in layout.segments if s.kind == "non_option_question"]
        (question,) = [p for p in sample.parts if getattr(p, "role", None) == "question"]
        words = "".join(
            prepared.prompt[a:b]
            for segment in asked
            for a, b in prepared.offsets[segment.start : segment.stop].tolist()
        )
        assert words.strip().startswith(question.text.strip()[:12])
        if reader == "worldsense":  # what its pipeline says before the video is of `system`
            spoken = prepared.prompt[: int(prepared.offsets[start.stop - 1][1])]
            assert "Carefully watch this video" in spoken
        if reader == "av_odyssey":
            correct = set(group_positions(layout, "correct_candidate").tolist())
            candidates = set(group_positions(layout, "candidates").tolist())
            assert correct
            assert correct < candidates


def sweep_file(
    folder: Path, checkpoint: Path, snapshots: dict[str, Path], **experiment: Any
) -> Path:
    sweep = {
        "name": "benchmarks",
        "models": [
            {"name": "t", "family": "qwen2_5_omni", "path": str(checkpoint), "dtype": "float32"}
        ],
        "datasets": [
            {
                "name": reader,
                "reader": reader,
                "root": str(root),
                "settings": {"tasks": "all"},
            }
            for reader, root in snapshots.items()
        ],
        "experiments": [{"name": "e", "samples": "all", "windows": [1], **experiment}],
        "execution": {"executor": "local"},
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    return path


@pytest.fixture
def avflow(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("avflow.orchestrator.tracking.publish", lambda paths, config: None)
    monkeypatch.setattr("avflow.orchestrator.cli_runs.draw", lambda run: "")

    def run(*words: object) -> tuple[int, str]:
        done = in_process.avflow(*words, columns=300)
        return done.returncode, done.said

    return run


def test_a_sweep_tells_tasks_of_one_name_apart_and_says_what_differs(
    tmp_path: Path, checkpoint: Path, snapshots: dict[str, Path], avflow: Any
) -> None:
    file = sweep_file(
        tmp_path,
        checkpoint,
        snapshots,
        tasks=[SHARED, "av_odyssey/Animal Recognition"],
        pathways=["question_to_last"],
        exclude=[{"tasks": [f"av_speakerbench/{SHARED}"]}],
    )
    status, said = avflow("plan", file, "--json")
    assert status == 0
    plan = json.loads(said)
    assert plan["samples"] == 2 + 8
    wrong = "data set av_speakerbench: Speech Rate: 0 questions where the paper has 209"
    assert wrong in plan["warnings"]

    status, said = avflow("inspect", file, "--sample", f"worldsense/{SHARED}")
    assert status == 0
    assert "What is heard first (0)?" in said

    run = tmp_path / "run"
    status, said = avflow("sweep", file, "--run", run)
    assert status == 0, said
    assert f"warning: {wrong}" in said
    assert "warning: data set av_speakerbench: left out: " in said
    assert "row 3: answer is 'E', which is none of its options, ABCD" in said
    cells = read(run)
    assert set(cells["dataset"]) == {"worldsense", "av_odyssey"}
    assert set(cells.filter(pl.col("dataset") == "worldsense")["task"]) == {SHARED}
    odyssey = cells.filter(pl.col("dataset") == "av_odyssey")
    assert set(odyssey["ordering"]) == {CQR, QRC, RCQ, RQC}

    paths = RunPaths(run)
    counts = pl.read_parquet(paths.counts)
    assert set(counts["dataset"]) == set(snapshots)
    assert not counts.filter(pl.col("task") == SHARED)["good"].any()
    (row,) = pl.read_parquet(paths.left_out).to_dicts()
    assert (row["dataset"], row["task"]) == ("av_speakerbench", "Speech Rate")
    recorded = sessions(paths)[0]["datasets"]
    assert isinstance(recorded, dict)
    assert recorded["av_odyssey"]["samples"] == 8
    stored = yaml.safe_load(paths.sweep.read_text())
    prompts = [dataset["settings"]["prompt"] for dataset in stored["datasets"]]
    assert prompts[0]["closing"] == "The best answer is:"
    assert prompts[2]["option"] == "{letter}:{option}\n"

    status, said = avflow("resume", run)  # from the folder's own file, prompts spelled out
    assert status == 0, said
    assert "0 were due now" in said


def test_a_prompt_of_one_s_own_is_another_sweep(
    tmp_path: Path, checkpoint: Path, snapshots: dict[str, Path], avflow: Any
) -> None:
    file = sweep_file(tmp_path, checkpoint, snapshots, pathways=["question_to_last"])
    raw = yaml.safe_load(file.read_text())
    raw["datasets"] = raw["datasets"][1:2]
    raw["experiments"][0]["tasks"] = ["Audio Change"]
    file.write_text(yaml.safe_dump(raw))
    assert avflow("sweep", file, "--run", tmp_path / "run")[0] == 0
    raw["datasets"][0]["settings"]["prompt"] = {"question": "Say: {question}\n", "closing": "So:"}
    file.write_text(yaml.safe_dump(raw))
    status, said = avflow("sweep", file, "--run", tmp_path / "run")
    assert status == 2
    assert "datasets[0].settings.prompt.closing" in said
