"""Gathers what one pass over a file decodes: frames at asked-for times, and one mono wave."""

from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation
from numpy.typing import NDArray
from PIL import Image

from avflow.datasets.media_spec import MediaError, MediaSpec
from avflow.datasets.sampling import fit, fit_antialiased, frame_budget

SLACK_S = 1e-3  # containers round times to a millisecond
MISSING_S = 0.5  # a stream that ends this much before its stated duration is truncated
LEAD_S = 0.1  # sound that begins less than this before the picture is cut to it
_HOLE_S = 0.1
# Else two neighbours of the smaller picture share their colour, and all is 1.5 levels too dark.
_SCALER = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT
_LONGEST_HOLE_S = 600  # more is a broken time stamp, and silence takes memory


def truncated(path: Path, what: str, end: float, stated: float) -> MediaError:
    """The error for a stream that ends, in seconds, before its file says."""
    return MediaError(
        f"{path}: the {what} ends at {end:.2f} s of {stated:.2f} s; the file is truncated, fetch "
        "it again"
    )


class FramePicker:
    """Keeps, for each asked-for time, the frame that is on the screen then.

    Works on time stamps, so a variable frame rate needs nothing special; a frame is turned into
    an array, and made smaller, only when it is kept.
    """

    def __init__(
        self, path: Path, times: tuple[float, ...], spec: MediaSpec, lead: float = 0.0
    ) -> None:
        """Time zero is `lead` seconds before the first frame, which is shown until then, too."""
        self.zero: float | None = None  # as the container counts, s
        self._path = path
        self._lead = lead
        self._times = times
        self._spec = spec
        self._max_pixels = frame_budget(len(times), spec)
        self._shown: av.VideoFrame | None = None
        self._kept: list[NDArray[np.uint8]] = []

    def add(self, frame: av.VideoFrame) -> None:
        """Take the next frame in order of time. Raises MediaError where that starts again."""
        if self.zero is None or self._shown is None:
            self.zero = frame.time - self._lead
            self._shown = frame
        if frame.time < self._shown.time - MISSING_S:
            raise MediaError(
                f"{self._path}: the time stamps of its picture jump back, from "
                f"{self._shown.time:.2f} s to {frame.time:.2f} s; encode it again"
            )
        self._keep_until(frame.time - self.zero)
        self._shown = frame

    def finish(self) -> tuple[NDArray[np.uint8], float]:
        """Frames [T, 3, H, W] and when the last decoded frame came, s as the container counts."""
        if self._shown is None or self.zero is None:
            raise MediaError(f"{self._path}: no frame could be decoded; fetch the file again")
        self._keep_until(np.inf)
        if len({kept.shape for kept in self._kept}) > 1:
            raise MediaError(
                f"{self._path}: the picture's size changes on the way; encode it again"
            )
        return np.stack(self._kept), float(self._shown.time or 0)

    def _keep_until(self, now: float) -> None:
        while (
            self._shown is not None
            and len(self._kept) < len(self._times)
            and self._times[len(self._kept)] < now - SLACK_S
        ):
            self._kept.append(_frame_array(self._shown, self._spec, self._max_pixels))


def _frame_array(frame: av.VideoFrame, spec: MediaSpec, max_pixels: float) -> NDArray[np.uint8]:
    """One frame as [3, H, W], upright, within the pixel budget."""
    if spec.resize == "antialias":
        height, width = fit_antialiased(frame.height, frame.width, max_pixels, spec.patch_multiple)
        rgb = _antialiased(frame, height, width)
    else:
        height, width = fit(frame.height, frame.width, max_pixels, spec.patch_multiple)
        smaller = (height, width) != (frame.height, frame.width)
        rule = _SCALER if smaller else Interpolation.BICUBIC
        rgb = frame.to_ndarray(format="rgb24", width=width, height=height, interpolation=rule)
    return np.ascontiguousarray(_upright(rgb, frame).transpose(2, 0, 1))


