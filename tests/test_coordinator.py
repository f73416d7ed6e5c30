"""The coordinator in process: workers replaced and passed on, deadlines, and signals."""

import os
import signal
import time
from pathlib import Path

import pytest
from faulty import KEYS, coordinate, faulty_worker, once, ran, unit
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    OutOfMemoryError,
    RaySystemError,
    RayTaskError,
    UnserializableException,
)

from avflow.orchestrator.coordinator import Outcome, Patience
from avflow.orchestrator.executors import LocalExecutor
from avflow.orchestrator.policy import FailureKind
from avflow.orchestrator.progress import Snapshot
from avflow.orchestrator.ray_executor import death_kind


def here() -> LocalExecutor:
    return LocalExecutor(threads=1, worker_class=faulty_worker())


class Watched(LocalExecutor):
    """Notes which workers were started and ended."""

    def __init__(self) -> None:
        super().__init__(threads=1, worker_class=faulty_worker())
        self.started: list[tuple[str, str]] = []
        self.ended: list[str] = []
        self.gone: frozenset[str] = frozenset()

    def start_worker(self, worker: str, spec: object, gpus: int) -> None:
        self.started.append((worker, spec.name))
        super().start_worker(worker, spec, gpus)

    def kill(self, worker: str) -> None:
        self.ended.append(worker)
        super().kill(worker)

    def leaving(self) -> frozenset[str]:
        return self.gone


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RayTaskError("f", "Traceback", RuntimeError("x")), FailureKind.FATAL),
        (RayTaskError("f", "Traceback", MemoryError("x")), FailureKind.HOST_MEMORY),
        (UnserializableException("x"), FailureKind.FATAL),
        (OutOfMemoryError("node ran low"), FailureKind.HOST_MEMORY),
        (ActorDiedError(), FailureKind.WORKER_DEATH),
        (ActorUnavailableError("node gone", b"0" * 16), FailureKind.WORKER_DEATH),
        (RaySystemError("x"), FailureKind.WORKER_DEATH),
    ],
)
def test_what_a_ray_error_says_of_the_worker(error: Exception, kind: FailureKind) -> None:
    assert death_kind(error) is kind


def test_failures_of_all_kinds_in_process(tmp_path: Path) -> None:
    faults = {"u1": "fails@4", "u2": "forgets", "u3": "raises@3", "u4": "memory@0"}
    units = [unit(f"u{i}", tmp_path, faults.get(f"u{i}", "")) for i in range(6)]
    outcome, notes = coordinate(units, here())
    lost = (("u1", KEYS[4]), ("u3", KEYS[3]), ("u4", KEYS[0]))
    assert notes.curves == once([u.unit_id for u in units], but=lost)
    assert ran(tmp_path, "u3")[KEYS[3]] == 3, "a worker that a curve ruins is replaced twice"
    kinds = {(d.unit.unit_id, d.kind) for d in notes.failures}
    assert {("u3", FailureKind.FATAL), ("u4", FailureKind.HOST_MEMORY)} <= kinds
    assert outcome == Outcome(signal=None, failures=4, given_up={})
    assert notes.tasks_stored == ["t"]


def test_a_unit_sent_again_with_half_the_budget_counts_as_split(tmp_path: Path) -> None:
    units = [unit("u0", tmp_path, "small@2"), unit("u1", tmp_path)]
    outcome, notes = coordinate(units, here())
    assert outcome == Outcome(signal=None, failures=0, given_up={})
    assert notes.curves == once(["u0", "u1"])
    assert notes.splits == {"u0": 1, "u1": 0}


def test_room_goes_to_the_next_model_when_one_is_done(tmp_path: Path) -> None:
    units = [unit(f"{m}{i}", tmp_path, model=m) for m in ("first", "second") for i in range(3)]
    executor = Watched()
    _, notes = coordinate(units, executor)
    assert notes.curves == once([u.unit_id for u in units])
    assert executor.started == [("w1", "first"), ("w2", "second")], "each model is loaded once"


