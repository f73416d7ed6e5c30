"""What a model's processor takes, and what decoding a file gives or why it can't."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from avflow.datasets.sample import MediaKind

DECODE_TIMEOUT_S = 120.0
"""For one file; a sweep may give it more (`execution.decode_timeout_s`)."""


class MediaError(ValueError):
    """A media file can't be used: which file, what is wrong, what to do. The sample fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaSpec:
    """What a model's processor takes. Pixels are height x width of one frame or picture.

    `fps` frames a second, at most `max_frames` a video (then evenly over its whole duration);
    their count is a multiple of `temporal_patch`. Sides come to multiples of `patch_multiple`
    where a picture is made smaller. `sample_rate` in Hz; sound after `max_audio_s` is cut.

    `sampling`: "steps" of 1/fps, or "spread" from the first frame to the last, at least
    `min_frames` (see `avflow.datasets.sampling`). `video_max_pixels`: shared out among the frames
    of a video that has fewer than `max_frames`. `resize`: what is too large is made smaller by
    the decoder's own "scaler", or "antialias" as torchvision and Pillow do it. `mono` is the "mean"
    of the channels, or FFmpeg's "mix", which is 3 dB louder for two of them.
    """

    fps: float
    max_frames: int
    temporal_patch: int
    frame_min_pixels: int
    frame_max_pixels: int
    image_min_pixels: int
    image_max_pixels: int
    patch_multiple: int
    sample_rate: int
    max_audio_s: float | None
    decode_timeout_s: float = DECODE_TIMEOUT_S
    sampling: Literal["steps", "spread"] = "steps"
    min_frames: int = 1
    video_max_pixels: float | None = None
    resize: Literal["scaler", "antialias"] = "scaler"
    mono: Literal["mean", "mix"] = "mean"

    def __post_init__(self) -> None:
        for name in ("fps", "temporal_patch", "patch_multiple", "sample_rate", "decode_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        if self.max_frames < self.temporal_patch:
            raise ValueError(
                f"max_frames is {self.max_frames}; it must be at least {self.temporal_patch}, the "
                "frames of one temporal patch"
            )
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(f"min_frames is {self.min_frames}; known: 1..{self.max_frames}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedMedia:
    """One file's arrays. T frames (a picture: T = 1) and n samples; None where the kind has none.

    `frame_times` are the asked-for times in seconds from the first frame, `seconds_per_frame`
    their spacing. `duration` is the video's, else the sound's (s; 0 for a picture). `notes` say
    what decoding changed ("sound cut to 300 s ...").
    """

    kind: MediaKind
    frames: NDArray[np.uint8] | None  # [T, 3, H, W]
    waveform: NDArray[np.float32] | None  # [n], mono at the spec's sample rate
    frame_times: tuple[float, ...]
    seconds_per_frame: float | None
    duration: float
    notes: tuple[str, ...]
