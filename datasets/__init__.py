"""Samples, prompts and media. Knows nothing of models."""

from avflow.datasets.media import (
    DecodedMedia,
    MediaError,
    MediaSpec,
    decode_media,
    decode_sample,
)
from avflow.datasets.prompts import multiple_choice
from avflow.datasets.sample import LETTERS, MediaPart, Part, Sample, TextPart

__all__ = [
    "LETTERS",
    "DecodedMedia",
    "MediaError",
    "MediaPart",
    "MediaSpec",
    "Part",
    "Sample",
    "TextPart",
    "decode_media",
    "decode_sample",
    "multiple_choice",
]
