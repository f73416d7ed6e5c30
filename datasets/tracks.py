"""Gathers what one pass over a file decodes: frames at asked-for times, and one mono wave."""

from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from avflow.datasets.media_spec import MediaError, MediaSpec

SLACK_S = 1e-3  # containers round times to a millisecond
MISSING_S = 0.5  # a stream that ends this much before its stated duration is truncated
_HOLE_S = 0.1


def fit(height: int, width: int, max_pixels: int, multiple: int) -> tuple[int, int]:
    """Size within the budget, sides as multiples; unchanged if it fits already.

    The same rounding as Qwen-VL's `smart_resize`, so that the processor leaves the result as is.
    """
    if height * width <= max_pixels:
        return height, width
    shrink = (height * width / max_pixels) ** 0.5
    return (
        max(multiple, int(height / shrink / multiple) * multiple),
        max(multiple, int(width / shrink / multiple) * multiple),
    )


class FramePicker:
    """Keeps, for each asked-for time, the frame that is on the screen then.

    Works on time stamps, so a variable frame rate needs nothing special; a frame is turned into
    an array only when it is kept.
    """

    def __init__(self, times: tuple[float, ...], spec: MediaSpec) -> None:
        self.zero: float | None = None  # the first frame's time in the container, s
        self._times = times
        self._spec = spec
        self._shown: av.VideoFrame | None = None
        self._kept: list[NDArray[np.uint8]] = []

    def add(self, frame: av.VideoFrame) -> None:
        """Take the next frame in order of time."""
        if self.zero is None:
            self.zero = frame.time
        self._keep_until(frame.time - self.zero)
        self._shown = frame

    def finish(self, path: Path) -> tuple[NDArray[np.uint8], float]:
        """Frames [T, 3, H, W] and where the last decoded frame ends, s from the first."""
        if self._shown is None or self.zero is None:
            raise MediaError(f"{path}: no frame could be decoded; fetch the file again")
        self._keep_until(np.inf)
        if len({kept.shape for kept in self._kept}) > 1:
            raise MediaError(f"{path}: the picture's size changes on the way; encode it again")
        held = float((self._shown.duration or 0) * (self._shown.time_base or 0))
        return np.stack(self._kept), self._shown.time - self.zero + held

    def _keep_until(self, now: float) -> None:
        while (
            self._shown is not None
            and len(self._kept) < len(self._times)
            and self._times[len(self._kept)] < now - SLACK_S
        ):
            self._kept.append(_frame_array(self._shown, self._spec))


def _frame_array(frame: av.VideoFrame, spec: MediaSpec) -> NDArray[np.uint8]:
    """One frame as [3, H, W], upright, within the pixel budget."""
    height, width = fit(frame.height, frame.width, spec.frame_max_pixels, spec.patch_multiple)
    rgb = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation="BICUBIC")
    turns = round((frame.rotation or 0) / 90) % 4  # phones store the turn beside the picture
    return np.ascontiguousarray(np.rot90(rgb, turns).transpose(2, 0, 1))


class Sound:
    """Gathers a sound track as mono float32 at one sample rate."""

    def __init__(self, track: av.AudioStream, rate: int) -> None:
        self._track = track
        self._rate = rate
        self._resampler = av.AudioResampler(format="fltp", rate=rate)
        self._pieces: list[NDArray[np.float32]] = []
        self._start: float | None = None
        self._end = 0.0

    def add(self, frame: av.AudioFrame) -> None:
        """Take the next frame of the track."""
        if self._start is None:
            self._start = frame.time
        self._end = (frame.time or 0) + frame.samples / frame.sample_rate
        self._resample(frame)

    def _resample(self, frame: av.AudioFrame | None) -> None:
        for out in self._resampler.resample(frame):
            # The mean of the channels, as librosa has it: FFmpeg's own mix of two is 3 dB louder.
            self._pieces.append(out.to_ndarray().mean(axis=0, dtype=np.float32))

    def finish(
        self, path: Path, *, zero: float | None, max_s: float | None
    ) -> tuple[NDArray[np.float32], tuple[str, ...]]:
        """The wave [n] from time `zero` (None: its own start) and what was changed."""
        if self._start is None:
            raise MediaError(f"{path}: its sound track is empty; fetch the file again")
        self._resample(None)
        wave = np.concatenate(self._pieces)
        hole = self._end - self._start - len(wave) / self._rate
        if abs(hole) > _HOLE_S:
            raise MediaError(
                f"{path}: its sound track has holes or overlaps of {hole:.2f} s, so it would drift "
                "from the picture; encode it again (ffmpeg -i IN -af aresample=async=1 OUT)"
            )
        if self._track.duration and self._track.time_base:
            stated = float(self._track.duration * self._track.time_base)
            if len(wave) < (stated - MISSING_S) * self._rate:
                raise MediaError(
                    f"{path}: the sound ends at {len(wave) / self._rate:.2f} s of {stated:.2f} s; "
                    "the file is truncated, fetch it again"
                )
            wave = wave[: round(stated * self._rate)]
        notes = []
        shift = 0 if zero is None else round((self._start - zero) * self._rate)
        if shift > 0:
            wave = np.concatenate([np.zeros(shift, np.float32), wave])
            notes.append(f"sound starts {shift / self._rate:.3f} s late: silence put before it")
        elif shift < 0:
            wave = wave[-shift:]
            notes.append(f"sound starts {-shift / self._rate:.3f} s early: its start was cut")
        if max_s is not None and len(wave) > max_s * self._rate:
            notes.append(f"sound cut from {len(wave) / self._rate:.2f} s to {max_s:g} s")
            wave = wave[: int(max_s * self._rate)]
        if not len(wave):
            raise MediaError(f"{path}: its sound has no samples; fetch the file again")
        return np.ascontiguousarray(wave, dtype=np.float32), tuple(notes)
