"""Other ways than even steps from the first frame: which frames, and how large, as data.

`spread` is how video-SALMONN 2+ takes its frames (its released `video_torchcodec` and
`process_video_frames`): a number that follows from the duration, from the first frame to the very
last, and pixels shared out among them.
"""

import numpy as np
from numpy.typing import NDArray

from avflow.datasets.media_spec import MediaSpec


def spread_indices(n_source: int, duration: float, spec: MediaSpec) -> NDArray[np.int64]:
    """Which of a video's `n_source` frames are taken, ascending, each once.

    `fps` frames a second of `duration` (s), rounded to even, within `min_frames` and `max_frames`;
    fewer where the video has fewer. Not a multiple of the temporal patch.
    """
    wanted = round(duration / (1 / spec.fps))  # as the authors divide: halves fall the same way
    count = min(max(wanted, spec.min_frames), spec.max_frames)
    return np.unique(np.linspace(0, n_source - 1, count, dtype=np.int64))


def spread_times(
    duration: float, n_source: int, spec: MediaSpec
) -> tuple[tuple[float, ...], float]:
    """The times of those frames in seconds, as if all lasted equally long, and their mean spacing.

    In a file of variable frame rate, time decides where the authors' code counts frames: what is
    seen then stays beside what is heard.
    """
    indices = spread_indices(n_source, duration, spec)
    return tuple((indices * (duration / n_source)).tolist()), duration / len(indices)


def frame_budget(n_frames: int, spec: MediaSpec) -> float:
    """Pixels at most of each of a video's `n_frames` frames.

    Below `max_frames`, `video_max_pixels` is shared out among them; else `frame_max_pixels`.
    """
    if spec.video_max_pixels is None or n_frames >= spec.max_frames:
        return spec.frame_max_pixels
    return spec.video_max_pixels / n_frames


def fit_antialiased(height: int, width: int, max_pixels: float, multiple: int) -> tuple[int, int]:
    """The size that Qwen-VL's `smart_resize` gives what is too large; else unchanged, so that
    the processor alone rounds or enlarges it."""
    rounded = round(height / multiple) * round(width / multiple) * multiple**2
    return (
        (height, width) if rounded <= max_pixels else _shrunk(height, width, max_pixels, multiple)
    )


def fit(height: int, width: int, max_pixels: float, multiple: int) -> tuple[int, int]:
    """Size within the budget, sides as multiples; unchanged if it fits already.

    The same rounding as Qwen-VL's `smart_resize`, so that the processor leaves the result as is.
    """
    if height * width <= max_pixels:
        return height, width
    return _shrunk(height, width, max_pixels, multiple)


def _shrunk(height: int, width: int, max_pixels: float, multiple: int) -> tuple[int, int]:
    shrink = (height * width / max_pixels) ** 0.5
    return (
        max(multiple, int(height / shrink / multiple) * multiple),
        max(multiple, int(width / shrink / multiple) * multiple),
    )
