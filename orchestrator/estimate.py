"""What a sweep takes, model by model and data set by data set: the engine's own counts on prompts
of nominal length (`cost.nominal_layout`), before and after prefix reuse.

FLOPs are those of the decoder's matrix products. Vision and audio encoders run once a sample in
either way and are left out, as is decoding, which the CPUs do ahead. A measured sample
(`measure.py`) has them in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from avflow.orchestrator.cost import nominal_layout
from avflow.orchestrator.errors import ConfigError
from avflow.orchestrator.plan import Plan
from avflow.pathways.layout import Layout
from avflow.workers.protocol import CurveSpec, DiscardSpec, MaskSpec, ProbeSpec, UnitSpec

if TYPE_CHECKING:
    from avflow.workers.engine.memory import Shapes
    from avflow.workers.models.base import ModelInfo

CARDS: Mapping[str, float] = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""Dense bfloat16 FLOP/s of the data sheets (SXM where there are several forms)."""
UTILISATION = 0.4
"""The share of that which prefills of some thousand tokens get; `--measure` replaces the guess."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Counts and decoder FLOPs. `plain`: one full forward a cell, a baseline and an intervention;
    `shared`: what the engine executes; `floor`: the least that these numbers need. They add."""

    samples: int = 0
    jobs: int = 0
    cells: int = 0
    forwards: float = 0.0
    plain: float = 0.0
    shared: float = 0.0
    floor: float = 0.0

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(
            samples=self.samples + other.samples,
            jobs=self.jobs + other.jobs,
            cells=self.cells + other.cells,
            forwards=self.forwards + other.forwards,
            plain=self.plain + other.plain,
            shared=self.shared + other.shared,
            floor=self.floor + other.floor,
        )

    @property
    def equivalents(self) -> float:
        """What is executed, in full forward passes."""
        return self.shared / self.plain * self.forwards if self.plain else 0.0


def gpu_hours(flops: float, card: str, utilisation: float = UTILISATION) -> float:
    """Raises ConfigError for a card that is not listed."""
    if card not in CARDS:
        raise ConfigError(f"unknown card {card!r}; known: {', '.join(CARDS)}")
    return flops / (CARDS[card] * utilisation) / 3600


def estimate(plan: Plan, accuracy: float = 1.0) -> dict[tuple[str, str], Estimate]:
    """(model, data set) -> what it takes, if a share `accuracy` of the baselines is right: where
    one is wrong, the curves that ask for right ones are not run."""
    found: dict[tuple[str, str], Estimate] = {}
    for group in plan.groups:
        jobs = sum(len(curve.job_ids) for curve in group.curves)
        key = group.model, group.dataset
        found[key] = found.get(key, Estimate()) + Estimate(jobs=jobs, cells=jobs * group.samples)
    known: dict[object, Estimate] = {}
    for unit in plan.units:
        layout = nominal_layout(unit.sample, plan.config.model(unit.model))
        shape = unit.model, layout, id(unit.curves), unit.extras  # a group's units share `curves`
        if shape not in known:
            known[shape] = of_unit(unit, layout, plan.models[unit.model], accuracy)
        found[unit.model, unit.sample.dataset] += known[shape]
    return found


def of_unit(
    unit: UnitSpec, layout: Layout | None, info: ModelInfo, accuracy: float = 1.0
) -> Estimate:
    """One sample's, without jobs and cells; `layout` None: a prompt that makes no sense."""
    from avflow.workers.engine.cost import plain_cost, prefill_floor
    from avflow.workers.engine.memory import shapes_of

    if layout is None:
        return Estimate(samples=1)
    shapes = shapes_of(info, info.head_size, layout.n_tokens, item_bytes=2)
    prefill = prefill_floor(shapes).flops
    forwards, shared, floor = 1.0, prefill, prefill
    asked = Counter(len(curve.center_layers) for curve in unit.curves if curve.correct_only)
    always = tuple(curve for curve in unit.curves if not curve.correct_only)
    if_right = accuracy * sum(centers * count for centers, count in asked.items())
    forwards += if_right + sum(len(curve.center_layers) for curve in always)
    for share, curves in ((accuracy, unit.curves), (1 - accuracy, always)):
        if share and curves:
            executed, least = _curves(unit, layout, shapes, curves)
            shared, floor = shared + share * executed, floor + share * least
    for executed, least in _extras(unit, layout, shapes, prefill):
        shared, floor = shared + executed, floor + least
    forwards += sum(not isinstance(spec, ProbeSpec) for spec in unit.extras)
    return Estimate(
        samples=1,
        forwards=forwards,
        plain=forwards * plain_cost(shapes).flops,
        shared=shared,
        floor=floor,
    )


def _curves(
    unit: UnitSpec, layout: Layout, shapes: Shapes, curves: tuple[CurveSpec, ...]
) -> tuple[float, float]:
    """FLOPs executed, and at the least."""
    from dataclasses import replace

    from avflow.workers.curves import knockouts_of, resolve
    from avflow.workers.engine.cost import batch_cost, knockout_floor
    from avflow.workers.engine.plan import compose_batches

    resolved, _ = resolve(replace(unit, curves=curves), layout, shapes.n_layers)
    knockouts = knockouts_of(resolved)
    batches = compose_batches(layout, knockouts, shapes, unit.byte_budget)
    executed = sum(batch_cost(shapes, batch).flops for batch in batches)
    return executed, knockout_floor(layout, shapes, knockouts).flops


def _extras(
    unit: UnitSpec, layout: Layout, shapes: Shapes, prefill: float
) -> Iterator[tuple[float, float]]:
    """FLOPs of each, executed and at the least."""
    from avflow.workers.engine.cost import batch_cost, knockout_floor
    from avflow.workers.engine.plan import Batch
    from avflow.workers.extras import plan_masks

    masks = plan_masks(unit, layout, shapes)
    for spec in unit.extras:
        match spec:
            case MaskSpec():
                batch = masks.batches.get(spec.key)
                if isinstance(batch, Batch):
                    least = knockout_floor(layout, shapes, [masks.knockouts[spec.key]]).flops
                    yield batch_cost(shapes, batch).flops, least
            case DiscardSpec():
                yield 2 * prefill, prefill  # it runs twice, the second timed; it saves little
            case ProbeSpec():
                pass  # it watches the baseline
