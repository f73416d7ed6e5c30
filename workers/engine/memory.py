"""Shapes of a checkpoint and a prompt, and the bytes that the engine needs for them.

Counted from shapes alone, so that a plan can be refused before a card runs out.
N prompt tokens, m = N - start replayed positions, R rows of a batch, P rows of a piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # models count with this module, too
    from avflow.workers.models.base import ModelInfo

HEAD_ROWS = 64  # rows whose probabilities are read at a time
HEAD_CHUNK = 16384  # rows of the vocabulary cast to float32 at a time: 235 MB at hidden size 3584


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
    def state_bytes(self) -> int:
        """The residual stream of one position."""
        return self.hidden * self.item_bytes

    @property
    def key_value_bytes(self) -> int:
        """Keys and values of one position at one layer."""
        return 2 * self.kv_heads * self.head_size * self.item_bytes

    @property
    def activation_bytes(self) -> int:
        """One position on its way through a layer, at its widest."""
        item, wide = self.item_bytes, self.heads * self.head_size
        # Input, norm (once in float32) and the residual sum.
        around = (3 * item + 8) * self.hidden
        # Queries, keys and values, projected and rotated; queries once more, rows folded together;
        # two parts' outputs in float32 and one in the model's dtype.
        attention = 2 * item * (wide + 2 * self.kv_heads * self.head_size) + 2 * item * wide
        attention += 8 * wide + item * wide
        return around + max(attention, 3 * item * self.intermediate)


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


def piece_tokens(shapes: Shapes, byte_budget: int) -> int:
    """Positions that go through a layer at a time: half of the budget."""
    return max(1, byte_budget // 2 // shapes.activation_bytes)


def piece_rows(shapes: Shapes, start: int, byte_budget: int) -> int:
    """Rows from `start` on that go through a layer at a time; at least 1."""
    return max(1, piece_tokens(shapes, byte_budget) // (shapes.n_tokens - start))


def rows_in_budget(shapes: Shapes, start: int, byte_budget: int) -> int:
    """Rows of a batch from `start` on, the trunk not counted; at least 1.

    What a piece leaves of the budget holds the rows' states, between layers.
    """
    m = shapes.n_tokens - start
    piece = piece_rows(shapes, start, byte_budget) * m * shapes.activation_bytes
    return max(1, (byte_budget - piece) // (m * shapes.state_bytes) - 1)


def batch_bytes(shapes: Shapes, start: int, n_rows: int, byte_budget: int) -> int:
    """A batch of `n_rows` rows at its peak: states with the trunk's, one piece, the heads."""
    m = shapes.n_tokens - start
    rows = min(n_rows + 1, piece_rows(shapes, start, byte_budget))
    states = (n_rows + 1) * m * shapes.state_bytes
    return states + rows * m * shapes.activation_bytes + head_bytes(shapes, n_rows + 1)


def head_bytes(shapes: Shapes, n_rows: int) -> int:
    """To read probabilities: logits in pieces, whole and after the softmax, all in float32, and a
    piece of the head's weight cast to it."""
    cast = min(HEAD_CHUNK, shapes.vocabulary) * shapes.hidden * 4 * (shapes.item_bytes < 4)
    return 12 * min(n_rows, HEAD_ROWS) * shapes.vocabulary + cast


def baseline_bytes(shapes: Shapes, n_checkpoints: int = 1) -> int:
    """What a sample keeps between its batches: keys and values of every layer, embeddings,
    rotary tables, and the residual stream at the layers where batches begin."""
    a_token = shapes.n_layers * shapes.key_value_bytes + 4 * shapes.head_size * shapes.item_bytes
    return shapes.n_tokens * (a_token + (1 + n_checkpoints) * shapes.state_bytes)


def peak_bytes(shapes: Shapes, weight_bytes: int, byte_budget: int, n_checkpoints: int = 1) -> int:
    """The most that a sample takes on its device: weights, what the baseline keeps, and the larger
    of the prefill's own activations and a batch (which keeps to the budget, or is one row and the
    trunk where not even they fit it). The encoders run before, on an otherwise empty device."""
    one_row = batch_bytes(shapes, 0, 1, byte_budget)
    prefill = shapes.n_tokens * shapes.activation_bytes
    widest = max(prefill, byte_budget + head_bytes(shapes, HEAD_ROWS), one_row)
    return weight_bytes + baseline_bytes(shapes, n_checkpoints) + widest
