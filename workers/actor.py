"""The worker: one model, loaded once, and the units that come to it; on Ray it is an actor.

`ModelWorker` knows nothing of Ray, so that the same class also works in process. On Ray no worker
restarts or retries: Ray's own restarts hide the cause of a death, repeat what killed the worker
and reorder the work. The coordinator replaces workers. What goes over the wire is numpy and
scalars; torch tensors would be pickled copies there.
"""

import os
import socket
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from avflow.datasets.media import MediaSpec
from avflow.workers.decode import Decoded, as_own, decode_unit
from avflow.workers.protocol import Event, UnitFailure, UnitSpec

if TYPE_CHECKING:
    from avflow.workers.models.base import ModelSpec


DECODE_RETRIES = 1


class ModelWorker:
    """One model in memory, one unit at a time."""

    def __init__(
        self, name: str, spec: "ModelSpec", devices: tuple[str, ...], threads: int
    ) -> None:
        """Load the model. `devices` as torch names them, the model spread over them all;
        `threads` of torch on a CPU.

        The last bits of a CPU's float32 sums depend on `threads`, so it belongs to the identity.
        Raises UnsupportedModelError, also when the checkpoint is not the one that was planned.
        """
        import torch

        from avflow.workers.encoders import EncoderCache
        from avflow.workers.models import load
        from avflow.workers.models.base import UnsupportedModelError

        torch.set_num_threads(threads)
        # Both before what may fail: Ray asks for a worker's name to tell that it did not load.
        self.name, self._model_name = name, spec.name
        self.model = load(spec, *devices)
        self.encoders = EncoderCache()
        if spec.digest not in (None, self.model.info.digest):
            raise UnsupportedModelError(
                f"model {spec.name}: the checkpoint at {spec.path} has digest "
                f"{self.model.info.digest}, planned was {spec.digest}; it differs on this machine, "
                "or was changed after the sweep began"
            )

    def __repr__(self) -> str:
        return f"ModelWorker({self.name}, {self._model_name})"

    def about(self) -> tuple[MediaSpec, str, str]:
        """How to decode for this model, `host:pid`, and the Ray node's id ("" without Ray)."""
        return self.model.media_spec, f"{socket.gethostname()}:{os.getpid()}", _ray_node_id()

    def run_unit(self, unit: UnitSpec, decoded: Decoded | UnitFailure) -> Iterator[Event]:
        """The unit's events as they come; raises only what ruins the worker.

        `decoded` may be that of another unit about the same media.
        """
        from avflow.workers.run_unit import run_unit

        decoded = as_own(unit, decoded)
        if isinstance(decoded, UnitFailure):
            yield decoded
        else:
            media, seconds = decoded.media, decoded.seconds
            yield from run_unit(self.model, unit, media, seconds, self.encoders)


def start_actor(
    worker_class: type[ModelWorker],
    name: str,
    spec: "ModelSpec",
    gpus: int,
    threads: int,
    *,
    avoided: Collection[str] = (),
) -> Any:
    """A Ray actor that begins to load; pending until `gpus` GPUs are free (0: a CPU worker).

    Never on one of the `avoided` nodes (Ray's ids).

    It asks for no CPU, so that actors never keep the decoding from its own.
    """
    import ray

    # Ray shows an actor its own GPUs alone, numbered from 0.
    devices = tuple(f"cuda:{i}" for i in range(gpus)) or ("cpu",)
    placed = ray.remote(worker_class).options(
        num_cpus=0,
        num_gpus=gpus,
        max_restarts=0,
        max_task_retries=0,
        scheduling_strategy="SPREAD",
        label_selector={"ray.io/node-id": f"!in({','.join(sorted(avoided))})"} if avoided else None,
    )
    return placed.remote(name, spec, devices, threads)


def decode_ahead(unit: UnitSpec, spec: MediaSpec) -> Any:
    """Decode a unit's media on any CPU: the reference to `Decoded | UnitFailure`.

    The one thing here that Ray may repeat: media that went with their node are decoded again
    elsewhere, below the worker that waits for them. It could not be told otherwise.
    """
    import ray

    label = f"{unit.sample.dataset}/{unit.sample.sample_id}"
    decode = ray.remote(decode_unit).options(
        name=f"decode {label}",
        num_cpus=1,
        max_retries=DECODE_RETRIES,
        scheduling_strategy="SPREAD",
    )
    return decode.remote(unit, spec)


def submit_unit(actor: Any, unit: UnitSpec, decoded: Any) -> Any:
    """Queue a unit on its actor, with a reference to its media: the stream of its events."""
    label = f"{unit.sample.dataset}/{unit.sample.sample_id}"
    run = actor.run_unit.options(name=f"run {label}", num_returns="streaming")
    return run.remote(unit, decoded)


def _ray_node_id() -> str:
    import sys

    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return ""
    return str(ray.get_runtime_context().get_node_id())