def _upright(rgb: NDArray[Any], frame: av.VideoFrame) -> NDArray[Any]:
    """Turned and mirrored by quarters as a phone wrote it beside the picture, in the matrix that
    takes x and y to where they are shown."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return rgb
    x_by_x, y_by_x, _, x_by_y, y_by_y = np.frombuffer(matrix, np.int32)[:5].tolist()
    if abs(y_by_x) + abs(x_by_y) > abs(x_by_x) + abs(y_by_y):
        rgb, x_by_x, y_by_y = rgb.transpose(1, 0, 2), x_by_y, y_by_x
    return rgb[:: -1 if y_by_y < 0 else 1, :: -1 if x_by_x < 0 else 1]


def _antialiased(frame: av.VideoFrame, height: int, width: int) -> NDArray[Any]:
    rgb: NDArray[Any] = frame.to_ndarray(format="rgb24")
    if (height, width) == (frame.height, frame.width):
        return rgb
    picture = Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture, dtype=np.uint8)


class Sound:
    """Gathers a sound track as mono float32 at one sample rate. `notes` say what it changed."""

    def __init__(self, path: Path, spec: MediaSpec, *, stated_s: float | None) -> None:
        """`stated_s` is how long the file says that the track is, if it does."""
        self.notes: list[str] = []
        self.end = 0.0  # of the last frame, as the container counts, s
        self._path = path
        self._stated_s = stated_s
        self._rate = spec.sample_rate
        self._max_s = spec.max_audio_s
        self._layout = "mono" if spec.mono == "mix" else None  # None: all channels as they are
        self._resampler = self._new_resampler()
        self._pieces: list[NDArray[np.float32]] = []
        self._n_samples = 0
        self._start: float | None = None

    def add(self, frame: av.AudioFrame) -> None:
        """Take the next frame of the track."""
        start = frame.time or 0.0
        if self._start is None:
            self._start = self.end = start
        if start - self.end > _HOLE_S:
            self._fill(start - self.end)
        self.end = start + frame.samples / frame.sample_rate
        self._resample(frame)

    def _new_resampler(self) -> av.AudioResampler:
        # One plane of all channels: PyAV reads past the planes of eight channels or more.
        return av.AudioResampler(format="flt", layout=self._layout, rate=self._rate)

    def _silence(self, seconds: float) -> NDArray[np.float32]:
        if seconds > _LONGEST_HOLE_S:
            raise MediaError(
                f"{self._path}: the time stamps of its sound jump by {seconds:.0f} s; encode it "
                "again"
            )
        return np.zeros(round(seconds * self._rate), np.float32)

    def _fill(self, hole_s: float) -> None:
        silence = self._silence(hole_s)
        self._resample(None)
        self._resampler = self._new_resampler()
        self._keep(silence)
        self.notes.append(f"sound has a hole at {self.end:.2f} s: {hole_s:.2f} s of silence put in")

    def _resample(self, frame: av.AudioFrame | None) -> None:
        try:
            resampled = self._resampler.resample(frame)
        except ValueError as error:
            raise MediaError(
                f"{self._path}: its sound changes rate or channels on the way; encode it again"
            ) from error
        for out in resampled:
            # As librosa has it; a mix has one channel already.
            channels = out.to_ndarray().reshape(-1, out.layout.nb_channels)
            self._keep(channels.mean(axis=1, dtype=np.float32))

    def _keep(self, piece: NDArray[np.float32]) -> None:
        """Count all samples, but hold no hours of sound that the model never hears."""
        if self._max_s is None or self._n_samples < (self._max_s + 1) * self._rate:
            self._pieces.append(piece)
        self._n_samples += len(piece)

    def finish(self, *, zero: float | None) -> NDArray[np.float32]:
        """The wave [n] from time `zero` as the container counts (None: its own start)."""
        if self._start is None:
            raise MediaError(f"{self._path}: its sound track is empty; fetch the file again")
        self._resample(None)
        drift = self.end - self._start - self._n_samples / self._rate
        if abs(drift) > _HOLE_S:
            raise MediaError(
                f"{self._path}: the time stamps of its sound are {-drift:.2f} s off its samples, "
                "so it would drift from the picture; encode it again (ffmpeg -i IN -af "
                "aresample=async=1 OUT)"
            )
        wave = self._clip(np.concatenate([*self._pieces, np.zeros(0, np.float32)]))
        wave = self._shift(wave, 0 if zero is None else round((self._start - zero) * self._rate))
        if self._max_s is not None and len(wave) > self._max_s * self._rate:
            whole = self._n_samples / self._rate
            self.notes.append(f"sound cut from {whole:.2f} s to {self._max_s:g} s")
            wave = wave[: int(self._max_s * self._rate)]
        if not len(wave):
            raise MediaError(f"{self._path}: its sound has no samples; fetch the file again")
        if not np.isfinite(wave).all():
            raise MediaError(f"{self._path}: its sound holds samples that are no numbers")
        return np.ascontiguousarray(wave, dtype=np.float32)

    def _clip(self, wave: NDArray[np.float32]) -> NDArray[np.float32]:
        """Without what the encoder padded. Raises MediaError if there is less than is stated."""
        if self._stated_s is None:
            return wave
        surplus = self._n_samples / self._rate - self._stated_s
        if surplus < -MISSING_S:
            raise truncated(self._path, "sound", self._stated_s + surplus, self._stated_s)
        if 0 < surplus < MISSING_S:  # more is no padding, but an mp3 whose length was guessed
            self._n_samples = round(self._stated_s * self._rate)
        return wave[: self._n_samples]

    def _shift(self, wave: NDArray[np.float32], late: int) -> NDArray[np.float32]:
        """The same wave `late` samples later; a negative number cuts its start."""
        self._n_samples += late
        if late > 0:
            self.notes.append(f"sound starts {late / self._rate:.3f} s late: silence put before it")
            return np.concatenate([self._silence(late / self._rate), wave])
        if late < 0:
            self.notes.append(f"sound starts {-late / self._rate:.3f} s early: its start was cut")
        return wave[-late:]

    def against(self, seen_s: float) -> tuple[str, ...]:
        """A note if the finished sound and a picture of `seen_s` seconds end apart."""
        heard_s = self._n_samples / self._rate
        if heard_s < seen_s - MISSING_S:
            return (f"sound ends at {heard_s:.2f} s of {seen_s:.2f} s: nothing is heard after",)
        if heard_s > seen_s + MISSING_S:
            return (f"picture ends at {seen_s:.2f} s, sound at {heard_s:.2f} s",)
        return ()
