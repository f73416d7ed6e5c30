"""A clip from the world: another encoder's H.264 with B-frames, and sound in 5.1."""

from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation
from media_files import decode
from PIL import Image
from scipy.signal import resample_poly

CLIP = Path(__file__).parent / "data" / "real" / "bigbuckbunny.mp4"


def test_it_is_seen_as_it_is_without_our_sampling() -> None:
    media = decode(CLIP, with_audio=True)
    assert media.frame_times == (0.0, 0.5)
    assert media.duration == pytest.approx(1.0, abs=0.04)
    assert media.notes == ()
    assert media.frames is not None
    with av.open(str(CLIP)) as container:
        shown = {round(frame.time, 2): frame for frame in container.decode(video=0)}
    for ours, at in zip(media.frames, (0.0, 0.48), strict=True):  # 0.48 is on the screen at 0.5
        # By a way of its own: an exact conversion at full size, then Pillow.
        exact = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
        full = Image.fromarray(shown[at].to_ndarray(format="rgb24", interpolation=exact))
        height, width = ours.shape[1:]
        theirs = np.asarray(full.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
        off = ours.transpose(1, 2, 0) - theirs
        assert np.abs(off).mean() < 0.5, "of 255 levels"
        assert np.abs(off).max() < 16
        assert abs(off.mean()) < 0.1, "neither lighter nor darker"


def test_six_channels_become_one_that_is_their_mean() -> None:
    wave = decode(CLIP, with_audio=True).waveform
    assert wave is not None
    with av.open(str(CLIP)) as container:
        assert container.streams.audio[0].layout.name == "5.1"
        six = np.concatenate([f.to_ndarray() for f in container.decode(audio=0)], axis=1)
    theirs = resample_poly(six.mean(axis=0), 1, 3)[: len(wave)]
    assert np.corrcoef(wave, theirs)[0, 1] > 0.99
    assert np.std(wave) == pytest.approx(np.std(theirs), rel=0.05)
