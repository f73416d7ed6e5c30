"""What the verbs print: whole lines into a pipe, names as they are, commands that can be pasted."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from in_process import avflow
from stored_run import failure, fill, make_plan
from tiny_sweep import write_sweep

from avflow.orchestrator.coordinator import Outcome
from avflow.orchestrator.data import about_tasks, readers
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.run_folder import claim
from avflow.orchestrator.store import ResultStore
from avflow.orchestrator.sweep import SweepCounts, _words
from avflow.orchestrator.views import show_frame


def piped(*words: object) -> list[str]:
    """What the command writes into a pipe, where nothing says how wide it is."""
    unset = ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE")
    command = [str(Path(sys.executable).with_name("avflow")), *map(str, words)]
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_pipe_gets_each_row_in_one_line() -> None:
    head, *rows = piped("datasets")
    assert len(rows) == sum(len(about_tasks(reader)) for reader in readers())
    (longest,) = (row for row in rows if "sound_when_colour" in row)
    assert longest.endswith("the sound heard while a colour is shown (control for video to audio)")
    assert head.split()[:2] == ["reader", "task"]


def test_so_does_a_plan(tmp_path: Path) -> None:
    lines = piped("plan", write_sweep(tmp_path))
    (head,) = (line for line in lines if "FLOPs, shared" in line)
    assert "forwards, plain" in head
    assert len(head) > 80
    assert any(line.startswith("Plain: ") and line.endswith("apart") for line in lines)


@pytest.fixture
def failed(tmp_path: Path) -> Path:
    """A run in a folder that a shell would take for two, with one sample failed."""
    paths, plan = RunPaths(tmp_path / "my $run"), make_plan()
    claim(paths, plan)
    store = ResultStore(paths, plan)
    told = failure(plan.units[0], None)
    assert told.failure is not None
    message = "question holds '[/img1]', which is :smile: no placeholder " + "of a medium " * 20
    store.add_failure(replace(told, failure=replace(told.failure, message=message)), worker="h:1")
    store.commit()
    return paths.root


def test_failures_are_told_as_they_are_with_a_command_to_paste(failed: Path) -> None:
    done = avflow("failures", str(failed))
    assert done.returncode == 0
    assert "'[/img1]', which is :smile: no placeholder " + "of a medium " * 20 in done.stdout
    command = done.stdout.splitlines()[-1].partition(": ")[2]
    assert shlex.split(command) == ["avflow", "resume", str(failed), "--failed"]


def test_states_are_told_in_whole_lines(failed: Path) -> None:
    lines = avflow("status", str(failed)).stdout.splitlines()
    assert lines[0].startswith("8 jobs: 0 done, 0 running, 8 failed")
    assert lines[1].startswith("4 samples: 0 done (0 answered correctly), 1 failed; 0 cells; ")
    assert [line.split()[-5:] for line in lines if line.startswith("tiny")] == [list("40013")]


def test_what_a_sweep_ends_with_can_be_pasted(tmp_path: Path) -> None:
    counts = SweepCounts(planned=2, ended=1, ran=1, failed=1)
    outcome = Outcome(signal=None, failures=1, given_up={})
    text = "\n".join(_words(Path("runs/it's mine"), counts, outcome, 1.0))
    quoted = shlex.quote("runs/it's mine")
    assert text.count(f"avflow resume {quoted}") == 2
    for verb in ("failures", "status", "query", "ui"):
        assert f"avflow {verb} {quoted}" in text


def test_a_run_without_mlflow_says_how_to_make_it(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "a run")
    fill(paths, make_plan())
    done = avflow("ui", str(paths.root))
    assert done.returncode != 0
    assert f"avflow track {shlex.quote(str(paths.root))}" in done.stderr


def test_an_answer_into_a_file_is_cut_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    text = "a message " * 30
    show_frame(
        pl.DataFrame({f"column {i}": [text] for i in range(9)} | {"p": [[0.5] * 9]}), "table"
    )
    said = capsys.readouterr().out
    assert said.count(text) == 9
    assert said.count("0.5") == 9