def test_a_model_that_does_not_load_leaves_the_others_alone(tmp_path: Path) -> None:
    outcome, notes = coordinate([unit("u0", tmp_path)], here(), path="broken")
    assert list(outcome.given_up) == ["m"]
    assert "no such weights" in outcome.given_up["m"]
    assert len(notes.failures) == 2


def test_a_model_that_can_never_load_is_given_up_at_once(tmp_path: Path) -> None:
    outcome, notes = coordinate([unit("u0", tmp_path)], here(), path="unsupported")
    assert "take 9.0 GiB, free are 8.0 GiB" in outcome.given_up["m"]
    assert [d.kind for d in notes.failures] == [FailureKind.UNSUPPORTED]


def test_a_worker_whose_node_leaves_finishes_and_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avflow.orchestrator.coordinator.LEAVING_EVERY_S", 0)
    executor = Watched()
    executor.gone = frozenset({"w1"})
    units = [unit(f"u{i}", tmp_path) for i in range(5)]
    _, notes = coordinate(units, executor)
    assert notes.curves == once([u.unit_id for u in units])
    assert [name for name, _ in executor.started] == ["w1", "w2"]
    assert not notes.failures, "leaving costs nothing"


class Striking:
    """Sends this process signals while it works."""

    def __init__(self, *numbers: int, after_curves: int) -> None:
        self._numbers = list(numbers)
        self._after = after_curves
        self.said: list[str] = []

    def show(self, snapshot: Snapshot, now: float) -> None:
        while self._numbers and snapshot.curves_ended >= self._after:
            os.kill(os.getpid(), self._numbers.pop(0))

    def say(self, text: str) -> None:
        self.said.append(text)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_first_signal_lets_running_units_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr("avflow.orchestrator.coordinator.TICK_S", 0)
    units = [unit(f"u{i}", tmp_path) for i in range(6)]
    striking = Striking(number, after_curves=3)
    outcome, notes = coordinate(units, here(), progress=striking)
    assert outcome.signal == number
    assert sorted(notes.samples) == ["u0", "u1"], "what was in flight ended, nothing else began"
    assert notes.commits == 1
    assert "stopping" in striking.said[0]


def test_a_terminal_that_goes_hangs_up_once_and_not_under_nohup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avflow.orchestrator.coordinator.TICK_S", 0)
    units = [unit(f"u{i}", tmp_path) for i in range(6)]
    striking = Striking(signal.SIGHUP, signal.SIGHUP, after_curves=3)
    outcome, notes = coordinate(units, here(), progress=striking)
    assert outcome.signal == signal.SIGHUP
    assert sorted(notes.samples) == ["u0", "u1"], "a second one cuts nothing short"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        outcome, notes = coordinate(units, here(), progress=Striking(signal.SIGHUP, after_curves=3))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert outcome.signal is None
    assert len(notes.samples) == 6


def test_a_unit_that_outlasts_the_grace_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avflow.orchestrator.coordinator.TICK_S", 0)
    units = [unit(f"u{i}", tmp_path) for i in range(6)]
    striking = Striking(signal.SIGINT, after_curves=3)
    outcome, notes = coordinate(
        units, here(), progress=striking, patience=Patience(load_s=60, grace_s=0)
    )
    assert outcome.signal == signal.SIGINT
    assert 3 <= notes.curves.total() <= 4, "curves that came out are kept"
    assert notes.commits == 1


def test_a_second_signal_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avflow.orchestrator.coordinator.TICK_S", 0)
    before = signal.getsignal(signal.SIGINT)
    units = [unit(f"u{i}", tmp_path, "hangs@4") for i in range(3)]
    began = time.monotonic()
    striking = Striking(signal.SIGINT, signal.SIGTERM, after_curves=3)
    with pytest.raises(KeyboardInterrupt):
        coordinate(units, here(), progress=striking)
    assert time.monotonic() - began < 60, "not after the hang"
    assert signal.getsignal(signal.SIGINT) is before
