"""Units and curves for tests of run_unit."""

from typing import Any

from avflow.datasets.sample import Sample
from avflow.pathways import catalogue
from avflow.workers.protocol import CurveDone, CurveSpec, Event, UnitSpec

N_LAYERS = 8
BUDGET = 8 * 2**20


def curve(name: str, *, window: int = 3, correct_only: bool = True, **changes: Any) -> CurveSpec:
    pathway = catalogue.find(name)[0]
    return CurveSpec(
        pathway=pathway,
        window=window,
        center_layers=changes.get("center_layers", tuple(range(N_LAYERS))),
        option_span=changes.get("option_span", "letter"),
        correct_only=correct_only,
    )


EVERY_CURVE = tuple(curve(p.name) for p in catalogue.SINGLE_VIDEO)


def unit(curves: tuple[CurveSpec, ...], wanted: set[str] | None = None, **changes: Any) -> UnitSpec:
    sample = Sample(
        sample_id="s1", dataset="d", task="t", category="c", layout="single_video", parts=(),
        answer=0, media_group="m",
    )  # fmt: skip
    return UnitSpec(
        unit_id="u1",
        model="tiny",
        data_root=".",
        sample=sample,
        curves=curves,
        wanted=frozenset(c.key for c in curves) if wanted is None else frozenset(wanted),
        byte_budget=changes.get("byte_budget", BUDGET),
        cost=1,
    )


def curves_of(events: list[Event]) -> dict[str, CurveDone]:
    return {event.curve: event for event in events if isinstance(event, CurveDone)}
