"""MLflow as a view of the store, in a real SQLite store: whole, once, and the same again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from avflow.datasets.prompts import multiple_choice
from avflow.datasets.sample import MediaPart, Sample
from avflow.orchestrator import drafts, figures
from avflow.orchestrator.config import SweepConfig
from avflow.orchestrator.data import LoadedDataset, fingerprint
from avflow.orchestrator.outcome import read_outcome
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.plan import Plan, build_plan
from avflow.orchestrator.policy import Action, Decision, FailureKind
from avflow.orchestrator.report import words, write_report
from avflow.orchestrator.results import read
from avflow.orchestrator.run_folder import claim, record_session, stored_config
from avflow.orchestrator.store import ResultStore
from avflow.orchestrator.stored import remaining, stored_state
from avflow.orchestrator.tracking import PublishReport, TrackingError, connect, publish
from avflow.workers.models.base import ModelInfo
from avflow.workers.protocol import CurveDone, SampleDone, UnitFailure, UnitSpec

LAYERS = 4
SAMPLES = 3
POOLED = "one sense (category)"
PATHWAYS = ("video_to_question", "question_to_last")
INFO = ModelInfo(
    n_layers=LAYERS, hidden_size=8, n_heads=2, n_kv_heads=1, head_size=4,
    intermediate_size=16, vocab_size=100, parameters=5000, digest="d1",
)  # fmt: skip


def sample(task: str, number: int) -> Sample:
    clip = MediaPart(kind="video", path=f"{number}.mp4", with_audio=True)
    return Sample(
        sample_id=f"{task}-{number}", dataset="world", task=task, category="one sense",
        layout="single_video", parts=(clip, *multiple_choice("Which?", ["x"] * 4)),
        answer=0, media_group=str(number),
    )  # fmt: skip


def make_plan(windows: tuple[int, ...] = (3,), uri: str | None = None) -> Plan:
    raw = {
        "name": "test",
        "models": [{"name": "tiny", "family": "qwen2_5_omni", "path": "testbed"}],
        "datasets": [{"name": "world", "reader": "testbed"}],
        "experiments": [{"name": "e", "pathways": PATHWAYS, "windows": windows}],
        "mlflow": {"tracking_uri": uri},
    }
    config = SweepConfig.model_validate_json(json.dumps(raw))
    samples = tuple(sample(task, n) for task in ("sight", "sound") for n in range(SAMPLES))
    world = LoadedDataset(root=Path("/x"), samples=samples, fingerprint=fingerprint(samples))
    return build_plan(config, {"world": world}, {"tiny": INFO})


def store_unit(store: ResultStore, unit: UnitSpec, *, correct: bool = True) -> None:
    """One sample with numbers of its own, as a worker's do."""
    rng = np.random.default_rng(list(unit.unit_id.encode()))
    for curve in unit.curves if correct else ():
        n = len(curve.center_layers)
        done = CurveDone(
            unit_id=unit.unit_id, curve=curve.key,
            center_layer=np.array(curve.center_layers, dtype=np.int16), p_knockout=rng.random(n),
            p_options=rng.random((n, 4)), knockout_token=rng.integers(7, 9, n, dtype=np.int32),
            n_blocked_edges=np.ones(n, dtype=np.int64), p_base=0.5, base_token=7,
            correct_base=True, answer_token=7, n_tokens=50,
        )  # fmt: skip
        if curve.key in unit.wanted:
            store.add_curve(unit, done)
    done_sample = SampleDone(
        unit_id=unit.unit_id, answer="A", predicted="A" if correct else "B", base_token=7,
        p_base=0.5, p_options=np.full(4, 0.25), correct=correct, n_tokens=50, group_spans={},
        decode_s=0.1, encode_s=0.1, prefill_s=0.1, replay_s=0.1, token_layers=10, flops=1e6,
        flops_lower_bound=9e5, split_batches=0, peak_bytes=1,
    )  # fmt: skip
    store.add_sample(unit, done_sample, worker="host:1", attempt=1)


