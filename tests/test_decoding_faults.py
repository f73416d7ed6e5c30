"""A file that hangs or crashes its decoder, in a sweep: it costs its own sample, and no worker."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from faulty import SPEC, coordinate, faulty_worker, unit
from media_files import even, write_video
from PIL import Image

from avflow.datasets.sample import MediaPart
from avflow.orchestrator.cluster import start_ray
from avflow.orchestrator.executors import Executor, LocalExecutor
from avflow.orchestrator.ray_executor import RayExecutor
from avflow.workers.protocol import UnitSpec


def executor(kind: str) -> Executor:
    if kind == "local":
        return LocalExecutor(threads=1, worker_class=faulty_worker())
    start_ray(None)
    return RayExecutor(workers=1, threads=1, worker_class=faulty_worker())


def picture(unit_id: str, root: Path, path: str) -> UnitSpec:
    sample = unit(unit_id, root).sample
    part = MediaPart(kind="image", path=path)
    return replace(unit(unit_id, root), sample=replace(sample, parts=(part, *sample.parts)))


@pytest.mark.parametrize("kind", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_stuck_decoder_costs_its_sample_by_name(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Pillow decodes a picture in one call into C; this one takes most of a second.
    monkeypatch.setattr("faulty.SPEC", replace(SPEC, decode_timeout_s=0.15))
    Image.new("RGB", (9400, 9400)).save(tmp_path / "stuck.jpg", progressive=True)
    write_video(tmp_path / "fine.mp4", even(1, 4))
    units = [
        unit("before", tmp_path, media="fine.mp4"),
        picture("stuck", tmp_path, "stuck.jpg"),
        unit("after", tmp_path, media="fine.mp4"),
    ]
    outcome, notes = coordinate(units, executor(kind))
    assert set(notes.samples) == {"before", "after"}
    assert Counter(d.unit.unit_id for d in notes.failures) == {"stuck": 1}
    (failure,) = (d.failure for d in notes.failures)
    assert (failure.stage, failure.error) == ("decode", "MediaError")
    assert "stuck.jpg: decoding took more than 0.15 s" in failure.message
    assert outcome.failures == 1
    assert not outcome.given_up
