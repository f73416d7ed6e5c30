"""What the verbs print: whole lines into a pipe, names as they are, commands that can be pasted."""

import io
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import polars as pl
import pytest
from in_process import avflow
from rich.console import Console
from stored_run import failure, fill, make_plan
from tiny_sweep import write_sweep

from avflow.orchestrator.coordinator import Outcome
from avflow.orchestrator.data import about_tasks, readers
from avflow.orchestrator.estimate import Estimate
from avflow.orchestrator.paths import RunPaths
from avflow.orchestrator.results import query
from avflow.orchestrator.run_folder import claim
from avflow.orchestrator.store import ResultStore
from avflow.orchestrator.sweep import SweepCounts, _words
from avflow.orchestrator.views import show_frame
from avflow.orchestrator.views_plan import _costs_tables
from avflow.pathways.catalogue import ALL

ROOT = Path(__file__).parents[1]


TERMINAL = {"TTY_COMPATIBLE": "1", "COLUMNS": "80", "TERM": "dumb"}


def on_a_terminal(*words: object) -> str:
    """What the command prints on one of 80 columns."""
    with patch.dict("os.environ", TERMINAL):
        done = avflow(*words, columns=80)
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    head, model, task = lines[-3:]
    assert head.split() == ["task", "samples", "right", "wrong", "failed", "to", "do"]
    assert model.split(", ")[0] == "tiny"
    assert task.split() == ["sight", *"40013"]


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


def test_a_plan_of_the_papers_size_folds_nowhere_on_80_columns() -> None:
    name = ("video-salmonn2-plus-3b", "av_speakerbench")
    cost = Estimate(
        samples=14_207, jobs=49_884, cells=7_537_080, forwards=7_569_803.0,
        plain=2.59e20, shared=2.42e19,
    )  # fmt: skip
    for table in _costs_tables({name: cost}, cost):
        console = Console(width=80, file=io.StringIO())
        with console.capture() as captured:
            console.print(table)
        lines = [line.rstrip() for line in captured.get().splitlines()]
        assert [line.split()[0] for line in lines[1:]] == [*name, "all"]
        assert lines[2].split()[1:] == lines[3].split()[1:]
    assert "182 -> 17" in captured.get()
    assert "H100, H200 h" in captured.get()


def test_a_plan_of_tables_and_discards_folds_nowhere_on_80_columns() -> None:
    said = on_a_terminal("plan", str(ROOT / "configs" / "figures" / "table4.yaml"))
    assert max(map(len, said.splitlines())) <= 80
    lines = [line.split() for line in said.splitlines()]
    assert ["discard/discard_question", "29", "5", "1,104"] in lines
    assert ["Attribute", "Recognition", "204", "0", "0", "0"] in lines


def test_names_of_pathways_can_be_copied_from_80_columns() -> None:
    words = on_a_terminal("pathways").split()
    assert all(pathway.name in words for pathway in ALL)


def test_too_many_columns_for_a_terminal_become_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(RunPaths(tmp_path), make_plan())
    for name, value in TERMINAL.items():
        monkeypatch.setenv(name, value)
    show_frame(query(tmp_path, "SELECT * FROM cells LIMIT 2"), "table")
    said = capsys.readouterr().out
    assert said.startswith("row 1\n  job_id            ")
    assert said.count("\n  n_blocked_edges  ") == 2
    show_frame(query(tmp_path, "SELECT pathway, delta FROM cells LIMIT 2"), "table")
    assert "┆ delta" in capsys.readouterr().out


def test_a_query_that_fails_says_why_without_polars_plan(failed: Path) -> None:
    done = avflow("query", str(failed), "SELECT nothing FROM samples")
    assert done.returncode == 2
    assert 'unable to find column "nothing"' in done.stderr
    assert "FAILED HERE" not in done.stderr
    assert "tables: cells, samples" in done.stderr


def test_an_option_that_would_not_be_read_is_refused() -> None:
    done = avflow("plan", ROOT / "configs" / "demo.yaml", "--model", "testbed")
    assert done.returncode == 2
    assert "goes with --measure alone" in done.stderr


def test_findings_from_few_samples_say_so(tmp_path: Path) -> None:
    fill(RunPaths(tmp_path), make_plan())
    done = avflow("report", tmp_path)
    assert "mind: Some of these curves stand on 4 videos: bands of fewer than 20" in done.stdout


def test_a_report_of_nothing_says_what_it_takes(tmp_path: Path) -> None:
    fill(RunPaths(tmp_path), make_plan())
    done = avflow("report", tmp_path, "--wrong")
    assert "nothing: no curve of wrongly answered samples is complete" in done.stdout
    assert "`samples: all`" in done.stdout


def test_names_of_groups_can_be_copied_from_80_columns() -> None:
    said = on_a_terminal("inspect", ROOT / "configs" / "demo.yaml", "--sample", "match_image")
    assert said.split().count("incorrect_candidates") == 3
    assert "<|vision_eos|>3." in said


def test_ctrl_c_while_the_report_is_written_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, plan = RunPaths(tmp_path / "my run"), make_plan()
    fill(paths, plan)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("avflow.orchestrator.sweep.run_sweep", interrupted)
    done = avflow("resume", paths.root)
    assert done.returncode == 130
    assert f"go on: avflow resume {shlex.quote(str(paths.root))}" in done.stderr
