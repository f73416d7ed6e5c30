"""Encoder outputs kept for the samples that share their media.

Benchmarks ask several questions about one video; its frames and sound go through the encoders
once. Outputs are kept by a digest of the media as the model sees them (its processor's tensors),
so nothing is shared between media that only look the same by name, and a sample gets the same
bits whether its media were seen before or not.
"""

import hashlib
from collections import OrderedDict

import torch
from torch import Tensor

from avflow.workers.models.base import TEXT_TENSORS, Features, LoadedModel, Prepared

DEFAULT_BYTES = 2 << 30  # 30 videos of 9,000 tokens of Qwen2.5-Omni-7B


class EncoderCache:
    """The features of the media that were used last, in the host's memory. One a worker."""

    def __init__(self, byte_limit: int = DEFAULT_BYTES) -> None:
        """Keep at most `byte_limit` bytes; larger features are handed out and not kept."""
        self._limit = byte_limit
        self._kept: OrderedDict[str, Features] = OrderedDict()
        self.hits = 0
        self.misses = 0

    @property
    def held_bytes(self) -> int:
        """What is kept now."""
        return sum(_size(features) for features in self._kept.values())

    def encode(self, model: LoadedModel, prepared: Prepared) -> Features:
        """As `model.encode`, run only for media that are not kept. The prompt's device."""
        key = media_digest(prepared)
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
            self.hits += 1
            return _to(kept, model.device)
        self.misses += 1
        features = model.encode(prepared)
        if _size(features) <= self._limit:
            self._kept[key] = _to(features, torch.device("cpu"))
            while self.held_bytes > self._limit:
                self._kept.popitem(last=False)
        return features


def media_digest(prepared: Prepared) -> str:
    """sha256 (hex) of the tensors that the encoders are given: names, shapes, dtypes and bits."""
    digest = hashlib.sha256()
    for name in sorted(set(prepared.tensors) - TEXT_TENSORS):
        tensor = prepared.tensors[name].contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _size(features: Features) -> int:
    return sum(tensor.nbytes for tensor in features.tensors.values())


def _to(features: Features, device: torch.device) -> Features:
    moved: dict[str, Tensor] = {name: t.to(device) for name, t in features.tensors.items()}
    return Features(tensors=moved)
