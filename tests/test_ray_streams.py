"""How a unit's stream ends on real Ray, when more than one thing goes wrong with it."""

import os
import signal
from pathlib import Path

import pytest
from faulty import coordinate, faulty_worker, once, unit

from avflow.datasets.media import MediaSpec
from avflow.orchestrator.cluster import start_ray
from avflow.orchestrator.ray_executor import RayExecutor
from avflow.workers.actor import DECODE_RETRIES
from avflow.workers.decode import Decoded, decode_unit
from avflow.workers.protocol import UnitFailure, UnitSpec


@pytest.mark.ray
def test_a_worker_that_says_nothing_after_its_decoder_crashed_ends_no_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_ray(None)

    def decode(unit: UnitSpec, spec: MediaSpec) -> Decoded | UnitFailure:
        crashes = Path(unit.data_root) / "crashes"
        if unit.unit_id == "u0" and len(crashes.read_text()) <= DECODE_RETRIES:
            with crashes.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return decode_unit(unit, spec)

    (tmp_path / "crashes").write_text("")
    monkeypatch.setattr("avflow.workers.actor.decode_unit", decode)
    units = [unit("u0", tmp_path, "forgets"), unit("u1", tmp_path)]
    executor = RayExecutor(workers=1, threads=1, worker_class=faulty_worker())
    outcome, notes = coordinate(units, executor, deadline_s=15)
    assert notes.curves == once(["u0", "u1"])
    first, last = notes.failures
    assert (first.failure.stage, first.terminal) == ("decode", False)
    assert (last.failure.error, last.terminal) == ("StreamEnded", True)
    assert outcome.failures == 1
