"""Whole sweeps on a tiny random checkpoint: from the file to the cells, in process and on Ray."""

import io
import json
import logging
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import av
import polars as pl
import pytest
import yaml
from tiny_sweep import write_sweep

from avflow.orchestrator import sweep
from avflow.orchestrator.cluster import start_ray
from avflow.orchestrator.config import SweepConfig, load_config
from avflow.orchestrator.errors import AvflowError, ConfigError, ExitStatus, RunLocked
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.progress import Plain, Silent, Snapshot, duration, log_file
from avflow.orchestrator.results import read
from avflow.orchestrator.run_folder import hold
from avflow.orchestrator.sweep import SweepOutcome, run_sweep


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, media and a sweep file."""
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishing takes longer than these sweeps, and has tests of its own."""
    monkeypatch.setattr("avflow.orchestrator.tracking.publish", lambda paths, config: None)


def run(config: Path | SweepConfig, folder: Path, *, only_failed: bool = False) -> SweepOutcome:
    loaded = load_config(config) if isinstance(config, Path) else config
    return run_sweep(loaded, folder, only_failed=only_failed, progress=Silent())


def cells(folder: Path) -> pl.DataFrame:
    return read(folder).sort("job_id", "sample_id")


@pytest.fixture(scope="module")
def local(place: Path) -> pl.DataFrame:
    """The cells of an undisturbed run in process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("avflow.orchestrator.tracking.publish", lambda paths, config: None)
        assert run(place / "sweep.yaml", place / "local").exit_status == ExitStatus.DONE
    return cells(place / "local")


def test_every_cell_of_the_plan_is_there_once(place: Path, local: pl.DataFrame) -> None:
    single_video, interleaved = 3, 2  # of PATHWAYS; `question_to_last` is there for both
    expected = 2 * (single_video + interleaved) * 2 * 4  # samples, windows, centre layers
    assert local.height == expected == local.unique(["job_id", "sample_id"]).height
    assert local["p_base"].is_between(0, 1).all()
    assert (local["delta"] != 0).any()
    assert read(place / "local", "samples").height == 4


def test_running_again_runs_nothing(place: Path, local: pl.DataFrame) -> None:
    again = run(place / "sweep.yaml", place / "local")
    assert (again.exit_status, again.counts.ran) == (ExitStatus.DONE, 0)
    assert cells(place / "local").equals(local)


def test_the_resolved_file_reproduces_the_run_elsewhere(
    place: Path, local: pl.DataFrame, tmp_path: Path
) -> None:
    run(RunPaths(place / "local").sweep, tmp_path / "copy")
    assert cells(tmp_path / "copy").equals(local)


def test_a_first_try_with_a_limit_is_completed_later(
    place: Path, local: pl.DataFrame, tmp_path: Path
) -> None:
    config = load_config(place / "sweep.yaml")
    assert run(config.with_execution(limit=1), tmp_path / "run").counts.planned == 2
    rest = run(config, tmp_path / "run")
    assert (rest.counts.planned, rest.counts.ran) == (4, 2)
    assert cells(tmp_path / "run").equals(local)


@pytest.mark.ray
def test_ray_with_an_actor_killed_midway_gives_the_same_bits(
    place: Path, local: pl.DataFrame, tmp_path: Path
) -> None:
    start_ray(None)  # shared with the other tests of this process
    config = load_config(place / "sweep.yaml").with_execution(executor="ray", workers=2)
    assassin = Assassin()
    logging.getLogger("avflow.orchestrator.coordinator").addHandler(assassin)
    try:
        outcome = run_sweep(config, tmp_path / "run", progress=assassin)
    finally:
        logging.getLogger("avflow.orchestrator.coordinator").removeHandler(assassin)
    assert outcome.exit_status == ExitStatus.DONE
    assert assassin.killed is not None
    assert cells(tmp_path / "run").equals(local)
    deaths = read(tmp_path / "run", "failures").filter(kind="worker_death")
    assert deaths["worker"].str.ends_with(f":{assassin.killed}").all()
    assert not deaths["terminal"].any()


class Assassin(logging.Handler):
    """Learns where the first worker runs, and kills it once it works."""

    def __init__(self) -> None:
        super().__init__()
        self.killed: int | None = None
        self._victim: int | None = None

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message.startswith("ready at ") and self._victim is None:
            self._victim = int(message.rpartition(":")[2])

    def show(self, snapshot: Snapshot, now: float) -> None:
        if self._victim is not None and self.killed is None:
            self.killed = self._victim
            os.kill(self._victim, signal.SIGKILL)

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def strip_sound(clip: Path, to: Path) -> None:
    """The same video without its sound track."""
    with av.open(str(clip)) as source, av.open(str(to), "w") as target:
        track = source.streams.video[0]
        copy = target.add_stream_from_template(track)
        for packet in source.demux(track):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)


def test_bad_files_fail_their_samples_and_are_taken_up_once_mended(
    place: Path, local: pl.DataFrame, tmp_path: Path
) -> None:
    raw = yaml.safe_load((place / "sweep.yaml").read_text())
    shutil.copytree(place / "media", tmp_path / "media")
    raw["datasets"][0]["root"] = str(tmp_path / "media")
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(raw))
    corrupt, silent = sorted((tmp_path / "media").rglob("*.mp4"))
    good = [path.read_bytes() for path in (corrupt, silent)]
    corrupt.write_bytes(good[0][:1000])
    strip_sound(silent, tmp_path / "silent.mp4")
    (tmp_path / "silent.mp4").replace(silent)

    first = run(tmp_path / "sweep.yaml", tmp_path / "run")
    assert first.exit_status == ExitStatus.WITH_FAILURES
    assert (first.counts.ended, first.counts.failed) == (4, 2)
    failures = read(tmp_path / "run", "failures").sort("sample_id")
    assert failures["stage"].to_list() == ["decode", "decode"]
    assert corrupt.name in failures["message"][0]
    assert "sound" in failures["message"][1] or "audio" in failures["message"][1]
    assert set(cells(tmp_path / "run")["task"]) == {"match_image"}

    assert run(tmp_path / "sweep.yaml", tmp_path / "run").counts.ran == 0, "not by themselves"
    corrupt.write_bytes(good[0])
    silent.write_bytes(good[1])
    mended = run(RunPaths(tmp_path / "run").sweep, tmp_path / "run", only_failed=True)
    assert (mended.exit_status, mended.counts.ran) == (ExitStatus.DONE, 2)
    assert cells(tmp_path / "run").equals(local)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("windows", [2], "windows"),
        ("windows", [9], "9 layers does not fit"),
        ("pathways", ["video_to_nowhere"], "video_to_question"),
        ("tasks", ["smell"], "sight"),
    ],
)
def test_what_can_be_refused_is_refused_before_anything_starts(
    place: Path,
    local: pl.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    field: str,
    value: list[object],
    says: str,
) -> None:
    monkeypatch.setattr(sweep, "_executor", lambda config: pytest.fail("an executor was made"))
    raw = yaml.safe_load((place / "sweep.yaml").read_text())
    raw["experiments"][0][field] = value
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(AvflowError, match=says) as refusal:
        run(tmp_path / "other.yaml", place / "local")
    assert refusal.value.exit_status == ExitStatus.CONFIGURATION


def test_a_checkpoint_that_is_none_is_refused(place: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load((place / "sweep.yaml").read_text())
    raw["models"][0]["path"] = str(tmp_path)  # a folder, but empty
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match="path"):
        run(tmp_path / "sweep.yaml", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_two_drivers_do_not_share_a_folder(place: Path, local: pl.DataFrame) -> None:
    with hold(RunPaths(place / "local")), pytest.raises(RunLocked, match=str(os.getpid())):
        run(place / "sweep.yaml", place / "local")


def test_mlflow_being_down_never_stops_a_sweep(
    place: Path,
    local: pl.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(paths: RunPaths, config: SweepConfig) -> None:
        raise ConnectionError("no server")

    monkeypatch.setattr("avflow.orchestrator.tracking.publish", refuse)
    assert run(place / "sweep.yaml", place / "local").exit_status == ExitStatus.DONE
    assert f"avflow track {place / 'local'}" in capsys.readouterr().err


SNAPSHOT = Snapshot(
    units=10,
    units_done=2,
    units_failed=1,
    curves=100,
    curves_ended=30,
    failures=1,
    workers_ready=2,
    workers_loading=0,
    share=0.25,
    working_s=60,
)


def test_progress_says_how_long_it_will_take() -> None:
    assert SNAPSHOT.eta_s == 180
    assert replace(SNAPSHOT, share=0.0).eta_s is None
    assert SNAPSHOT.line() == "3/10 samples · 30/100 curves · 1 failures · 2 workers · ETA 3:00"
    assert duration(3723) == "1:02:03"


def test_plain_progress_prints_every_ten_seconds_and_at_the_end() -> None:
    stream = io.StringIO()
    plain = Plain(stream)
    for second in range(25):
        plain.show(replace(SNAPSHOT, curves_ended=second), second)
    plain.close()
    curves = [line.split(" · ")[1] for line in stream.getvalue().splitlines()]
    assert curves == ["0/100 curves", "10/100 curves", "20/100 curves", "24/100 curves"]


def test_the_log_is_json_lines_and_leaves_logging_as_it_was(tmp_path: Path) -> None:
    logger = logging.getLogger("avflow.somewhere")
    with log_file(tmp_path / "logs" / "a.jsonl"):
        logger.warning("what %s", "happened", extra={"worker": "w1"})
    logger.warning("later")
    (line,) = map(json.loads, (tmp_path / "logs" / "a.jsonl").read_text().splitlines())
    assert (line["message"], line["level"], line["worker"]) == ("what happened", "warning", "w1")


def test_a_log_that_can_t_be_written_is_said_once_and_ends_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with log_file(Path("/dev/full")):
        for n in range(3):
            logging.getLogger("avflow.somewhere").warning("%d", n)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "/dev/full can't be written: [Errno 28]" in said
