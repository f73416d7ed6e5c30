"""What the engine asks of transformers: its own causal mask, and an attention function's place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import create_causal_mask, sdpa_mask

from avflow.workers.models.base import Decoder


def causal_mask(decoder: Decoder, hidden: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """What the official forward hands to its layers for hidden [1, N, D]: None where the attention
    function makes the causal mask itself."""
    return cast(
        "Tensor | None",
        create_causal_mask(
            config=cast(PreTrainedConfig, decoder.config),
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=None,
            position_ids=None,
        ),
    )


@contextmanager
def attending(config: object, name: str, function: Callable[..., object]) -> Iterator[None]:
    """Within, layers of this text config attend through `function`; the encoders, and the model
    afterwards, are left as they were. No "flash", "sdpa" or "/" in the name: transformers treats
    names that hold these differently."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)  # without one, padding would be ignored
    before = config._attn_implementation  # type: ignore[attr-defined]
    config._attn_implementation = name  # type: ignore[attr-defined]
    try:
        yield
    finally:
        config._attn_implementation = before  # type: ignore[attr-defined]
