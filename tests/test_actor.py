"""The worker in process: what it refuses to load."""

from dataclasses import replace
from typing import Any

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


def test_a_worker_that_did_not_load_still_has_a_name() -> None:
    """Ray asks for it; what its text raises would be told in place of the reason."""
    worker: Any = ModelWorker.__new__(ModelWorker)
    with pytest.raises(UnsupportedModelError, match="no folder"):
        worker.__init__("w1", replace(TESTBED, path="nowhere"), ("cpu",), 1)
    assert repr(worker) == "ModelWorker(w1, testbed)"
