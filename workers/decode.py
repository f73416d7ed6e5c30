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
    """A sample's media in the order of `sample.media`, and the seconds it took. `unit_id` is the
    unit's that they were decoded for; a unit about the same media may be given them, too."""

    unit_id: str
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
    return Decoded(unit_id=unit.unit_id, media=media, seconds=time.perf_counter() - began)


def same_media(one: UnitSpec, other: UnitSpec) -> bool:
    """Whether what is decoded for the one, for the same model, will do for the other."""
    return bool(one.sample.media) and (
        (one.data_root, one.decode_timeout_s, one.sample.media)
        == (other.data_root, other.decode_timeout_s, other.sample.media)
    )


def as_own(unit: UnitSpec, decoded: Decoded | UnitFailure) -> Decoded | UnitFailure:
    """What was perhaps decoded for another unit, as this one's: its failure, or in no time."""
    if decoded.unit_id == unit.unit_id:
        return decoded
    if isinstance(decoded, UnitFailure):
        return replace(decoded, unit_id=unit.unit_id)
    return replace(decoded, unit_id=unit.unit_id, seconds=0.0)


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