def fail_unit(store: ResultStore, unit: UnitSpec) -> None:
    failure = UnitFailure(
        unit_id=unit.unit_id, curve=None, stage="decode", error="MediaError",
        message="no sound track", traceback="",
    )  # fmt: skip
    decision = Decision(
        action=Action.QUARANTINE, kind=FailureKind.EXCEPTION, model=unit.model, unit=unit,
        failure=failure, attempt=1,
    )  # fmt: skip
    store.add_failure(decision, worker="host:1")


def run_session(paths: RunPaths, plan: Plan, keep: Callable[[UnitSpec], bool]) -> None:
    """What a sweep does: claim the folder, run what is left of what `keep` says, commit."""
    claim(paths, plan)
    record_session(paths, plan, ["test"])
    store = ResultStore(paths, plan)
    for unit in remaining(plan, stored_state(paths)):
        if keep(unit):
            store_unit(store, unit)
    store.commit()


@pytest.fixture(scope="module")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow store: making one takes seconds of migrations, copying it none."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def paths(tmp_path: Path, new_store: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    shutil.copy(new_store, paths.mlflow)
    return paths


def published(paths: RunPaths) -> PublishReport:
    return publish(paths, stored_config(paths))


def client_of(paths: RunPaths) -> MlflowClient:
    return connect(f"sqlite:///{paths.mlflow}")


def runs(paths: RunPaths) -> dict[str, Run]:
    """Live runs by name; fails on two of a name."""
    client = client_of(paths)
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def history(paths: RunPaths, run: Run, metric: str) -> list[tuple[int, float]]:
    points = client_of(paths).get_metric_history(run.info.run_id, metric)
    return sorted((point.step, point.value) for point in points)


def everything(paths: RunPaths) -> dict[str, object]:
    """All that a person sees: runs, their tags, parameters, and every point of every metric."""
    return {
        name: (
            run.info.run_id,
            run.data.tags,
            run.data.params,
            {metric: history(paths, run, metric) for metric in run.data.metrics},
        )
        for name, run in runs(paths).items()
    }


def test_a_run_a_task_with_a_metric_a_pathway_and_a_point_a_centre_layer(paths: RunPaths) -> None:
    run_session(paths, make_plan(), lambda unit: True)
    report = published(paths)
    assert (report.created, report.replaced, report.unchanged, report.unfinished) == (4, 0, 0, 0)
    found = runs(paths)
    assert set(found) == {"sight", "sound", POOLED, "sweep: test"}
    colours = {found[task].data.tags["mlflow.runColor"] for task in ("sight", "sound")}
    assert len(colours) == 2
    cells = read(paths.root)
    for task in ("sight", "sound"):
        run = found[task]
        assert run.data.tags["cell_key"] == f"tiny/world/{task}/k3/letter"
        assert run.data.params["samples.right"] == str(SAMPLES)
        assert run.info.status == "FINISHED"
        for pathway in PATHWAYS:
            of_curve = cells.filter(task=task, pathway=pathway)
            means = {
                layer: of_curve.filter(center_layer=layer)["delta"].mean()
                for layer in range(LAYERS)
            }
            points = history(paths, run, f"dp/{pathway}")
            assert [step for step, _ in points] == list(range(LAYERS))
            assert dict(points) == pytest.approx(means)
            low, high = (history(paths, run, f"dp_{edge}/{pathway}") for edge in ("low", "high"))
            assert all(a[1] < b[1] < c[1] for a, b, c in zip(low, points, high, strict=True))
            assert history(paths, run, f"n/{pathway}") == [(k, SAMPLES) for k in range(LAYERS)]
            flips = of_curve.group_by("center_layer").agg((pl.col("knockout_token") == 8).mean())
            assert history(paths, run, f"flip/{pathway}") == sorted(flips.iter_rows())
            peak = max(means, key=lambda layer: abs(means[layer]))
            assert run.data.metrics[f"peak_layer/{pathway}"] == peak
            assert run.data.metrics[f"peak_dp/{pathway}"] == pytest.approx(means[peak])


