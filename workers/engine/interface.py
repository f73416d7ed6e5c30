"""What the engine asks of transformers: its own causal mask, and an attention function's place."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import create_causal_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from avflow.workers.models.base import Decoder, UnsupportedModelError


def causal_mask(decoder: Decoder, hidden: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """What the official forward hands to its layers for hidden [1, N, D]: None where the attention
    function makes the causal mask itself."""
    return cast(
        "Tensor | None",
        create_causal_mask(
            config=decoder.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=None,
        ),
    )


def attention_function(config: PreTrainedConfig, attention: nn.Module) -> Callable[..., object]:
    """What a layer's attention module calls as the config stands; a family's `eager` stands beside
    its attention class, the others in transformers' registry."""
    family = sys.modules[type(attention).__module__]
    eager: Any = getattr(family, "eager_attention_forward", None)
    found = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    if found is None:
        raise UnsupportedModelError(
            f"{family.__name__} has no eager_attention_forward; load the model with sdpa attention"
        )
    return found


@contextmanager
def attending(
    config: PreTrainedConfig, name: str, function: Callable[..., object]
) -> Iterator[None]:
    """Within, layers of this text config attend through `function`; the encoders, and the model
    afterwards, are left as they were. No "flash", "sdpa" or "/" in the name: transformers treats
    names that hold these differently."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)  # without one, padding would be ignored
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before
        AttentionInterface.register(name, _over)  # the registry is global: it would hold a model


def _over(*_arguments: object, **_options: object) -> None:
    raise RuntimeError("attention through a function whose pass is over")
