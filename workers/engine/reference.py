"""The plain way, for checking: one full forward of the unmodified model per knockout.

Written from the paper's Eq. 2 and positions alone. It imports nothing of this project, so that it
can't share a mistake with the pathways or with the fast engine: attention in a layer l of the
window is softmax(Q K^T / sqrt(d) + M^l) V, where M^l is minus infinity for (query in T, key in S)
and for keys after the query, and 0 elsewhere; other layers keep the model's own mask.

Shapes: N prompt tokens, D hidden size, L layers, H heads, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

Edges = Tensor  # bool [N, N], True at (query, key) where the query may not read the key


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The decoder's exact inputs: inputs_embeds [1, N, D], position_ids int64 [3, 1, N],
    attention_mask int64 [1, N] of ones."""

    inputs_embeds: Tensor
    position_ids: Tensor
    attention_mask: Tensor


def edges_between(
    n_tokens: int, sources: Sequence[int], targets: Sequence[int], *, both_ways: bool = False
) -> Edges:
    """Queries at `targets` don't read keys at `sources`; with `both_ways` nor the reverse."""
    edges = torch.zeros(n_tokens, n_tokens, dtype=torch.bool)
    edges[_grid(targets, sources)] = True
    if both_ways:
        edges[_grid(sources, targets)] = True
    return _without_self(edges)


def edges_across(n_tokens: int, members: Sequence[Sequence[int]]) -> Edges:
    """Queries of one member (a frame, a chunk, a candidate) don't read keys of another."""
    edges = torch.zeros(n_tokens, n_tokens, dtype=torch.bool)
    for one in members:
        for other in members:
            if one is not other:
                edges[_grid(one, other)] = True
    return _without_self(edges)


def _grid(queries: Sequence[int], keys: Sequence[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(queries)[:, None], torch.tensor(keys)[None, :]


def _without_self(edges: Edges) -> Edges:
    edges.fill_diagonal_(False)
    return edges


def knockout_probabilities(
    hf_model: nn.Module, inputs: Inputs, edges: Edges, center_layer: int, window: int
) -> Tensor:
    """Next-token probabilities [V] with `edges` blocked in `window` layers around `center_layer`.

    softmax(lm_head(norm(h))) at the last position; float32, or float64 for a float64 model.
    """
    with knocked_out(hf_model, edges, center_layer, window):
        return plain_probabilities(hf_model, inputs)


@torch.no_grad()
def plain_probabilities(hf_model: nn.Module, inputs: Inputs) -> Tensor:
    """Next-token probabilities [V] of the model as it stands."""
    seen: list[Tensor] = []
    norm = _text_model(hf_model).norm
    handle = norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        _forward(hf_model, inputs)
    finally:
        handle.remove()
    (hidden,) = seen
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    head: Any = hf_model.lm_head
    normed = norm(hidden[0, -1].to(exact))
    with align_module_device(head):  # an offloaded head's weight is on `meta` outside
        weight = head.weight.to(exact)
        return torch.softmax(nn.functional.linear(normed.to(weight.device), weight), dim=-1)


@torch.no_grad()
def attention_weights(
    hf_model: nn.Module, inputs: Inputs, edges: Edges, center_layer: int, window: int
) -> tuple[Tensor, ...]:
    """Each layer's attention weights [H, N, N] under the knockout. The model must run eager
    attention, the only one that hands them out; ValueError otherwise."""
    implementation = _text_model(hf_model).config._attn_implementation
    if implementation != "eager":
        raise ValueError(
            f"attention weights need a model with eager attention, this one has {implementation}: "
            'call set_attn_implementation({"text_config": "eager"}) first'
        )
    with knocked_out(hf_model, edges, center_layer, window):
        output = _forward(hf_model, inputs, output_attentions=True)
    return tuple(weights[0] for weights in output.attentions)


@contextmanager
def knocked_out(
    hf_model: nn.Module, edges: Edges, center_layer: int, window: int
) -> Iterator[range]:
    """Within, the window's attention modules get a dense mask instead of their own. Yields the
    window: `window // 2` layers below the centre, as many layers in all as there is room for."""
    first = center_layer - window // 2
    masked = range(max(first, 0), min(first + window, len(_text_model(hf_model).layers)))
    with knocked_out_at(hf_model, edges, masked):
        yield masked


@contextmanager
def knocked_out_at(hf_model: nn.Module, edges: Edges, masked: Sequence[int]) -> Iterator[None]:
    """Within, the attention modules of any set of layers get a dense mask instead of their own."""
    layers = _text_model(hf_model).layers
    with ExitStack() as hooks:
        for index in masked:
            attention = layers[index].self_attn
            handle = attention.register_forward_pre_hook(_mask_hook(edges), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def _mask_hook(edges: Edges) -> Any:
    n_tokens = edges.shape[0]
    future = torch.ones(n_tokens, n_tokens, dtype=torch.bool).triu(1)

    def replace_mask(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = kwargs["hidden_states"]
        mask = torch.zeros(n_tokens, n_tokens, dtype=hidden.dtype)
        mask.masked_fill_(future | edges, float("-inf"))
        return args, {**kwargs, "attention_mask": mask[None, None].to(hidden.device)}

    return replace_mask


def _text_model(hf_model: nn.Module) -> Any:
    model: Any = hf_model
    return model.get_decoder()


def _forward(hf_model: nn.Module, inputs: Inputs, output_attentions: bool = False) -> Any:
    return hf_model(
        inputs_embeds=inputs.inputs_embeds,
        position_ids=inputs.position_ids,
        attention_mask=inputs.attention_mask,
        use_cache=False,
        output_attentions=output_attentions,
    )
