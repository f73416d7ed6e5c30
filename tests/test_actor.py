"""The worker in process: what it refuses to load."""

from dataclasses import replace

import pytest

from avflow.workers.actor import ModelWorker
from avflow.workers.models import describe
from avflow.workers.models.base import ModelSpec, UnsupportedModelError

TESTBED = ModelSpec(name="testbed", family="qwen2_5_omni", path="testbed", dtype="float32")


def test_a_worker_refuses_another_checkpoint_than_was_planned() -> None:
    planned = describe(TESTBED).digest
    worker = ModelWorker("w0", replace(TESTBED, digest=planned), ("cpu",), 1)
    assert worker.model.info.digest == planned
    with pytest.raises(UnsupportedModelError, match="planned was 0123"):
        ModelWorker("w1", replace(TESTBED, digest="0123"), ("cpu",), 1)
