"""The SLURM scripts under a scheduler made of three small programs, the real sweep inside."""

import os
import shutil
import signal
import subprocess
import time
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from tiny_sweep import write_sweep

from avflow.orchestrator.results import read, status

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "slurm"
BATCH = SLURM / "sweep.sbatch"

# What the scripts call. `srun` runs one task here; `ray symmetric-run` what stands after `--`.
FAKES = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "ray": "[[ $1 == stop ]] && exit; while [[ $1 != -- ]]; do shift; done; shift; "
    'env | grep ^RAY_TMPDIR= > "$REQUEUED.tmpdir"; exec "$@"',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$REQUEUED"; fi',
    "squeue": 'if [[ $* == *%T* ]]; then echo "${STATE:-RUNNING}"; else echo "$ENDS"; fi',
}


@pytest.fixture
def scheduler(tmp_path: Path) -> dict[str, str]:
    """The environment that SLURM would give."""
    fakes = tmp_path / "bin"
    fakes.mkdir()
    for name, body in FAKES.items():
        (fakes / name).write_text(f"#!/bin/bash\n{body}\n")
        (fakes / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{fakes}:{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_ON_NODE": "2",
        "ENDS": "N/A",  # as without a wall time
        "SLURM_SUBMIT_DIR": str(ROOT),
        "REQUEUED": str(tmp_path / "requeued"),
        "OMP_NUM_THREADS": "1",
    }


def fake_avflow(scheduler: dict[str, str], body: str) -> None:
    path = Path(scheduler["PATH"].split(":")[0]) / "avflow"
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


def submit(scheduler: dict[str, str], *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", BATCH, *map(str, words)],
        env=scheduler,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def requeued(scheduler: dict[str, str]) -> list[str]:
    file = Path(scheduler["REQUEUED"])
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("script", ["sweep.sbatch", "drive.sh"])
def test_the_scripts_are_valid(script: str) -> None:
    subprocess.run(["bash", "-n", SLURM / script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SLURM / script], check=True)


@pytest.mark.parametrize(
    ("ends", "again"), [(0, False), (3, False), (2, False), (1, True), (137, True)]
)
def test_what_has_ended_stays_ended_and_what_was_lost_is_queued_again(
    scheduler: dict[str, str], tmp_path: Path, ends: int, again: bool
) -> None:
    fake_avflow(scheduler, f'echo "$@" > {tmp_path}/words; exit {ends}')
    job = submit(scheduler, "sweep.yaml", tmp_path / "run", "--limit", "5")
    said, _ = job.communicate(timeout=60)
    assert requeued(scheduler) == (["requeue 4711"] if again else []), said
    assert job.returncode == (0 if again else ends)
    words = f"sweep sweep.yaml --run {tmp_path / 'run'} --address auto --limit 5"
    assert (tmp_path / "words").read_text().strip() == words
    assert not list((tmp_path / "run").iterdir()), "no file of the script's stays"


def test_a_driver_that_is_always_lost_is_not_queued_for_ever(
    scheduler: dict[str, str], tmp_path: Path
) -> None:
    fake_avflow(scheduler, "exit 1")
    job = submit(scheduler | {"SLURM_RESTART_COUNT": "50"}, "s.yaml", tmp_path / "run")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 1
    assert "no more" in said
    assert not requeued(scheduler)


def test_the_driver_stops_in_order_and_the_job_is_queued_again(
    scheduler: dict[str, str], tmp_path: Path
) -> None:
    fake_avflow(
        scheduler,
        f"trap 'sleep 1; echo drained > {tmp_path}/drained; exit 143' TERM\n"
        f"touch {tmp_path}/started; while true; do sleep 0.1; done",
    )
    job = submit(scheduler, "s.yaml", tmp_path / "run")
    wait_for(tmp_path / "started")
    job.send_signal(signal.SIGUSR1)  # as --signal=B:USR1@600 does: to the batch shell alone
    said, _ = job.communicate(timeout=60)
    assert (tmp_path / "drained").exists(), "it had the time that it needed"
    assert requeued(scheduler) == ["requeue 4711"], said
    assert job.returncode == 0


def test_a_cancelled_job_stays_cancelled(scheduler: dict[str, str], tmp_path: Path) -> None:
    """`scontrol requeue` would bring it back: seen on a real SLURM."""
    fake_avflow(scheduler, "exit 143")
    job = submit(scheduler | {"STATE": "COMPLETING"}, "s.yaml", tmp_path / "run")
    said, _ = job.communicate(timeout=60)
    assert "not queued again" in said
    assert not requeued(scheduler)


def test_a_driver_that_does_not_stop_is_left_before_the_wall_time(
    scheduler: dict[str, str], tmp_path: Path
) -> None:
    """A job that runs into its wall time is not queued again."""
    fake_avflow(scheduler, f"trap '' TERM; touch {tmp_path}/started; sleep 60 & wait; wait")
    ends = datetime.now() + timedelta(seconds=32)
    job = submit(scheduler | {"ENDS": f"{ends:%Y-%m-%dT%H:%M:%S}"}, "s.yaml", tmp_path / "run")
    wait_for(tmp_path / "started")
    job.send_signal(signal.SIGUSR1)
    try:
        while not requeued(scheduler):
            assert datetime.now() < ends, "SLURM would have killed it by now"
            time.sleep(0.1)
    finally:
        os.killpg(job.pid, signal.SIGKILL)


def test_rays_files_are_apart_from_other_users(scheduler: dict[str, str], tmp_path: Path) -> None:
    """The second user of a node may not write /tmp/ray/ray_current_cluster."""
    fake_avflow(scheduler, "exit 0")
    scheduler.pop("RAY_TMPDIR", None)
    submit(scheduler, "s.yaml", tmp_path / "run").communicate(timeout=60)
    written = Path(scheduler["REQUEUED"] + ".tmpdir").read_text().strip()
    assert written == f"RAY_TMPDIR=/tmp/ray-{os.getuid()}"


def test_without_avflow_nothing_is_queued_again(scheduler: dict[str, str], tmp_path: Path) -> None:
    fakes = scheduler["PATH"].split(":")[0]
    job = submit(scheduler | {"PATH": f"{fakes}:/usr/bin:/bin"}, "s.yaml", tmp_path / "run")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert "activate" in said
    assert not requeued(scheduler)


def wait_for(path: Path, patience_s: float = 60) -> None:
    until = time.monotonic() + patience_s
    while not path.exists():
        assert time.monotonic() < until, f"no {path}"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_real_sweep_is_drained_requeued_and_finished(
    scheduler: dict[str, str], tmp_path: Path
) -> None:
    sweep = write_sweep(tmp_path, samples_per_task=50, executor="local")
    run = tmp_path / "run"
    job = submit(scheduler, sweep, run)
    until = time.monotonic() + 120
    while not list(run.glob("samples/**/*.parquet")):  # the first commit, after 15 s
        assert time.monotonic() < until
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    said, _ = job.communicate(timeout=120)
    assert requeued(scheduler) == ["requeue 4711"], said
    assert 0 < status(run).samples_done < 100
    again = submit(scheduler | {"SLURM_RESTART_COUNT": "1"}, sweep, run)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert len(requeued(scheduler)) == 1
    other = submit(scheduler, sweep, tmp_path / "whole")
    assert other.wait(timeout=300) == 0
    assert status(run).samples_done == 100
    assert_frame_equal(cells(run), cells(tmp_path / "whole"), check_exact=True)


def cells(run: Path) -> pl.DataFrame:
    return read(run).sort("job_id", "sample_id")
