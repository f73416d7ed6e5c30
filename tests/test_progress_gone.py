"""The terminal goes in the night: an ssh connection that drops, a pipe whose reader ends."""

import os
import pty
import sys
from pathlib import Path

import pytest
from faulty import N_CURVES, coordinate, faulty_worker, unit

from avflow.orchestrator.coordinator import Outcome
from avflow.orchestrator.executors import LocalExecutor
from avflow.orchestrator.progress import Enduring, open_progress
from avflow.workers.protocol import UnitSpec


def units_that_are_told_of(folder: Path) -> list[UnitSpec]:
    return [unit("u0", folder, "fails@2"), unit("u1", folder, "fails@3")]


def here() -> LocalExecutor:
    return LocalExecutor(threads=1, worker_class=faulty_worker())


def test_a_pipe_whose_reader_has_ended_ends_no_sweep(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    shown = Enduring(open_progress(os.fdopen(writer, "w", buffering=1)))
    outcome, notes = coordinate(units_that_are_told_of(tmp_path), here(), progress=shown)
    shown.close()
    assert outcome == Outcome(signal=None, failures=2, given_up={})
    assert notes.curves.total() == 2 * (N_CURVES - 1)


def test_a_terminal_that_is_gone_ends_no_sweep_and_keeps_no_hold_of_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pty.openpty()
    terminal = os.fdopen(theirs, "w")
    monkeypatch.setenv("TERM", "xterm")
    before = sys.stdout
    shown = Enduring(open_progress(terminal))
    assert sys.stdout is not before, "rich prints above its bar"
    os.close(ours)
    shown.say("the first that is not heard; this process' own worker prints, too")
    outcome, notes = coordinate(units_that_are_told_of(tmp_path), here(), progress=shown)
    shown.close()
    assert sys.stdout is before
    assert outcome == Outcome(signal=None, failures=2, given_up={})
    assert notes.curves.total() == 2 * (N_CURVES - 1)
