"""What a sample's work costs: token-layers and FLOPs, executed, plain, and at the least.

A token-layer is one position through one decoder layer. FLOPs count multiply-adds twice, matrix
products alone (norms, rotary, softmax and the encoders are left out of all three alike).

Shapes: L layers, N prompt tokens, m = N - start replayed positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avflow.workers.engine.attention import query_chunks
from avflow.workers.engine.replay import Row
from avflow.workers.models.base import ModelInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Shapes:
    """A checkpoint's sizes and a prompt's length; `item_bytes` of the model's dtype."""

    n_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    n_tokens: int
    item_bytes: int

    @property
    def kv_flops(self) -> int:
        """Key and value projections of one token-layer."""
        return 4 * self.hidden * self.kv_heads * self.head_size

    @property
    def linear_flops(self) -> int:
        """All projections and the MLP of one token-layer."""
        query_and_output = 4 * self.hidden * self.heads * self.head_size
        return self.kv_flops + query_and_output + 6 * self.hidden * self.intermediate

    @property
    def edge_flops(self) -> int:
        """Score and mix of one (query, key) edge over all heads."""
        return 4 * self.heads * self.head_size

    @property
    def head_flops(self) -> int:
        """The LM head at one position."""
        return 2 * self.hidden * self.vocabulary

    def causal_edges(self, start: int) -> int:
        """(query, key) edges of the queries from `start` on under the causal mask."""
        return sum(range(start + 1, self.n_tokens + 1))

    def row_bytes(self, start: int) -> int:
        """Activations of one replayed row at its widest, attention scores apart."""
        m = self.n_tokens - start
        # Queries, keys and values: as projected, rotated, and once in float32.
        heads = (self.heads + 2 * self.kv_heads) * self.head_size * (2 * self.item_bytes + 4)
        widest = max(heads, 3 * self.intermediate * self.item_bytes)
        a_position = 4 * self.hidden * self.item_bytes + widest + 3 * self.n_tokens  # masks
        return m * a_position + 12 * self.vocabulary


def shapes_of(info: ModelInfo, head_size: int, n_tokens: int, item_bytes: int) -> Shapes:
    """A checkpoint's shapes for a prompt of `n_tokens`."""
    return Shapes(
        n_layers=info.n_layers,
        hidden=info.hidden_size,
        heads=info.n_heads,
        kv_heads=info.n_kv_heads,
        head_size=head_size,
        intermediate=info.intermediate_size,
        vocabulary=info.vocab_size,
        n_tokens=n_tokens,
        item_bytes=item_bytes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Token-layers and FLOPs. Costs add."""

    token_layers: int = 0
    flops: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            token_layers=self.token_layers + other.token_layers, flops=self.flops + other.flops
        )


def plain_cost(shapes: Shapes, forwards: int = 1) -> Cost:
    """Full forwards, each over the whole prompt with dense attention and one head position.

    The plain way runs one a (pathway, centre layer), and one for the baseline.
    """
    n = shapes.n_tokens
    a_layer = n * shapes.linear_flops + n * n * shapes.edge_flops
    flops = shapes.n_layers * a_layer + shapes.head_flops
    return Cost(token_layers=forwards * shapes.n_layers * n, flops=float(forwards * flops))


def replay_cost(shapes: Shapes, start: int, rows: Sequence[Row], score_bytes: int) -> Cost:
    """What `replay` executes for these rows."""
    m = shapes.n_tokens - start
    token_layers = flops = 0
    for layer in range(shapes.n_layers):
        alive = sum(row.layers.start <= layer for row in rows)
        if not alive:
            continue
        chunks = query_chunks(alive, shapes.heads, m, shapes.n_tokens, score_bytes)
        edges = sum(len(chunk) * (start + chunk.stop) for chunk in chunks)
        token_layers += alive * m
        flops += alive * (m * shapes.linear_flops + edges * shapes.edge_flops)
    return Cost(token_layers=token_layers, flops=float(flops + len(rows) * shapes.head_flops))


def prefill_floor(shapes: Shapes) -> Cost:
    """The least that the one baseline needs: every token-layer once, causal edges alone."""
    n, n_layers = shapes.n_tokens, shapes.n_layers
    a_layer = n * shapes.linear_flops + shapes.causal_edges(0) * shapes.edge_flops
    flops = n_layers * a_layer + shapes.head_flops
    return Cost(token_layers=n_layers * n, flops=float(flops))


def replay_floor(shapes: Shapes, lost_keys: NDArray[np.int64], windows: Sequence[range]) -> Cost:
    """The least that one curve needs, given the baseline: C_min, a window (of layers) each.

    `lost_keys` [N] says how many keys each query loses. Below the window's first layer a nothing
    changes; at layer a only the targets (queries that lose a key) do, their keys and values not
    yet; from a + 1 on all m positions from the first target; at the last layer only the last
    position's query is needed, with the keys and values of all m. Blocked edges cost nothing.
    """
    targets = np.flatnonzero(lost_keys)
    start, last = int(targets[0]), shapes.n_layers - 1
    m = shapes.n_tokens - start
    lost, lost_by_last = int(lost_keys.sum()), int(lost_keys[-1])
    target_edges = int((targets + 1).sum()) - lost
    suffix_edges = shapes.causal_edges(start)
    edges = without_kv = with_kv = kv_alone = 0
    for window in windows:
        first = window.start
        between = range(first + 1, last)
        if first < last:
            without_kv += targets.size
            edges += target_edges
            kv_alone += m
        with_kv += len(between) * m
        edges += sum(suffix_edges - lost * (layer in window) for layer in between)
        without_kv += 1  # the last position at the last layer
        edges += shapes.n_tokens - lost_by_last * (last in window)
    token_layers = without_kv + with_kv
    flops = token_layers * shapes.linear_flops + (kv_alone - without_kv) * shapes.kv_flops
    flops += edges * shapes.edge_flops + len(windows) * shapes.head_flops
    return Cost(token_layers=token_layers, flops=float(flops))
