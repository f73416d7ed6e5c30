"""Workers that die, hang, raise and fail to load, on real Ray: each costs what it must and no more.

The coordinator, queue, executor and actors are the real ones; only the model is left out, so that
a fault can be put exactly where it is wanted: a sample's `category` says what goes wrong with it.
"""

import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from avflow.datasets.media import MediaSpec
from avflow.datasets.sample import MediaPart, Sample, TextPart
from avflow.orchestrator.cluster import start_ray
from avflow.orchestrator.coordinator import Coordinator, Outcome, Patience, Placement
from avflow.orchestrator.executors import Executor
from avflow.orchestrator.policy import Budgets, Decision, FailureKind, FailurePolicy
from avflow.orchestrator.progress import Silent
from avflow.orchestrator.queue import WorkQueue
from avflow.orchestrator.ray_executor import RayExecutor
from avflow.pathways.catalogue import ALL
from avflow.workers.actor import ModelWorker
from avflow.workers.decode import Decoded, decode_unit
from avflow.workers.models.base import ModelSpec
from avflow.workers.protocol import CurveDone, CurveSpec, Event, SampleDone, UnitFailure, UnitSpec

pytestmark = pytest.mark.ray

N_CURVES = 6
SPEC = MediaSpec(
    fps=2,
    max_frames=8,
    temporal_patch=2,
    frame_min_pixels=28 * 28,
    frame_max_pixels=56 * 56,
    image_min_pixels=28 * 28,
    image_max_pixels=56 * 56,
    patch_multiple=28,
    sample_rate=16_000,
    max_audio_s=None,
)
CURVES = tuple(
    CurveSpec(pathway=pathway, window=1, center_layers=(0, 1)) for pathway in ALL[:N_CURVES]
)
KEYS = [curve.key for curve in CURVES]


@pytest.fixture(scope="session")
def ray_here() -> None:
    """One Ray on this machine for all tests of the session; it ends with the process."""
    start_ray(None)


def faulty_worker() -> type[ModelWorker]:
    """The class is made in a function, so that Ray sends it along and imports no test module."""

    class FaultyWorker(ModelWorker):
        def __init__(self, name: str, spec: ModelSpec, device: str, threads: int) -> None:
            self.name = name
            if spec.path == "broken":
                raise RuntimeError("no such weights")
            if spec.path == "hangs":
                time.sleep(3600)

        def __repr__(self) -> str:
            return f"FaultyWorker({self.name})"

        def about(self) -> tuple[MediaSpec, str, str]:
            return SPEC, f"{socket.gethostname()}:{os.getpid()}", ""

        def run_unit(self, unit: UnitSpec, decoded: Decoded | UnitFailure) -> Iterator[Event]:
            if isinstance(decoded, UnitFailure):
                yield decoded
                return
            ledger = Path(unit.data_root) / f"{unit.unit_id}.ran"
            what, _, where = unit.sample.category.partition("@")
            fault_at = int(where or -1)
            for index, curve in enumerate(unit.curves):
                if curve.key not in unit.wanted:
                    continue
                with ledger.open("a") as file:
                    file.write(curve.key + "\n")
                if index == fault_at:
                    time.sleep(0.1)  # what was yielded is on its way by now
                    if what == "dies" or (
                        what == "dies_once" and ledger.read_text().count(curve.key) == 1
                    ):
                        os.kill(os.getpid(), signal.SIGKILL)
                    if what == "raises":
                        raise RuntimeError("the device is gone")
                    if what == "memory":
                        raise MemoryError("host memory is gone")
                    if what == "hangs":
                        time.sleep(3600)
                    if what == "fails":
                        yield failed(unit.unit_id, curve.key)
                        continue
                yield curve_done(unit.unit_id, curve.key)
            if what != "forgets":
                yield sample_done(unit.unit_id)

    def failed(unit_id: str, key: str) -> UnitFailure:
        return UnitFailure(
            unit_id=unit_id, curve=key, stage="replay", error="E", message="m", traceback=""
        )

    def curve_done(unit_id: str, key: str) -> CurveDone:
        return CurveDone(
            unit_id=unit_id,
            curve=key,
            center_layer=np.arange(2, dtype=np.int16),
            p_knockout=np.full(2, 0.5),
            p_options=np.full((2, 4), 0.25),
            knockout_token=np.zeros(2, dtype=np.int32),
            n_blocked_edges=np.ones(2, dtype=np.int64),
            p_base=0.5,
            base_token=0,
            correct_base=True,
            answer_token=0,
            n_tokens=10,
        )

    def sample_done(unit_id: str) -> SampleDone:
        return SampleDone(
            unit_id=unit_id,
            answer="A",
            predicted="A",
            base_token=0,
            p_base=0.5,
            p_options=np.full(4, 0.25),
            correct=True,
            n_tokens=10,
            group_spans={},
            decode_s=0,
            encode_s=0,
            prefill_s=0,
            replay_s=0,
            token_layers=0,
            flops=0,
            flops_lower_bound=0,
            split_batches=0,
            peak_bytes=0,
        )

    return FaultyWorker


