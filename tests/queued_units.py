"""Units and failures for tests of the queue."""

from dataclasses import replace

from avflow.datasets.sample import Sample, TextPart
from avflow.orchestrator.queue import WorkQueue
from avflow.pathways.catalogue import SINGLE_VIDEO
from avflow.workers.protocol import CurveSpec, UnitFailure, UnitSpec

SAMPLE = Sample(
    sample_id="s",
    dataset="d",
    task="t",
    category="c",
    layout="single_video",
    parts=(TextPart(role="question", text="?"),),
    answer=0,
    media_group="g",
)


def unit(
    name: str,
    curves: int = 3,
    *,
    cost: float = 1.0,
    model: str = "m",
    correct_only: bool = True,
    media: str = "g",
) -> UnitSpec:
    specs = tuple(
        CurveSpec(pathway=p, window=3, center_layers=(0, 1), correct_only=correct_only)
        for p in SINGLE_VIDEO[:curves]
    )
    return UnitSpec(
        unit_id=name,
        model=model,
        data_root="/",
        sample=replace(SAMPLE, media_group=media),
        curves=specs,
        wanted=frozenset(spec.key for spec in specs),
        byte_budget=1 << 20,
        cost=cost,
    )


def keys(spec: UnitSpec) -> list[str]:
    return [curve.key for curve in spec.curves if curve.key in spec.wanted]


def failed(
    unit_id: str, curve: str | None, *, retryable: bool = False, error: str = "E"
) -> UnitFailure:
    return UnitFailure(
        unit_id=unit_id,
        curve=curve,
        stage="replay",
        error=error,
        message="it broke",
        traceback="",
        retryable=retryable,
    )


def lease(queue: WorkQueue, worker: str = "w", now: float = 0.0) -> UnitSpec:
    spec = queue.next_for(worker, "m", now)
    assert spec is not None
    return spec


def run(queue: WorkQueue, spec: UnitSpec, worker: str = "w") -> None:
    """Everything that is wanted comes out."""
    for key in keys(spec):
        assert queue.on_curve(worker, spec.unit_id, key, 0.0)
    assert queue.on_sample_done(worker, spec.unit_id, correct=True, now=0.0) == []