def test_the_sweeps_own_run_holds_figures_tables_words_and_config(paths: RunPaths) -> None:
    run_session(paths, make_plan(), lambda unit: True)
    published(paths)
    run = runs(paths)["sweep: test"]
    uri = run.info.artifact_uri
    assert uri.startswith("mlflow-artifacts:/")  # relative to the server: the folder can move
    folder = paths.mlflow_artifacts / uri.removeprefix("mlflow-artifacts:/")
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"sweep.yaml", "report/fig4.svg", "report/fig4.png", "report/curves.csv"} <= files
    assert (folder / "report" / "fig4.svg").read_bytes() == (paths.report / "fig4.svg").read_bytes()
    assert "video -/-> question: " in (folder / "report" / "findings.txt").read_text()
    assert run.data.metrics["samples/right"] == 2 * SAMPLES
    assert (
        "Step = centre layer"
        in client_of(paths).get_experiment(run.info.experiment_id).tags["mlflow.note.content"]
    )


def test_publishing_twice_and_resuming_add_neither_runs_nor_points(paths: RunPaths) -> None:
    plan = make_plan()
    run_session(paths, plan, lambda unit: True)
    published(paths)
    before = everything(paths)
    again = published(paths)
    assert (again.created, again.replaced, again.unchanged) == (0, 0, 4)
    run_session(paths, plan, lambda unit: True)  # nothing is left to run
    assert published(paths).unchanged == 4
    assert everything(paths) == before


def test_only_complete_tasks_are_published_and_a_resumed_run_publishes_the_rest(
    paths: RunPaths,
) -> None:
    plan = make_plan()
    run_session(paths, plan, lambda unit: unit.sample.sample_id != "sound-2")
    report = published(paths)
    assert (report.created, report.unfinished) == (1, 1)
    assert set(runs(paths)) == {"sight"}
    first = runs(paths)["sight"].info.run_id

    run_session(paths, plan, lambda unit: True)
    report = published(paths)
    assert (report.created, report.replaced, report.unchanged) == (3, 0, 1)
    assert runs(paths)["sight"].info.run_id == first
    assert history(paths, runs(paths)["sound"], "n/video_to_question") == [
        (layer, SAMPLES) for layer in range(LAYERS)
    ]


def test_changed_data_replaces_the_run_and_keeps_the_old_one_in_the_bin(paths: RunPaths) -> None:
    """A sample that had failed is mended: its task was complete before and is so after."""
    plan = make_plan()
    claim(paths, plan)
    store = ResultStore(paths, plan)
    for unit in plan.units:
        (fail_unit if unit.sample.sample_id == "sight-1" else store_unit)(store, unit)
    store.commit()
    published(paths)
    old = runs(paths)
    assert old["sight"].data.params["samples.failed"] == "1"

    for unit in remaining(plan, stored_state(paths), retry_failed=True):
        store_unit(store, unit)
    store.commit()
    report = published(paths)
    assert (report.created, report.replaced, report.unchanged) == (0, 3, 1)
    new = runs(paths)
    assert new["sound"].info.run_id == old["sound"].info.run_id
    assert new["sight"].info.run_id != old["sight"].info.run_id
    assert history(paths, new["sight"], "n/question_to_last")[0] == (0, SAMPLES)
    assert client_of(paths).get_run(old["sight"].info.run_id).info.lifecycle_stage == "deleted"