class Notes:
    """A recorder that remembers."""

    def __init__(self) -> None:
        self.curves: Counter[tuple[str, str]] = Counter()
        self.samples: Counter[str] = Counter()
        self.failures: list[Decision] = []
        self.commits = 0
        self.tasks_stored: list[str] = []

    def add_curve(self, unit: UnitSpec, done: CurveDone) -> None:
        self.curves[unit.unit_id, done.curve] += 1

    def add_sample(self, unit: UnitSpec, done: SampleDone, *, worker: str, attempt: int) -> None:
        self.samples[unit.unit_id] += 1

    def add_failure(self, decision: Decision, *, worker: str) -> None:
        self.failures.append(decision)

    def tick(self) -> bool:
        return True

    def commit(self) -> None:
        self.commits += 1


def unit(unit_id: str, root: Path, fault: str = "", media: str | None = None) -> UnitSpec:
    part = TextPart(role="question", text="?")
    parts = (part,) if media is None else (MediaPart(kind="video", path=media), part)
    sample = Sample(
        sample_id=unit_id,
        dataset="d",
        task="t",
        category=fault,
        layout="single_video",
        parts=parts,
        answer=0,
        media_group="g",
    )
    return UnitSpec(
        unit_id=unit_id,
        model="m",
        data_root=str(root),
        sample=sample,
        curves=CURVES,
        wanted=frozenset(KEYS),
        byte_budget=1,
        cost=1.0,
    )


def sweep(
    units: list[UnitSpec],
    executor: Executor,
    *,
    path: str = "fine",
    deadline_s: float | None = None,
    load_s: float = 60,
    budgets: Budgets | None = None,
) -> tuple[Outcome, Notes]:
    notes = Notes()
    policy = FailurePolicy(budgets=budgets or Budgets())
    coordinator = Coordinator(
        queue=WorkQueue(units, policy=policy, deadline_s=deadline_s),
        units={unit.unit_id: unit for unit in units},
        models={"m": Placement(spec=ModelSpec(name="m", family="none", path=path), gpus=1)},
        executor=executor,
        recorder=notes,
        progress=Silent(),
        patience=Patience(load_s=load_s),
        on_task_stored=lambda: notes.tasks_stored.append("t"),
    )
    return coordinator.run(), notes


def on_ray(workers: int = 2) -> RayExecutor:
    return RayExecutor(workers=workers, threads=1, worker_class=faulty_worker())


def ran(root: Path, unit_id: str) -> Counter[str]:
    return Counter((root / f"{unit_id}.ran").read_text().split())


def once(unit_ids: list[str], but: tuple[tuple[str, str], ...] = ()) -> Counter[tuple[str, str]]:
    return Counter({(u, key): 1 for u in unit_ids for key in KEYS if (u, key) not in but})


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
    outcome, notes = sweep(units, on_ray(), budgets=Budgets(fatal=1, host_memory=1))
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
    outcome, notes = sweep(units, on_ray(1), deadline_s=2, budgets=budgets)
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
    outcome, notes = sweep(units, on_ray(1), deadline_s=3)
    assert set(notes.samples) == {"fine"}
    assert Counter(d.unit.unit_id for d in notes.failures) == {
        "corrupt": 1,
        "missing": 1,
        "crashes": 2,
        "blocks": 2,
    }
    assert {d.failure.stage for d in notes.failures} == {"decode"}
    assert outcome.failures == 4


@pytest.mark.parametrize(
    ("path", "load_s", "says"),
    [("broken", 60, "RuntimeError: no such weights"), ("hangs", 4, "load_deadline_s = 4 s")],
)
def test_a_model_that_does_not_load_is_given_up(
    ray_here: None, tmp_path: Path, path: str, load_s: float, says: str
) -> None:
    outcome, notes = sweep([unit("u0", tmp_path)], on_ray(1), path=path, load_s=load_s)
    assert says in outcome.given_up["m"]
    assert [d.kind for d in notes.failures] == [FailureKind.LOAD] * 2
    assert all(says in d.failure.message for d in notes.failures)
    assert not notes.curves


def test_what_ray_listens_on_is_this_machine_alone(ray_here: None) -> None:
    import ray

    assert ray.nodes()[0]["NodeManagerAddress"] == "127.0.0.1"
    assert os.environ["RAY_AUTH_MODE"] == "token"
