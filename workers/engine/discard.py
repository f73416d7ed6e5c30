"""Tokens discarded from the sequence on the way up, and how long the prefill takes with them gone.

Paper section 6, Table 4: once a layer has run, some tokens leave. They are no longer in the hidden
states, so no later layer has their keys, values, projections or MLP; what stays keeps its position
ids. The answer is that of a full pass in which they are blocked as keys from the next layer on.

Time is taken alike with and without discarding: the same walk over the official layers with the
checkpoint's own attention and a key/value cache, from the decoder's inputs (encoders apart) to the
next token's probabilities. Each prefill runs twice and the second is timed, on a GPU between two
synchronisations.

Shapes: N prompt tokens, n of them left, D hidden size, L layers, V vocabulary.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from avflow.pathways.layout import Positions
from avflow.workers.engine.head import last_probabilities
from avflow.workers.engine.interface import causal_mask
from avflow.workers.models.base import Decoder, Embedded


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """`probabilities` [V] at the last position; `lengths` [L], the positions that each layer ran
    and kept keys and values of; `seconds` None where no time was taken."""

    probabilities: Tensor
    lengths: tuple[int, ...]
    seconds: float | None = None

    @property
    def token_layers(self) -> int:
        """One position through one layer, summed."""
        return sum(self.lengths)


def discard_prefill(
    decoder: Decoder, embedded: Embedded, drops: Mapping[int, Positions]
) -> Prefill:
    """One prefill in which the tokens `drops[i]` leave after layer i; an empty mapping: none do.

    `drops` holds prompt positions; one that has left before may be named again. Raises ValueError
    for the last position, which holds the answer, and for a layer with nothing after it.
    """
    return _walk(decoder, embedded, _survivors(decoder, embedded, drops))


def timed_prefill(decoder: Decoder, embedded: Embedded, drops: Mapping[int, Positions]) -> Prefill:
    """The same twice; the first warms up kernels and allocator, the second has `seconds`."""
    survivors = _survivors(decoder, embedded, drops)
    warm = _walk(decoder, embedded, survivors)
    _wait_for(warm.probabilities)
    began = time.perf_counter()
    timed = _walk(decoder, embedded, survivors)
    _wait_for(timed.probabilities)
    seconds = time.perf_counter() - began
    return Prefill(probabilities=timed.probabilities, lengths=timed.lengths, seconds=seconds)


def _wait_for(result: Tensor) -> None:
    # The result needs the work of every device that the model lies on.
    if result.device.type == "cuda":
        torch.cuda.synchronize(result.device)


def _survivors(
    decoder: Decoder, embedded: Embedded, drops: Mapping[int, Positions]
) -> dict[int, Tensor]:
    """After layer i, the indices int64 [n] of what stays into the sequence as it is then."""
    n_tokens, n_layers = embedded.inputs_embeds.shape[1], len(decoder.layers)
    left = np.arange(n_tokens)
    survivors = {}
    for layer in sorted(drops):
        if not 0 <= layer < n_layers - 1:
            raise ValueError(
                f"nothing can be discarded after layer {layer}: layers are 0 to {n_layers - 1}, "
                "and after the last one only the answer is read"
            )
        gone = np.zeros(n_tokens, dtype=np.bool_)
        gone[drops[layer]] = True
        if gone[-1]:
            raise ValueError("the last position can't be discarded: the answer is read there")
        stays = np.flatnonzero(~gone[left])
        left = left[stays]
        survivors[layer] = torch.from_numpy(stays).to(embedded.inputs_embeds.device)
    return survivors


@torch.inference_mode()
def _walk(decoder: Decoder, embedded: Embedded, survivors: Mapping[int, Tensor]) -> Prefill:
    cache = DynamicCache(config=decoder.config)
    hidden = embedded.inputs_embeds
    cos, sin = decoder.rotary(hidden, embedded.position_ids)
    mask = causal_mask(decoder, hidden, embedded.attention_mask[:, : hidden.shape[1]])
    lengths = []
    for i, layer in enumerate(decoder.layers):
        lengths.append(hidden.shape[1])
        hidden = layer(
            hidden,
            attention_mask=mask,
            position_embeddings=(cos, sin),
            past_key_values=cache,
        )
        if i in survivors:
            hidden = hidden.index_select(1, survivors[i].to(hidden.device))
            cos, sin = (part.index_select(-2, survivors[i].to(part.device)) for part in (cos, sin))
            # In their old order, so among themselves they are causal as before.
            mask = causal_mask(decoder, hidden, embedded.attention_mask[:, : hidden.shape[1]])
    probabilities = last_probabilities(decoder, hidden[:, -1])[0]
    return Prefill(probabilities=probabilities, lengths=tuple(lengths))
