"""Decode a unit's media ahead of its model, on any CPU; what goes wrong comes back as data.

Decoding itself happens in a process below this one (see `Decoder`), which is what dies of a bad
file, on Ray as in the local executor. Torch stays out: a process that only decodes need not spend
seconds and memory on it.
"""

import functools
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from avflow.datasets.decoder import Decoder
from avflow.datasets.media import DecodedMedia, MediaSpec
from avflow.datasets.sample import Sample
from avflow.workers.protocol import UnitFailure, UnitSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """A sample's media in the order of `sample.media`, and the seconds it took."""

    media: tuple[DecodedMedia, ...]
    seconds: float


def decode_unit(unit: UnitSpec, spec: MediaSpec) -> Decoded | UnitFailure:
    """Decode all media of the unit's sample. Never raises on account of a file."""
    began = time.perf_counter()
    if unit.decode_timeout_s is not None:
        spec = replace(spec, decode_timeout_s=unit.decode_timeout_s)
    try:
        media = _decoder().decode_sample(Path(unit.data_root), unit.sample, spec)
    except Exception as error:  # the file boundary: whatever a bad file raises fails its sample
        return decode_failure(unit, error)
    return Decoded(media=media, seconds=time.perf_counter() - began)


@functools.cache
def _decoder() -> Decoder:
    """This process's own, kept for the next unit: starting one takes half a second."""
    return Decoder()


def decode_failure(unit: UnitSpec, error: Exception) -> UnitFailure:
    """The sample's failure. What the system did (OSError) may pass the next time."""
    return UnitFailure(
        unit_id=unit.unit_id,
        curve=None,
        stage="decode",
        error=type(error).__name__,
        message=str(error),
        traceback="".join(traceback.format_exception(error)),
        retryable=isinstance(error, OSError),
    )


def media_notes(sample: Sample, media: Sequence[DecodedMedia]) -> tuple[str, ...]:
    """What decoding changed in each file, as `file: what`; `media` in the order of the sample's."""
    return tuple(
        f"{part.path}: {note}"
        for part, decoded in zip(sample.media, media, strict=False)  # checked by the adapter
        for note in decoded.notes
    )
