"""Probabilities at the last position: norm and LM head in float32, softmax over the vocabulary.

bfloat16 logits alone would move a probability by a median of 2% and up to 12%, so only the body
runs in the model's dtype.
"""

import torch
from accelerate.utils import align_module_device
from torch import Tensor

from avflow.workers.engine.memory import HEAD_CHUNK
from avflow.workers.models.base import Decoder


@torch.inference_mode()
def last_probabilities(decoder: Decoder, hidden: Tensor) -> Tensor:
    """hidden [R, D], the last layer's output at the last position -> [R, V] probabilities.

    float32, or float64 for a model in float64.
    """
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    normed = decoder.norm(hidden.to(exact))
    return torch.softmax(_logits(decoder, normed), dim=-1)


def _logits(decoder: Decoder, normed: Tensor) -> Tensor:
    with align_module_device(decoder.lm_head):  # an offloaded head's weight is on `meta` outside
        weight = decoder.lm_head.get_parameter("weight")
        bias = dict(decoder.lm_head.named_parameters()).get("bias")
        normed = normed.to(weight.device)
        if weight.dtype == normed.dtype:
            logits = normed @ weight.T
        else:  # cast in pieces: a whole float32 copy of a 7B model's head takes 2.2 GB
            logits = torch.cat(
                [normed @ w.to(normed.dtype).T for w in torch.split(weight, HEAD_CHUNK)], 1
            )
        return logits if bias is None else logits + bias.to(normed.dtype)
