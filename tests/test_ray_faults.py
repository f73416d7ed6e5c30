"""Workers that die, hang, raise and fail to load, on real Ray: each costs what it must, no more."""

import os
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from faulty import KEYS, coordinate, faulty_worker, once, ran, unit
from media_files import write_video

from avflow.datasets.media import MediaSpec
from avflow.orchestrator.cluster import start_ray
from avflow.orchestrator.coordinator import Outcome, Patience
from avflow.orchestrator.policy import Budgets, FailureKind
from avflow.orchestrator.ray_executor import RayExecutor
from avflow.workers.decode import Decoded, decode_unit
from avflow.workers.protocol import UnitFailure, UnitSpec

pytestmark = pytest.mark.ray


@pytest.fixture(scope="session")
def ray_here() -> None:
    """One Ray on this machine for all tests of the session; it ends with the process."""
    start_ray(None)


def on_ray(workers: int = 2) -> RayExecutor:
    return RayExecutor(workers=workers, threads=1, worker_class=faulty_worker())


def test_many_faults_at_once_lose_and_double_nothing(ray_here: None, tmp_path: Path) -> None:
    faults = {
        "u1": "dies@2",
        "u3": "fails@4",
        "u5": "dies_once@1",
        "u6": "forgets",
        "u7": "raises@3",
        "u8": "memory@0",
    }
    units = [unit(f"u{i}", tmp_path, faults.get(f"u{i}", "")) for i in range(10)]
    outcome, notes = coordinate(units, on_ray(), budgets=Budgets(fatal=1, host_memory=1))
    lost = (("u1", KEYS[2]), ("u3", KEYS[4]), ("u7", KEYS[3]), ("u8", KEYS[0]))
    assert notes.curves == once([u.unit_id for u in units], but=lost)
    assert ran(tmp_path, "u1")[KEYS[2]] == 3, "a curve that kills gets three tries"
    assert ran(tmp_path, "u5")[KEYS[1]] == 2
    terminal = Counter((d.unit.unit_id, d.failure.curve) for d in notes.failures if d.terminal)
    assert terminal == dict.fromkeys((*lost, ("u6", None)), 1)
    kinds = {(d.unit.unit_id, d.kind) for d in notes.failures}
    assert ("u1", FailureKind.WORKER_DEATH) in kinds
    assert ("u7", FailureKind.FATAL) in kinds
    assert ("u3", FailureKind.EXCEPTION) in kinds
    assert ("u8", FailureKind.HOST_MEMORY) in kinds
    assert notes.tasks_stored == ["t"]
    assert outcome == Outcome(signal=None, failures=5, given_up={})


def test_a_hang_ends_by_its_deadline(ray_here: None, tmp_path: Path) -> None:
    units = [unit("u0", tmp_path, "hangs@3"), unit("u1", tmp_path)]
    budgets = Budgets(timeout=1)
    outcome, notes = coordinate(units, on_ray(1), deadline_s=2, budgets=budgets)
    assert notes.curves == once(["u0", "u1"], but=(("u0", KEYS[3]),))
    assert [(d.kind, d.failure.stage, d.failure.curve) for d in notes.failures] == [
        (FailureKind.TIMEOUT, "timeout", KEYS[3])
    ]
    assert outcome.failures == 1


def test_media_that_break_crash_or_block_the_decoder_cost_their_sample(
    ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corrupt.mp4").write_bytes(b"no video at all")

    def decode(unit: UnitSpec, spec: MediaSpec) -> Decoded | UnitFailure:
        if unit.unit_id == "crashes":
            os.kill(os.getpid(), signal.SIGKILL)
        if unit.unit_id == "blocks":
            time.sleep(3600)
        return decode_unit(unit, spec)

    monkeypatch.setattr("avflow.workers.actor.decode_unit", decode)
    units = [
        unit("corrupt", tmp_path, media="corrupt.mp4"),
        unit("missing", tmp_path, media="missing.mp4"),
        unit("crashes", tmp_path),
        unit("blocks", tmp_path),
        unit("fine", tmp_path),
    ]
    outcome, notes = coordinate(units, on_ray(1), deadline_s=8)  # a process may take 5 to start
    assert set(notes.samples) == {"fine"}
    assert Counter(d.unit.unit_id for d in notes.failures) == {
        "corrupt": 1,
        "missing": 1,
        "crashes": 2,
        "blocks": 2,
    }
    assert {d.failure.stage for d in notes.failures} == {"decode"}
    assert outcome.failures == 4


def test_media_of_several_samples_are_decoded_once(
    ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "a.mp4", [0, 0.5])
    write_video(tmp_path / "b.mp4", [0, 0.5])
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")

    def decode(unit: UnitSpec, spec: MediaSpec) -> Decoded | UnitFailure:
        with (Path(unit.data_root) / f"{unit.sample.media[0].path}.decoded").open("a") as file:
            file.write(f"{unit.unit_id}\n")
        return decode_unit(unit, spec)

    monkeypatch.setattr("avflow.workers.actor.decode_unit", decode)
    plain = [
        unit(f"{m}{i}", tmp_path, media=f"{m}.mp4") for m in ("a", "b", "broken") for i in range(3)
    ]
    units = [
        replace(u, sample=replace(u.sample, media_group=u.sample.media[0].path)) for u in plain
    ]
    outcome, notes = coordinate(units, on_ray(1))
    assert notes.curves == once([f"{media}{i}" for media in "ab" for i in range(3)])
    for media in "ab":
        (only,) = (tmp_path / f"{media}.mp4.decoded").read_text().split()
        assert only.startswith(media)
    failed = Counter((d.unit.unit_id, d.failure.unit_id, d.failure.error) for d in notes.failures)
    assert failed == Counter((f"broken{i}", f"broken{i}", "MediaError") for i in range(3))
    assert outcome.failures == 3


@pytest.mark.parametrize(
    ("path", "load_s", "says", "kinds"),
    [
        ("broken", 60, "RuntimeError: no such weights", [FailureKind.LOAD] * 2),
        ("hangs", 4, "load_deadline_s = 4 s", [FailureKind.LOAD] * 2),
        ("unsupported", 60, "take 9.0 GiB, free are 8.0 GiB", [FailureKind.UNSUPPORTED]),
    ],
)
def test_a_model_that_does_not_load_is_given_up(
    ray_here: None, tmp_path: Path, path: str, load_s: float, says: str, kinds: list[FailureKind]
) -> None:
    outcome, notes = coordinate(
        [unit("u0", tmp_path)], on_ray(1), path=path, patience=Patience(load_s=load_s)
    )
    assert says in outcome.given_up["m"]
    assert [d.kind for d in notes.failures] == kinds
    assert all(says in d.failure.message for d in notes.failures)
    assert not notes.curves


def test_what_ray_listens_on_is_this_machine_alone(ray_here: None) -> None:
    import ray

    assert ray.nodes()[0]["NodeManagerAddress"] == "127.0.0.1"
    assert os.environ["RAY_AUTH_MODE"] == "token"
