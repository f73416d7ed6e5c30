"""Two ways to the same numbers, for tests: the fast engine, and the plain reference pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from avflow.pathways import catalogue
from avflow.pathways.groups import group_positions, members, positions
from avflow.pathways.layout import Layout, Segment
from avflow.pathways.pathway import (
    Pathway,
    blocked_segments,
    first_target,
)
from avflow.pathways.windows import window_layers
from avflow.workers.engine import memory, reference
from avflow.workers.engine.baseline import run_baseline
from avflow.workers.engine.head import last_probabilities
from avflow.workers.engine.memory import Shapes, piece_tokens
from avflow.workers.engine.plan import checkpoints, compose_batches
from avflow.workers.engine.replay import replay
from avflow.workers.engine.rows import Knockout
from avflow.workers.models.base import Embedded

BUDGET = 64 * 2**20
TOLERANCE = 1e-5


def of_kind(layout: Layout) -> list[Pathway]:
    return [p for p in catalogue.ALL if p.layout == layout.kind]


def clip_of(*lengths: int) -> Layout:
    """Frames of these lengths, then the last position."""
    segments, at = [], 0
    for index, length in enumerate(lengths):
        segments.append(Segment(kind="frame", start=at, stop=at + length, index=index))
        at += length
    segments.append(Segment(kind="last", start=at, stop=at + 1))
    return Layout(kind="single_video", n_tokens=at + 1, segments=tuple(segments), answer=0)


def knockout(layout: Layout, pathway: Pathway, window: int, n_layers: int) -> Knockout:
    blocked = blocked_segments(layout, pathway)
    return Knockout(
        blocked=blocked,
        start=first_target(layout, blocked),
        layer_sets=tuple(tuple(window_layers(c, window, n_layers)) for c in range(n_layers)),
    )


def fast(
    tiny, embedded: Embedded, layout: Layout, pathways: Sequence[Pathway], window: int,
    budget: int = BUDGET,
) -> dict[str, Tensor]:  # fmt: skip
    """Probabilities [C, V] of each pathway at every centre, all batched together."""
    n_layers = tiny.info.n_layers
    knockouts = [knockout(layout, p, window, n_layers) for p in pathways]
    found = replayed(tiny, embedded, layout, knockouts, budget)
    return {
        pathway.name: torch.stack([found[number, center] for center in range(n_layers)])
        for number, pathway in enumerate(pathways)
    }


def replayed(
    tiny, embedded: Embedded, layout: Layout, knockouts: Sequence[Knockout], budget: int
) -> dict[tuple[int, int], Tensor]:
    """Probabilities [V] by (knockout, set of layers)."""
    shapes = shapes_for(tiny, layout)
    batches = compose_batches(layout, knockouts, shapes, budget)
    baseline = run_baseline(tiny.decoder, embedded, checkpoints(batches))
    found = {
        (number, index): baseline.probabilities
        for number, asked in enumerate(knockouts)
        for index in range(len(asked.layer_sets))
    }
    trunk: Tensor | None = None
    for batch in batches:
        if batch.opens:
            trunk = baseline.residual[batch.first_layer, batch.start][0]
        done = replay(tiny.decoder, baseline, trunk, batch, piece_tokens(shapes, budget))
        trunk = done.trunk
        control, *rows = last_probabilities(tiny.decoder, done.last)
        if batch.control:  # an unmasked row is the baseline
            assert (control - baseline.probabilities).abs().max() <= control_tolerance(tiny)
        for answers, probabilities in zip(batch.wanted_by, rows, strict=True):
            found.update(dict.fromkeys(answers, probabilities))
    return found


def control_tolerance(tiny) -> float:
    return {torch.bfloat16: 0.02, torch.float32: TOLERANCE}.get(
        next(tiny.hf_model.parameters()).dtype, 1e-7
    )


def shapes_for(tiny, layout: Layout) -> Shapes:
    parameter = next(tiny.hf_model.parameters())
    item_bytes = parameter.element_size()
    return memory.shapes_of(tiny.info, tiny.info.head_size, layout.n_tokens, item_bytes)


def reference_edges(layout: Layout, pathway: Pathway) -> Tensor:
    """The pathway as bare positions, for the reference."""
    if pathway.direction == "across":
        of_group = [m for name in pathway.sources for m in members(layout, name)]
        dumped = [positions(layout, m).tolist() for m in of_group]
        return reference.edges_across(layout.n_tokens, dumped)
    ends = [
        [p for name in names for p in group_positions(layout, name).tolist()]
        for names in (pathway.sources, pathway.targets)
    ]
    both = pathway.direction == "both_ways"
    return reference.edges_between(layout.n_tokens, ends[0], ends[1], both_ways=both)


def reference_inputs(embedded: Embedded) -> reference.Inputs:
    return reference.Inputs(
        inputs_embeds=embedded.inputs_embeds,
        position_ids=embedded.position_ids,
        attention_mask=embedded.attention_mask,
    )


def plain(tiny, embedded: Embedded, edges: Tensor, centers: Sequence[int], window: int) -> Tensor:
    inputs = reference_inputs(embedded)
    return torch.stack([
        reference.knockout_probabilities(tiny.hf_model, inputs, edges, center, window)
        for center in centers
    ])  # fmt: skip


def worst_disagreement(
    tiny, embedded: Embedded, layout: Layout, window: int, every: int = 1
) -> float:
    """Over all pathways of the prompt's kind, at each (or every nth) centre."""
    curves = fast(tiny, embedded, layout, of_kind(layout), window)
    centers = range(tiny.info.n_layers)[::every]
    return max(
        float((curves[p.name][::every] - reference_curve).abs().max())
        for p in of_kind(layout)
        for reference_curve in [plain(tiny, embedded, reference_edges(layout, p), centers, window)]
    )