def test_what_a_killed_publication_left_half_done_is_made_again(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_session(paths, make_plan(), lambda unit: True)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(figures, "task_figure", killed)  # after the metrics, before the end
        with pytest.raises(KeyboardInterrupt):
            published(paths)
    torn = runs(paths)["sight"].info.run_id
    published(paths)
    assert set(runs(paths)) == {"sight", "sound", POOLED, "sweep: test"}
    assert runs(paths)["sight"].info.run_id != torn
    assert len(history(paths, runs(paths)["sight"], "dp/video_to_question")) == LAYERS


def test_a_moved_run_folder_publishes_on_where_it_was(paths: RunPaths, tmp_path: Path) -> None:
    run_session(paths, make_plan(), lambda unit: True)
    published(paths)
    before = everything(paths)
    moved = RunPaths(tmp_path / "elsewhere")
    paths.root.rename(moved.root)
    assert published(moved).unchanged == 4
    assert everything(moved) == before


def test_windows_are_runs_of_their_own_and_named_so(paths: RunPaths) -> None:
    run_session(paths, make_plan(windows=(1, 3)), lambda unit: True)
    published(paths)
    of_windows = {f"{name} · k={k}" for name in ("sight", "sound", POOLED) for k in (1, 3)}
    assert set(runs(paths)) == of_windows | {"sweep: test"}


def test_any_tracking_uri_will_do(tmp_path: Path, new_store: Path, paths: RunPaths) -> None:
    other = tmp_path / "other.db"
    shutil.copy(new_store, other)
    run_session(paths, make_plan(uri=f"sqlite:///{other}"), lambda unit: True)
    client = connect(f"sqlite:///{other}")
    artifacts = client.create_experiment("test", artifact_location=(tmp_path / "art").as_uri())
    assert published(paths).created == 4
    (run,) = client.search_runs([artifacts], "tags.kind = 'sweep'")
    assert "report" in [file.path for file in client.list_artifacts(run.info.run_id)]
    assert not paths.mlflow_artifacts.exists()


def test_a_server_that_is_down_is_a_clear_error_and_costs_nothing(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run_session(paths, make_plan(uri="http://127.0.0.1:9"), lambda unit: True)
    with pytest.raises(TrackingError, match="avflow track"):
        published(paths)
    assert read(paths.root).height == make_plan().counts().cells


def test_a_store_that_could_not_be_made_whole_leaves_none_behind(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan()
    run_session(paths, plan, lambda unit: True)
    paths.mlflow.unlink(missing_ok=True)

    def half(uri: str) -> MlflowClient:
        Path(uri.removeprefix("sqlite:///")).write_bytes(b"some tables")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("avflow.orchestrator.tracking.connect", half)
        with pytest.raises(TrackingError, match="No space left"):
            publish(paths, plan.config)
    assert not paths.mlflow.exists()
    assert not list(paths.temporary.glob("*.tmp"))
    assert publish(paths, plan.config).created > 0


def test_a_wrong_baseline_is_counted_and_has_no_curve(paths: RunPaths) -> None:
    plan = make_plan()
    claim(paths, plan)
    store = ResultStore(paths, plan)
    for unit in plan.units:
        store_unit(store, unit, correct=unit.sample.task == "sight")
    store.commit()
    assert published(paths).created == 3  # sound has no curve, so it has no run
    assert set(runs(paths)) == {"sight", POOLED, "sweep: test"}
    text = words(read_outcome(paths, stored_config(paths)))
    assert "unclear for sight" in text or "sight by" in text  # three samples say little
    assert "mind: tiny, world, sound: no sample was answered correctly" in text


def test_the_report_is_drawn_once(paths: RunPaths) -> None:
    run_session(paths, make_plan(), lambda unit: True)
    write_report(paths, read_outcome(paths, stored_config(paths)))
    drawn = {path: path.stat().st_mtime_ns for path in paths.report.iterdir()}
    assert paths.report / "fig4.svg" in drawn
    write_report(paths, read_outcome(paths, stored_config(paths)))
    published(paths)
    assert {path: path.stat().st_mtime_ns for path in paths.report.iterdir()} == drawn


def test_names_are_what_mlflow_takes() -> None:
    """MLflow refuses a whole batch for one bad name."""
    from mlflow.utils.validation import _validate_metric_name

    from avflow.pathways import catalogue

    for prefix in [prefix for prefix, _ in drafts._METRICS]:
        for pathway in catalogue.ALL:
            _validate_metric_name(f"{prefix}/{pathway.name}")
