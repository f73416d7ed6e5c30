"""What a sample's work costs: token-layers and FLOPs, executed, plain, and at the least.

A token-layer is one position through one decoder layer. FLOPs count multiply-adds twice, matrix
products alone (norms, rotary, softmax and the encoders are left out of all three alike). The
formulas are derived in docs/engine.md.

Shapes: L layers, N prompt tokens, m = N - start replayed positions, T targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avflow.pathways.layout import Layout
from avflow.pathways.pathway import blocked_keys
from avflow.workers.engine.memory import Shapes
from avflow.workers.engine.plan import Batch
from avflow.workers.engine.rows import Knockout, Layers, family, steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Token-layers and FLOPs. Costs add."""

    token_layers: int = 0
    flops: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            token_layers=self.token_layers + other.token_layers, flops=self.flops + other.flops
        )


def key_value_flops(shapes: Shapes) -> int:
    """Key and value projections of one token-layer."""
    return 4 * shapes.hidden * shapes.kv_heads * shapes.head_size


def query_output_flops(shapes: Shapes) -> int:
    """Query and output projections of one token-layer."""
    return 4 * shapes.hidden * shapes.heads * shapes.head_size


def linear_flops(shapes: Shapes) -> int:
    """All projections and the MLP of one token-layer."""
    mlp = 6 * shapes.hidden * shapes.intermediate
    return key_value_flops(shapes) + query_output_flops(shapes) + mlp


def edge_flops(shapes: Shapes) -> int:
    """Score and mix of one (query, key) edge over all heads."""
    return 4 * shapes.heads * shapes.head_size


def head_flops(shapes: Shapes) -> int:
    """The LM head at one position."""
    return 2 * shapes.hidden * shapes.vocabulary


def plain_cost(shapes: Shapes, forwards: int = 1) -> Cost:
    """Full forwards, each over the whole prompt with dense attention and one head position.

    The plain way runs one a (pathway, centre layer), and one for the baseline.
    """
    n = shapes.n_tokens
    a_layer = n * linear_flops(shapes) + n * n * edge_flops(shapes)
    flops = shapes.n_layers * a_layer + head_flops(shapes)
    return Cost(token_layers=forwards * shapes.n_layers * n, flops=float(forwards * flops))


def prefill_floor(shapes: Shapes) -> Cost:
    """The least that the one baseline needs: every token-layer once, causal edges alone."""
    n, n_layers = shapes.n_tokens, shapes.n_layers
    a_layer = n * linear_flops(shapes) + n * (n + 1) // 2 * edge_flops(shapes)
    flops = n_layers * a_layer + head_flops(shapes)
    return Cost(token_layers=n_layers * n, flops=float(flops))


def batch_cost(shapes: Shapes, batch: Batch) -> Cost:
    """What `replay` executes for a batch, the trunk included."""
    edges = [_Edges.of(batch.layout, mask.blocked, batch.start) for mask in batch.masks]
    causal = _Edges.of(batch.layout, None, batch.start)
    m, top = shapes.n_tokens - batch.start, shapes.n_layers - 1
    token_layers = flops = 0
    layers = range(batch.first_layer, shapes.n_layers)
    for step in steps(batch.rows, layers, batch.trunk_until(shapes.n_layers)):
        running = [
            edges[batch.rows[row].mask] if row in step.masked else causal for row in step.running
        ] + [causal] * step.trunk
        joining = [edges[batch.rows[row].mask] for row in step.joins]
        if step.layer < top or m == 1:
            targets = [sum(b - a for a, b in _targets(batch, row)) for row in step.joins]
            queries = m * len(running) + sum(targets)
            asked = sum(e.suffix for e in running) + sum(e.targets for e in joining)
        else:
            leaving = [e for e in joining if e.last < shapes.n_tokens]
            queries = len(running) + len(leaving)
            asked = sum(e.last for e in running + leaving)
            # Every position's keys and values, through the layer's own attention module.
            flops += len(running) * m * (key_value_flops(shapes) + query_output_flops(shapes))
        token_layers += queries
        flops += queries * linear_flops(shapes) + asked * edge_flops(shapes)
    heads = len(batch.rows) + batch.control
    return Cost(token_layers=token_layers, flops=float(flops + heads * head_flops(shapes)))


def _targets(batch: Batch, row: int) -> Sequence[tuple[int, int]]:
    return batch.masks[batch.rows[row].mask].targets


@dataclass(frozen=True, slots=True, kw_only=True)
class _Edges:
    """Open (query, key) edges of a mask: of all replayed queries, of its targets (`n_targets` of
    them lose a key), of the last position."""

    suffix: int
    targets: int
    last: int
    n_targets: int

    @staticmethod
    def of(layout: Layout, blocked: NDArray[np.bool_] | None, start: int) -> "_Edges":
        n = layout.n_tokens
        lost = np.zeros(n, dtype=np.int64) if blocked is None else blocked_keys(layout, blocked)
        kept = np.arange(1, n + 1) - lost
        return _Edges(
            suffix=int(kept[start:].sum()),
            targets=int(kept[lost > 0].sum()),
            last=int(kept[-1]),
            n_targets=int((lost > 0).sum()),
        )


def knockout_floor(layout: Layout, shapes: Shapes, knockouts: Sequence[Knockout]) -> Cost:
    """The least that these knockouts need, given the baseline and what it passed through: C_min.

    A distinct (mask, set of layers) is one forward's worth, equal to another of the same mask
    until their layers part. Before its first masked layer nothing changes; in it only the targets
    do (queries that lose a key), their keys and values not yet; from then on all m positions from
    the mask's own first target; in the last layer only the last position's query is needed, with
    the keys and values of all m. Blocked edges cost nothing.
    """
    asked: dict[bytes, tuple[Knockout, set[Layers]]] = {}
    for knockout in knockouts:
        if knockout.start is not None:
            held = asked.setdefault(knockout.blocked.tobytes(), (knockout, set()))
            held[1].update(knockout.layer_sets)
    total = Cost()
    for knockout, layer_sets in asked.values():
        total += _mask_floor(layout, shapes, knockout, sorted(layer_sets))
    return total


def _mask_floor(
    layout: Layout, shapes: Shapes, knockout: Knockout, layer_sets: Sequence[Layers]
) -> Cost:
    assert knockout.start is not None
    masked = _Edges.of(layout, knockout.blocked, knockout.start)
    causal = _Edges.of(layout, None, knockout.start)
    m, top = shapes.n_tokens - knockout.start, shapes.n_layers - 1
    queries = edges = keys = unseen = 0
    rows = family([(0, layers) for layers in layer_sets])
    for step in steps(rows, range(shapes.n_layers), 0):
        running = [masked if row in step.masked else causal for row in step.running]
        if step.layer < top:
            queries += m * len(running) + masked.n_targets * len(step.joins)
            edges += sum(e.suffix for e in running) + masked.targets * len(step.joins)
            keys += m * len(running)
        else:
            leaving = [masked] * (len(step.joins) if masked.last < shapes.n_tokens else 0)
            unseen += len(step.joins) - len(leaving)
            queries += len(running) + len(leaving)
            edges += sum(e.last for e in running + leaving)
            keys += m * len(running)
    linear = linear_flops(shapes) - key_value_flops(shapes)
    flops = queries * linear + keys * key_value_flops(shapes) + edges * edge_flops(shapes)
    return Cost(
        token_layers=queries, flops=float(flops + (len(rows) - unseen) * head_flops(shapes))
    )
