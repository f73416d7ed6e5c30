"""Workers of several GPUs on a real Ray, which is told of GPUs that this machine has not.

Ray reserves what it is told of, and shows each actor its own; the model itself is spread over this
machine's memory and its disk.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray_cluster import bare_cluster
from tiny_models import numbers, same_bits, spec_of, unit_of

from avflow.datasets.media import MediaSpec
from avflow.datasets.testbed.samples import load as load_samples
from avflow.orchestrator.cluster import start_ray
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.executors import Died, Ended, ExecutorEvent, Ready, Yielded
from avflow.orchestrator.policy import FailureKind
from avflow.orchestrator.ray_executor import RayExecutor
from avflow.workers.actor import ModelWorker
from avflow.workers.models import load
from avflow.workers.models.base import ModelSpec
from avflow.workers.models.tiny import build_tiny_checkpoint
from avflow.workers.protocol import CurveDone

pytestmark = [pytest.mark.slow, pytest.mark.ray]
PATIENCE_S = 120


@pytest.fixture(scope="module")
def ray_with_gpus() -> Iterator[None]:
    with bare_cluster() as made:
        for gpus in (4, 1):
            made.add_node(num_cpus=1, num_gpus=gpus)
        start_ray(made.address)
        yield


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return spec_of(build_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "omni", n_layers=4))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the workers have: the last bits of float32 depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def split_worker() -> type[ModelWorker]:
    """Spread over memory and disk, whatever GPUs it is given; says which these are. Made in a
    function, so that Ray sends it along."""

    class SplitWorker(ModelWorker):
        def __init__(self, name: str, spec: Any, devices: Any, threads: int) -> None:
            super().__init__(name, spec, ("cpu", "disk"), threads)
            self.given = devices

        def about(self) -> tuple[MediaSpec, str, str]:
            media_spec, _, node = super().about()
            return media_spec, f"{os.environ['CUDA_VISIBLE_DEVICES']} {self.given}", node

    return SplitWorker


def until(executor: RayExecutor, kind: type[ExecutorEvent], n: int = 1) -> list[Any]:
    """Events up to the n-th of a kind; those of that kind alone."""
    found: list[Any] = []
    end = time.monotonic() + PATIENCE_S
    while len(found) < n and time.monotonic() < end:
        for event in executor.poll(1.0):
            assert isinstance(event, kind | Yielded), event
            found.append(event)
    assert found, "in time"
    return [event for event in found if isinstance(event, kind)]


def test_two_gpus_a_worker_are_two_workers_on_four_and_a_split_model_gives_the_same_cells(
    ray_with_gpus: None, one_thread: None, spec: ModelSpec, tmp_path: Path
) -> None:
    sight, match = load_samples(
        tmp_path, seed=0, samples_per_task=1, tasks=("sight", "match_image")
    )
    whole = load(spec, "cpu")
    executor = RayExecutor(workers=None, threads=1, worker_class=split_worker())
    with pytest.raises(ConfigError, match=r"gpus_per_model is 5, but no machine .* more than 4"):
        executor.has_room(5)
    for worker in ("w1", "w2"):
        assert executor.has_room(2)
        executor.start_worker(worker, spec, 2)
    assert not executor.has_room(2)
    assert executor.has_room(1), "the other machine's"
    ready = {event.worker: event.where for event in until(executor, Ready, 2)}
    devices = "('cuda:0', 'cuda:1')"
    assert set(ready.values()) == {f"0,1 {devices}", f"2,3 {devices}"}
    executor.start_worker("w3", spec, 2)
    units = {"w1": unit_of(4, tmp_path, sight), "w2": unit_of(4, tmp_path, match)}
    for worker, unit in units.items():
        executor.submit(worker, unit)
    found: dict[str, dict[str, Any]] = {worker: {} for worker in units}
    ended = 0
    while ended < len(units):
        for event in executor.poll(1.0):
            assert isinstance(event, Yielded | Ended), event
            ended += isinstance(event, Ended)
            if isinstance(event, Yielded) and isinstance(event.event, CurveDone):
                found[event.worker][event.event.curve] = event.event.p_options
    assert same_bits(found["w1"], numbers(whole, tmp_path, sight))
    assert same_bits(found["w2"], numbers(whole, tmp_path, match))
    assert executor.waits_for_room("w3"), "all four are taken"
    executor.kill("w1")
    (third,) = until(executor, Ready)
    assert (third.worker, third.where) == ("w3", ready["w1"])
    executor.shutdown()


def test_why_a_worker_did_not_load_comes_back_whole(ray_with_gpus: None, spec: ModelSpec) -> None:
    """GPUs that torch does not see, which another machine may have, and a checkpoint that is not
    the planned one, which none has."""
    executor = RayExecutor(workers=None, threads=1)
    executor.start_worker("w1", spec, 2)
    (blind,) = until(executor, Died)
    assert blind.kind is FailureKind.LOAD
    assert blind.message.startswith("NotNowError: model tiny: of the 2 GPUs given to its worker")
    assert "sees 0 (CUDA_VISIBLE_DEVICES: " in blind.message
    executor = RayExecutor(workers=None, threads=1, worker_class=split_worker())
    executor.start_worker("w2", replace(spec, digest="0123"), 1)
    (other,) = until(executor, Died)
    assert other.kind is FailureKind.UNSUPPORTED
    assert "planned was 0123" in other.message
