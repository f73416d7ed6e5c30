"""slurm/sweep.sbatch under a real SLURM: when a job ends and comes back is for SLURM to say."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from slurm_machines import Machine, slurm, wait_for, what_is_missing
from tiny_sweep import write_sweep

from avflow.orchestrator.results import read

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "slurm"
MISSING = what_is_missing()
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"a real SLURM {MISSING}")

# Stand in for Ray and the sweep where the scheduler alone is looked at.
FAKES = {
    "ray": "[[ $1 == stop ]] && exit; while [[ $1 != -- ]]; do shift; done; shift; exec $@",
    "avflow": "trap 'exit 143' TERM; while true; do sleep 0.2; done",
}


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[list[Machine]]:
    with slurm(tmp_path) as machines:
        yield machines


@pytest.fixture
def fakes(tmp_path: Path) -> str:
    """A folder of programs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return str(folder)


class Job:
    """A sweep given to sbatch as docs/cluster.md says, on machines without GPUs."""

    def __init__(
        self, login: Machine, programs: str, sweep: Path, run: Path, *options: str
    ) -> None:
        self._login = login
        self.log = run.with_suffix(".log")
        said = login.run(
            *("sbatch", "--gpus-per-node=0", f"--cpus-per-task={os.cpu_count()}"),
            *(f"--output={self.log}", *options, SLURM / "sweep.sbatch", sweep, run),
            PATH=f"{programs}:{os.environ['PATH']}",
            AVFLOW_SLURM=str(SLURM),
            RAY_TMPDIR="/run",  # of each machine's own
            OMP_NUM_THREADS="1",
        )
        self.number = said.split()[-1]

    def what(self, field: str) -> str:
        found = re.search(
            rf"\b{field}=(\S+)", self._login.run("scontrol", "show", "job", self.number)
        )
        assert found is not None
        return found[1]

    def has_begun(self) -> bool:
        """Whether the script's own files and traps are there."""
        steps = self._login.run("squeue", "--noheader", "--steps", f"--jobs={self.number}")
        return f"{self.number}.0" in steps

    def cancel(self, *options: str) -> None:
        self._login.run("scancel", *options, self.number)

    def start_now(self) -> None:
        """SLURM itself waits two minutes before it starts a job anew."""
        self._login.run("scontrol", "update", f"JobId={self.number}", "StartTime=now")


def test_a_cancelled_job_does_not_come_back(
    machines: list[Machine], fakes: str, tmp_path: Path
) -> None:
    job = Job(machines[0], fakes, tmp_path / "s.yaml", tmp_path / "run", "--nodes=1")
    wait_for(job.has_begun, 30)
    job.cancel()
    wait_for(lambda: "not queued again" in job.log.read_text(), 60)
    wait_for(lambda: job.what("JobState") == "CANCELLED", 60)
    assert job.what("Restarts") == "0"


def test_a_drained_job_comes_back(machines: list[Machine], fakes: str, tmp_path: Path) -> None:
    job = Job(machines[0], fakes, tmp_path / "s.yaml", tmp_path / "run", "--nodes=1")
    wait_for(job.has_begun, 30)
    job.cancel("--batch", "--signal=USR1")
    wait_for(lambda: job.what("Restarts") == "1", 60)
    assert "the driver ended with status 143" in job.log.read_text()
    wait_for(lambda: job.what("JobState") == "PENDING", 60)
    job.start_now()
    wait_for(job.has_begun, 30)
    job.cancel()


@pytest.mark.slow
def test_a_job_is_drained_before_its_wall_time(
    machines: list[Machine], fakes: str, tmp_path: Path
) -> None:
    options = ("--nodes=1", "--time=2", "--signal=B:USR1@90")  # SLURM looks twice a minute
    job = Job(machines[0], fakes, tmp_path / "s.yaml", tmp_path / "run", *options)
    wait_for(lambda: job.what("Restarts") == "1", 120)
    assert "the driver ended with status 143" in job.log.read_text()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
def test_a_sweep_on_two_nodes_is_drained_and_outlives_the_loss_of_one(
    machines: list[Machine], tmp_path: Path
) -> None:
    write_sweep(tmp_path, name="whole", samples_per_task=100)
    sweep = write_sweep(tmp_path, samples_per_task=100, executor="ray")
    whole, run = tmp_path / "whole", tmp_path / "run"
    avflow = [sys.executable, "-m", "avflow", "sweep"]
    subprocess.run([*avflow, tmp_path / "whole.yaml", "--run", whole], check=True)

    login, other, _ = machines
    job = Job(login, str(Path(sys.executable).parent), sweep, run, "--nodes=2", "--time=60")
    wait_for(lambda: parts(run), 300)
    job.cancel("--batch", "--signal=USR1")
    wait_for(lambda: job.what("Restarts") == "1", 240)
    wait_for(lambda: job.what("JobState") == "PENDING", 120)
    assert "the driver ended with status 143" in job.log.read_text()
    before = len(parts(run))
    job.start_now()
    wait_for(lambda: len(parts(run)) > before, 300)
    other.pull_the_plug()
    wait_for(lambda: job.what("Restarts") == "2", 240)
    wait_for(lambda: job.what("JobState") == "PENDING", 120)
    job.start_now()
    wait_for(lambda: job.what("JobState") == "COMPLETED", 400)
    assert_frame_equal(cells(run), cells(whole), check_exact=True)


def parts(run: Path) -> list[Path]:
    return list(run.glob("samples/**/*.parquet"))


def cells(run: Path) -> pl.DataFrame:
    return read(run).sort("job_id", "sample_id")
