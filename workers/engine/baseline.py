"""The undisturbed pass, once a sample, keeping what every replay starts from.

A loop over the official decoder layers: bit-equal to the model's own forward (tested).
Shapes: N prompt tokens, D hidden size, L layers, G key/value heads, d head size, V vocabulary.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from avflow.workers.engine.head import last_probabilities
from avflow.workers.engine.interface import causal_mask
from avflow.workers.models.base import Decoder, Embedded, UnsupportedModelError

Checkpoint = tuple[int, int]  # (layer, start): the layer's input from a position on
Watch = Callable[[int, Tensor], AbstractContextManager[None]]  # a layer and its input [1, N, D]


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """`residual[layer, start]` is a layer's input at positions `start` on, [1, N - start, D] in the
    model's dtype, for the few layers where batches begin; `keys[i]` and `values[i]` are
    [1, G, N, d], rotated; `cos` and `sin` [1, N, d]; `probabilities` [V] float32 at the last
    position."""

    n_tokens: int
    residual: dict[Checkpoint, Tensor]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    cos: Tensor
    sin: Tensor
    probabilities: Tensor


class _Recorder:
    """Stands where the layers expect a cache: keeps keys and values, hands them back unchanged."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *_cache_kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if layer_idx != len(self.keys):
            raise UnsupportedModelError(
                f"layer {len(self.keys)} calls itself {layer_idx}: layers must run in order, each "
                "with its own keys and values"
            )
        self.keys.append(key)
        self.values.append(value)
        return key, value


def _unwatched(_layer: int, _hidden: Tensor) -> AbstractContextManager[None]:
    return nullcontext()


@torch.inference_mode()
def run_baseline(
    decoder: Decoder,
    embedded: Embedded,
    checkpoints: Iterable[Checkpoint],
    watch: Watch = _unwatched,
) -> Baseline:
    """Prefill, keeping the residual stream at the checkpoints alone. Each layer runs within its
    `watch`, which may look and change nothing.

    Raises UnsupportedModelError for a decoder whose layers are not all full causal attention.
    """
    types = set(getattr(decoder.config, "layer_types", None) or ["full_attention"])
    if types != {"full_attention"}:
        raise UnsupportedModelError(
            f"the decoder has layers of type {sorted(types)}; the engine knows full_attention only"
        )
    hidden = embedded.inputs_embeds
    mask = causal_mask(decoder, hidden, embedded.attention_mask)
    cos, sin = decoder.rotary(hidden, embedded.position_ids)
    recorder = _Recorder()
    wanted = set(checkpoints)
    residual: dict[Checkpoint, Tensor] = {}
    for number, layer in enumerate(decoder.layers):
        for at in (c for c in wanted if c[0] == number):
            residual[at] = hidden[:, at[1] :].clone()  # a view would keep the whole prompt's
        with watch(number, hidden):
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=(cos, sin),
                past_key_values=recorder,
            )
    return Baseline(
        n_tokens=hidden.shape[1],
        residual=residual,
        keys=tuple(recorder.keys),
        values=tuple(recorder.values),
        cos=cos,
        sin=sin,
        probabilities=last_probabilities(decoder, hidden[:, -1])[0],
    )
