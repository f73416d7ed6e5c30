"""A worker whose model is left out, so that a fault can be put exactly where it is wanted.

The coordinator, the queue and the executors around it are the real ones. A sample's `category` says
what goes wrong with it: `dies@2` at its third curve, and so on. Torch stays out, so that a worker
starts quickly.
"""

import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from avflow.datasets.media import MediaSpec
from avflow.datasets.sample import MediaPart, Sample, TextPart
from avflow.orchestrator.coordinator import Coordinator, Outcome, Patience, Placement
from avflow.orchestrator.executors import Executor
from avflow.orchestrator.policy import Budgets, Decision, FailurePolicy
from avflow.orchestrator.progress import Progress, Silent
from avflow.orchestrator.queue import WorkQueue
from avflow.pathways.catalogue import ALL
from avflow.workers.actor import ModelWorker
from avflow.workers.decode import Decoded
from avflow.workers.protocol import CurveDone, CurveSpec, Event, SampleDone, UnitFailure, UnitSpec

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


def faulty_worker() -> type[ModelWorker]:
    """The class is made in a function, so that Ray sends it along and imports no test module."""

    class FaultyWorker(ModelWorker):
        def __init__(self, name: str, spec: Any, devices: Any, threads: int) -> None:
            self.name = name
            if spec.path == "broken":
                raise RuntimeError("no such weights")
            if spec.path == "unsupported":
                from avflow.workers.models.base import UnsupportedModelError

                raise UnsupportedModelError("model m: its weights take 9.0 GiB, free are 8.0 GiB")
            if spec.path.startswith("not on ") and ray_node() == spec.path.removeprefix("not on "):
                raise RuntimeError("no GPU is visible")
            if spec.path == "hangs":
                time.sleep(3600)

        def __repr__(self) -> str:
            return f"FaultyWorker({self.name})"

        def about(self) -> tuple[MediaSpec, str, str]:
            return SPEC, f"{socket.gethostname()}:{os.getpid()}", ray_node()

        def run_unit(self, unit: UnitSpec, decoded: Decoded | UnitFailure) -> Iterator[Event]:
            from avflow.workers.decode import as_own

            decoded = as_own(unit, decoded)
            if isinstance(decoded, UnitFailure):
                yield decoded
                return
            broken = Path(unit.data_root) / "broken-node"  # written by the test
            if broken.exists() and ray_node() == broken.read_text():
                os.kill(os.getpid(), signal.SIGKILL)
            ledger = Path(unit.data_root) / f"{unit.unit_id}.ran"
            what, _, where = unit.sample.category.partition("@")
            print(f"{self.name} takes {unit.unit_id}", flush=True)
            time.sleep(float(where) if what == "slow" else 0)
            fault_at = int(where or -1) if what != "slow" else -1
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
                    if what == "small" and ledger.read_text().count(curve.key) == 1:
                        yield failed(unit.unit_id, curve.key, "OutOfMemoryError")
                        continue
                    if what == "fails":
                        yield failed(unit.unit_id, curve.key)
                        continue
                yield curve_done(unit.unit_id, curve.key)
            if what != "forgets":
                yield sample_done(unit.unit_id)

    def ray_node() -> str:
        import ray

        return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""

    def failed(unit_id: str, key: str, error: str = "E") -> UnitFailure:
        return UnitFailure(
            unit_id=unit_id, curve=key, stage="replay", error=error, message="m", traceback=""
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
        self.splits: dict[str, int] = {}
        self.failures: list[Decision] = []
        self.commits = 0
        self.tasks_stored: list[str] = []

    def add_curve(self, unit: UnitSpec, done: CurveDone) -> None:
        self.curves[unit.unit_id, done.curve] += 1

    def add_sample(self, unit: UnitSpec, done: SampleDone, *, worker: str, attempt: int) -> None:
        self.samples[unit.unit_id] += 1
        self.splits[unit.unit_id] = done.split_batches

    def add_failure(self, decision: Decision, *, worker: str) -> None:
        self.failures.append(decision)

    def tick(self) -> bool:
        return True

    def commit(self) -> None:
        self.commits += 1


def unit(
    unit_id: str, root: Path, fault: str = "", *, media: str | None = None, model: str = "m"
) -> UnitSpec:
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
        model=model,
        data_root=str(root),
        sample=sample,
        curves=CURVES,
        wanted=frozenset(KEYS),
        byte_budget=1,
        cost=1.0,
    )


def coordinate(
    units: list[UnitSpec],
    executor: Executor,
    *,
    path: str = "fine",
    deadline_s: float | None = None,
    patience: Patience | None = None,
    budgets: Budgets | None = None,
    progress: Progress | None = None,
) -> tuple[Outcome, Notes]:
    """Run the units; `path` is of the models, "broken", "unsupported" and "hangs" say how
    they fail to load."""
    notes = Notes()
    policy = FailurePolicy(budgets=budgets or Budgets())
    models = dict.fromkeys(unit.model for unit in units)
    coordinator = Coordinator(
        queue=WorkQueue(units, policy=policy, deadline_s=deadline_s),
        units={unit.unit_id: unit for unit in units},
        models={m: Placement(spec=SimpleNamespace(name=m, path=path), gpus=1) for m in models},
        executor=executor,
        recorder=notes,
        progress=progress or Silent(),
        patience=patience or Patience(load_s=60),
        on_task_stored=lambda: notes.tasks_stored.append("t"),
    )
    return coordinator.run(), notes


def ran(root: Path, unit_id: str) -> Counter[str]:
    return Counter((root / f"{unit_id}.ran").read_text().split())


def once(unit_ids: list[str], but: tuple[tuple[str, str], ...] = ()) -> Counter[tuple[str, str]]:
    return Counter({(u, key): 1 for u in unit_ids for key in KEYS if (u, key) not in but})
